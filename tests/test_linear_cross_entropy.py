"""The head's products are formed in the forward: when, of which rows, and what the backward makes of them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICES
from test_ops import _Recorder
from torch import Tensor

from sap_fast import _C
from sap_fast.ops import linear_cross_entropy
from sap_fast.ops._library import references_on_cpu

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MODES = {"single": 1, "half": 1, "full": 2}


@pytest.fixture(params=["cpu", *(["reference"] if _C.loaded else []), *DEVICES[1:]])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The devices of every test, and a CPU served by the reference rules."""
    if request.param != "reference":
        yield request.param
        return
    with references_on_cpu():
        yield "cpu"


def posed(device: str, dtype: torch.dtype = torch.float32, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """``x [2, rows, 8]``, weight and targets of a vocabulary of 11."""
    rng = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, rows, 8, generator=rng, device=device).to(dtype)
    weight = torch.randn(11, 8, generator=rng, device=device).to(dtype)
    return x, weight, torch.arange(rows, device=device)


def losses(mode: str, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Make the leaves of a mode, and the losses that have a gradient."""
    x, x_dot = x.clone()
    leaves = {"single": [x], "half": [x_dot], "full": [x, x_dot]}[mode]
    for leaf in leaves:
        leaf.requires_grad_()
    ys = linear_cross_entropy(x, None if mode == "single" else x_dot, weight, targets)
    return leaves, [y for y in ys if y is not None and y.requires_grad]


def calls(mode: str, device: str) -> list[tuple[Any, tuple]]:
    with _Recorder() as recorder:
        leaves, ys = losses(mode, *posed(device))
        if ys:
            torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
    return recorder.calls


@pytest.mark.parametrize("mode", MODES)
def test_forms_what_the_backward_will_want_and_the_backward_sees_no_head(mode: str, device: str) -> None:
    (_, given), (backward, (dnll, basis, dtype)) = calls(mode, device)
    assert given[-1] == MODES[mode]
    assert dnll.shape == (MODES[mode], 5)
    assert basis.shape == (MODES[mode], 5, 8) and basis.dtype == torch.float32
    assert dtype == torch.float32 and len(backward._schema.arguments) == 3


@pytest.mark.parametrize("mode", MODES)
def test_forms_nothing_where_no_gradient_can_be_asked_for(mode: str, device: str) -> None:
    with torch.no_grad():
        ((forward, given),) = calls(mode, device)
    assert given[-1] == 0
    assert forward(*given)[1].shape == (0, 5, 8)
    x, weight, targets = posed(device)
    with _Recorder() as recorder:
        nll, nll_dot = linear_cross_entropy(x[0], x[1], weight, targets)
    assert nll_dot is not None and not (nll.requires_grad or nll_dot.requires_grad)
    assert recorder.calls[0][1][-1] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_losses_do_not_depend_on_whether_a_gradient_is_wanted(mode: str, dtype: torch.dtype, device: str) -> None:
    x, weight, targets = posed(device, dtype)
    with_grads = torch.ops.sap_fast.linear_cross_entropy(x, weight, targets, MODES[mode])[0]
    assert torch.equal(with_grads, torch.ops.sap_fast.linear_cross_entropy(x, weight, targets, 0)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_that_is_kept_gives_the_same_again(mode: str, dtype: torch.dtype, device: str) -> None:
    leaves, ys = losses(mode, *posed(device, dtype))
    dys = [torch.randn_like(y) for y in ys]
    first, again, last = (
        torch.autograd.grad(ys, leaves, weighted, retain_graph=True) for weighted in (dys, dys, [2 * dy for dy in dys])
    )
    for one, two, twice in zip(first, again, last, strict=True):
        assert one.dtype == dtype
        # The double of a number has its digits.
        assert torch.equal(one, two) and torch.equal(2 * one, twice)


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_no_cotangent_reaches_have_no_gradient(mode: str, device: str) -> None:
    leaves, ys = losses(mode, *posed(device))
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0], device=device)
    for dx in torch.autograd.grad(ys, leaves, [weights] * len(ys)):
        assert dx.abs().amax(1).bool().tolist() == [True, False, True, False, False]


def gradients(mode: str, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    leaves, ys = losses(mode, x, weight, targets)
    return ys, torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_no_number_stays_alone(mode: str, dtype: torch.dtype, device: str) -> None:
    x, weight, targets = posed(device, dtype)
    expected = gradients(mode, x, weight, targets)
    x[0, 1] = float("nan")
    for before, after in zip(expected, gradients(mode, x, weight, targets), strict=True):
        for one, other in zip(before, after, strict=True):
            assert other[1].isnan().all()
            assert torch.equal(one[[0, 2, 3, 4]], other[[0, 2, 3, 4]])


@pytest.mark.skipif(not _C.loaded, reason=f"the C++ kernels are not loaded: {_C.status}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [-100, 11, 2**40])
@pytest.mark.parametrize("mode", MODES)
def test_a_target_outside_of_the_vocabulary_makes_its_loss_no_number(
    mode: str, target: int, dtype: torch.dtype
) -> None:
    """The step refuses it; nothing else is harmed, as far as rows are concerned. (Triton: test_kernel_edges.py.)"""
    x, weight, targets = posed("cpu", dtype)
    expected = gradients(mode, x, weight, targets)
    targets[1] = target
    ys, dxs = gradients(mode, x, weight, targets)
    assert all(y.isnan().tolist() == [False, True, False, False, False] for y in ys)
    assert all(dx.isfinite().all() for dx in dxs)
    for before, after in zip(expected, (ys, dxs), strict=True):
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one[[0, 2, 3, 4]], other[[0, 2, 3, 4]])


@pytest.mark.skipif(not _C.loaded, reason=f"the C++ kernels are not loaded: {_C.status}")
@pytest.mark.parametrize("vocab", [2**17, 2**17 + 7])
def test_a_confident_token_has_a_gradient(vocab: int) -> None:
    """Its probability is 1 in float32, and one less it is not 0."""
    weight = torch.zeros(vocab, 2)
    weight[5, 0] = 1.0
    x = torch.zeros(2, 70, 2)
    x[0, :, 0] = torch.linspace(25.0, 30.0, 70)
    x[1, :, 0] = 1.0
    _, (spread, miss) = torch.ops.sap_fast.linear_cross_entropy(x, weight, torch.full((70,), 5), 2)
    others = (vocab - 1) * torch.exp(-x[0, :, 0].double())
    p = 1 / (1 + others)
    # Of p - 1: what shares a lane with the 1 is lost, for at most 256 tokens of 2^17 before the sum goes to a double.
    assert ((miss[:, 0] + others * p) / others).abs().max() < 2 * 256 / 2**17
    assert torch.equal(miss[:, 1], torch.zeros(70))
    # z_dot is 1 at the target and 0 elsewhere: p (1 - lse_dot) there, where lse_dot is p, has float32's error of p.
    assert (spread[:, 0] - p * (others * p)).abs().max() < torch.finfo(torch.float32).eps


@pytest.mark.parametrize("grads", [-1, 3])
@pytest.mark.skipif(not _C.loaded, reason=f"the C++ kernels are not loaded: {_C.status}")
def test_the_kernel_refuses_what_makes_no_sense(grads: int) -> None:
    with pytest.raises(RuntimeError, match=f"grads must be 0 to 2, the halves of x, but is {grads}"):
        torch.ops.sap_fast.linear_cross_entropy(*posed("cpu"), grads)


def test_a_backward_of_more_halves_than_were_formed_is_refused(device: str) -> None:
    dnll, basis = torch.ones(2, 3, device=device), torch.ones(1, 3, 4, device=device)
    with pytest.raises((RuntimeError, ValueError), match="dnll has 2 halves, but basis 1"):
        torch.ops.sap_fast.linear_cross_entropy_backward(dnll, basis, torch.float32)


@pytest.mark.skipif(not _C.loaded, reason=f"the C++ kernels are not loaded: {_C.status}")
def test_a_basis_of_another_dtype_is_refused() -> None:
    dnll, basis = torch.ones(1, 3), torch.ones(1, 3, 4)
    backward = torch.ops.sap_fast.linear_cross_entropy_backward
    with pytest.raises(RuntimeError, match="does not go with a basis in Float"):
        backward(dnll, basis, torch.float64)
    with pytest.raises(RuntimeError, match="basis must be float32 or float64"):
        backward(dnll.bfloat16(), basis.bfloat16(), torch.bfloat16)
