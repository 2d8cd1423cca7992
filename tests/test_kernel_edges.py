"""What the contract of the kernels cannot say: how they split rows, and what they do at their edges."""

import pytest
import torch
from agreement import error, scales
from triton_kernels import INTERPRETED, needs_kernels

from sap_fast.ops import attention, glu, linear_cross_entropy
from sap_fast.ops._cases import OpCases, Problem, derive, every_op, pose, run
from sap_fast.ops._tolerances import allowed

pytestmark = [*needs_kernels, pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
DEVICE = "cpu" if INTERPRETED else "cuda"
OPS = {op.name: op for op in every_op()}


def posed(op: OpCases, name: str) -> Problem:
    (case,) = (case for case in op.cases if case.name == name)
    return pose(op, case, torch.Generator(DEVICE).manual_seed(0), torch.float32)


def check(op: OpCases, problem: Problem) -> None:
    truth, yardstick, actual = derive(op, problem.to(torch.float64)), derive(op, problem), run(op, problem)
    for name, scale in scales(truth).items():
        most = allowed(error(yardstick[name], truth[name]), scale, torch.float32)
        assert error(actual[name], truth[name]) <= most, name


def test_capture_walks_over_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the captured backward sums several blocks of rows; 13 rows of two programs here."""
    from sap_fast.ops.probe_rms_norm import kernels

    shape_of = kernels.shape_of
    monkeypatch.setattr(kernels, "capture_blocks", lambda tiles: 2)
    monkeypatch.setattr(kernels, "shape_of", lambda d: shape_of(d)._replace(ROWS=2))
    op = OPS["probe_rms_norm"]
    check(op, posed(op, "13x64"))


def test_number_of_partial_sums_follows_from_the_shape() -> None:
    from sap_fast.ops.probe_rms_norm.kernels import capture_blocks

    assert [capture_blocks(tiles) for tiles in (0, 1, 100, 4095, 4096, 10**6)] == [1, 1, 128, 128, 256, 256]


def test_cross_entropy_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from sap_fast.ops.linear_cross_entropy import kernels

    op = OPS["linear_cross_entropy"]
    monkeypatch.setattr(kernels, "_chunks", lambda rows, vocab: (slice(0, 2), slice(2, 4), slice(4, rows)))
    pair = posed(op, "5x11x7")
    for problem in (pair, pair.half(), pair.single()):
        check(op, problem)


@pytest.mark.parametrize(("vocab", "size"), [(32000, 1024), (128256, 256), (262144, 128), (10**9, 128), (7, 4793472)])
def test_chunks_bound_the_logits(vocab: int, size: int) -> None:
    from sap_fast.ops.linear_cross_entropy.kernels import _chunks

    assert [(s.start, s.stop) for s in _chunks(size + 1, vocab)] == [(0, size), (size, size + 1)]
    assert list(_chunks(0, vocab)) == []


@pytest.mark.parametrize("target", [-100, 11, 2**40])
def test_targets_outside_of_the_vocabulary_give_no_number(target: int) -> None:
    """The step refuses a loss that is not finite; reading past the logits would give it a wrong one."""
    x, weight = torch.randn(2, 3, 4, device=DEVICE), torch.randn(11, 4, device=DEVICE)
    nll, nll_dot = linear_cross_entropy(x[0], x[1], weight, torch.tensor([1, target, 2], device=DEVICE))
    assert nll_dot is not None
    for loss in (nll, nll_dot):
        assert loss.isnan().tolist() == [False, True, False]


def test_glu_in_place() -> None:
    dy, gate, up = (torch.randn(2, 5, 700, device=DEVICE) for _ in range(3))
    for n in (1, 2):
        expected = torch.ops.sap_fast.glu_backward(dy[:n], gate, up, "silu")
        found = gate.clone(), up.clone()
        torch.ops.sap_fast.glu_backward_(dy[:n], *found, "silu")
        assert all(torch.equal(a[:n], b) for a, b in zip(found, expected, strict=True))
        assert n == 2 or torch.equal(found[0][1], gate[1])  # half mode leaves the tangents alone


def test_a_width_of_zero() -> None:
    x = torch.zeros(3, 0, device=DEVICE)
    assert glu(x, x, x, x, activation="silu")[0].shape == (3, 0)


def test_a_grid_that_no_gpu_can_count_is_refused_by_name() -> None:
    from sap_fast.ops._triton import config, launch
    from sap_fast.ops.glu.kernels import forward_kernel

    with pytest.raises(ValueError, match=r"forward_kernel would need a grid of \(1, 65536\).*fewer rows"):
        launch(forward_kernel, (1, 65536), config(4))


def test_wide_heads_are_refused_by_name() -> None:
    q = torch.randn(3, 1, 257, device=DEVICE)
    lengths = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="head dimensions up to 256"):
        attention(q, None, q, None, q, None, lengths, max_seqlen=3, scale=1.0)


# That 0 / 0 is NaN is what is looked for; NumPy, which interprets, remarks on it.
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
def test_a_query_without_a_key_is_nan_and_disturbs_no_other_sequence() -> None:
    """What a CPU refuses, and a GPU is not waited for to find."""
    q, k = (torch.randn(rows, 1, 16, device=DEVICE) for rows in (6, 7))
    cu_seqlens, cu_seqlens_k = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 3, 6], [0, 2, 7]))
    leaves = [x.requires_grad_() for x in (q, k, k.clone())]
    o, _ = attention(
        *(half for x in leaves for half in (x, None)),
        cu_seqlens,
        max_seqlen=3,
        scale=1.0,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_k=5,
    )
    assert o[0].isnan().all() and o[1:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(o, leaves, torch.ones_like(o))
    assert dq[3:].isfinite().all() and dk[2:].isfinite().all() and dv[2:].isfinite().all()


def test_cross_entropy_of_a_head_in_another_dtype() -> None:
    """Neither is rounded to the other's."""
    x, weight = torch.randn(2, 5, 8, device=DEVICE), torch.randn(11, 8, device=DEVICE)
    targets = torch.arange(5, device=DEVICE)
    mixed = x.bfloat16().requires_grad_()
    nll, nll_dot = linear_cross_entropy(mixed[0], mixed[1], weight, targets)
    expected = linear_cross_entropy(mixed[0].detach().float(), mixed[1].detach().float(), weight, targets)
    assert all(torch.equal(a.detach(), b) for a, b in zip((nll, nll_dot), expected, strict=True))
    (dx,) = torch.autograd.grad(nll_dot.sum(), mixed)
    assert dx.dtype == torch.bfloat16 and dx.abs().max() > 0
