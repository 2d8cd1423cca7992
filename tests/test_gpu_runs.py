"""Runs of ``benchmarks.gpu`` lose nothing to what may happen to them: planted failures of every kind, kills, hangs, and
limits on a slow machine. All of it without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import record
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cache, keep, results, table
from benchmarks.gpu.processes import Command, Runner, Tests, grace_of

linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is Linux-only")


def started(*arguments: Any) -> subprocess.Popen:
    """Start the command as a user would."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--tiny", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=record.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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
    """A program such as compute-sanitizer tells by its exit code, after all tests have passed."""
    (tmp_path / "test_it.py").write_text("def test_a():\n    pass\n")
    watching = ("sh", "-c", '"$@"; exit 99', "sh")
    lines = ran(tmp_path, Tests("sanitize", [str(tmp_path / "test_it.py")], before=watching), 60.0)
    assert [item.outcome for item in results.items(lines)] == ["passed"]
    assert stages(lines) == [("sanitize", "a process came to its end with code 99; log.txt says why", 0)]


def test_a_file_that_cannot_be_imported_is_a_failure_of_its_own(tmp_path: Path) -> None:
    """A file that cannot be imported costs no test of another file."""
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
    """Here all but a test that runs until nothing may begin any more."""
    seconds = 9.0
    late = time.time() + seconds - grace_of(seconds) + 0.5
    (tmp_path / "test_it.py").write_text(
        f"import time\ndef test_a():\n    time.sleep({late} - time.time())\n"
        "def test_b():\n    pass\ndef test_c():\n    pass\n"
    )
    lines = ran(tmp_path, Tests("smoke", [str(tmp_path / "test_it.py")]), seconds)
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
    """Both parts run in Triton's interpreter, on shapes that take no time."""
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
