"""Everything there is to measure on a CPU about the ops, in one command.

    python -m benchmarks.cpu --json result.json [-k EXPRESSION]

Runs ``ops/bench_cpu.py`` under pytest-benchmark: every op's C++ kernels, the reference rules they replace, and the
dual's formula in plain PyTorch, in both orders, each found right before it is timed. Exit code 1 if one was wrong; a
missed target is printed, and is no failure.
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import record
from benchmarks.common.record import Row
from benchmarks.gpu import results
from benchmarks.gpu.ops_table import parameter
from benchmarks.gpu.processes import Runner, Tests
from benchmarks.gpu.subjects import ROW_WISE
from sap_fast import _C

# Seconds in which the run must begin what it begins.
LIMIT = 1500
# How many times faster than the dual's formula in PyTorch a row-wise op is to be, in float32.
LEAST_OVER_EAGER = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write it as JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    parser.add_argument("-k", dest="only", default="", help="as pytest's: which visits to make")
    args = parser.parse_args(argv)
    if not _C.loaded:
        parser.error(f"the C++ kernels are not loaded: {_C.status}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = folder / "benchmark.json"
        arguments = ["benchmarks/ops/bench_cpu.py", f"--benchmark-json={report}", "-k", args.only]
        runner = Runner(folder / "found.jsonl", folder / "log.txt", hang=LIMIT)
        runner.tests(Tests("ops", arguments), LIMIT)
        written = report.exists() and report.stat().st_size > 0
        table = rows(json.loads(report.read_text())["benchmarks"]) if written else []
        told = results.read(runner.found)
        if not table:
            print(runner.log.read_text(errors="replace")[-2000:])
    found, items = targets(table), results.items(told)
    stage = next(line for line in told if line["kind"] == "stage")
    failures = [{"test": item.id, "reason": item.reason} for item in items if item.outcome in results.WRONG]
    result = {"environment": record.environment(), "kernels": _C.status, "seconds": stage["seconds"]}
    result |= {"problem": stage["problem"], **Counter(item.outcome for item in items), "dropped": stage["left"]}
    result |= {"targets": found, "rows": table, "failures": failures}
    record.write(args.json, result)
    print("\n".join([*lines(table), *(f"{t['verdict']:6} {t['target']}: {t['value']:.2f}" for t in found)]))
    print("\n".join(f"FAILED {failure['test']}: {failure['reason']}" for failure in failures))
    return 0 if table and not (failures or stage["problem"] or stage["left"]) else 1


def rows(benchmarks: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Make one row for each op, model, dtype and pass, with every contender's median over both visits."""
    seconds: dict[tuple[str, ...], dict[str, list[float]]] = {}
    moved: dict[tuple[str, ...], int] = {}
    for benchmark in benchmarks:
        op, model, dtype, pass_, name, _ = parameter(benchmark["name"]).split()
        key = op, model, dtype, pass_
        seconds.setdefault(key, {}).setdefault(name, []).extend(benchmark["stats"]["data"])
        if name == "ours":
            moved[key] = benchmark["extra_info"]["bytes"]
    result = []
    for (op, model, dtype, pass_), found in seconds.items():
        ms = {name: 1e3 * statistics.median(data) for name, data in found.items()}
        row: Row = {"op": op, "model": model, "rows": 1024, "dtype": dtype, "pass": pass_}
        row |= {f"{name}_ms": value for name, value in ms.items()}
        row["rounds"] = {name: len(data) for name, data in found.items()}
        if "ours" in ms:
            row["GB/s"] = moved[op, model, dtype, pass_] / ms["ours"] / 1e6
            row["times_faster_than"] = {name: value / ms["ours"] for name, value in ms.items() if name != "ours"}
        result.append(row)
    return result


def targets(table: Iterable[Row]) -> list[Row]:
    """Judge the row-wise ops in float32 against the plain formula."""
    result = []
    for row in table:
        faster = row.get("times_faster_than", {}).get("eager")
        if row["op"] in ROW_WISE and row["dtype"] == "float32" and faster is not None:
            text = (
                f"{row['op']} {row['pass']}, {row['model']}, float32: times faster than eager >= {LEAST_OVER_EAGER:g}"
            )
            verdict = "met" if faster >= LEAST_OVER_EAGER else "missed"
            result.append({"target": text, "value": faster, "verdict": verdict})
    return result


def lines(table: Iterable[Row]) -> list[str]:
    """Write the table as text. The last columns say how many times faster than another ours is."""
    result = [f"{'op':21}{'model':14}{'dtype':9} {'pass':9}{'ms':>9}{'GB/s':>7}{'reference':>11}{'eager':>8}"]
    for row in table:
        faster = row.get("times_faster_than", {})
        cells = f"{row['op']:21}{row['model']:14}{row['dtype']:9} {row['pass']:9}"
        cells += f"{row['ours_ms']:9.2f}{row['GB/s']:7.1f}" if "ours_ms" in row else f"{'-':>9}{'-':>7}"
        for name, width in (("reference", 11), ("eager", 8)):
            cells += f"{faster[name]:{width}.2f}" if name in faster else f"{'-':>{width}}"
        result.append(cells)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
