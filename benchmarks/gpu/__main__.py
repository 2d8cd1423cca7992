"""What there is to try and to measure on one GPU, in two commands that fit into a quarter of an hour.

    python -m benchmarks.gpu --part check --out DIR      # does everything run, is it right: four minutes
    python -m benchmarks.gpu --part time --out DIR --resume EARLIER      # how fast is it: five and a half

``check`` compiles the kernels of the smoke, then runs the **smoke** (each op at Llama-2-7B's widths, and steps of two
layers, against float64), then the tests that need a GPU, a spread of cases first, then 45 s of whole steps. ``time``
first repeats what ``--resume`` lists as failed, then measures ceilings, whole steps, fidelity, ops, and a profile.
``ahead`` needs no GPU: it compiles what ``check`` would, for a device with the same release of Triton.

DIR then holds ``results.jsonl`` (a line a fact, written the moment it is known), ``table.txt`` (printed last),
``tracebacks.txt`` (one for each distinct error), ``log.txt``, ``cache.tar`` (the compiled kernels, which a later run
unpacks) and ``profile.html``. Every stage runs in processes of its own within a limit of its own, and a crash or a hang
costs one test. After a stop of any kind, ``--resume DIR`` goes on: what was found right is not tried again, what failed
is, last. ``python -m benchmarks.gpu.keep DIR`` turns the lines into a file for ``benchmarks/results/``.

Where ``.carry/`` holds wheels (``make wheels``), kernels compiled ahead (``--part ahead --out .carry``) or
``gsm8k.json``, they are used. ``--tiny`` goes through a part on a CPU, in Triton's interpreter, and measures nothing.

Exit code 0 if all was tried and right, 1 if something failed, died or hung, 3 if nothing was wrong but not all was
tried. A missed target is printed, and is no failure.
"""

import argparse
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import parts, results, table
from benchmarks.gpu.processes import ROOT, Runner

LOG = "log.txt"
CARRIED = ROOT / ".carry"
# Seconds at the end in which nothing is tried: the table, and packing the kernels.
ENDING = 6.0


class Stopped(BaseException):
    """Raised where the run was told to stop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a part, print its table; returns the exit code."""
    start = time.time() - time.process_time()  # what was imported until here counts
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    found, log = args.out / results.NAME, args.out / LOG
    earlier = results.read(args.resume / results.NAME) if args.resume else []
    begun: dict[str, Any] = {"kind": "run", "part": args.part, "tiny": args.tiny, "limit": args.limit, "start": start}
    begun |= {"resumed": bool(earlier), "environment": parts.environment(tiny=args.tiny or args.part == "ahead")}
    # In place of what the folder may hold; a run that resumes itself has read it.
    temporary = found.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    for line in (begun, *results.carried_over(earlier, begun)):
        results.append(temporary, line)
    temporary.replace(found)
    if not args.resume or args.resume.resolve() != args.out.resolve():
        log.unlink(missing_ok=True)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    runner = Runner(found, log, hang=args.hang, only=args.only)
    stopped = None
    with tempfile.TemporaryDirectory(prefix="sap-fast-gpu-") as folder:
        run = parts.Run(args, runner, Path(folder), start + args.limit - ENDING, CARRIED)
        try:
            parts.PARTS[args.part](run)
        except (Stopped, KeyboardInterrupt) as error:
            stopped = type(error).__name__
            runner.ended("run", time.time() - start, ["stopped"], late=True)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # what was found is written, whatever comes now
        text = table.write(args.out, _spelled(args))
        run.keep()
    print(text, flush=True)
    if stopped:
        return 130
    return table.verdict(results.read(found)).code


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", choices=parts.PARTS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder for what is found; its files are replaced")
    limits = ", ".join(f"{seconds:.0f} for {part}" for part, seconds in parts.LIMITS.items())
    parser.add_argument("--limit", type=float, help=f"seconds in all: {limits}")
    parser.add_argument("--only", metavar="GLOB", help="tests, contenders or stages by name; * and ? are special")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="an earlier run's folder, to go on from")
    parser.add_argument("--sanitize", metavar="OP", help="of check: this op's smoke alone, under compute-sanitizer")
    parser.add_argument("--data", type=Path, help="instructions and outputs as a JSON list, for rows of real lengths")
    parser.add_argument("--hang", type=float, help="seconds after which a test counts as hung; else as its stage says")
    parser.add_argument("--also", type=Path, action="append", default=[], help="a further file of tests for the smoke")
    parser.add_argument("--workers", type=int, help="processes that share the tests; 16, of a tiny run 2")
    parser.add_argument("--arch", default="sm_90", help="of ahead: what to compile for")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU: no measurement")
    args = parser.parse_args(argv)
    args.limit = parts.LIMITS[args.part] if args.limit is None else args.limit
    args.workers = args.workers or (2 if args.tiny else parts.WORKERS)
    args.data = args.data or next((path for path in [CARRIED / "gsm8k.json"] if path.exists()), None)
    if not args.limit > ENDING:
        parser.error(f"--limit must be more than {ENDING:.0f} s, but is {args.limit:g}")
    if args.resume and not (args.resume / results.NAME).exists():
        parser.error(f"--resume: {args.resume} holds no {results.NAME}; name the --out of an earlier run")
    for path in (args.data, *args.also):
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    if problem := parts.unfit(args):
        parser.error(problem)
    return args


def _spelled(args: Any) -> str:
    """Spell the options with which one item of this run is repeated; its part, and its name, are to be added."""
    words = ["--out", "DIR", *(["--tiny"] if args.tiny else [])]
    return shlex.join(words + [word for path in args.also for word in ("--also", str(path))])


def _stop(number: int, frame: Any) -> None:
    raise Stopped(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
