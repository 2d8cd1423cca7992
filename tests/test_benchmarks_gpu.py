"""What is timed on a GPU, as far as it can be tried without one: contenders are right, the clock counts what it should,
and a table says what was found. That runs survive what may happen to them is in ``test_gpu_runs.py``."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from agreement import assert_agrees
from torch import Tensor
from torch.nn import functional as F

from benchmarks import fidelity
from benchmarks.common import models
from benchmarks.common.device_timer import DeviceTimer
from benchmarks.gpu import ops_table, subjects
from benchmarks.gpu.results import Item
from benchmarks.gpu.subjects import GpuStage, Subject, Visit
from benchmarks.ops import formulas, peers
from benchmarks.ops.contenders import PASSES, Recorder
from sap_fast.ops._cases import MANY, Case, OpCases, Problem, Widths, cases_for, derive, every_op, pose, run
from sap_fast.ops._tolerances import OF_NORM
from sap_fast.ops.attention import cases
from sap_fast.ops.rms_norm.reference import primal as rms_norm
from sap_fast.ops.rotary.reference import primal as rotary

MODES = {"full": lambda pair: pair, "half": Problem.half, "single": Problem.single}


# The formulas written by hand


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, case, id=f"{op.name}-{case.name}")
        for op, case in cases_for("contract")
        if subjects.has_formula(op.name)
    ],
)
def test_formulas_are_the_rules_derived(op: OpCases, case: Case, mode: str) -> None:
    problem = MODES[mode](pose(op, case, torch.Generator().manual_seed(0)))
    with Recorder(formulas.rule) as recorder:
        actual = run(op, problem)
    assert [function.__module__ for function, _, _ in recorder.calls] == [formulas.__name__] * 2
    truth = derive(op, problem)
    assert actual.keys() == truth.keys()
    assert_agrees(actual, truth)


@pytest.mark.parametrize("name", ["attention", "lora_linear", "linear_cross_entropy"])
def test_formulas_compile_to_one_graph(name: str) -> None:
    """The comparison with torch.compile is one with its best."""
    subject = Subject.of(subjects.op_named(name), "tiny", 8, 4)
    with Recorder(formulas.rule) as recorder:
        run(subjects.op_named(name), subjects.posed(subject, "cpu", torch.float32))
    for function, arguments, _ in recorder.calls:
        torch.compile(function, backend="eager", fullgraph=True, dynamic=False)(*arguments)


# Contenders


@pytest.fixture
def middling(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a model wide enough for bfloat16 errors to average out."""
    monkeypatch.setitem(subjects.MODELS, "middling", Widths(256, 512, 300, 4, 2, 64))
    return "middling"


@pytest.mark.parametrize("dtype", OF_NORM, ids=str)
@pytest.mark.parametrize("op", every_op(), ids=lambda op: op.name)
def test_contenders_are_found_right(op: OpCases, dtype: torch.dtype, middling: str) -> None:
    stage = GpuStage("cpu", dtype)
    for name in ("eager", "ours") if subjects.has_formula(op.name) else ("ours",):
        for pass_ in PASSES:
            found = stage.checked(Visit(Subject.of(op, middling, 64, 32), pass_, name, 1))
            assert found.moved[pass_] > 64 * 64 * dtype.itemsize


