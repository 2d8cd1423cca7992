"""A whole training step against others, on the same tokens: the published one, plain fine-tuning, our own options.

    python -m benchmarks.step --json result.json [--device cuda] [--model smollm2] [--dtype float32 bfloat16]
        [--rows full real released] [--contenders lagged tidy ...] [--rounds 7] [--published-shapes]

All contenders (``contenders.py``) take turns in one process, in both orders, each on adapters of its own; the
frozen weights are shared. They are timed on rows of three kinds (``batches.py``). Where a step's cost changes from
step to step, as with ``probe_every``, whole periods are timed and a row tells of a period's mean step.

Before anything is timed, loss and gradient of the first two steps of each contender are compared with plain autograd on
a float64 copy of the model, at the probe in whose presence each was taken: the first is at V = 0, the second at the
probe that the first has found. How good that probe is, ``benchmarks.fidelity`` and the tests say, not this. Models of
7B parameters are cut to two layers for that. What is wrong or fails is not timed, is listed
as refused, and makes the exit code 1; what cannot be run here is listed as skipped. Neither happens silently.

In a row, ``padding`` is the kind of its rows; ``tokens_per_s`` counts the real tokens of the task batch, which is what
training gets through; ``launches`` is of one step: ops on a CPU, kernels on a GPU; ``task_lengths`` and
``pair_lengths`` are those of the sequences that the contender computes on, with padding if it computes on that, and
``task_rows`` and ``pair_rows`` all of them, where sequences share some less. ``peak_memory`` is in bytes: the weights,
and what is allocated beside them at the peak of the first steps, a period or more (``counts.py``).

``tflop`` is what the contender's own computation needs (``own_floor.py``), ``tflops_per_s`` that by its time,
``share_of_ceiling`` that of the matrix product timed in the same rounds (``common/ceiling.py``), ``floor_ms`` the
least time for its computation at the ceilings of product and copy, and ``ms_over_floor`` how many times that it took.
On few rows caches hold what a floor counts as crossing memory. ``ceilings`` has the ceilings, ``targets`` what was
aimed at (``targets.py``): a missed one is printed, and is no failure. ``digests`` holds what tells the bits of a few
exact steps from others' (``digest.py``).
"""

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import models, record
from benchmarks.ops.peers import installed
from benchmarks.step import targets
from benchmarks.step.bases import BASES, CHECKED_LAYERS, LARGE, frozen_dtype, ready, shallow
from benchmarks.step.batches import KINDS, PUBLISHED, SMALL, rows
from benchmarks.step.contenders import CONTENDERS
from benchmarks.step.digest import digest
from benchmarks.step.suite import DTYPES, OUT_OF_TIME, RATIOS, Row, Suite

