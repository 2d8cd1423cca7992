"""Everything there is to try and to measure on a GPU, in one command.

    python -m benchmarks.gpu --part all [--out DIR] [--smollm2 FOLDER]

- ``tests``: all tests that need a GPU;
- ``ops``: every op against what others would do, each found right before it is timed (``gpu_ops.py``);
- ``fidelity``: the probe's gradient on a random model of Llama-2-7B's width cut to 8 layers, and on SmolLM2 where the
  folder of the converted model is given;
- ``step``: ``benchmarks.step`` at the published shapes in bfloat16, on Llama-2-7B's shape, on SmolLM2 where its folder
  is given, and on Qwen2.5-7B's shape;
- ``profile``: ``sap_fast.profile`` on Llama-2-7B's shape.

A part takes at most four minutes, ``step`` nine, all of them twenty: what has not begun by then is dropped, by name,
and rounds that have not begun are left out. Each part
writes ``DIR/<device>-<part>-<date>.json``; a short table comes last. Packages that are not installed are skipped by
name. Without a GPU, ``TRITON_INTERPRET=1 python -m benchmarks.gpu --part all --tiny`` goes through all of it on tiny
shapes, which shows that it runs and measures nothing.

Exit code 1 if something failed or was dropped that the part is about; a missed target is printed, and is no failure.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_session, gpu_steps, gpu_table, models
from benchmarks.fidelity import misses
from benchmarks.gpu_session import Settings
from benchmarks.peers import installed

Result = dict[str, Any]

# Seconds in which a part must begin what it begins. It ends at most half a minute later: see ``gpu_session``.
ALONE = {"tests": 205, "ops": 205, "fidelity": 205, "step": 505, "profile": 205}
TOGETHER = {"tests": 175, "ops": 160, "fidelity": 105, "step": 505, "profile": 105}
# Processes that the tests are spread over: compiling their kernels is what takes time.
WORKERS = 8
OPTIONAL = ("liger_kernel", "trl", "flash_attn")
# A handful of kernels in the interpreter.
TINY_TESTS = ("tests/test_kernels.py", "-k", "test_agrees_with_the_oracle and 5x7 and float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, write their results, print a table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", choices=[*PARTS, "all"], required=True)
    parser.add_argument("--out", type=Path, help="benchmarks/results by default; of a tiny run, runs/tiny")
    parser.add_argument("--smollm2", type=Path, help="a folder with SmolLM2-135M-Instruct as transformers saves it")
    parser.add_argument("--data", type=Path, help="instructions and outputs as a JSON list, for rows of real lengths")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, interpreted on the CPU: no measurement")
    args = parser.parse_args(argv)
    if args.tiny and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--tiny runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no GPU is at hand; TRITON_INTERPRET=1 and --tiny go through every part without one")
    if not args.tiny and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 keeps kernels off the GPU: unset it, or give --tiny")

    out = args.out or models.ROOT / ("runs/tiny" if args.tiny else "benchmarks/results")
    environment = models.environment("cpu" if args.tiny else "cuda")
    succeeded, summary = True, []
    for part in PARTS if args.part == "all" else [args.part]:
        limit = (TOGETHER if args.part == "all" else ALONE)[part]
        path = out / f"{device_name(environment, args.tiny)}-{part}-{environment['date'][:10]}.json"
        with tempfile.TemporaryDirectory() as folder:
            most = limit + gpu_session.GRACE + gpu_session.INTERRUPTED
            print(f"{part}: at most {most:.0f} s", flush=True)
            result = PARTS[part](Settings(args.tiny, limit, Path(folder), args.smollm2, args.data, path))
        succeeded &= result["succeeded"]
        models.write(path, {"environment": environment, "part": part, "tiny": args.tiny, **result})
        summary += [f"--- {part}: {path.name}", *LINES[part](result)]
    print("\n".join(summary))
    if args.tiny:
        print("tiny: this shows that the command runs; nothing was measured")
    print("all ran and was right" if succeeded else "FAILED: see above")
    return 0 if succeeded else 1


def device_name(environment: Mapping[str, Any], tiny: bool) -> str:
    """As in a file's name: ``nvidia-h200``; a tiny run's is no device's."""
    return "tiny" if tiny else re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")


# The tests


def tests(settings: Settings) -> Result:
    """All tests that need a GPU, in several processes where pytest-xdist is installed."""
    arguments = ["-q", "-p", "no:benchmark"]
    if settings.tiny:
        arguments += TINY_TESTS
    else:
        arguments += ["tests", "-m", "gpu"]
        arguments += ["-n", str(WORKERS)] if find_spec("xdist") else []
    session = gpu_session.run(arguments, settings.folder, settings.limit, settings.environment)
    return {
        "succeeded": session.problem is None and not session.failed and not session.dropped,
        "seconds": round(session.seconds, 1),
        "problem": session.problem,
        **session.counts,
        "failures": [{"test": test.name, "reason": test.reason} for test in session.failed],
    }


