"""What this device reaches, before anything is timed on it: a large matrix product, and a copy.

python -m benchmarks.gpu.ceilings --device cuda --jsonl FILE
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.ceiling import Ceiling
from benchmarks.gpu import results

VISITS = 5
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure in each dtype, and add a row for each; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ceilings", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--jsonl", type=Path, required=True, help="the file to add rows to")
    args = parser.parse_args(argv)
    for name, dtype in DTYPES.items():
        ceiling = Ceiling(args.device, dtype)
        for _ in range(VISITS):
            ceiling.visit()
        results.append(args.jsonl, {"dtype": name, **ceiling.row})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
