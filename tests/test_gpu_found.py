"""What runs of ``benchmarks.gpu`` find, as it is told and kept: the table, verdicts, and the compiled kernels."""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import record
from benchmarks.gpu import cache, reporter, results, table
from benchmarks.gpu.results import Item

linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is Linux-only")


# Lines


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
            compile_one, cwd=record.ROOT, env=environment, capture_output=True, text=True, timeout=120
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
    run = {"kind": "run", "part": "check", "tiny": False, "limit": 260.0, "environment": record.environment("cpu")}
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
    environment = record.environment("cpu") | {"device": "NVIDIA H100 80GB HBM3"}
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


def test_reasons_name_no_folder() -> None:
    assert results.brief(f"in {record.ROOT}/x.py,\n {Path.home()}/y and /usr/lib/w.so") == "in x.py, y and w.so"


def test_one_test_of_each_kind_comes_first(pytester_items: list[Any]) -> None:
    order = [item.nodeid for item in reporter._spread(pytester_items)]
    assert order == ["a[0]", "b[0]", "a[1]", "b[1]", "a[2]"]


@pytest.fixture
def pytester_items() -> list[Any]:
    return [argparse.Namespace(nodeid=id) for id in ("a[0]", "a[1]", "a[2]", "b[0]", "b[1]")]
