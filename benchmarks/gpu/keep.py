"""Turns what a run on a GPU has found into the file that backs its figures.

    python -m benchmarks.gpu.keep DIR [--results benchmarks/results]

DIR is the run's ``--out``. The file is named after device, part and date, as ``nvidia-h200-check-2026-11-26.json``, and
holds every fact but the tracebacks; the profile's page goes beside it.
"""

import argparse
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import record
from benchmarks.gpu import ops_table, results

PAGE = "profile.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file, print its path; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.keep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="DIR", help="the --out of a run of benchmarks.gpu")
    parser.add_argument("--results", type=Path, default=record.ROOT / "benchmarks/results", help="where to write to")
    args = parser.parse_args(argv)
    lines = results.read(args.run / results.NAME)
    if not lines:
        parser.error(f"{args.run} holds no {results.NAME}; name the --out of a run of benchmarks.gpu")
    path = args.results / f"{name(lines)}.json"
    record.write(path, kept(lines))
    print(path)
    if (args.run / PAGE).exists():
        print(shutil.copy(args.run / PAGE, path.with_suffix(".html")))
    return 0


def name(lines: Sequence[Mapping[str, Any]]) -> str:
    """Name a run by device, part and date; a tiny run's is no device's."""
    run = next(line for line in lines if line["kind"] == "run")
    device = "tiny" if run["tiny"] else re.sub(r"[^a-z0-9]+", "-", run["environment"]["device"].lower()).strip("-")
    return f"{device}-{run['part']}-{run['environment']['date'][:10]}"


def kept(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Order the facts of a run: where, which stages, every item that went wrong, errors, measurements."""
    run = next(line for line in lines if line["kind"] == "run")
    items = results.items(lines)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        counts[item.stage][item.outcome] += 1
    measured = [item for item in items if item.stage == "ops"]
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "row":
            told = {key: value for key, value in line.items() if key not in ("kind", "earlier")}
            rows[line["stage"]].append(told)
    stages = [line for line in lines if line["kind"] == "stage"]
    result = {
        **{key: run[key] for key in ("environment", "part", "tiny", "limit")},
        "stages": [
            {**{key: line[key] for key in ("stage", "seconds", "problem", "left")}, **counts[line["stage"]]}
            for line in stages
        ],
        "wrong": [
            {key: value for key, value in item.line.items() if key not in ("kind", "traceback", "earlier")}
            for item in items
            if item.outcome in results.WRONG
        ],
        "errors": [{"id": item.id, "off": item.values["off"]} for item in items if "off" in item.values],
    }
    if measured:
        table, memory = ops_table.rows(measured), ops_table.memory(measured)
        result |= {"ops": table, "ops_memory": memory, "ops_targets": ops_table.targets(table, memory)}
    return result | dict(rows)


if __name__ == "__main__":
    sys.exit(main())
