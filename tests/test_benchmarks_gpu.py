"""The command for a GPU, as far as it can be tried without one: its contenders are right, its clock and its limits
hold, and ``--tiny`` goes through all of it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from agreement import assert_agrees
from test_benchmarks import read
from torch import Tensor
from torch.nn import functional as F

from benchmarks import eager_pairs, fidelity, gpu, gpu_ops, gpu_session, gpu_steps, gpu_table, models, peers
from benchmarks.contenders import PASSES, TOLERANCE, Recorder
from benchmarks.device_timer import DeviceTimer
from benchmarks.gpu_ops import MANY, Stage, Subject, Visit, Widths
from benchmarks.gpu_session import Session, Test
from sap_fast.ops._cases import Case, OpCases, Problem, cases_for, derive, pose, run
from sap_fast.ops.rms_norm.reference import primal as rms_norm
from sap_fast.ops.rotary.reference import primal as rotary

MODES = {"full": lambda pair: pair, "half": Problem.half, "single": Problem.single}


# The formulas written by hand


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op.name}-{case.name}") for op, case in cases_for("contract")]
)
def test_eager_pairs_are_the_rules_derived(op: OpCases, case: Case, mode: str) -> None:
    problem = MODES[mode](pose(op, case, torch.Generator().manual_seed(0)))
    with Recorder(eager_pairs.rule) as recorder:
        actual = run(op, problem)
    assert [function.__module__ for function, _, _ in recorder.calls] == [eager_pairs.__name__] * 2
    truth = derive(op, problem)
    assert actual.keys() == truth.keys()
    assert_agrees(actual, truth)


@pytest.mark.parametrize("name", ["attention", "lora_linear", "linear_cross_entropy"])
def test_eager_pairs_compile_to_one_graph(name: str) -> None:
    """... so that the comparison with torch.compile is one with its best."""
    subject = Subject(name, "tiny", 8, 4 if name == "attention" else 0)
    with Recorder(eager_pairs.rule) as recorder:
        run(gpu_ops.op_named(name), gpu_ops.posed(subject, "cpu", torch.float32))
    for function, arguments, _ in recorder.calls:
        torch.compile(function, backend="eager", fullgraph=True, dynamic=False)(*arguments)


# Contenders


@pytest.fixture
def middling(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model wide enough for bfloat16 errors to average out."""
    monkeypatch.setitem(gpu_ops.MODELS, "middling", Widths(256, 512, 300, 4, 2, 64))
    return "middling"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("op", [op.name for op in gpu_ops.every_op()])
def test_contenders_are_found_right(op: str, dtype: torch.dtype, middling: str) -> None:
    stage, length = Stage("cpu", dtype), 32 if op == "attention" else 0
    for name in ("eager", "ours"):
        for pass_ in PASSES:
            found = stage.checked(Visit(Subject(op, middling, 64, length), pass_, name, 1))
            assert found.moved[pass_] > 64 * 64 * dtype.itemsize


def test_bytes_are_those_of_inputs_and_outputs() -> None:
    found = Stage("cpu", torch.bfloat16).checked(Visit(Subject("glu", "tiny", 8), "backward", "eager", 1))
    # gate, up, dy, dgate, dup: two halves of 8 rows of 48, two bytes each.
    assert found.moved["backward"] == 5 * 2 * 8 * 48 * 2


def test_a_wrong_contender_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = eager_pairs.glu
    monkeypatch.setattr(eager_pairs, "glu", lambda *args: 1.01 * right(*args))
    stage = Stage("cpu", torch.float32)
    stage.checked(Visit(Subject("glu", "tiny", 8), "forward", "ours", 1))
    with pytest.raises(AssertionError, match=r"y is off by 0\.01 of its norm"):
        stage.checked(Visit(Subject("glu", "tiny", 8), "forward", "eager", 1))


def plain_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return rms_norm(x, weight, eps, offset)[0]


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    turned = rotary(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
    return (*(x.transpose(0, 1)[None] for x in turned), cos, sin)


# What Liger's functions compute, in PyTorch: ``{op: (module, function, apply)}``.
LIGER: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "rms_norm": ("rms_norm", "LigerRMSNormFunction", plain_norm),
    "probe_rms_norm": (
        "fused_add_rms_norm",
        "LigerFusedAddRMSNormFunction",
        lambda x, r, *args: (plain_norm(x + r, *args), x + r),
    ),
    "glu": ("swiglu", "LigerSiLUMulFunction", lambda gate, up: F.silu(gate) * up),
    "rotary": ("rope", "LigerRopeFunction", plain_rope),
}


