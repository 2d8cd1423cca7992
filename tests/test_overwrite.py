"""The backward of glu takes over the buffers of its inputs where nobody else can see them, and only there."""

from typing import Any

import pytest
import torch
from agreement import assert_agrees
from test_ops import _Recorder
from torch import Tensor

from sap_fast.ops import LoRATarget, glu, lora_linear

IN_PLACE, FRESH = "sap_fast::glu_backward_", "sap_fast::glu_backward"


def chain(x: Tensor, weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Make gate and up by a linear map, as in a decoder layer. Returns the outputs, and gate and up."""
    x_dot = x[1] if len(x) == 2 else None
    (gate, gate_dot), (up, up_dot) = lora_linear(x[0], x_dot, [LoRATarget(weight), LoRATarget(2 * weight)])
    ys = glu(gate, gate_dot, up, up_dot, activation="silu")
    return [y for y in ys if y is not None], [gate, up]


def pull(ys: list[Tensor], x: Tensor, *, keep: bool = False) -> tuple[Tensor, str]:
    """Pull back to the gradient of x, and say which op the backward of glu called."""
    with _Recorder() as recorder:
        (dx,) = torch.autograd.grad([y for y in ys if y.requires_grad], x, _ones(ys), retain_graph=keep)
    (called,) = (func.name() for func, _ in recorder.calls if "glu" in func.name())
    return dx, called


def _ones(ys: list[Tensor]) -> list[Tensor]:
    return [torch.ones_like(y) for y in ys if y.requires_grad]


@pytest.mark.parametrize("halves", [1, 2])
def test_takes_over_its_inputs_when_the_graph_ends(halves: int, device: str) -> None:
    x = torch.randn(halves, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, device=device)
    ys = chain(x, weight)[0]
    kept, called = pull(ys, x, keep=True)
    assert called == FRESH
    last, called = pull(ys, x)
    assert called == IN_PLACE
    assert torch.equal(last, kept)


def test_leaves_alone_what_is_held_elsewhere(device: str) -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    ys, held = chain(x, torch.randn(6, 4, dtype=torch.float64, device=device))
    before = [t.detach().clone() for t in held]
    called = pull(ys, x)[1]
    assert called == FRESH
    assert all(torch.equal(t, b) for t, b in zip(held, before, strict=True))


def leaves(shape: tuple[int, ...], device: str) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]


def glu_of(gate: Tensor, up: Tensor) -> list[Tensor]:
    halves = [half for x in (gate, up) for half in (x[0], x[1] if len(x) == 2 else None)]
    return [y for y in glu(*halves, activation="silu") if y is not None]


def held_buffers(device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Halves of buffers that the caller keeps."""
    gate, up = leaves((2, 5, 6), device)
    buffers = [gate * 2, up * 2]
    return glu_of(*buffers), buffers


def held_leaves(device: str) -> tuple[list[Tensor], list[Tensor]]:
    gate, up = leaves((5, 6), device)
    return [y for y in glu(gate, None, up, None, activation="silu") if y is not None], [gate, up]


@pytest.mark.parametrize("make", [held_buffers, held_leaves])
def test_never_writes_what_someone_else_can_see(make: Any, device: str) -> None:
    ys, held = make(device)
    before = [t.detach().clone() for t in held]
    with _Recorder() as recorder:
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert FRESH in {func.name() for func, _ in recorder.calls}
    assert all(torch.equal(t, b) for t, b in zip(held, before, strict=True))


def test_another_that_saved_the_gate_still_finds_it(device: str) -> None:
    """The square of gate saves it too, so whichever backward runs first must leave it for the other."""
    x, up = leaves((5, 6), device)
    gradients = []
    for keep in (True, False):  # with a kept graph nothing is ever overwritten
        gate = x * 2
        y, _ = glu(gate, None, up * 2, None, activation="silu")
        total = (y + gate * gate).sum()
        del gate, y
        gradients.append(torch.autograd.grad(total, [x, up], retain_graph=keep))
    assert all(torch.equal(kept, last) for kept, last in zip(*gradients, strict=True))


@pytest.mark.parametrize("n", [1, 2])
def test_in_place_is_the_same_rule(n: int, device: str) -> None:
    dy, gate, up = (torch.randn(2, 5, 4, dtype=torch.float64, device=device) for _ in range(3))
    dgate, dup = torch.ops.sap_fast.glu_backward(dy[:n], gate, up, "gelu")
    torch.library.opcheck(torch.ops.sap_fast.glu_backward_.default, (dy[:n], gate.clone(), up.clone(), "gelu"))
    torch.ops.sap_fast.glu_backward_(dy[:n], gate, up, "gelu")
    assert_agrees({"dgate": gate[:n], "dup": up[:n]}, {"dgate": dgate, "dup": dup}, tolerance=0.0)
