"""Measures how a step scales: time and memory for each task token, as one thing grows and the others stay.

    python -m benchmarks.scaling --json result.json [--device cuda --model llama-2-7b --dtype bfloat16] [--full]
        [--axes tokens length probes targets] [--tokens 256 1024 ...] [--rounds 3]

Axes: ``tokens`` in the task batch, in sequences of 128; ``length`` of a sequence, at an equal number of tokens;
``probes``, so many layers spread evenly, from one to all; ``targets``, the linear maps with adapters. Contenders:
plain fine-tuning by transformers and PEFT, our own, and the exact lagged step with its pairs, whose number and length
stay. Rows are full and of random tokens, half of them scored; pairs share the first half of theirs.

Each setting of probes and targets is first found right on short rows, as ``benchmarks.step`` does it; who is wrong is
refused, and makes the exit code 1. Sizes are small by default; ``--full`` takes those of a GPU: 256 to 32k tokens,
lengths of 128 to 8k. A size for which a GPU lacks memory has a row without a time.

In a row, ``us_per_token`` and ``bytes_per_token`` are for each token of the task batch; the latter leaves out the
weights. Floors are as in ``benchmarks.step``. Beside the result, ``<its name>-<axis>.svg`` is a plot of each axis.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import models, record
from benchmarks.common.ceiling import Ceiling
from benchmarks.common.line_chart import Panel, figure
from benchmarks.step.bases import BASES, CHECKED_LAYERS, LARGE, base_of, wake
from benchmarks.step.batches import PUBLISHED
from benchmarks.step.batches import SMALL as SMALL_ROWS
from benchmarks.step.check import Exact, check
from benchmarks.step.contenders import Contender
from benchmarks.step.counts import Allocations, weights_of
from benchmarks.step.own_floor import contender_floor
from benchmarks.step.rounds import Rounds
from benchmarks.step.run import Run
from benchmarks.step.scaling_points import AXES, FULL, SMALL, Point, contenders, points, random_rows
from benchmarks.step.suite import DTYPES, Row

ROUNDS = {"cpu": 3, "cuda": 10}
# Sequences, tokens of each, and pairs, of the rows that a contender is found right on.
CHECKED = (2, 32, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write it as JSON and plots; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--json", type=Path, required=True, help="where to write the result; plots go beside it")
    add("--device", choices=ROUNDS, default="cpu")
    add("--model", choices=BASES, default="smollm2")
    add("--dtype", choices=DTYPES, default="float32")
    add("--axes", nargs="+", choices=AXES, default=list(AXES))
    add("--full", action="store_true", help="the sizes of a GPU, and pairs of 8 x 256 for 4 x 96")
    for name in ("tokens", "lengths", "probes"):
        add(f"--{name}", nargs="+", type=int, help="in place of those of the axis")
    add("--rounds", type=int, help="of each contender at each point")
    add("--smollm2", type=Path, help="a folder to take SmolLM2 from, as transformers saves it")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is at hand; leave --device cpu")
    if args.device == "cpu" and args.model in LARGE:
        parser.error(f"{args.model} is drawn on a GPU; give --device cuda, or a smaller model")
    rounds = ROUNDS[args.device] if args.rounds is None else args.rounds
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {rounds}")
    try:
        ranges = (FULL if args.full else SMALL).replaced(args.tokens, args.lengths, args.probes)
    except ValueError as error:
        parser.error(str(error))

    start = time.perf_counter()
    torch.manual_seed(0)
    base, _ = base_of(args.model, args.smollm2)
    base = models.twin(base.requires_grad_(False), DTYPES[args.dtype]).to(args.device)
    depth = base.config.get_text_config().num_hidden_layers
    shapes = PUBLISHED if args.full else SMALL_ROWS
    bench = Bench(base, args.device, args.dtype, rounds, (shapes.pairs, shapes.pair_length), args.model in LARGE)
    settings = {"model": args.model, "rounds": rounds, "ranges": vars(ranges), "axes": args.axes, "optimizer": "none"}
    settings |= {"pairs": shapes.pairs, "pair_length": shapes.pair_length, "lora": "r = 8"}
    result: dict[str, Any] = {"environment": record.environment(args.device), "settings": settings, "seconds": None}
    result |= {"refused": bench.refused, "rows": []}
    print(HEADINGS)
    for axis in args.axes:
        for point in points(axis, ranges, depth):
            for row in bench.measure(point):
                result["rows"].append({"axis": axis, **row})
                print(line(result["rows"][-1]), flush=True)
            result["seconds"] = round(time.perf_counter() - start, 1)
            record.write(args.json, result)  # later points may fail
        plot = args.json.with_name(f"{args.json.stem}-{axis}.svg")
        plot.write_text(drawing([row for row in result["rows"] if row["axis"] == axis], axis), encoding="utf-8")
    for entry in bench.refused:
        print(f"refused: {', '.join(map(str, entry.values()))}")
    return 1 if bench.refused else 0


class Bench:
    """Measures points; a point that two axes share is measured once.

    Args:
        base: a model without adapters, frozen, on the device, in the dtype.
        pairs: how many, and tokens of each answer with its prompt.
        shallow: check contenders on a cut of the model.
    """

    def __init__(
        self, base: nn.Module, device: str, dtype: str, rounds: int, pairs: tuple[int, int], shallow: bool
    ) -> None:
        self._base, self._device, self._dtype, self._rounds, self._pairs = base, device, dtype, rounds, pairs
        self._shallow = shallow
        self._known: dict[Point, list[Row]] = {}
        self._right: dict[tuple, dict[str, Contender]] = {}
        self._model: tuple[tuple[str, ...], nn.Module] | None = None
        self._vocab = base.config.get_text_config().vocab_size
        self.refused: list[Row] = []

    def measure(self, point: Point) -> list[Row]:
        """Make a row for each contender that is right."""
        if point not in self._known:
            self._known[point] = self._measured(point)
        return self._known[point]

    def _adapted(self, targets: tuple[str, ...]) -> nn.Module:
        """Return the model with adapters on these maps; the last one is kept."""
        if self._model is None or self._model[0] != targets:
            model = models.with_lora(models.twin(self._base), seed=0, targets=targets).to(self._device)
            wake(model)
            self._model = targets, model
        return self._model[1]

    def _measured(self, point: Point) -> list[Row]:
        model = self._adapted(point.targets)
        found_right = self._checked(model, point)
        given = random_rows(self._vocab, point.tokens // point.length, point.length, *self._pairs, self._device)
        runs: dict[str, tuple[Run, int]] = {}
        memories: dict[str, int] = {}
        with ExitStack() as stack:
            for name, contender in found_right.items():
                own, allocations = models.twin(model), Allocations(self._device)
                try:
                    with allocations.recording():
                        run = stack.enter_context(contender.opened(own, given))
                        run.step()
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    continue
                runs[name], memories[name] = (run, 1), allocations.peak
            ceiling = Ceiling(self._device, DTYPES[self._dtype])
            seconds = {name: statistics.median(s) for name, s in self._timed(runs, ceiling).items()}
        shared = {"tokens": point.tokens, "length": point.length, "probes": point.probes, "targets": [*point.targets]}
        shared |= {"device": self._device, "dtype": self._dtype, "rounds": self._rounds}
        rows = []
        for name, contender in found_right.items():
            row: Row = shared | {"contender": name, "ms": None, "us_per_token": None, "ratio_to_plain_sft": None}
            row |= {"peak_memory": None, "bytes_per_token": None, "floor_ms": None, "ms_over_floor": None}
            if name in runs:
                ms, floor = 1e3 * seconds[name], contender_floor(contender, runs[name][0], given, model, ceiling.device)
                row |= {"ms": ms, "us_per_token": 1e3 * ms / point.tokens, "floor_ms": floor.ms}
                row |= {"ratio_to_plain_sft": seconds[name] / seconds["plain-sft"] if "plain-sft" in runs else None}
                row |= {"ms_over_floor": ms / floor.ms, "peak_memory": weights_of(model) + memories[name]}
                row["bytes_per_token"] = memories[name] / point.tokens
            rows.append(row)
        return rows

    def _timed(self, runs: dict[str, tuple[Run, int]], ceiling: Ceiling) -> dict[str, list[float]]:
        rounds = Rounds(runs, self._device, ceiling)
        for _ in rounds.take(self._rounds):
            pass
        return rounds.seconds

    def _checked(self, model: nn.Module, point: Point) -> dict[str, Contender]:
        """Return the contenders that are right with a point's probes and targets."""
        key = point.probes, point.targets
        if key not in self._right:
            looked_at = models.cut(model, CHECKED_LAYERS) if self._shallow else model
            sequences, length, pairs = CHECKED
            given = random_rows(self._vocab, sequences, length, pairs, length, self._device)
            exact = Exact(looked_at)
            self._right[key] = {}
            for name, contender in contenders(point.probes).items():
                own = models.twin(looked_at)
                try:
                    with contender.opened(own, given) as run:
                        check(name, own, run, exact)
                except AssertionError as error:
                    self.refused.append({"contender": name, "probes": point.probes, "reason": str(error)})
                else:
                    self._right[key][name] = contender
        return self._right[key]