@pytest.mark.parametrize("op", LIGER)
def test_liger_is_called_as_it_wants_to_be(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, apply = LIGER[op]
    name = f"liger_kernel.ops.{module}"
    for parent in ("liger_kernel", "liger_kernel.ops", name):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setattr(sys.modules[name], function, type(function, (), {"apply": staticmethod(apply)}), raising=False)
    stage = Stage("cpu", torch.float32)
    for pass_ in PASSES:
        found = stage.checked(Visit(Subject(op, "tiny", 8), pass_, "liger", 1))
        assert len(found.functions[pass_]()) == 2


@pytest.mark.parametrize("which", ["is_causal", "window_size", "none"])
def test_flash_is_called_as_it_wants_to_be(which: str, middling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PyTorch's packed attention there are two signatures; without it, a batch of equal lengths is attended to."""
    seen: list[Any] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return peers._flash_of_equal_lengths(int(lengths[1]), q.shape[-1] ** -0.5)(q, k, v)[0]

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        seen.append(is_causal)
        return attend(query, key, value, cu_seq_q)

    def new(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        seen.append(window_size == (-1, 0) and enable_gqa)
        return attend(query, key, value, cu_seq_q)

    varlen = ModuleType("torch.nn.attention.varlen")
    if which != "none":
        varlen.varlen_attn = {"is_causal": old, "window_size": new}[which]
    monkeypatch.setitem(sys.modules, varlen.__name__, varlen)
    stage = Stage("cpu", torch.float32)
    for pass_ in PASSES:
        stage.checked(Visit(Subject("attention", middling, 64, 32), pass_, "flash", 1))
    assert all(seen)
    assert bool(seen) == (which != "none")


@pytest.mark.skipif(peers.installed("liger_kernel") is not None, reason="Liger is installed")
def test_an_absent_peer_is_named() -> None:
    with pytest.raises(peers.AbsentError, match="liger_kernel is not installed"):
        Stage("cpu", torch.float32).checked(Visit(Subject("glu", "tiny", 8), "forward", "liger", 1))


def test_every_visit_has_its_name() -> None:
    everything = gpu_ops.visits(tiny=False)
    assert [Visit.parse(str(visit)) for visit in everything] == everything
    assert len(set(everything)) == len(everything)
    first = [visit.contender for visit in everything[:6]]
    assert first == ["ours", "eager", "liger", "liger", "eager", "ours"]  # both orders


# Time


def test_the_clock_stands_still_outside_of_regions() -> None:
    timer = DeviceTimer("cpu")
    with timer.region():
        time.sleep(0.02)
    counted = timer()
    time.sleep(0.05)
    assert timer() == counted
    assert 0.02 <= counted < 0.05


def test_on_a_gpu_a_region_is_the_time_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """... and nobody waits for the device before its work is queued."""
    done: list[str] = []

    class Event:
        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")
            Event.now += 2.0
            self.at = Event.now

        def synchronize(self) -> None:
            done.append("synchronize")

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = DeviceTimer("cuda")
    assert timer() == 0.0
    for _ in range(2):
        with timer.region():
            done.append("work")
    assert done == ["record", "work", "record"] * 2
    assert timer() == timer() == pytest.approx(4e-3)


def test_what_begins_too_late_is_dropped_by_name(tmp_path: Path) -> None:
    path = tmp_path / "test_it.py"
    path.write_text("def test_a():\n    assert True\ndef test_b():\n    assert True\n")
    session = gpu_session.run([str(path)], tmp_path, -1.0)
    assert (session.problem, session.dropped, session.counts["passed"]) == (None, 2, 0)
    assert {test.name: test.reason for test in session.tests} == {"test_a": "time", "test_b": "time"}


def test_what_never_ends_is_stopped_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_session, "GRACE", 0.0)
    path = tmp_path / "test_it.py"
    path.write_text(
        "import time\ndef test_a():\n    assert True\n"
        "def test_b():\n    assert 1 == 2, 'no'\ndef test_c():\n    time.sleep(600)\n"
    )
    session = gpu_session.run([str(path)], tmp_path, 10.0)
    assert session.problem == "stopped after 10 s"
    assert [test.outcome for test in session.tests][:2] == ["passed", "failed"]
    assert "no" in session.failed[0].reason
    assert "Interrupt" in capsys.readouterr().out


def test_reasons_name_no_folder() -> None:
    assert gpu_session.brief(f"in {models.ROOT}/x.py,\n {Path.home()}/y and /usr/lib/w.so") == "in x.py, y and w.so"


# Results


def timed(us: float, name: str = "ours", length: int = 2048, op: str = "attention", pass_: str = "forward") -> tuple:
    visit = Visit(Subject(op, "llama-2-7b", MANY, length), pass_, name, 1)
    return Test(f"test_op[{visit}]", "passed", "", {}), ([us * 1e-6] * 3, 10**6 if name == "ours" else None)


def test_rows_and_targets() -> None:
    found = [
        timed(10.0),
        timed(6.0, "flash"),
        timed(20.0, length=0, op="glu"),
        timed(10.0, length=0, op="rms_norm", pass_="backward"),
        timed(19.0, "liger", length=0, op="rms_norm", pass_="backward"),
    ]
    tests = [test for test, _ in found]
    skipped = timed(0.0, "compiled")[0]
    tests.append(skipped._replace(outcome="skipped", reason="time"))
    times = {test.name: data for test, data in found} | {"test_copy_first": ([1e-3], 10**8)}
    rows = gpu_table.rows(tests, times)
    assert rows[0]["contenders"]["compiled"] == {"outcome": "skipped: time"}
    assert rows[0]["contenders"]["ours"]["GB/s"] == pytest.approx(100)
    assert rows[0]["times_faster_than"] == {"flash": pytest.approx(0.6)}

    memories = [{"length": n, "forward": n, "backward": n * n} for n in (2, 4, 8)]
    verdicts = {t["target"].partition(":")[0]: t["verdict"] for t in gpu_table.targets(rows, memories)}
    assert verdicts["attention forward at 2048"] == "met"  # 10 / 6 <= 2
    assert verdicts["attention forward at 128"] == "not measured"
    assert verdicts["glu forward, llama-2-7b, 16384 rows"] == "missed"  # half of the copy's bandwidth
    assert verdicts["rms_norm backward, llama-2-7b, 16384 rows"] == "met"
    assert verdicts["rms_norm backward, 16384 rows"] == "missed"  # 1.9 x
    assert verdicts["attention forward, memory when the length doubles"] == "met"
    assert verdicts["attention backward, memory when the length doubles"] == "missed"
    assert any("compiled: skipped: time (1 rows)" in line for line in gpu_table.lines(rows))


def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for arguments, reason in (([], "no GPU is at hand"), (["--tiny"], "set TRITON_INTERPRET=1")):
        with pytest.raises(SystemExit, match="2"):
            gpu.main(["--part", "ops", *arguments])
        assert reason in capsys.readouterr().err


def test_a_failed_part_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sessions = {
        "passes": Session([Test("a", "passed", "", {})], 1.0, None),
        "fails": Session([Test("a", "failed", "no", {})], 1.0, None),
        "dropped": Session([Test("a", "skipped", "time", {})], 1.0, None),
        "stopped": Session([Test("a", "passed", "", {})], 1.0, "stopped after 9 s"),
    }
    for name, session in sessions.items():
        monkeypatch.setattr(gpu_session, "run", lambda *_: session)  # noqa: B023
        assert gpu.main(["--part", "tests", "--tiny", "--out", str(tmp_path)]) == (name != "passes"), name
    assert "FAILED" in capsys.readouterr().out


def test_a_missed_cosine_is_a_missed_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """... in bfloat16; in float32 the derivative would be wrong."""
    settings = gpu.Settings(tiny=False, limit=1.0, folder=tmp_path, smollm2=None)
    row = {"model": "llama", "when": "now", "gradient": "dual", "radius": None, "length_ratio": 1.0}
    row |= {"truth": "float32 weights"}
    monkeypatch.setattr(gpu_session, "bounded", lambda *_: 1)
    for dtype, succeeded in (("bfloat16", True), ("float32", False)):
        rows = [row | {"dtype": dtype, "cosine": 0.9}]
        (tmp_path / "fidelity.json").write_text(json.dumps({"settings": {}, "rows": rows}))
        result = gpu.fidelity(settings)
        assert result["succeeded"] == succeeded
        assert [target["verdict"] for target in result["targets"]] == (["missed"] if succeeded else [])
        assert result["skipped"] == ["smollm2: no folder was given (--smollm2)"]


def test_the_wide_model_has_a_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow one of its kind."""
    monkeypatch.setitem(fidelity.MODELS, "llama", (lambda: models.llama_base(3, 32, 2, 1024), (1, 2)))
    rows = fidelity.measure("llama", 1, None, "cpu")
    assert not [row for row in rows if fidelity.misses(row)]


def stub(rows: dict[str, list[dict[str, Any]]], codes: dict[str, int | None], seen: list[list[str]]) -> Callable:
    """Stands for ``gpu_session.bounded``: writes what ``benchmarks.step`` would have."""

    def bounded(command: list[str], log: Path, limit: float, environment: Any) -> int | None:
        seen.append([*command, f"{limit:.0f}"])
        model = command[command.index("--model") + 1]
        log.write_text("it said this")
        if model in rows:
            found = {"seconds": 1.0, "settings": {}, "skipped": [], "refused": [], "ceilings": []}
            found |= {"rows": rows[model], "targets": [{"target": model, "value": None, "verdict": "met"}]}
            Path(command[command.index("--json") + 1]).write_text(json.dumps(found))
        return codes.get(model, 0)

    return bounded


def test_the_steps_of_all_models_share_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(gpu_session, "bounded", stub({name: [] for name in gpu_steps.WEIGHTS}, {}, seen))
    settings = gpu.Settings(tiny=False, limit=900.0, folder=tmp_path, smollm2=tmp_path / "s", data=tmp_path / "d.json")
    result = gpu_steps.step(settings)
    assert result["succeeded"] and result["problem"] is None
    assert [run["model"] for run in result["runs"]] == list(gpu_steps.WEIGHTS)
    # What one leaves over goes to those after it; this one took none of it.
    assert [int(command[-1]) for command in seen] == [400, 360, 900]
    assert result["targets"] == [{"target": "llama-2-7b", "value": None, "verdict": "met"}]
    for command in seen:
        assert {"--published-shapes", "cuda", "bfloat16", str(tmp_path / "d.json")} <= {*command}
        assert ("--smollm2" in command) == ("smollm2" in command)
        assert float(command[command.index("--limit") + 1]) == int(command[-1]) - gpu_steps.ENDING


def test_a_failed_model_fails_the_part_and_the_rest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"contender": "lagged", "ms": 1.0}
    codes = {"llama-2-7b": None, "qwen2.5-7b": 1}
    monkeypatch.setattr(gpu_session, "bounded", stub({"qwen2.5-7b": [row]}, codes, []))
    result = gpu_steps.step(gpu.Settings(tiny=False, limit=900.0, folder=tmp_path))
    assert not result["succeeded"]
    assert result["problem"] == ("llama-2-7b: stopped, it took too long; qwen2.5-7b: benchmarks.step ended with code 1")
    assert result["rows"] == [{"model": "qwen2.5-7b", **row}]
    assert result["skipped"] == [{"contender": "all of smollm2", "reason": "no folder was given (--smollm2)"}]
    assert {target["verdict"] for target in result["targets"]} == {"not measured"}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is Linux-only")
def test_the_whole_command_runs(tmp_path: Path) -> None:
    """In Triton's interpreter, on shapes that take no time."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", "all", "--tiny", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=models.ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was measured" in done.stdout
    assert "skipped: trl is not installed" in done.stdout or peers.installed("trl")
    results = {path.name.split("-")[1]: read(path) for path in tmp_path.glob("*.json")}
    assert results.keys() == gpu.PARTS.keys()
    for result in results.values():
        assert (result["tiny"], result["succeeded"]) == (True, True)
    assert results["tests"]["passed"] > 0
    timed = [row for row in results["ops"]["rows"] if {"us", "GB/s"} <= row["contenders"]["ours"].keys()]
    assert len(timed) == 2 * len(gpu_ops.every_op())
    assert {target["verdict"] for target in results["ops"]["targets"]} == {"not measured"}
    assert {row["model"] for row in results["fidelity"]["rows"]} == {"tiny"}
    assert [row["contender"] for row in results["step"]["rows"]] == list(gpu_steps.TINY)
    assert {target["verdict"] for target in results["step"]["targets"]} == {"not measured"}
    page = results["profile"]["page"]
    assert "<svg" in (tmp_path / page).read_text() and results["profile"]["profile"]["ratios"]["sap/sft"]["median"] > 0