# On rows of kind "floor": those whose share of the ceiling is judged, and what they are compared with.
ON_FLOOR = ("lagged", "graph", "own-sft", "direction-kept", "plain-sft", "tidy")
ROUNDS = {"cpu": 7, "cuda": 30}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write it as JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    parser.add_argument("--jsonl", type=Path, help="add each fact to this file, a JSON object a line, once it is known")
    parser.add_argument("--device", choices=ROUNDS, default="cpu")
    parser.add_argument("--model", choices=BASES, default="smollm2")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=["real"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    rounds_help = f"of each contender; a verdict takes {targets.LEAST_ROUNDS}"
    parser.add_argument("--rounds", type=int, help=rounds_help)
    shapes_help = "task 10 x 128 and pairs 8 x 256, not 4 x 64 and 4 x 96"
    parser.add_argument("--published-shapes", action="store_true", help=shapes_help)
    parser.add_argument("--data", type=Path, help="instructions and outputs as a JSON list, for the task rows")
    parser.add_argument("--smollm2", type=Path, help="a folder to take SmolLM2 from, as transformers saves it")
    parser.add_argument("--limit", type=float, help="seconds: no contender and no round begins when they are over")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is at hand; leave --device cpu")
    if args.device == "cpu" and args.model in LARGE:
        parser.error(f"{args.model} is drawn on a GPU; give --device cuda, or a smaller model")
    rounds = ROUNDS[args.device] if args.rounds is None else args.rounds
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {rounds}")
    if args.limit is not None and not args.limit > 0:
        parser.error(f"--limit must be positive, but is {args.limit}")

    start = time.perf_counter()
    shapes = PUBLISHED if args.published_shapes else SMALL
    examples = models.examples(args.data)
    settings = {"model": args.model, "rounds": rounds, "lora": "r = 8 on q_proj and v_proj", "optimizer": "none"}
    settings |= {"shapes": vars(shapes), "contenders": args.contenders, "peers": _peers()}
    tell = partial(told, args.jsonl) if args.jsonl else lambda row: None
    tell({"model": args.model})
    suite = Suite(args.device, rounds, args.contenders, CHECKED_LAYERS if args.model in LARGE else None, tell=tell)
    environment = record.environment(args.device)
    result: dict[str, Any] = {"environment": environment, "settings": settings, "seconds": None}
    result |= {
        "skipped": suite.skipped,
        "refused": suite.refused,
        "targets": [],
        "digests": [],
        "ceilings": suite.ceilings,
    }
    result |= {"ceilings": suite.ceilings, "rows": suite.rows}
    measured = [(dtype, kind) for dtype in args.dtype for kind in args.rows]
    stored: nn.Module | None = None
    for i, (dtype, kind) in enumerate(measured):
        if stored is None or DTYPES[dtype] != frozen_dtype(stored):
            stored = None  # before another takes its place
            stored, tokenizer = ready(args.model, args.smollm2, DTYPES[dtype], args.device)
        suite.names = [name for name in args.contenders if kind != "floor" or name in ON_FLOOR]
        if args.limit is not None:
            suite.limit = max(0.0, args.limit - (time.perf_counter() - start)) * _share(measured[i:])
        for row in suite.measure(stored, dtype, rows(tokenizer, examples, shapes, kind, args.device)):
            print(line(row), flush=True)
        if dtype not in (known["dtype"] for known in result["digests"]):
            taken(dtype, shallow(args.model, stored), result["digests"], tell)
        result["seconds"] = round(time.perf_counter() - start, 1)
        result["targets"] = targets.verdicts(suite.rows, result["digests"], environment["device"], args.model)
        record.write(args.json, result)  # later rows may fail
    for verdict in ("skipped", "refused"):
        for entry in result[verdict]:
            print(f"{verdict}: {', '.join(str(entry[key]) for key in entry)}")
    print("\n".join(targets.lines(result["targets"])))
    return 1 if suite.refused or any(entry["reason"] == OUT_OF_TIME for entry in suite.skipped) else 0


def taken(dtype: str, model: nn.Module, digests: list[Row], tell: Callable[[Row], None]) -> None:
    """Take the digest of a few steps; where they fail, that is told, and others go on."""
    try:
        digests.append({"dtype": dtype, **digest(model)})
    except Exception as error:
        traceback.print_exception(error)
        tell({"contender": "digest", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
    else:
        tell({"digest": digests[-1]})


def told(path: Path, fact: Row) -> None:
    """Add a fact to a file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(fact) + "\n")


def _share(left: Sequence[tuple[str, str]]) -> float:
    """Return, of the time that is left, what the first of these measurements gets: few take part on some rows."""
    weights = [0.4 if kind == "floor" else 1.0 for _, kind in left]
    return weights[0] / sum(weights)


def _peers() -> dict[str, str]:
    return {package: installed(package) or "not installed" for package in ("trl", "liger_kernel")}


def line(row: Row) -> str:
    """Write a row as text."""
    what = f"{row['padding']:8} {row['dtype']:8} {row['contender']:24}"
    times = f"{row['ms']:8.1f} ms ({row['ms_least']:.1f} to {row['ms_most']:.1f})"
    floor = f"floor {row['floor_ms']:.1f} ms, {row['ms_over_floor']:.2f} x  {_rate(row)}"
    ratios = "  ".join(f"{row[key]:5.2f} x {to}" for key, to in RATIOS.items() if row[key] is not None)
    return f"{what}{times:34}  {floor}  {ratios}  {_launches(row)}  {row['peak_memory'] / 2**30:.2f} GiB"


def _launches(row: Row) -> str:
    return "" if row["launches"] is None else f"{row['launches']:.0f} launches"


def _rate(row: Row) -> str:
    return f"{row['tflops_per_s']:.3g} TFLOP/s ({row['share_of_ceiling']:.0%})"


if __name__ == "__main__":
    # torch's profiler, which follows the memory on a CPU, says on stderr whenever it begins.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    raise SystemExit(main())
