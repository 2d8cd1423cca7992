"""Runs of ``benchmarks.gpu`` lose nothing to what may happen to them: planted failures of every kind, kills, hangs, and
limits on a slow machine. All of it without a GPU."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import models
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cache, keep, parts, reporter, results, table
from benchmarks.gpu.processes import Command, Runner, Tests
from benchmarks.gpu.results import Item

linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is Linux-only")


def started(*arguments: Any) -> subprocess.Popen:
    """The command, started as a user would."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--tiny", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=models.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def outcomes(out: Path) -> dict[str, str]:
    return {item.id.rpartition("::")[2]: item.outcome for item in results.items(results.read(out / results.NAME))}


# What may go wrong in a test


@linux
def test_planted_failures_are_shown_and_survived(tmp_path: Path) -> None:
    file = "tests/planted.py"
    given = ["--also", file, "--only", f"{file}::*", "--hang", 4, "--workers", 1, "--out", tmp_path]
    done = started("--part", "check", *given)
    printed, _ = done.communicate(timeout=200)
    assert done.returncode == 1, printed
    assert outcomes(tmp_path) == {
        "test_before": "passed",
        "test_wrong_number": "failed",
        "test_exception[glu-full-bfloat16-3x5]": "failed",
        "test_exception[glu-half-bfloat16-3x5]": "failed",
        "test_hang": "hung",
        "test_out_of_memory": "failed",
        "test_death_by_signal": "died",
        "test_after": "passed",
    }
    text = (tmp_path / table.NAME).read_text()
    assert text.strip() in printed and len(text) < 10_000
    for told in (
        "SOMETHING IS WRONG",
        "2 passed, 4 failed, 1 died, 1 hung",
        "failed: AssertionError: off by more than allowed",
        "2 x allowed",
        "2 x failed: ValueError: the launcher of glu was given what it does not take",
        "glu                  full   bfloat16 3x5",
        "can't allocate memory",
        "hung: did not end within 4 s",
        "died: its process ended by signal 11 (SIGSEGV)",
        f"--part check --out DIR --tiny --also {file} --only 'tests/planted.py::test_exception[glu-full-bfloat16-3x5]'",
    ):
        assert told in text, told
    # One for each distinct error, with the place where it was raised.
    traces = (tmp_path / table.TRACEBACKS).read_text()
    assert traces.count("raise ValueError") == 1 and traces.count(": in test_") == 3
    assert {path.name for path in tmp_path.iterdir()} <= {
        *(results.NAME, table.NAME, table.TRACEBACKS, command.LOG, cache.NAME, keep.PAGE)
    }


