"""What the profiler counts, and what it predicts from it."""

from typing import Any

import pytest
import torch
from oracle import ALL_LINEAR, random_batch, random_pairs, tiny_model
from profiles import contenders, f32
from steps import CONFIG
from torch.utils.flop_counter import FlopCounterMode

import sap_fast
from sap_fast import SAPConfig
from sap_fast.ops._cases import OpCases, every_op, pose, run
from sap_fast.ops._library import flop_formula, raw_ops
from sap_fast.profiling.advice import Parts, advise
from sap_fast.profiling.assemble import _floor
from sap_fast.profiling.counting import Counter, Work
from sap_fast.profiling.flops import matrix_flops
from sap_fast.profiling.trace import kernels

# Counting


def test_flops_of_a_forward_pass_are_those_of_its_weights() -> None:
    model, batch, pairs = tiny_model(dtype=f32, targets=ALL_LINEAR), random_batch(), random_pairs()
    with sap_fast.attach(model, CONFIG) as sap:
        found = contenders(model, sap)
        work = {}
        for key in ("sft", "sap"):
            with Counter() as counter:
                found[key].run(batch, pairs, counter.begin)
            work[key] = counter.work
    layers = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    frozen = sum(p.numel() for p in layers if not p.requires_grad)
    adapters = sum(p.numel() for p in layers if p.requires_grad)
    lengths = batch["attention_mask"].sum(1)
    scores = 4 * 4 * int((lengths * (lengths + 1) // 2).sum()) * 8  # layers, heads, what a causal mask leaves, head_dim
    rows, scored = int(lengths.sum()), int((batch["labels"][:, 1:] != -100).sum())
    head = 32 * 37 * scored
    assert work["sft"]["forward"].flops == 2 * (rows * (frozen + adapters) + 2 * scores)
    assert work["sap"]["dual_forward"].flops == 2 * (rows * (2 * frozen + 3 * adapters) + 6 * scores)
    assert work["sft"]["head"].flops == 2 * 2 * head  # the logits, and the product with their cotangents
    assert work["sap"]["dual_head"].flops == 2 * work["sft"]["head"].flops


def test_flops_of_grouped_attention_are_those_of_its_query_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch's own formula takes only as many heads of keys as of queries, as that of torch 2.11 does."""
    from torch.utils import flop_counter

    def of_equal_heads(q: Any, k: Any, v: Any) -> int:
        assert q[:2] == k[:2] == v[:2]
        return 2 * 2 * q[0] * q[1] * q[2] * k[2] * q[3]

    monkeypatch.setattr(flop_counter, "sdpa_flop_count", of_equal_heads)
    q, k, v, do = (torch.zeros(1, heads, 5, 8) for heads in (4, 2, 2, 4))
    ops = torch.ops.aten
    forward = matrix_flops(ops._scaled_dot_product_flash_attention.default, (q, k, v), {}, None)
    backward = matrix_flops(ops._scaled_dot_product_flash_attention_backward.default, (do, q, k, v), {}, None)
    assert (forward, backward) == (2 * 2 * 4 * 5 * 5 * 8, 5 * 2 * 4 * 5 * 5 * 8)


@pytest.mark.parametrize("halves", [1, 2])
def test_flops_of_adapters_are_those_of_their_rules(halves: int) -> None:
    """The products are written out, and counted by PyTorch."""
    rows, width, out, rank = 7, 12, 10, 3
    x, dy = torch.randn(2, rows, width), torch.randn(2, rows, out)
    w, a, b = torch.randn(out, width), torch.randn(rank, width), torch.randn(out, rank)
    a_dot, b_dot = torch.randn_like(a), torch.randn_like(b)
    with FlopCounterMode(display=False) as forward:
        x[0] @ w.T, (x[0] @ a.T) @ b.T
        if halves == 2:
            x[1] @ w.T, (x[1] @ a.T + x[0] @ a_dot.T) @ b.T, (x[0] @ a.T) @ b_dot.T
    again = 2 * rows * rank * width * (halves - 1)  # x A^T, which a rule may keep
    with FlopCounterMode(display=False) as backward:
        of_dot = dy[1] @ b
        dy[1] @ w, of_dot @ a, dy[1].T @ (x[0] @ a.T), of_dot.T @ x[0]
        if halves == 2:
            dy[0] @ w, (dy[0] @ b + dy[1] @ b_dot) @ a, of_dot @ a_dot
    named = {"x": x[:halves], "weight": [w], "a": [a], "need_dx": True, "dy": [dy[:halves]]}
    assert flop_formula("lora_linear")(named) == forward.get_total_flops() - again
    assert flop_formula("lora_linear_backward")(named) == backward.get_total_flops()


@pytest.mark.parametrize(("window", "used"), [(0, None), (3, None), (1, None), (0, [4, 2]), (3, [4, 0])])
def test_attention_counts_what_its_mask_leaves(window: int, used: list[int] | None) -> None:
    ends, heads, head_dim = [0, 5, 7], 2, 4
    lengths = [5, 2] if used is None else used
    seen = sum(1 for n in lengths for i in range(n) for j in range(i + 1) if not window or i - j < window)
    x = torch.randn(2, 9, heads, head_dim)
    named = {"q": x, "do": x[:1], "cu_seqlens": torch.tensor(ends), "window": window}
    named |= {"seqused": None if used is None else torch.tensor(used), "cu_seqlens_k": None}
    assert flop_formula("attention")(named) == 6 * 2 * seen * heads * head_dim
    assert flop_formula("attention_backward")(named) == 5 * 2 * seen * heads * head_dim


@pytest.mark.parametrize("window", [0, 1, 3])
def test_attention_counts_what_queries_at_the_end_see(window: int) -> None:
    queries, keys, heads, head_dim = [2, 0, 4], [5, 3, 4], 2, 4
    seen = sum(
        1
        for n, n_k in zip(queries, keys, strict=True)
        for i in range(n_k - n, n_k)
        for j in range(i + 1)
        if not window or i - j < window
    )
    x = torch.randn(2, 6, heads, head_dim)
    named = {"q": x, "cu_seqlens": torch.tensor([0, 2, 2, 6]), "cu_seqlens_k": torch.tensor([0, 5, 8, 12])}
    named |= {"seqused": None, "window": window}
    assert flop_formula("attention")(named) == 6 * 2 * seen * heads * head_dim


@pytest.mark.parametrize("op", every_op(), ids=lambda op: op.name)
def test_every_op_of_the_library_can_be_counted(op: OpCases) -> None:
    case = max((case for case in op.cases if case.purpose == "contract"), key=lambda case: case.flops)
    with Counter() as counter:
        counter.begin("op")
        run(op, pose(op, case, torch.Generator().manual_seed(0)))
    assert (counter.work["op"].flops > 0) == (case.flops > 0)


def test_every_raw_op_has_a_formula() -> None:
    assert all(callable(flop_formula(name)) for name in raw_ops())


def test_bytes_are_those_of_the_operands() -> None:
    x, table, index = torch.ones(4, 5), torch.ones(100, 5), torch.tensor([1, 2, 3])
    with Counter() as counter:
        counter.begin("add")
        x + x
        counter.begin("gather")
        table.index_select(0, index)
        counter.begin("fill")
        torch.zeros_like(x)
        counter.begin("in place")
        torch._foreach_add_([x, x], 1.0)
        counter.begin("nothing")
        x.view(20)
        torch.empty(7)
    found = {phase: (work.ops, work.bytes) for phase, work in counter.work.items()}
    assert found == {
        "add": (1, 3 * 80),
        "gather": (1, 2 * 60 + 24),
        "fill": (1, 80),
        "in place": (1, 4 * 80),
        "nothing": (0, 0),
    }


def test_kernels_belong_to_the_phase_that_launched_them() -> None:
    def mark(at: float, name: str) -> dict:
        return {"ph": "X", "cat": "user_annotation", "name": f"sap_fast:{name}", "ts": at, "dur": 1}

    def launch(at: float, number: int, ran_at: float, lasted: float, cat: str = "kernel") -> list[dict]:
        return [
            {"ph": "X", "cat": "cuda_runtime", "ts": at, "dur": 1, "args": {"correlation": number}},
            {"ph": "X", "cat": cat, "ts": ran_at, "dur": lasted, "args": {"correlation": number}},
        ]

    events = [mark(30, "sap:head"), mark(10, "sap:forward"), mark(50, "sap:end"), mark(60, "sft:forward")]
    # The second runs while the next phase's host code does; the fourth was launched by nobody who was asked.
    events += [*launch(12, 1, 13, 2), *launch(29, 2, 40, 3), *launch(31, 3, 43, 4, "gpu_memset")]
    events += [*launch(55, 4, 56, 9), *launch(61, 5, 62, 5), *launch(5, 6, 6, 7)]
    events += [{"ph": "X", "cat": "gpu_user_annotation", "name": "sap_fast:sap:write", "ts": 11, "dur": 1}]
    found = {key: {p: (k.count, k.seconds * 1e6) for p, k in of.items()} for key, of in kernels(events).items()}
    assert found == {
        "sap": {"forward": (2, pytest.approx(5)), "head": (1, pytest.approx(4))},
        "sft": {"forward": (1, pytest.approx(5))},
    }


# Advice


def test_predictions_follow_from_the_phase_times() -> None:
    full = {"data": 2.0, "direction_forward": 20.0, "direction_backward": 30.0, "dual_forward": 16.0}
    full |= {"backward_above": 8.0, "backward_beneath": 6.0, "update": 1.0, "optimizer": 3.0}
    plain = {"data": 1.0, "forward": 8.0, "backward": 8.0, "optimizer": 3.0}
    config = SAPConfig()
    parts = Parts.of(full, plain, config, batch=8, pairs=8)
    assert parts == Parts(50.0, 30.0, 16.0, 6.0, 5.0, 1.0, 8)
    assert parts.seconds(config, 8, 8) == 86
    assert parts.seconds(config.replace(direction_every=4), 8, 8) == pytest.approx(50 / 4 + 36)
    assert parts.seconds(config.replace(probe_every=8), 8, 8) == pytest.approx((86 + 7 * 21) / 8)
    assert parts.seconds(config.replace(tangent_fraction=0.25), 8, 8) == pytest.approx(50 + 6 + 16 + 14 / 4)
    assert parts.seconds(config.replace(pairs_per_step=2), 8, 8) == pytest.approx(50 / 4 + 36)
    found = advise(parts, config, 8, 8, ratio=4.3)
    predicted = {tuple(advice.changes.items()): advice.predicted_ratio for advice in found}
    assert predicted == pytest.approx(
        {
            (("direction_every", 4),): 4.3 * 48.5 / 86,
            (("tangent_fraction", 0.25),): 4.3 * 75.5 / 86,
            (("direction_every", 4), ("tangent_fraction", 0.25)): 4.3 * 38 / 86,
            (("probe_every", 4),): 4.3 * (86 + 3 * 21) / 4 / 86,
            (("probe_every", 8),): 4.3 * (86 + 7 * 21) / 8 / 86,
            (("pairs_per_step", 2),): 4.3 * 48.5 / 86,
        }
    )
    assert [advice.predicted_ratio for advice in found] == sorted(predicted.values())
    assert found[0].text == (
        "probe_every=8 predicts 1.46x plain SFT, now 4.30x (of the time the pairs hold 58% and finding the probe 16%)"
    )


def test_what_an_option_in_use_has_saved_is_accounted_for() -> None:
    """Measured under options, predicted back to none of them."""
    full = {"direction_forward": 10.0, "dual_forward": 19.0, "optimizer": 1.0}
    plain = {"forward": 16.0, "optimizer": 1.0}
    config = SAPConfig(tangent_fraction=0.25, pairs_per_step=2, direction_every=2)
    parts = Parts.of(full, plain, config, batch=4, pairs=8)
    assert parts.seconds(config, 4, 8) == pytest.approx(10 / 2 + 19 + 1)
    assert parts.seconds(SAPConfig(), 4, 8) == pytest.approx(40 + 28 + 1)


def test_advice_is_only_what_the_settings_take() -> None:
    parts = Parts(50.0, 30.0, 16.0, 6.0, 5.0, 1.0, 8)

    def changed(**settings: Any) -> set[str]:
        config = SAPConfig(**settings)
        return {name for advice in advise(parts, config, 8, 8, 4.0) for name in advice.changes}

    assert changed() == {"direction_every", "tangent_fraction", "probe_every", "pairs_per_step"}
    assert changed(guard="project") == {"direction_every", "pairs_per_step"}
    assert changed(schedule="fresh") == {"direction_every", "probe_every", "pairs_per_step"}
    assert changed(probe_every=8, direction_every=8) == {"tangent_fraction", "pairs_per_step"}
    nothing = Parts(0.0, 16.0, 16.0, 6.0, 5.0, 1.0, 8)
    assert [a.changes for a in advise(nothing, SAPConfig(), 8, 8, 1.0) if "probe_every" not in a.changes] == []


@pytest.mark.parametrize(
    ("peak", "bandwidth", "floor"),
    [(10.0, None, 3.0), (None, 4.0, 5.0), (10.0, 4.0, 5.0), (10.0, 8.0, 3.0 + 1.0), (None, None, None)],
)
def test_the_floor_is_products_and_then_what_is_row_wise(
    peak: float | None, bandwidth: float | None, floor: float | None
) -> None:
    assert _floor(Work(ops=2, bytes=20, rowwise_bytes=8, flops=30), peak, bandwidth) == floor


def test_bytes_of_products_are_not_row_wise() -> None:
    x = torch.ones(4, 4)
    with Counter() as counter:
        counter.begin("forward")
        (x @ x).exp()
    assert counter.work["forward"] == Work(ops=2, bytes=3 * 64 + 2 * 64, rowwise_bytes=2 * 64, flops=2 * 4**3)
