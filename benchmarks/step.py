"""A whole training step against others, on the same tokens: the published one, plain fine-tuning, our own options.

    python -m benchmarks.step --json result.json [--device cuda] [--model smollm2] [--dtype float32 bfloat16]
        [--rows full real released] [--contenders lagged tidy ...] [--rounds 9] [--published-shapes]

All contenders (``step_contenders.py``) take turns in one process, in both orders, each on adapters of its own; the
frozen weights are shared. They are timed on rows of three kinds (``step_rows.py``). Where a step's cost changes from
step to step, as with ``probe_every``, whole periods are timed and a row tells of a period's mean step.

Before anything is timed, the first two steps of each contender are compared with plain autograd on a float64 copy of
the model, at the probe in whose presence each was taken: the first is at V = 0, the second at the probe that the
first has found. Models of 7B parameters are cut to two layers for that. What is wrong or fails is not timed, is listed
as refused, and makes the exit code 1; what cannot be run here is listed as skipped. Neither happens silently.

In a row, ``padding`` is the kind of its rows; ``tokens_per_s`` counts the real tokens of the task batch, which is what
training gets through; ``launches`` is of one step: ops on a CPU, kernels on a GPU; ``task_lengths`` and
``pair_lengths`` are those of the rows that the contender computes on, with padding if it computes on that.
"""

import argparse
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import models
from benchmarks.device_timer import DeviceTimer
from benchmarks.peers import AbsentError, installed
from benchmarks.published_parts import trained
from benchmarks.step_check import Exact, check
from benchmarks.step_contenders import CONTENDERS, Run
from benchmarks.step_counts import Counting, launches, peak_memory
from benchmarks.step_rows import KINDS, PUBLISHED, SMALL, Batch, Given, lengths, rows, scored

Row = dict[str, Any]

BASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "smollm2": models.smollm2_base,
    "random": models.random_base,
    "tiny": models.tiny_base,
    "llama-2-7b": partial(models.llama_base, layers=32),
    "qwen2.5-7b": models.qwen_base,
}
# Drawn on a GPU, and too large for a float64 copy.
LARGE = ("llama-2-7b", "qwen2.5-7b")
CHECKED_LAYERS = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = {"cpu": 9, "cuda": 30}
# Rounds that are not counted. On a CPU the check has warmed everything up.
WARM_UP = {"cpu": 0, "cuda": 3}
# What the others' times are divided by.
RATIOS = {"ratio_to_plain_sft": "plain-sft", "ratio_to_published_tidy": "tidy", "ratio_to_released": "released"}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write it as JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    parser.add_argument("--device", choices=ROUNDS, default="cpu")
    parser.add_argument("--model", choices=BASES, default="smollm2")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=["real"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, help="of each contender; at least 7 on a CPU, 30 on a GPU, for a result")
    shapes_help = "task 10 x 128 and pairs 8 x 256, not 4 x 64 and 4 x 96"
    parser.add_argument("--published-shapes", action="store_true", help=shapes_help)
    parser.add_argument("--data", type=Path, help="instructions and outputs as a JSON list, for the task rows")
    parser.add_argument("--smollm2", type=Path, help="a folder to take SmolLM2 from, as transformers saves it")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is at hand; leave --device cpu")
    if args.device == "cpu" and args.model in LARGE:
        parser.error(f"{args.model} is drawn on a GPU; give --device cuda, or a smaller model")
    rounds = ROUNDS[args.device] if args.rounds is None else args.rounds
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {rounds}")

    start = time.perf_counter()
    torch.manual_seed(0)
    base, tokenizer = models.smollm2_base(args.smollm2) if args.model == "smollm2" else BASES[args.model]()
    model = models.with_lora(base, seed=0).to(args.device)
    wake(model)
    shapes = PUBLISHED if args.published_shapes else SMALL
    examples = models.examples(args.data)
    settings = {"model": args.model, "rounds": rounds, "lora": "r = 8 on q_proj and v_proj", "optimizer": "none"}
    settings |= {"shapes": vars(shapes), "contenders": args.contenders, "peers": _peers()}
    suite = Suite(args.device, rounds, args.contenders, CHECKED_LAYERS if args.model in LARGE else None)
    result: dict[str, Any] = {"environment": models.environment(args.device), "settings": settings, "seconds": None}
    result |= {"skipped": suite.skipped, "refused": suite.refused, "rows": suite.rows}
    for dtype in args.dtype:
        stored = models.twin(model, DTYPES[dtype])
        for kind in args.rows:
            for row in suite.measure(stored, dtype, rows(tokenizer, examples, shapes, kind, args.device)):
                print(line(row), flush=True)
            result["seconds"] = round(time.perf_counter() - start, 1)
            models.write(args.json, result)  # later rows may fail
    for verdict in ("skipped", "refused"):
        for entry in result[verdict]:
            print(f"{verdict}: {', '.join(str(entry[key]) for key in entry)}")
    return 1 if suite.refused else 0


