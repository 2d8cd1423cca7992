"""The contenders of a whole step, put to work, found right, timed in turns: ``benchmarks.step`` without its command."""

import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from benchmarks.common import models
from benchmarks.common.ceiling import Ceiling
from benchmarks.common.record import Row
from benchmarks.floor.step import Device
from benchmarks.ops.peers import AbsentError
from benchmarks.step.batches import Batch, Given, lengths, scored
from benchmarks.step.check import Exact, check
from benchmarks.step.contenders import CONTENDERS
from benchmarks.step.counts import Allocations, Counting, launches, weights_of
from benchmarks.step.own_floor import contender_floor
from benchmarks.step.rounds import Rounds, run_period
from benchmarks.step.run import Run

# Told each fact the moment it is known.
Tell = Callable[[Row], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What the others' times are divided by.
RATIOS = {"ratio_to_plain_sft": "plain-sft", "ratio_to_published_tidy": "tidy", "ratio_to_released": "released"}
# Of a limited time, the share in which contenders are opened and checked; the rest is for timing them.
OPENING = 0.6
OUT_OF_TIME = "time"
# The exit code of a process whose CUDA context was lost.
LOST = 70
# After so many rounds rows are told, and again at the end: what stops a run then costs it the rounds since.
TOLD = (2, 7, 15, 22)


@dataclass(frozen=True)
class Entrant:
    """Describes a contender that takes part.

    Attributes:
        ops: of a step, on a CPU.
        peak_memory: bytes of its model's weights, and of what was allocated beside them at the peak of its first
            period.
    """

    model: nn.Module
    run: Run
    ops: float | None
    peak_memory: int


class Suite:
    """Opens contenders, checks them, times them; gathers rows, and who is left out, with the reason.

    Args:
        names: of the contenders.
        checked_layers: cut the model to so many layers to check a contender; None checks it as it is.
        limit: seconds that a measurement may take, after which no round begins but the first; contenders that are not
            open when most of it is over are left out by name. None: as long as it takes.
        tell: is given every row, and who is left out, the moment that it is known; of a row the last word counts.
    """

    def __init__(
        self,
        device: str,
        rounds: int,
        names: Sequence[str],
        checked_layers: int | None,
        limit: float | None = None,
        tell: Tell = lambda row: None,
    ) -> None:
        self.device, self.rounds, self.names, self.checked_layers = device, rounds, names, checked_layers
        self.limit, self._tell = limit, tell
        self.rows: list[Row] = []
        self.ceilings: list[Row] = []
        self.skipped: list[Row] = []
        self.refused: list[Row] = []
        self._deadline: float | None = None

    def measure(self, model: nn.Module, dtype: str, given: Given) -> list[Row]:
        """Make the rows of one dtype and kind, of the contenders that can be run and are right.

        Args:
            model: stored in the dtype.
        """
        self._deadline = None if self.limit is None else time.perf_counter() + self.limit
        where = {"dtype": dtype, "padding": given.kind}
        ceiling = Ceiling(self.device, DTYPES[dtype])
        with ExitStack() as stack:
            entrants = self._open(stack, model, dtype, given)
            if not entrants:
                return []
            runs = {name: (entrant.run, CONTENDERS[name].period) for name, entrant in entrants.items()}

            def refuse(name: str, error: Exception) -> None:
                self._refuse(name, error, where)

            rounds = Rounds(runs, self.device, ceiling, self._deadline, refuse)

            def rows() -> list[Row]:
                return [self._row(name, entrants[name], where, given, rounds) for name in rounds.seconds]

            for done in rounds.take(self.rounds):
                for row in rows() if done in TOLD else []:
                    self._tell(row)
            found = rows()
            for row in found:
                self._tell(row)
            # A profiler counts launches, and slows down what comes after it.
            for row in found:
                try:
                    row["launches"] = self._launches(row["contender"], entrants[row["contender"]])
                except Exception as error:  # its times stand
                    refuse(row["contender"], error)
                self._tell(row)
        self.rows += found
        self.ceilings.append(where | ceiling.row)
        return found

    def _row(self, name: str, entrant: Entrant, where: Row, given: Given, rounds: Rounds) -> Row:
        """Make a row of what is known of a contender so far; its launches are counted last."""
        seconds, median, ceiling = rounds.seconds[name], rounds.median(name), rounds.ceiling
        assert ceiling is not None
        return (
            {"contender": name, "device": self.device, **where, "options": dict(CONTENDERS[name].options)}
            | {"ms": 1e3 * median, "ms_least": 1e3 * min(seconds), "ms_most": 1e3 * max(seconds)}
            | {key: rounds.ratio(name, to) for key, to in RATIOS.items()}
            | {"tokens_per_s": sum(lengths(given.batch)) / median}
            | against_floor(name, entrant, given, median, ceiling.device)
            | {"peak_memory": entrant.peak_memory, "launches": None}
            | {"rounds": len(seconds), "period": CONTENDERS[name].period, "round_ms": [1e3 * s for s in seconds]}
            | _sizes("task", given.batch, entrant.run.task_lengths, entrant.run.task_rows)
            | _sizes("pair", given.pairs, entrant.run.pair_lengths, entrant.run.pair_rows)
        )

    def _open(self, stack: ExitStack, model: nn.Module, dtype: str, given: Given) -> dict[str, Entrant]:
        """Open every contender that can be run and is right."""
        exact = Exact(model if self.checked_layers is None else models.cut(model, self.checked_layers))
        runs = {}
        now = time.perf_counter()
        latest = None if self._deadline is None else now + OPENING * (self._deadline - now)
        for name in self.names:
            where = {"dtype": dtype, "padding": given.kind}
            if _has_copies(name) and any(map(_has_copies, runs)):
                reason = "holds a copy of the weights in float8, as another does: run it in a process of its own"
                self._leave_out(self.skipped, {"contender": name, "reason": reason, **where})
                continue
            if latest is not None and time.perf_counter() > latest:
                self._leave_out(self.skipped, {"contender": name, "reason": OUT_OF_TIME, **where})
                continue
            try:
                runs[name] = self._opened(stack, model, exact, name, given)
            except AbsentError as error:
                self._leave_out(self.skipped, {"contender": name, "reason": str(error)})
            except Exception as error:  # the others are measured all the same
                self._refuse(name, error, where)
        return runs

    def _opened(self, stack: ExitStack, model: nn.Module, exact: Exact, name: str, given: Given) -> Entrant:
        """Put a contender to work on a twin of the model, found right, at the beginning of a period."""
        contender = CONTENDERS[name]
        if self.checked_layers is not None:
            shallow = models.cut(model, self.checked_layers)
            with contender.opened(shallow, given) as run:
                check(name, shallow, run, exact)
        own = models.twin(model)
        # Before it is opened: the released form makes parameters of its probe.
        weights, allocations = weights_of(own), Allocations(self.device)
        with ExitStack() as opening:
            with allocations.recording():
                run = opening.enter_context(contender.opened(own, given))
            # Counting slows nothing down that is timed.
            counting = Counting(run.step, self.device, allocations)
            # The check's steps are the first of a period.
            steps = check(name, own, replace(run, step=counting), exact) if self.checked_layers is None else 0
            if run.settle is not None:
                run.settle()
                steps = 0
            # At least three steps: what an option, or a captured step, takes beside shows after the first.
            whole = -(-max(3, steps) // contender.period) * contender.period
            for _ in range(whole - steps):
                counting()
            stack.push(opening.pop_all())
        ops = statistics.mean(counting.counts[-contender.period :]) if counting.counts else None
        return Entrant(own, run, ops, weights + allocations.peak)

    def _leave_out(self, entries: list[Row], entry: Row) -> None:
        if entry not in entries:
            entries.append(entry)
            self._tell(entry)

    def _refuse(self, name: str, error: Exception, where: Row) -> None:
        """Go on without who is wrong or fails; the others get the memory that it has taken."""
        if not isinstance(error, AssertionError):
            traceback.print_exception(error)
        reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("AssertionError: ").split())[:300]
        self._leave_out(self.refused, {"contender": name, "reason": reason, **where})
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as lost:  # nothing runs in this process any more: who started it goes on without this one
                self._tell({"lost": name})
                print(f"{name} has lost the GPU: {lost}", flush=True)
                os._exit(LOST)  # what else is open could not be closed
            error.__traceback__ = None  # its frames hold tensors
            gc.collect()
            torch.cuda.empty_cache()

    def _launches(self, name: str, entrant: Entrant) -> float:
        """Count the launches of a step; in a further period where they are not known."""
        if entrant.ops is not None:
            return round(entrant.ops, 1)
        period = CONTENDERS[name].period
        return round(launches(partial(run_period, entrant.run, period), self.device) / period, 1)


def _has_copies(name: str) -> bool:
    """Tell whether a contender holds a copy of the weights: two of 7B parameters leave no room on 80 GB."""
    return bool(CONTENDERS[name].options.get("float8"))


def against_floor(name: str, entrant: Entrant, given: Given, seconds: float, reached: Device) -> Row:
    """Compare a contender's time with the least that it could take on what the device reached in the same run."""
    floor = contender_floor(CONTENDERS[name], entrant.run, given, entrant.model, reached)
    rate = floor.flops / seconds
    return {"tflop": floor.flops / 1e12, "tflops_per_s": rate / 1e12, "share_of_ceiling": rate / reached.peak} | {
        "floor_ms": floor.ms,
        "ms_over_floor": 1e3 * seconds / floor.ms,
    }


def _sizes(name: str, batch: Batch, computed: list[int], rows: int | None) -> Row:
    """Return the batch as given, the length of each sequence that is computed on, and the rows of all."""
    shape = list(batch["input_ids"].shape)
    counts = {"tokens": sum(lengths(batch)), "scored": scored(batch), "rows": sum(computed) if rows is None else rows}
    return {f"{name}_{key}": value for key, value in {"shape": shape, **counts, "lengths": computed}.items()}