def tests_lines(result: Result) -> list[str]:
    counts = ", ".join(f"{result[name]} {name}" for name in ("passed", "failed", "skipped"))
    lines = [f"{counts} (of these {result['dropped']} for want of time) in {result['seconds']} s"]
    lines += [f"FAILED {failure['test']}: {failure['reason']}" for failure in result["failures"][:10]]
    return lines + ([str(result["problem"])] if result["problem"] else [])


# The ops


def ops(settings: Settings) -> Result:
    """Every op and its contenders, timed by pytest-benchmark."""
    report = settings.folder / "benchmark.json"
    arguments = ["benchmarks/bench_gpu_ops.py", "-q", "-W", "default", f"--benchmark-json={report}"]
    arguments += [f"{gpu_session.SIZE}={'tiny' if settings.tiny else 'real'}"]
    session = gpu_session.run(arguments, settings.folder, settings.limit, settings.environment)
    written = report.exists() and report.stat().st_size > 0
    timed = gpu_table.times(json.loads(report.read_text())) if written else {}
    table, memories = gpu_table.rows(session.tests, timed), gpu_table.memory(session.tests)
    ours = [row["contenders"].get("ours", {}) for row in table]
    copied = gpu_table.copy_bandwidth(timed)
    return {
        "succeeded": session.problem is None and not session.failed and bool(ours) and all("us" in x for x in ours),
        "seconds": round(session.seconds, 1),
        "problem": session.problem,
        **session.counts,
        "copy_GB/s": copied and copied / 1e9,
        "peers": {package: installed(package) or "not installed" for package in OPTIONAL},
        # The times of an interpreter meet no target and miss none.
        "targets": gpu_table.targets([], []) if settings.tiny else gpu_table.targets(table, memories),
        "memory": memories,
        "rows": table,
        "failures": [{"test": test.name, "reason": test.reason} for test in session.failed],
    }


def ops_lines(result: Result) -> list[str]:
    absent = [package for package, found in result["peers"].items() if found == "not installed"]
    lines = [*gpu_table.lines(result["rows"]), *(f"skipped: {package} is not installed" for package in absent)]
    for row in result["memory"]:
        sizes = [f"{name} {row[name] / 2**20:.0f} MiB" for name in ("forward", "backward") if row[name] is not None]
        lines.append(f"attention over one sequence of {row['length']}: {', '.join(sizes) or row['reason']}")
    lines += [f"FAILED {failure['test']}: {failure['reason']}" for failure in result["failures"][:10]]
    if result["copy_GB/s"]:
        lines.append(f"copy: {result['copy_GB/s']:.0f} GB/s read and written; {result['seconds']} s in all")
    return [*lines, *gpu_table.verdicts(result["targets"]), *([result["problem"]] if result["problem"] else [])]


# Fidelity


def fidelity(settings: Settings) -> Result:
    """``benchmarks.fidelity`` on a model as wide as Llama-2-7B, and on SmolLM2."""
    path, log = settings.folder / "fidelity.json", settings.folder / "log.txt"
    command = [sys.executable, "-m", "benchmarks.fidelity", "--json", str(path)]
    names, skipped = ["tiny" if settings.tiny else "llama"], []
    if settings.smollm2 is not None and not settings.tiny:
        names.append("smollm2")
        command += ["--smollm2", str(settings.smollm2.absolute())]
    else:
        skipped.append("smollm2: no folder was given (--smollm2)")
    command += ["--tiny"] if settings.tiny else ["--device", "cuda", "--models", *names]
    code = gpu_session.bounded(command, log, settings.limit, settings.environment)
    found = json.loads(path.read_text()) if path.exists() else {"settings": None, "rows": []}
    rows, problem = found["rows"], None
    if code is None or {row["model"] for row in rows} != {*names}:
        gpu_session.print_end(log)
        problem = "stopped: it took too long" if code is None else f"benchmarks.fidelity ended with code {code}"
    return {
        # In bfloat16 the bound is a target. In float32 it says whether the derivative is right.
        "succeeded": problem is None and not any(misses(row) for row in rows if row["dtype"] != "bfloat16"),
        "problem": problem,
        "settings": found["settings"],
        "skipped": skipped,
        "targets": [] if settings.tiny else gpu_table.cosine_targets(rows),
        "rows": rows,
    }


def fidelity_lines(result: Result) -> list[str]:
    lines = [
        f"{row['model']:8} {row['when']:18} dual {row['dtype']:9} cosine {row['cosine']:.6f} ({row['truth']})"
        for row in result["rows"]
        if row["gradient"] == "dual"
    ]
    lines += [f"skipped: {name}" for name in result["skipped"]]
    return [*lines, *gpu_table.verdicts(result["targets"]), *([result["problem"]] if result["problem"] else [])]


PARTS: dict[str, Callable[[Settings], Result]] = {
    "tests": tests,
    "ops": ops,
    "fidelity": fidelity,
    "step": gpu_steps.step,
    "profile": gpu_steps.profile,
}
LINES: dict[str, Callable[[Result], list[str]]] = {
    "tests": tests_lines,
    "ops": ops_lines,
    "fidelity": fidelity_lines,
    "step": gpu_steps.step_lines,
    "profile": gpu_steps.profile_lines,
}


if __name__ == "__main__":
    raise SystemExit(main())
