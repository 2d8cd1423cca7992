"""Attention of ordinary passes: every backend against the oracle, and in a step."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from agreement import error, scales
from oracle import random_batch, random_pairs, tiny_model
from steps import CONFIG, CONFIGS, grads
from sync import forbidden_syncs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sap_fast
from sap_fast import SAPConfig
from sap_fast.model.attention_backends import Attention, Heads, choose, load, machine_of, with_attention
from sap_fast.model.attention_backends.choice import BACKENDS, Backend
from sap_fast.model.attention_backends.machine import problem_of
from sap_fast.model.attention_backends.packed import flash_attn_kernel, packed_attention, varlen_attn_kernel
from sap_fast.model.attention_backends.padded import padded_attention
from sap_fast.model.attention_backends.serve import Ordinary, own_attention
from sap_fast.model.read import read_decoder
from sap_fast.ops._cases import Case, OpCases, Problem, cases_for, derive, pose, run
from sap_fast.ops._tolerances import ROUNDINGS, allowed

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")
HEADS = Heads(torch.bfloat16, 128)

# Stand-ins for kernels that run on a GPU alone, by what their documentation says of their arguments.


class _Unwritten(torch.autograd.Function):
    """Puts NaN in rows from ``end`` on, forward or backward: rows that a kernel leaves as they were."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: int, backward: bool) -> Tensor:
        ctx.end, ctx.backward_too = end, backward
        y = x.clone()
        if not backward:
            y[end:] = math.nan
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        dx = dy.clone()
        if ctx.backward_too:
            dx[ctx.end :] = math.nan
        return dx, None, None


def windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
    left: int,
    right: int,
) -> Tensor:
    """Let query i of n see keys i + m - n - left to i + m - n + right of m, -1 being all."""
    ends, ends_k = (x.tolist() for x in cu_seqlens)
    for x, most in ((ends, longest[0]), (ends_k, longest[1])):
        assert max(b - a for a, b in pairwise(x)) <= most
    # Else flash-attn takes every sequence to have one query.
    assert longest[0] > 1
    q = _Unwritten.apply(q, ends[-1], True)
    k, v = (_Unwritten.apply(x, ends_k[-1], True) for x in (k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    found = []
    for (a, b), (c, d) in zip(pairwise(ends), pairwise(ends_k), strict=True):
        distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        hidden = (distance > (left if left >= 0 else d)) | (-distance > (right if right >= 0 else d))
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), k[c:d].float()) * scale
        p = scores.masked_fill(hidden, -math.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", p, v[c:d].float()).to(q.dtype))
    return _Unwritten.apply(torch.cat([*found, q[ends[-1] :]]), ends[-1], False)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    assert deterministic and not dropout_p and softmax_scale is not None
    left, right = window_size
    lengths = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return windowed(q, k, v, *lengths, softmax_scale, left, 0 if causal else right)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    assert scale is not None
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return windowed(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, *window_size)


ON_CPU: dict[str, Ordinary] = {
    "own": own_attention,
    "sdpa": padded_attention,
    "flash_attn, stand-in": partial(packed_attention, flash_attn_kernel(flash_attn_varlen_func)),
    "varlen_attn, stand-in": partial(packed_attention, varlen_attn_kernel(varlen_attn)),
}
# Rows of padding are not packed, so no ordinary pass of a step has them.
PACKED = [
    (op, case)
    for op, case in cases_for("contract", "tiles")
    if op.name == "attention" and case.make(torch.Generator())[1]["seqused"] is None
]
every_case = pytest.mark.parametrize(("op", "case"), PACKED, ids=[case.name for _, case in PACKED])


def served_by(op: OpCases, ordinary: Ordinary) -> OpCases:
    """Make attention's cases call it as a layer does, with a backend for ordinary passes."""
    attend = Attention("sdpa", ordinary)

    def call(pairs: dict, c: dict) -> list:
        lengths = {name: c[name] for name in ("max_seqlen", "scale", "window", "cu_seqlens_k", "max_seqlen_k")}
        return [attend(*pairs["q"], *pairs["k"], *pairs["v"], c["cu_seqlens"], **lengths)]

    return replace(op, call=call)


def test_cases_have_what_backends_differ_in() -> None:
    names = {case.name for _, case in PACKED}
    assert {"packed", "grouped-heads", "window", "rows-after-the-last", "max-seqlen-larger", "no-sequence"} <= names
    assert {"queries-at-the-end", "queries-at-the-end-window", "keys-without-queries"} <= names


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
@every_case
def test_a_backend_agrees_with_the_oracle(
    op: OpCases,
    case: Case,
    backend: str,
    dtype: torch.dtype,
    formula_in: Callable[[OpCases, Problem], dict[str, Tensor]],
) -> None:
    """The error in o and its gradients is at most what that of the formula in the same dtype allows."""
    pair = pose(op, case, torch.Generator().manual_seed(0), dtype)
    problem = pair.single()
    truth, yardstick = derive(op, problem.to(torch.float64)), formula_in(op, problem)
    actual = run(served_by(op, ON_CPU[backend]), problem)
    assert actual.keys() == truth.keys() == {"o", "dq", "dk", "dv"}
    for name, scale in scales(truth).items():
        assert actual[name].dtype == dtype
        difference, usual = error(actual[name], truth[name]), error(yardstick[name], truth[name])
        assert difference <= allowed(usual, scale, dtype), (
            f"{name} is off by {difference:.3g}; the formula by {usual:.3g}, the largest element is {scale:.3g}"
        )


@pytest.mark.parametrize("backend", ["sdpa", "flash_attn, stand-in", "varlen_attn, stand-in"])
def test_rows_of_no_sequence_are_zero(backend: str) -> None:
    """Whatever lies in rows of no sequence, o and gradients are zero there; also where no sequence has a row."""
    for lengths, lengths_k in (([4, 0, 2], None), ([0, 0], None), ([2, 0, 2], [4, 3, 2])):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        keys, used = (), [sum(lengths), sum(lengths_k or lengths)]
        if lengths_k is not None:
            keys = torch.tensor([0, *lengths_k]).cumsum(0).int(), 5
        q, k, v = (torch.randn(used[i] + 3, h, 8) for i, h in ((0, 4), (1, 2), (1, 2)))
        for x, end in ((q, used[0]), (k, used[1]), (v, used[1])):
            x[end:] = math.nan
            x.requires_grad_()
        o = ON_CPU[backend](q, k, v, cu_seqlens, 5, 0.3, 3, *keys)
        dxs = torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
        for x, end in zip((o, *dxs), (used[0], used[0], used[1], used[1]), strict=True):
            assert x[end:].count_nonzero() == 0 and x[:end].isfinite().all()
            assert not end or x[:end].count_nonzero() > 0


def test_pairs_stay_with_the_library() -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("a pair went to an ordinary pass's backend")

    for op, case in PACKED:
        problem = pose(op, case, torch.Generator().manual_seed(0))
        served, own = run(served_by(op, never), problem), run(op, problem)
        assert all(torch.equal(served[name], own[name]) for name in own)


def test_sdpa_gives_the_same_bits_again() -> None:
    (op, case), *_ = ((op, case) for op, case in PACKED if case.name == "tiles-window")
    problem = pose(op, case, torch.Generator().manual_seed(0), torch.bfloat16).single()
    first, again = (run(served_by(op, padded_attention), problem) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


# What is looked at before one is taken


def test_a_trial_finds_what_is_wrong() -> None:
    def without_window(*args: Any) -> Tensor:
        return own_attention(*args[:6], None, *args[7:])

    def with_half_the_scale(*args: Any) -> Tensor:
        return own_attention(*args[:5], 0.5 * args[5], *args[6:])

    def aligned_at_the_top(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *args: Any) -> Tensor:
        """The first query sees the first key."""
        cu_seqlens_k = args[3]
        if cu_seqlens_k is None:
            return own_attention(q, k, v, cu_seqlens, *args)
        keys = [torch.arange(a, a + n) for a, n in zip(cu_seqlens_k.tolist(), cu_seqlens.diff().tolist(), strict=False)]
        seen = torch.cat([*keys, torch.arange(len(k) - 2, len(k))])
        return own_attention(q, k[seen], v[seen], cu_seqlens, *args[:3])

    def not_a_number(*args: Any) -> Tensor:
        return own_attention(*args) * math.nan

    def without_kernel(*_: Any) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image is available\nand more")

    for right in ON_CPU.values():
        assert problem_of(right, CPU, Heads(torch.bfloat16, 64)) is None
    for wrong in (without_window, with_half_the_scale, aligned_at_the_top, not_a_number):
        assert problem_of(wrong, CPU, HEADS) == "it is wrong on a few rows"
    expected = "it failed on a few rows (RuntimeError: CUDA error: no kernel image is available)"
    assert problem_of(without_kernel, CPU, HEADS) == expected
    with torch.inference_mode():  # where attach may stand
        assert problem_of(padded_attention, CPU, HEADS) is None


def test_a_release_too_old_is_not_loaded() -> None:
    def old(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
        raise AssertionError("it is not called")

    with pytest.raises(ImportError, match="flash-attn here is too old: its function takes no deterministic, window_si"):
        flash_attn_kernel(old)
    with pytest.raises(ImportError, match="varlen_attn here is too old: its function takes no enable_gqa, scale, wind"):
        varlen_attn_kernel(old)


def test_the_torch_here_has_what_varlen_attn_needs() -> None:
    """The stand-in was written from the kernel's arguments; the kernel itself needs a GPU."""
    assert load("varlen_attn").func is packed_attention  # type: ignore[attr-defined]


# In a step


class Calls(TorchDispatchMode):
    """Counts ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def one_step(model: nn.Module, config: SAPConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Take a second step, at a probe: its gradients, and that probe; of the same numbers in every dtype."""
    model.to(dtype).zero_grad()
    torch.manual_seed(1)
    steps = [(random_batch(), random_pairs()) for _ in range(2)]
    with sap_fast.attach(model, config) as sap:
        for batch, pairs in steps:
            model.zero_grad()
            sap.step(batch, pairs)
        probe = {str(layer): v for layer, v in sap.probe.items()}
    return {name: g.double() for name, g in {**grads(model), **probe}.items()}


# Of an ordinary pass: a fresh step's second, a plain difference's two, and the direction's in all.
STEPS = {name: CONFIGS[name].replace(probe_update="normalised") for name in ("lagged", "fresh-recompute")}
STEPS["probe_every"] = CONFIG.replace(probe_update="normalised", probe_every=2)


@pytest.mark.parametrize("config", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_step_by_sdpa_is_the_same_step(family: str, config: SAPConfig) -> None:
    """A step in float64 is the same to its rounding; in float32 no further off than by the library's own kernels."""
    model = tiny_model(family)
    truth = one_step(model, config.replace(attention="own"), torch.float64)
    sdpa = one_step(model, config.replace(attention="sdpa"), torch.float64)
    # Gradients of 4 layers at a probe found on gradients: 1e-16 grown by their condition, with six digits to spare.
    assert max(error(sdpa[k], truth[k]) / float(truth[k].abs().max()) for k in truth) < 1e-10
    own, narrow = (one_step(model, config.replace(attention=a), torch.float32) for a in ("own", "sdpa"))
    for name, scale in scales(truth).items():
        # One draw of the rounding errors against another, of which the largest can differ by some times.
        allowed = 4 * error(own[name], truth[name]) + 16 * torch.finfo(torch.float32).eps * scale
        assert error(narrow[name], truth[name]) <= allowed, name


def test_only_ordinary_passes_are_served() -> None:
    model, layers = tiny_model(), 4
    for schedule, ordinary in (("lagged", 1), ("fresh", 2)):  # the direction, and the outer pass
        config = CONFIG.replace(schedule=schedule, restart="recompute", attention="sdpa")
        with sap_fast.attach(model, config) as sap, Calls() as calls:
            sap.step(random_batch(), random_pairs())
        assert calls.seen["aten::_scaled_dot_product_flash_attention_for_cpu"] == layers * ordinary
        assert calls.seen["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == layers * ordinary
        assert calls.seen["sap_fast::attention"] == layers


def test_auto_on_a_cpu_leaves_float32_to_the_library() -> None:
    decoder = read_decoder(tiny_model(dtype=torch.float32))
    assert with_attention(decoder, "auto").layers == decoder.layers == with_attention(decoder, "own").layers


# On a GPU


def usable(backend: Backend, heads: Heads) -> Ordinary:
    """Return a backend on the GPU here; skip with its obstacle."""
    try:
        choose(backend, machine_of(torch.device("cuda"), heads), heads)
    except ValueError as problem:
        pytest.skip(str(problem))
    return load(backend)


@pytest.mark.gpu
@GPU
@pytest.mark.usefixtures("poisoned_memory")  # which is the switch that varlen_attn and sdpa need
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_on_a_gpu(backend: Backend, head_dim: int) -> None:
    """It is right in bfloat16, gives the same bits again, and zero in rows of no sequence, without waiting."""
    ordinary = usable(backend, Heads(torch.bfloat16, head_dim))
    rng = torch.Generator("cuda").manual_seed(0)
    alike = [0, 300, 300, 301, 557]
    longer = [0, 300, 385, 470, 726]  # keys before the queries, and keys without any
    for ends_k, window in ((None, None), (None, 100), (longer, None), (longer, 100)):
        cu_seqlens = torch.tensor(alike, dtype=torch.int32, device="cuda")
        keys = (None, None) if ends_k is None else (torch.tensor(ends_k, dtype=torch.int32, device="cuda"), 300)
        rows, rows_k = 600, 600 if ends_k is None else 800
        shapes = (rows, 8), (rows_k, 2), (rows_k, 2), (rows, 8)
        q, k, v, do = (torch.randn(*shape, head_dim, generator=rng, device="cuda").bfloat16() for shape in shapes)
        used = [alike[-1], alike[-1], *[(ends_k or alike)[-1]] * 2]

        def results(attend: Ordinary, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]  # noqa: B023
            o = attend(*leaves, cu_seqlens, 300, head_dim**-0.5, window, *keys)  # noqa: B023
            return [o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype))]  # noqa: B023

        truth, first = results(own_attention, torch.float64), results(ordinary)
        with forbidden_syncs():
            again = results(ordinary)
        for x, y, expected, end in zip(first, again, truth, used, strict=True):
            assert torch.equal(x, y)
            assert x[end:].count_nonzero() == 0
            # Roundings to bfloat16, of 2^-9 each, of p, ds and the result, which average out over elements.
            assert (x.double() - expected).norm() <= 2**-6 * expected.norm()


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("backend", ["varlen_attn", "sdpa"])
def test_the_switch_may_not_go_off(backend: Backend) -> None:
    x = torch.ones(4, 1, 64, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device="cuda")
    ordinary = usable(backend, Heads(torch.bfloat16, 64))
    with pytest.raises(RuntimeError, match=f"served by {backend}.*it was on at attach and is off now"):
        ordinary(x, x, x, cu_seqlens, 4, 1.0, None)