def wake(model: nn.Module) -> None:
    """Move B away from zero, where A would have no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in trained(model).items():
            if "lora_B" in name:
                p.add_(1e-2 * torch.randn(p.shape, generator=generator).to(p.device))


def _peers() -> dict[str, str]:
    return {package: installed(package) or "not installed" for package in ("trl", "liger_kernel")}


@dataclass(frozen=True)
class Taking:
    """A contender that takes part: its model, its steps, and the ops of a step where they were counted."""

    model: nn.Module
    run: Run
    ops: float | None


class Suite:
    """Opens contenders, checks them, times them; gathers rows, and who is left out, with the reason.

    Args:
        names: of the contenders.
        checked_layers: cut the model to so many layers to check a contender; None checks it as it is.
    """

    def __init__(self, device: str, rounds: int, names: Sequence[str], checked_layers: int | None) -> None:
        self.device, self.rounds, self.names, self.checked_layers = device, rounds, names, checked_layers
        self.rows: list[Row] = []
        self.skipped: list[Row] = []
        self.refused: list[Row] = []

    def measure(self, model: nn.Module, dtype: str, given: Given) -> list[Row]:
        """The rows of one dtype and kind, of the contenders that can be run and are right.

        Args:
            model: stored in the dtype.
        """
        with ExitStack() as stack:
            runs = self._open(stack, model, dtype, given)
            seconds = self._timed({name: taking.run for name, taking in runs.items()})
            medians = {name: statistics.median(found) for name, found in seconds.items()}
            found = [
                {"contender": name, "device": self.device, "dtype": dtype, "padding": given.kind}
                | {"options": dict(CONTENDERS[name].options), "ms": 1e3 * medians[name]}
                | {"ms_least": 1e3 * min(seconds[name]), "ms_most": 1e3 * max(seconds[name])}
                | {key: medians[name] / medians[to] if to in medians else None for key, to in RATIOS.items()}
                | {"tokens_per_s": sum(lengths(given.batch)) / medians[name]}
                | self._counts(taking, CONTENDERS[name].period)
                | {"rounds": len(seconds[name]), "period": CONTENDERS[name].period}
                | _sizes("task", given.batch, taking.run.task_lengths)
                | _sizes("pair", given.pairs, taking.run.pair_lengths)
                for name, taking in runs.items()
            ]
        self.rows += found
        return found

    def _open(self, stack: ExitStack, model: nn.Module, dtype: str, given: Given) -> dict[str, Taking]:
        """Every contender that can be run and is right."""
        exact = Exact(model if self.checked_layers is None else models.cut(model, self.checked_layers))
        runs = {}
        for name in self.names:
            try:
                runs[name] = self._opened(stack, model, exact, name, given)
            except AbsentError as error:
                self._leave_out(self.skipped, {"contender": name, "reason": str(error)})
            except Exception as error:  # the others are measured all the same
                if not isinstance(error, AssertionError):
                    traceback.print_exc()
                reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("AssertionError: ").split())[:300]
                where = {"dtype": dtype, "padding": given.kind}
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
        counted = None
        with ExitStack() as opening:
            run = opening.enter_context(contender.opened(own, given))
            if self.checked_layers is None:
                # The check's steps are the first of a period; counting slows nothing down that is timed.
                counting = Counting(run.step)
                steps = check(name, own, replace(run, step=counting), exact)
                for _ in range(-steps % contender.period):
                    counting()
                counted = statistics.mean(counting.counts[-contender.period :])
            stack.push(opening.pop_all())
        if run.settle is not None:
            run.settle()
            counted = None
        return Taking(own, run, counted if self.device == "cpu" else None)

    @staticmethod
    def _leave_out(entries: list[Row], entry: Row) -> None:
        if entry not in entries:
            entries.append(entry)

    def _timed(self, runs: Mapping[str, Run]) -> dict[str, list[float]]:
        """Seconds of each contender's mean step in every round; the order is another in every other round."""
        timer = DeviceTimer(self.device)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        emptied = False
        for i in range(-WARM_UP[self.device], self.rounds):
            for name in list(runs)[:: 1 if i % 2 else -1]:
                run, period = runs[name], CONTENDERS[name].period
                if emptied and timer.is_cuda:
                    _period(run, period)  # finds again the memory that the one before has given back
                start = timer()
                with timer.region():
                    _period(run, period)
                found = (timer() - start) / period
                if i >= 0:
                    seconds[name].append(found)
                emptied = run.empties_cache
        return seconds

    def _counts(self, taking: Taking, period: int) -> Row:
        """Memory and launches of a step; in further periods where they are not known."""
        once = partial(_period, taking.run, period)
        memory = peak_memory(once, taking.model, self.device)
        found = launches(once, self.device) / period if taking.ops is None else taking.ops
        return {"peak_memory": memory, "launches": round(found, 1)}


def _sizes(name: str, batch: Batch, computed: list[int]) -> Row:
    """The batch as it is given, and the length of each row that is computed on."""
    shape = list(batch["input_ids"].shape)
    counts = {"tokens": sum(lengths(batch)), "scored": scored(batch)}
    return {f"{name}_{key}": value for key, value in {"shape": shape, **counts, "lengths": computed}.items()}


def _period(run: Run, period: int) -> None:
    for _ in range(period):
        run.step()


def line(row: Row) -> str:
    """A row as text."""
    what = f"{row['padding']:8} {row['dtype']:8} {row['contender']:24}"
    times = f"{row['ms']:8.1f} ms ({row['ms_least']:.1f} to {row['ms_most']:.1f})"
    ratios = "  ".join(f"{row[key]:5.2f} x {to}" for key, to in RATIOS.items() if row[key] is not None)
    memory = "" if row["peak_memory"] is None else f"  {row['peak_memory'] / 2**30:.2f} GiB"
    return f"{what}{times:34}  {ratios}  {row['launches']:.0f} launches{memory}"


if __name__ == "__main__":
    raise SystemExit(main())
