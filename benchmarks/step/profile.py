"""``sap_fast.profile`` on a model of a published shape, with the ceilings that this device reaches.

    python -m benchmarks.step.profile --out FOLDER [--device cuda] [--model llama-2-7b] [--dtype bfloat16] [--steps 10]

For models whose weights need not be at hand: rows are those of ``benchmarks.step`` at the published shapes, a new draw
in each round. FOLDER then holds ``profile.html``, ``profile.json`` and ``trace.json``, as of ``sap-fast profile``.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

import sap_fast
from benchmarks.common import models
from benchmarks.common.ceiling import Ceiling
from benchmarks.step.bases import BASES, LARGE, ready
from benchmarks.step.batches import PUBLISHED, SMALL, rows
from benchmarks.step.suite import DTYPES

WARM_UP = 2
# Times that the ceilings are measured, before anything else.
VISITS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Profile, print the summary; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.profile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="the output folder; an earlier profile is replaced")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=BASES, default="smollm2")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="measured rounds")
    parser.add_argument("--small", action="store_true", help="task 4 x 64 and pairs 4 x 96, not 10 x 128 and 8 x 256")
    parser.add_argument("--data", type=Path, help="instructions and outputs as a JSON list, for the task rows")
    parser.add_argument("--smollm2", type=Path, help="a folder to take SmolLM2 from, as transformers saves it")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is at hand; leave --device cpu")
    if args.device == "cpu" and args.model in LARGE:
        parser.error(f"{args.model} is drawn on a GPU; give --device cuda, or a smaller model")
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, but is {args.steps}")

    dtype = DTYPES[args.dtype]
    model, tokenizer = ready(args.model, args.smollm2, dtype, args.device)
    ceiling = Ceiling(args.device, dtype)
    for _ in range(VISITS):
        ceiling.visit()
    reached = ceiling.device
    del ceiling
    shapes, examples = SMALL if args.small else PUBLISHED, models.examples(args.data)
    given = [rows(tokenizer, examples, shapes, "real", "cpu", seed) for seed in range(WARM_UP + args.steps)]
    profile = sap_fast.profile(
        model,
        [some.batch for some in given],
        [some.pairs for some in given],
        steps=args.steps,
        warmup=WARM_UP,
        output_dir=args.out,
        overwrite=True,
        peak_flops=reached.peak,
        bandwidth=reached.bandwidth,
        tell=lambda line: print(f"  {line} ...", flush=True),
    )
    print(profile.summary())
    return 0


if __name__ == "__main__":
    # torch's profiler says on stderr whenever it begins.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    raise SystemExit(main())