def test_the_truth_of_attention_is_derived_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are of whole sequences, the rows after the last among them."""
    op, subject = subjects.op_named("attention"), Subject("attention", "tiny", 30, 4)
    problem = subjects.posed(subject, "cpu", torch.float32)
    monkeypatch.setattr(cases, "_TOKENS_AT_ONCE", 9)
    assert [part.inputs["q"].shape[1] for part in cases._parts(problem)] == [8, 8, 8, 6]
    assert_agrees(subjects.truth(op, problem), derive(op, problem.to(torch.float64)))


def test_bytes_are_those_of_inputs_and_outputs() -> None:
    found = GpuStage("cpu", torch.bfloat16).checked(Visit(Subject("glu", "tiny", 8), "backward", "eager", 1))
    # gate, up, dy, dgate, dup: two halves of 8 rows of 48, two bytes each.
    assert found.moved["backward"] == 5 * 2 * 8 * 48 * 2


def test_a_wrong_contender_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = formulas.glu
    monkeypatch.setattr(formulas, "glu", lambda *args: 1.01 * right(*args))
    stage = GpuStage("cpu", torch.float32)
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
    stage = GpuStage("cpu", torch.float32)
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
    stage = GpuStage("cpu", torch.float32)
    for pass_ in PASSES:
        stage.checked(Visit(Subject("attention", middling, 64, 32), pass_, "flash", 1))
    assert all(seen)
    assert bool(seen) == (which != "none")


@pytest.mark.skipif(peers.installed("liger_kernel") is not None, reason="Liger is installed")
def test_an_absent_peer_is_named() -> None:
    with pytest.raises(peers.AbsentError, match="liger_kernel is not installed"):
        GpuStage("cpu", torch.float32).checked(Visit(Subject("glu", "tiny", 8), "forward", "liger", 1))


def test_every_visit_has_its_name() -> None:
    everything = subjects.visits(tiny=False)
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
    """Nobody waits for the device before its work is queued."""
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


# Results


def timed(us: float, name: str = "ours", length: int = 2048, op: str = "attention", pass_: str = "forward") -> Item:
    visit = Visit(Subject(op, "llama-2-7b", MANY, length), pass_, name, 1)
    values = {"seconds": [us * 1e-6] * 3, "bytes": 10**6 if name == "ours" else None}
    return Item(f"ops.py::test_op[{visit}]", "ops", "passed", values=values)


def test_rows_and_targets() -> None:
    items = [
        timed(10.0),
        timed(6.0, "flash"),
        timed(20.0, length=0, op="glu"),
        timed(10.0, length=0, op="rms_norm", pass_="backward"),
        timed(19.0, "liger", length=0, op="rms_norm", pass_="backward"),
        replace(timed(0.0, "compiled"), outcome="skipped", reason="time", values={}),
        Item("ops.py::test_copy_first", "ops", "passed", values={"seconds": [1e-3], "bytes": 10**8}),
    ]
    rows = ops_table.rows(items)
    assert rows[0]["contenders"]["compiled"] == {"outcome": "skipped: time"}
    assert rows[0]["contenders"]["ours"]["GB/s"] == pytest.approx(100)
    assert rows[0]["times_faster_than"] == {"flash": pytest.approx(0.6)}

    memories = [{"length": n, "forward": n, "backward": n * n} for n in (2, 4, 8)]
    verdicts = {t["target"].partition(":")[0]: t["verdict"] for t in ops_table.targets(rows, memories)}
    assert verdicts["attention forward at 2048"] == "met"  # 10 / 6 <= 2
    assert verdicts["attention forward at 128"] == "not measured"
    assert verdicts["glu forward, llama-2-7b, 16384 rows"] == "missed"  # half of the copy's bandwidth
    assert verdicts["rms_norm backward, llama-2-7b, 16384 rows"] == "met"
    assert verdicts["rms_norm backward, 16384 rows"] == "missed"  # 1.9 x
    assert verdicts["attention forward, memory when the length doubles"] == "met"
    assert verdicts["attention backward, memory when the length doubles"] == "missed"
    assert any("compiled: skipped: time (1 rows)" in line for line in ops_table.lines(rows))


def test_the_wide_model_has_a_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow model of the same kind has one."""
    monkeypatch.setitem(fidelity.MODELS, "llama", (lambda: models.llama_base(3, 32, 2, 1024), (1, 2)))
    rows = [*fidelity.measure("llama", 1, None, "cpu")]
    assert not [row for row in rows if fidelity.misses(row)]


def test_every_op_of_the_library_has_a_formula() -> None:
    ops = "attention", "glu", "linear_cross_entropy", "lora_linear", "probe_rms_norm", "rms_norm", "rotary", "take_rows"
    assert [name for name in ops if not subjects.has_formula(name)] == []