def test_a_process_that_lost_its_gpu_is_replaced(tmp_path: Path) -> None:
    """Its context is gone for good: it reports the test that lost it, and another process takes over the rest."""
    (tmp_path / "test_it.py").write_text(
        "import types, sys\n"
        "def lost():\n    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "sys.modules.setdefault('torch', types.SimpleNamespace(cuda=types.SimpleNamespace(synchronize=lost,"
        " is_initialized=lambda: False)))\n"
        "sys.modules['torch'].cuda.synchronize = lost\n"
        "def test_a():\n    lost()\n"
        "def test_b():\n    pass\n"
    )
    lines = ran(tmp_path, Tests("smoke", [str(tmp_path / "test_it.py")]), 60.0)
    assert [(item.id.rpartition("::")[2], item.outcome) for item in results.items(lines)] == [
        ("test_a", "failed"),
        ("test_b", "passed"),
    ]
    assert stages(lines) == [("smoke", None, 0)]
    assert "illegal memory access" in results.items(lines)[0].traceback


def ran(folder: Path, tests: Tests, seconds: float, hang: float = 60.0) -> list[dict[str, Any]]:
    Runner(folder / "found.jsonl", folder / "log.txt", hang=hang).tests(tests, seconds)
    return results.read(folder / "found.jsonl")


def stages(lines: list[dict[str, Any]]) -> list[tuple]:
    return [(line["stage"], line["problem"], line["left"]) for line in lines if line["kind"] == "stage"]


def test_what_a_program_that_watches_says_at_its_end_is_a_problem(tmp_path: Path) -> None:
    """As compute-sanitizer does, by its exit code, after all tests have passed."""
    (tmp_path / "test_it.py").write_text("def test_a():\n    pass\n")
    watching = ("sh", "-c", '"$@"; exit 99', "sh")
    lines = ran(tmp_path, Tests("sanitize", [str(tmp_path / "test_it.py")], before=watching), 60.0)
    assert [item.outcome for item in results.items(lines)] == ["passed"]
    assert stages(lines) == [("sanitize", "a process came to its end with code 99; log.txt says why", 0)]


def test_a_file_that_cannot_be_imported_is_a_failure_of_its_own(tmp_path: Path) -> None:
    """... and costs no test of another file."""
    (tmp_path / "test_bad.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "test_good.py").write_text("def test_a():\n    pass\ndef test_b():\n    pass\n")
    files = [str(tmp_path / name) for name in ("test_bad.py", "test_good.py")]
    lines = ran(tmp_path, Tests("tests", files, workers=2), 60.0)
    found = {item.id.rpartition("/")[2]: item for item in results.items(lines)}
    assert {id.partition("::")[2] or id: item.outcome for id, item in found.items()} == {
        "test_bad.py": "failed",
        "test_a": "passed",
        "test_b": "passed",
    }
    assert found["test_bad.py"].reason == "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"
    assert stages(lines) == [("tests", None, 0)]


def test_processes_that_never_reach_a_test_are_given_up(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("raise SystemExit(9)\n")
    ((stage, problem, left),) = stages(ran(tmp_path, Tests("smoke", [str(tmp_path / "test_it.py")]), 60.0))
    assert (stage, left) == ("smoke", 0) and "outside of any test; log.txt says why" in problem


# Limits


def test_a_stage_ends_in_time_whatever_it_does(tmp_path: Path) -> None:
    """Tests that end no more, and heed no interrupt; what is not begun is counted, and is no result."""
    (tmp_path / "test_it.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "def test_a():\n    pass\ndef test_b():\n    time.sleep(600)\ndef test_c():\n    pass\n"
    )
    start = time.time()
    lines = ran(tmp_path, Tests("smoke", [str(tmp_path / "test_it.py")]), 8.0)
    assert 7.5 < time.time() - start < 20
    found = {item.id.rpartition("::")[2]: (item.outcome, item.reason) for item in results.items(lines)}
    assert found == {
        "test_a": ("passed", ""),
        "test_b": ("hung", "was still running when the 8 s of its stage were over"),
    }
    assert stages(lines) == [("smoke", "1 of 1 processes were cut off after 8 s", 1)]


def test_what_begins_too_late_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_a():\n    time.sleep(7)\ndef test_b():\n    pass\ndef test_c():\n    pass\n"
    )
    lines = ran(tmp_path, Tests("smoke", [str(tmp_path / "test_it.py")]), 9.0)
    assert [item.outcome for item in results.items(lines)] == ["passed"]
    assert stages(lines) == [("smoke", None, 2)]


def test_a_command_ends_in_time_and_its_rows_are_kept(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    script = (
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"print('{{\"ms\": 1.5}}', file=open({str(rows)!r}, 'a'), flush=True)\ntime.sleep(600)"
    )
    runner = Runner(tmp_path / "found.jsonl", tmp_path / "log.txt", hang=60.0)
    start = time.time()
    assert runner.command(Command("step", ["-c", script], rows=rows), 6.0) is None
    assert 5.5 < time.time() - start < 20
    lines = results.read(runner.found)
    assert results.rows(lines, "step") == [{"ms": 1.5, "kind": "row", "stage": "step"}]
    assert stages(lines) == [("step", "cut off after 6 s", 0)]


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
            "time": ["again", "ceilings", "step", "fidelity", "ops", "profile", "float8", "small"],
        }[part]
    )
    least = dict(runner.ran)
    if limit >= parts.LIMITS[part]:
        assert all(seconds >= parts.LEAST for stage, seconds in runner.ran if stage not in ("float8", "small")), (
            runner.ran
        )
        # The most telling has most of its time even there.
        assert least["smoke" if part == "check" else "step"] >= 60


@pytest.mark.parametrize(("limit", "most"), [(260.0, 260.0), (750.0, 400.0), (3600.0, 3600.0)])
def test_check_leaves_time_for_the_other_command(limit: float, most: float, tmp_path: Path) -> None:
    """With what is left of a quarter of an hour as its limit, too, though everything takes as long as it may."""
    run, runner = a_run("check", limit, tmp_path)
    parts.PARTS["check"](run)
    assert runner.now <= most


def test_time_repeats_nothing_where_nothing_failed(tmp_path: Path) -> None:
    results.append(tmp_path / results.NAME, Item("a", "smoke", "passed").line | {"earlier": True})
    run, runner = a_run("time", 330.0, tmp_path)
    parts.PARTS["time"](run)
    assert "again" not in dict(runner.ran) and dict(runner.ran)["step"] >= 120


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
        for path in (models.ROOT / "tests").glob("test_*.py")
        if "pytest.mark.gpu" in path.read_text() and path.name != Path(__file__).name
    }
    assert marked and marked <= {*parts.DEVICE_TESTS}
    assert all((models.ROOT / file).exists() for file in (*parts.DEVICE_TESTS, parts.SMOKE_FILE, parts.OPS_FILE))


# Resuming


@linux
def test_a_killed_run_is_resumed_until_it_is_complete(tmp_path: Path) -> None:
    """Killed outright at three moments, each run going on from the one before; the last comes to its end."""
    names = [f"test_{letter}" for letter in "abcdef"]
    file = tmp_path / "test_slow.py"
    bodies = "".join(f"def {name}():\n    time.sleep(0.4)\n    assert '{name}' != 'test_b'\n" for name in names)
    file.write_text(f"import time\n{bodies}")
    out, seen = tmp_path / "out", 0
    arguments = ["--part", "check", "--also", file, "--only", "*test_slow.py::*", "--workers", 1, "--out", out]
    for most in (0, 2, 4):
        process = started(*arguments)
        wait_for(lambda: (out / results.NAME).exists() and len(outcomes(out)) >= most, process)  # noqa: B023
        process.kill()
        process.communicate(timeout=60)
        seen = len(outcomes(out))
        assert most <= seen < len(names), "it was killed too late"
        arguments += ["--resume", out] if "--resume" not in arguments else []
    last = started(*arguments)
    printed, _ = last.communicate(timeout=120)
    assert last.returncode == 1, printed
    assert outcomes(out) == {name: "failed" if name == "test_b" else "passed" for name in names}
    lines = results.read(out / results.NAME)
    # The last run has not tried again what was found right before.
    right = {line["id"] for line in lines if line.get("earlier") and line.get("outcome") == "passed"}
    begun = Counter(line["id"] for line in lines if line["kind"] == "begin")
    assert len(right) >= 3 and not right & begun.keys() and set(begun.values()) == {1}
    # ... and what failed it tried again, last.
    assert [line["id"] for line in lines if line["kind"] == "begin"][-1].endswith("test_b")


def wait_for(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.time() + 60
    while not happened():
        assert process.poll() is None and time.time() < end
        time.sleep(0.02)


@linux
def test_a_run_that_is_told_to_stop_writes_its_table(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text("import time\ndef test_a():\n    pass\ndef test_b():\n    time.sleep(600)\n")
    out = tmp_path / "out"
    given = ["--also", tmp_path / "test_slow.py", "--only", "*test_slow.py::*", "--workers", 1, "--out", out]
    process = started("--part", "check", *given)
    wait_for(lambda: (out / results.NAME).exists() and "test_a" in outcomes(out), process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "  stopped" in printed and (out / table.NAME).read_text().strip() in printed


def test_what_a_resumed_run_takes_over() -> None:
    ground = {"device": "a", "torch": "1", "triton": "2", "commit": None}
    run = {"kind": "run", "part": "check", "environment": ground}
    ended = {"kind": "stage", "stage": "step", "problem": None, "left": 0, "only": None}
    timing = Item("timing", "ops", "passed", values={"seconds": [1.0]})
    lines = [
        run,
        {"kind": "begin", "id": "cut"},
        Item("right", "smoke", "passed").line,
        Item("wrong", "smoke", "hung").line,
        timing.line,
        {"kind": "row", "stage": "step", "ms": 1.0},
        {"kind": "row", "stage": "step", "digest": {}},
        ended,
        ended | {"stage": "ops", "left": 3},
        ended | {"stage": "smoke", "only": "*glu*"},
    ]
    same = results.carried_over(lines, run)
    assert all(line["earlier"] for line in same)
    assert [line.get("id") or line.get("stage") for line in same] == ["right", "wrong", "timing", *["step"] * 3]
    # Of another part, or on another device, no measurement; but what was wrong, and the bits to compare.
    for other in (run | {"part": "time"}, run | {"environment": ground | {"device": "b"}}):
        taken = results.carried_over(lines, other)
        assert [line.get("id") or "digest" in line for line in taken] == ["right", "wrong", True]
    assert results.settled(same) == {"right", "timing"} and results.wrong(same) == {"wrong"}
    # The last word counts.
    mended = [*same, {"kind": "begin", "id": "wrong"}, Item("wrong", "again", "passed").line]
    assert results.settled(mended) == {"right", "wrong", "timing"} and results.wrong(mended) == set()
    assert [item.outcome for item in results.items(mended)] == ["passed"] * 3
    # What was skipped, for want of time or memory, is tried again.
    assert results.settled([Item("skipped", "ops", "skipped", reason="time").line | {"earlier": True}]) == set()


def test_a_line_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / results.NAME
    results.append(path, {"kind": "row", "stage": "a"})
    with path.open("ab") as stream:
        stream.write(b'{"kind": "row", "sta')
    assert results.read(path) == [{"kind": "row", "stage": "a"}]
    assert results.read(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("id", "glob", "expected"),
    [("f.py::t[a-b]", "f.py::t[a-b]", True), ("f.py::t[a-b]", "*[a-?]", True), ("f.py::tb", "f.py::t[a-b]", False)],
)
def test_only_stars_and_question_marks_are_special(id: str, glob: str, expected: bool) -> None:
    assert results.matches(id, glob) == expected


# Kernels that travel


def test_the_cache_of_kernels_travels(tmp_path: Path) -> None:
    entry = tmp_path / "there" / "KEY"
    entry.mkdir(parents=True)
    names = ["k.cubin", "k.json", "k.ttir", "k.ptx"]
    for name in names:
        (entry / name).write_text(name)
    (entry / "__grp__k.json").write_text(json.dumps({"child_paths": {name: str(entry / name) for name in names}}))
    assert cache.pack(tmp_path / "there", tmp_path / cache.NAME).startswith("1 entries")
    here = tmp_path / "here"
    assert cache.unpack(tmp_path / cache.NAME, here) == 3
    assert cache.unpack(tmp_path / cache.NAME, here) == 0  # all there
    assert sorted(path.name for path in (here / "KEY").iterdir()) == ["__grp__k.json", "k.cubin", "k.json"]
    index = json.loads((here / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert index == {name: str(here / "KEY" / name) for name in ("k.cubin", "k.json")}
    assert cache.kernels(here) == 1


def test_a_cache_writes_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name in ("../x.json", "a/../../x.json", "x.json"):
            tar.add(tmp_path / "x.json", name)
    assert cache.unpack(tmp_path / "bad.tar", tmp_path / "here") == 0


@linux
def test_kernels_compiled_before_are_found(tmp_path: Path) -> None:
    """Packed, unpacked elsewhere, and asked for again: Triton compiles none of them."""
    compile_one = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.reporter", "benchmarks/gpu/variants.py"]
    compile_one += ["--size=tiny", "--arch=sm_90", "-k", "glu", "-W", "default", "-p", "no:cacheprovider"]

    def compiled(folder: Path) -> set[str]:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
        done = subprocess.run(
            compile_one, cwd=models.ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout
        return {path.name for path in folder.rglob("*.ttir")}

    assert compiled(tmp_path / "first")
    cache.pack(tmp_path / "first", tmp_path / cache.NAME)
    cache.unpack(tmp_path / cache.NAME, tmp_path / "second")
    before = cache.kernels(tmp_path / "second")
    # What is compiled leaves its stages behind; what is found has none.
    assert compiled(tmp_path / "second") == set() and cache.kernels(tmp_path / "second") == before > 0


# The table


def failing(i: int, error: str = "ValueError: no", off: dict | None = None) -> Item:
    id = f"benchmarks/gpu/smoke.py::test_op[glu-full-float32-llama-2-7b-{i}]"
    return Item(id, "smoke", "failed", 1.0, error, f"x.py:{len(error)}: in f", {"off": off} if off else {})


def test_the_table_stays_short() -> None:
    run = {"kind": "run", "part": "check", "tiny": False, "limit": 260.0, "environment": models.environment("cpu")}
    many = [failing(i, f"Error{i % 50}: {'x' * (i % 50)}").line for i in range(2000)]
    text = table.table([run, *many], "repeat")
    assert len(text) < 10_000 and "more lines: results.jsonl has all of it" in text
    assert text.count(" x failed: ") > 20


def test_errors_are_told_apart_and_no_number_is_the_worst() -> None:
    items = [
        failing(1),
        failing(2),
        failing(3, "ValueError: other"),
        failing(4, off={"y": (1.0, 2.0), "dx": (3.0, 1.5)}),
    ]
    assert [len(group) for group in table.alike(items).values()] == [3, 1]
    assert table.over_allowed(items[3]) == 2.0
    nan = failing(5, off={"y": (float("nan"), 1.0), "dx": (3.0, 1.0)})
    assert table.over_allowed(nan) != table.over_allowed(nan)
    assert table.Problem.of(items[0].id) == ("glu", "full", "float32", "llama-2-7b-1")
    contract = "tests/test_kernels.py::test_agrees_with_the_oracle[cuda-half-bfloat16-attention-more-than-a-tile]"
    assert table.Problem.of(contract) == ("attention", "half", "bfloat16", "more-than-a-tile")


def test_a_verdict_is_of_what_was_tried() -> None:
    run = {"kind": "run", "part": "check"}
    ended = {"kind": "stage", "stage": "smoke", "problem": None, "left": 0, "late": False}
    right, wrong = Item("a", "smoke", "passed").line, Item("b", "smoke", "died").line
    late = ended | {"problem": "cut off after 9 s", "late": True}
    for lines, expected in (
        ([right, ended], 0),
        ([right, wrong, ended], 1),
        ([right, ended | {"problem": "ended with code 1"}], 1),
        ([ended], 2),  # of an --only that has nothing in it
        ([right, ended | {"left": 4}], 3),
        ([right, late], 3),
        ([right, late | {"earlier": True}, ended], 0),
    ):
        assert table.verdict([run, *lines]).code == expected, lines


def step_row(contender: str, ms: float, rounds: int, **more: Any) -> dict[str, Any]:
    row = {"kind": "row", "stage": "step", "contender": contender, "padding": "real", "dtype": "bfloat16", "ms": ms}
    row |= {"floor_ms": 1.0, "tflops_per_s": 1.0, "peak_memory": 2**30, "rounds": rounds, "launches": None}
    return row | {"task_shape": [10, 128], "round_ms": [ms] * rounds, "ratio_to_plain_sft": None} | more


def test_steps_are_told_by_the_most_rounds_and_judged_though_cut_off() -> None:
    environment = models.environment("cpu") | {"device": "NVIDIA H100 80GB HBM3"}
    digest = {"dtype": "bfloat16", "layers": 2, "first": "a" * 64, "again": "a" * 64, "identical": True}
    lines = [
        {"kind": "run", "part": "time", "tiny": False, "limit": 330.0, "environment": environment},
        {"kind": "row", "stage": "step", "model": "llama-2-7b"},
        {"kind": "row", "stage": "step", "digest": digest, "earlier": True},
        {"kind": "row", "stage": "step", "digest": digest},
        {"kind": "row", "stage": "step", "contender": "lagged", "reason": "of an earlier run"},
        {"kind": "row", "stage": "step", "contender": "tidy", "reason": "OutOfMemoryError"},
        step_row("plain-sft", 10.0, 22, earlier=True),
        step_row("lagged", 18.0, 22, earlier=True),
        step_row("lagged", 99.0, 2),
    ]
    text = table.table(lines, "")
    assert "18.0 ms" in text and "99.0 ms" not in text
    assert (
        "met              llama-2-7b on H100 or H200, bfloat16: lagged, ms over plain-sft's <= 2: 1.8 (1.8 to 1.8)"
        in text
    )
    assert "step: tidy: OutOfMemoryError" in text and "of an earlier run" not in text
    assert f"digest bfloat16, 2 layers: the same in 2 runs: {'a' * 16}" in text
    lines[3] = lines[3] | {"digest": digest | {"again": "b" * 64}}
    assert "digest bfloat16, 2 layers: DIFFERENT in 2 runs" in table.table(lines, "")


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


def test_reasons_name_no_folder() -> None:
    assert results.brief(f"in {models.ROOT}/x.py,\n {Path.home()}/y and /usr/lib/w.so") == "in x.py, y and w.so"


def test_one_test_of_each_kind_comes_first(pytester_items: list[Any]) -> None:
    order = [item.nodeid for item in reporter._spread(pytester_items)]
    assert order == ["a[0]", "b[0]", "a[1]", "b[1]", "a[2]"]


@pytest.fixture
def pytester_items() -> list[Any]:
    return [argparse.Namespace(nodeid=id) for id in ("a[0]", "a[1]", "a[2]", "b[0]", "b[1]")]


# The command


def test_bad_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = ["--out", str(tmp_path / "out")]
    for arguments, reason in (
        ([], "no GPU is at hand; --tiny goes through every stage without one"),
        (["--tiny", "--limit", "3"], "--limit must be more than 6 s, but is 3"),
        (["--tiny", "--resume", str(tmp_path)], "holds no results.jsonl; name the --out of an earlier run"),
        (["--tiny", "--also", "nowhere.py"], "nowhere.py does not exist"),
        (["--tiny", "--sanitize", "glu"], "--sanitize belongs to --part check, on a GPU"),
        (["--sanitize", "typo"], "no GPU is at hand"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command.main(["--part", "check", *out, *arguments])
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing was touched
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        command.main(["--part", "check", *out])
    assert "keeps kernels off the GPU" in capsys.readouterr().err


@linux
def test_the_whole_of_both_parts_runs(tmp_path: Path) -> None:
    """In Triton's interpreter, on shapes that take no time."""
    checked, timed = tmp_path / "check", tmp_path / "time"
    for part, out, more in (("check", checked, []), ("time", timed, ["--resume", checked])):
        process = started("--part", part, "--out", out, *more)
        printed, _ = process.communicate(timeout=500)
        assert process.returncode == 0, printed + (out / command.LOG).read_text()[-5000:]
        assert "nothing was measured" in printed and "ALL WAS TRIED AND RIGHT" in printed
    lines = results.read(checked / results.NAME)
    assert [stage for stage, _, _ in stages(lines)] == ["compile", "smoke", "tests", "step"]
    right = Counter(item.stage for item in results.items(lines) if item.outcome == "passed")
    assert right["compile"] >= 8 and right["smoke"] >= 24 and right["tests"] >= 8
    assert {result.values["off"]["y"][1] > 0 for result in results.items(lines) if "rms_norm-full" in result.id} == {
        True
    }
    assert {row["contender"] for row in results.rows(lines, "step") if "ms" in row} == {"plain-sft", "lagged"}
    lines = results.read(timed / results.NAME)
    ended = [line["stage"] for line in lines if line["kind"] == "stage" and not line.get("earlier")]
    assert ended == ["ceilings", "step", "fidelity", "ops", "profile"]
    assert {row["model"] for row in results.rows(lines, "fidelity")} == {"tiny"}
    assert "<svg" in (timed / keep.PAGE).read_text()
    assert keep.main([str(timed), "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("tiny-time-*.json")
    kept = json.loads(path.read_text())
    assert kept["part"] == "time" and not kept["wrong"] and path.with_suffix(".html").exists()
    times = [row for row in kept["ops"] if {"us", "GB/s"} <= row["contenders"]["ours"].keys()]
    assert len(times) == 2 * 8
