"""The contenders of a whole step, put to work, found right, timed in turns: ``benchmarks.step`` without its command."""

import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import models
from benchmarks.ceiling import Ceiling
from benchmarks.device_timer import DeviceTimer
from benchmarks.peers import AbsentError
from benchmarks.step_check import Exact, check
from benchmarks.step_contenders import CONTENDERS
from benchmarks.step_counts import Allocations, Counting, launches, weights_of
from benchmarks.step_floor import Device
from benchmarks.step_rows import Batch, Given, lengths, scored
from benchmarks.step_run import Run
from benchmarks.step_work import contender_floor

Row = dict[str, Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rounds that are not counted. On a CPU the check has warmed everything up.
WARM_UP = {"cpu": 0, "cuda": 3}
# What the others' times are divided by.
RATIOS = {"ratio_to_plain_sft": "plain-sft", "ratio_to_published_tidy": "tidy", "ratio_to_released": "released"}
# Of a limited time, the share in which contenders are opened and checked; the rest is for timing them.
OPENING = 0.6
OUT_OF_TIME = "time"


@dataclass(frozen=True)
class Taking:
    """A contender that takes part.

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
        limit: seconds from now, after which no round begins but the first; contenders that are not open when most of
            it is over are left out by name. None: as long as it takes.
    """

    def __init__(
        self, device: str, rounds: int, names: Sequence[str], checked_layers: int | None, limit: float | None = None
    ) -> None:
        self.device, self.rounds, self.names, self.checked_layers = device, rounds, names, checked_layers
        self.rows: list[Row] = []
        self.ceilings: list[Row] = []
        self.skipped: list[Row] = []
        self.refused: list[Row] = []
        self._deadline = None if limit is None else time.perf_counter() + limit

    def measure(self, model: nn.Module, dtype: str, given: Given) -> list[Row]:
        """The rows of one dtype and kind, of the contenders that can be run and are right.

        Args:
            model: stored in the dtype.
        """
        ceiling = Ceiling(self.device, DTYPES[dtype])
        with ExitStack() as stack:
            runs = self._open(stack, model, dtype, given)
            if not runs:
                return []
            seconds = timed(
                {name: (taking.run, CONTENDERS[name].period) for name, taking in runs.items()},
                self.device,
                self.rounds,
                ceiling,
                self._deadline,
            )
            medians = {name: statistics.median(found) for name, found in seconds.items()}
            found = [
                {"contender": name, "device": self.device, "dtype": dtype, "padding": given.kind}
                | {"options": dict(CONTENDERS[name].options), "ms": 1e3 * medians[name]}
                | {"ms_least": 1e3 * min(seconds[name]), "ms_most": 1e3 * max(seconds[name])}
                | {key: medians[name] / medians[to] if to in medians else None for key, to in RATIOS.items()}
                | {"tokens_per_s": sum(lengths(given.batch)) / medians[name]}
                | against_floor(name, taking, given, medians[name], ceiling.device)
                | {"peak_memory": taking.peak_memory, "launches": self._launches(name, taking)}
                | {"rounds": len(seconds[name]), "period": CONTENDERS[name].period}
                | _sizes("task", given.batch, taking.run.task_lengths, taking.run.task_rows)
                | _sizes("pair", given.pairs, taking.run.pair_lengths, taking.run.pair_rows)
                for name, taking in runs.items()
            ]
        self.rows += found
        self.ceilings.append({"dtype": dtype, "padding": given.kind} | ceiling.row)
        return found

    def _open(self, stack: ExitStack, model: nn.Module, dtype: str, given: Given) -> dict[str, Taking]:
        """Every contender that can be run and is right."""
        exact = Exact(model if self.checked_layers is None else models.cut(model, self.checked_layers))
        runs = {}
        now = time.perf_counter()
        latest = None if self._deadline is None else now + OPENING * (self._deadline - now)
        for name in self.names:
            where = {"dtype": dtype, "padding": given.kind}
            if latest is not None and time.perf_counter() > latest:
                self._leave_out(self.skipped, {"contender": name, "reason": OUT_OF_TIME, **where})
                continue
            try:
                runs[name] = self._opened(stack, model, exact, name, given)
            except AbsentError as error:
                self._leave_out(self.skipped, {"contender": name, "reason": str(error)})
            except Exception as error:  # the others are measured all the same
                if not isinstance(error, AssertionError):
                    traceback.print_exc()
                reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("AssertionError: ").split())[:300]
                self._leave_out(self.refused, {"contender": name, "reason": reason, **where})
        return runs

    def _opened(self, stack: ExitStack, model: nn.Module, exact: Exact, name: str, given: Given) -> Taking:
        """A contender at work on a twin of the model, found right, at the beginning of a period."""
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
        return Taking(own, run, ops, weights + allocations.peak)

    @staticmethod
    def _leave_out(entries: list[Row], entry: Row) -> None:
        if entry not in entries:
            entries.append(entry)

    def _launches(self, name: str, taking: Taking) -> float:
        """Of a step; in a further period where they are not known."""
        if taking.ops is not None:
            return round(taking.ops, 1)
        period = CONTENDERS[name].period
        return round(launches(partial(run_period, taking.run, period), self.device) / period, 1)


def timed(
    runs: Mapping[str, tuple[Run, int]],
    device: str,
    rounds: int,
    ceiling: Ceiling | None = None,
    deadline: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender's mean step in every round; the order is another in every other round.

    Args:
        runs: contenders and their periods, by name.
        ceiling: visited in every round.
        deadline: by ``time.perf_counter``; from then on no round begins but the first.
    """
    timer = DeviceTimer(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    emptied = False
    for i in range(-WARM_UP[device], rounds):
        if i > 0 and deadline is not None and time.perf_counter() > deadline:
            break
        if ceiling is not None and i >= 0:
            ceiling.visit()
        for name in list(runs)[:: 1 if i % 2 else -1]:
            run, period = runs[name]
            if emptied and timer.is_cuda:
                run_period(run, period)  # finds again the memory that the one before has given back
            start = timer()
            with timer.region():
                run_period(run, period)
            found = (timer() - start) / period
            if i >= 0:
                seconds[name].append(found)
            emptied = run.empties_cache
    return seconds


def run_period(run: Run, period: int) -> None:
    for _ in range(period):
        run.step()


def against_floor(name: str, taking: Taking, given: Given, seconds: float, reached: Device) -> Row:
    """A contender's time beside the least that it could take on what the device reached in the same run."""
    floor = contender_floor(CONTENDERS[name], taking.run, given, taking.model, reached)
    rate = floor.flops / seconds
    return {"tflop": floor.flops / 1e12, "tflops_per_s": rate / 1e12, "share_of_ceiling": rate / reached.peak} | {
        "floor_ms": floor.ms,
        "ms_over_floor": 1e3 * seconds / floor.ms,
    }


def _sizes(name: str, batch: Batch, computed: list[int], rows: int | None) -> Row:
    """The batch as it is given, the length of each sequence that is computed on, and the rows of all."""
    shape = list(batch["input_ids"].shape)
    counts = {"tokens": sum(lengths(batch)), "scored": scored(batch), "rows": sum(computed) if rows is None else rows}
    return {f"{name}_{key}": value for key, value in {"shape": shape, **counts, "lengths": computed}.items()}