HEADINGS = (
    f"{'axis':8}{'tokens':>7}{'length':>7}{'probes':>7} {'adapters':10}{'contender':11}"
    f"{'ms':>9}{'us/token':>10}{'/plain':>8}{'floor ms':>10}{'/floor':>8}{'KiB/token':>11}"
)


def line(row: Row) -> str:
    """Write a row as text."""
    maps = {2: "q, v", 4: "attention"}.get(len(row["targets"]), "all")
    cells = f"{row['axis']:8}{row['tokens']:7}{row['length']:7}{row['probes']:7} {maps:10}{row['contender']:11}"
    if row["ms"] is None:
        return f"{cells}  out of memory"
    ratio = "-" if row["ratio_to_plain_sft"] is None else f"{row['ratio_to_plain_sft']:.2f}"
    cells += f"{row['ms']:9.1f}{row['us_per_token']:10.1f}{ratio:>8}{row['floor_ms']:10.1f}{row['ms_over_floor']:8.2f}"
    return f"{cells}{row['bytes_per_token'] / 1024:11.1f}"


def drawing(rows: Sequence[Row], axis: str) -> str:
    """Draw an axis's rows as a figure: time and memory for each token."""
    lines: dict[str, dict[str, list]] = {"us_per_token": {}, "bytes_per_token": {}}
    for row in rows:
        x = {2: "q, v", 4: "attention"}.get(len(row["targets"]), "all linear") if axis == "targets" else row[axis]
        for column, found in lines.items():
            points_of = found.setdefault(row["contender"], [])
            if row[column] is not None:
                points_of.append((x, row[column] / (1 if column == "us_per_token" else 1024)))
    said = AXES[axis]
    return figure(
        [
            Panel("Time for each token", said, "microseconds", lines["us_per_token"]),
            Panel("Memory for each token, weights aside", said, "KiB", lines["bytes_per_token"]),
        ]
    )


if __name__ == "__main__":
    # torch's profiler, which follows the memory on a CPU, says on stderr whenever it begins.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    raise SystemExit(main())
