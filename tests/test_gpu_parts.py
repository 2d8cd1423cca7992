"""Which stages the parts of a run on a GPU have, in which order, and within which limits."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import record
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts, reporter, results
from benchmarks.gpu.processes import Command, Tests
from benchmarks.gpu.results import Item


class Slow:
    """Stands for a runner on a slow machine: every stage takes all its time, and some seconds to be killed besides."""

    KILLING = 1.0

    def __init__(self, found: Path) -> None:
        self.found, self.now = found, 0.0
        self.ran: list[tuple[str, float]] = []

    def clock(self) -> float:
        return self.now

    def tests(self, tests: Tests | Command, seconds: float) -> None:
        self.ran.append((tests.stage, seconds))
        self.now += seconds + self.KILLING

    command = tests

    def ended(self, stage: str, seconds: float, problems: list[str], left: int = 0, *, late: bool = False) -> None:
        self.ran.append((stage, 0.0))


def a_run(part: str, limit: float, folder: Path, **options: Any) -> tuple[parts.Run, Slow]:
    given = {"part": part, "limit": limit, "tiny": False, "only": None, "resume": None, "sanitize": None, "also": []}
    args = argparse.Namespace(**{**given, "workers": 16, "data": None, "arch": "sm_90", "out": folder, **options})
    runner = Slow(folder / results.NAME)
    return parts.Run(args, runner, folder, limit - command.ENDING, folder, runner.clock), runner  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [30.0, 90.0, None, 750.0])
@pytest.mark.parametrize("part", ["check", "time"])
def test_limits_hold_on_a_slow_machine(part: str, limit: float | None, tmp_path: Path) -> None:
    limit = limit or parts.LIMITS[part]
    failed = Item(f"{parts.SMOKE_FILE}::a", "smoke", "failed")
    results.append(tmp_path / results.NAME, failed.line | {"earlier": True})
    run, runner = a_run(part, limit, tmp_path)
    parts.PARTS[part](run)
    assert runner.now <= limit
    names = [stage for stage, _ in runner.ran]
    assert (
        names
        == {
            "check": ["compile", "smoke", "tests", "step"],
            "time": ["again", "ceilings", "step", "fidelity", "ops", "profile", "options", "float8", "small"],
        }[part]
    )
    least = dict(runner.ran)
    if limit >= parts.LIMITS[part]:
        assert all(
            seconds >= parts.LEAST for stage, seconds in runner.ran if stage not in ("options", "float8", "small")
        ), runner.ran
        # The most telling has most of its time even there.
        assert least["smoke" if part == "check" else "step"] >= 60


@pytest.mark.parametrize(("limit", "most"), [(260.0, 260.0), (750.0, 400.0), (3600.0, 3600.0)])
def test_check_leaves_time_for_the_other_command(limit: float, most: float, tmp_path: Path) -> None:
    """The limit is also what is left of a quarter of an hour, though everything takes as long as it may."""
    run, runner = a_run("check", limit, tmp_path)
    parts.PARTS["check"](run)
    assert runner.now <= most


def test_time_repeats_nothing_where_nothing_failed(tmp_path: Path) -> None:
    results.append(tmp_path / results.NAME, Item("a", "smoke", "passed").line | {"earlier": True})
    run, runner = a_run("time", 330.0, tmp_path)
    parts.PARTS["time"](run)
    assert "again" not in dict(runner.ran) and dict(runner.ran)["step"] >= 120


def test_a_contender_that_loses_the_gpu_costs_the_others_nothing(tmp_path: Path) -> None:
    """They are run once more, in a process whose CUDA context is whole."""
    run, runner = a_run("time", 330.0, tmp_path)
    asked: list[list[str]] = []

    def losing(command: Command, seconds: float) -> int:
        words = [*command.arguments]
        asked.append(words[words.index("--contenders") + 1 : words.index("--model")])
        if "graph" not in asked[-1]:
            return 0
        results.append(runner.found, {"kind": "row", "stage": "step", "lost": "graph"})
        return reporter.FATAL

    runner.command = losing  # type: ignore[method-assign]
    run.steps("step", ("lagged", "graph", "tidy"), 7, most=200.0)
    assert asked == [["lagged", "graph", "tidy"], ["lagged", "tidy"]]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("benchmarks/gpu/smoke.py::test_op[[]glu*", ["smoke"]),
        ("tests/test_kernels.py::*", ["tests"]),
        ("step/lagged", ["step"]),
        ("*glu*", ["compile", "smoke", "tests"]),
    ],
)
def test_only_runs_the_stages_that_have_it(only: str, expected: list[str], tmp_path: Path) -> None:
    run, runner = a_run("check", 260.0, tmp_path, only=only)
    parts.PARTS["check"](run)
    assert [stage for stage, _ in runner.ran if stage != "compile" or "::" not in only] == expected


def test_the_device_tests_are_all_there_are() -> None:
    """But those of the reference rules in float64, which a CPU has run, and what only tells of the mark itself."""
    marked = {
        f"tests/{path.name}"
        for path in (record.ROOT / "tests").glob("test_*.py")
        if "pytest.mark.gpu" in path.read_text() and path.name != Path(__file__).name
    }
    assert marked and marked <= {*parts.DEVICE_TESTS}
    assert all((record.ROOT / file).exists() for file in (*parts.DEVICE_TESTS, parts.SMOKE_FILE, parts.OPS_FILE))
