"""Gated linear unit of a dual: SwiGLU (``silu``) and GeGLU (``gelu``, ``gelu_tanh``)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sap_fast.dual import halves, pullback, pushforward, stacked
from sap_fast.ops._library import (
    Mode,
    check_device,
    check_dtype,
    check_dual,
    check_shape,
    define,
    may_overwrite,
    row_wise,
    split_cotangent,
    stacked_cotangent,
)
from sap_fast.ops.glu.reference import ACTIVATIONS, primal

__all__ = ["ACTIVATIONS", "glu"]


def glu(
    gate: Tensor, gate_dot: Tensor | None, up: Tensor, up_dot: Tensor | None, *, activation: str
) -> tuple[Tensor, Tensor | None]:
    """Compute ``y = s(gate) up`` and its tangent ``y_dot = s'(gate) gate_dot up + s(gate) up_dot``.

    Args:
        gate, gate_dot, up, up_dot: ``[rows, d]``, float32, bfloat16 or float64; both tangents None is an
            ordinary pass.
        activation: one of :data:`ACTIVATIONS`.

    Returns:
        ``(y, y_dot)`` of the shape and dtype of ``gate``.

    Raises:
        ValueError, TypeError: an unknown activation; shapes, dtypes or devices that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, but is {activation!r}")
    check_dual("gate", gate, gate_dot, 2)
    check_dual("up", up, up_dot, 2)
    check_shape("up", up, tuple(gate.shape))
    check_dtype("up", up, "gate", gate)
    check_device("up", up, "gate", gate)
    if (gate_dot is None) != (up_dot is None):
        raise ValueError("gate and up must both have a tangent, or neither; pass zeros where it is zero")
    return _GLU.apply(gate, gate_dot, up, up_dot, activation)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        gate_dot: Tensor | None,
        up: Tensor,
        up_dot: Tensor | None,
        activation: str,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.mode = Mode.of(gate_dot, ctx.needs_input_grad[0] or ctx.needs_input_grad[2])
        ctx.activation = activation
        gate_stack, up_stack = stacked(gate, gate_dot), stacked(up, up_dot)
        y, y_dot = halves(torch.ops.sap_fast.glu(gate_stack, up_stack, activation))
        # Detached, so that may_overwrite counts whoever else holds them.
        ctx.save_for_backward(gate_stack.detach(), up_stack.detach())
        if ctx.mode is Mode.HALF:
            ctx.mark_non_differentiable(y)
        return y, y_dot

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dy_dot: Tensor | None) -> tuple:
        gate, up = ctx.saved_tensors
        dy = stacked_cotangent(ctx.mode, dy, dy_dot, gate[0])
        if may_overwrite(gate, up):
            torch.ops.sap_fast.glu_backward_(dy, gate, up, ctx.activation)
            dgate, dup = gate[: len(dy)], up[: len(dy)]
        else:
            dgate, dup = torch.ops.sap_fast.glu_backward(dy, gate, up, ctx.activation)
        return *split_cotangent(ctx.mode, dgate), *split_cotangent(ctx.mode, dup), None


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    (y,) = pushforward(lambda g, u: primal(g, u, activation), gate, up)
    return y


def _backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, ...]:
    return pullback(lambda g, u: primal(g, u, activation), (gate, up), (dy,))


def _backward_(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """Write the cotangents into the first n halves of gate and up."""
    dgate, dup = _backward(dy, gate, up, activation)
    gate[: len(dy)] = dgate
    up[: len(dy)] = dup


define(
    "glu(Tensor gate, Tensor up, str activation) -> Tensor",
    _forward,
    lambda gate, up, activation: torch.empty_like(gate, memory_format=torch.contiguous_format),
    flops=row_wise,
)
define(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _backward,
    lambda dy, gate, up, activation: (
        torch.empty_like(dy, memory_format=torch.contiguous_format),
        torch.empty_like(dy, memory_format=torch.contiguous_format),
    ),
    flops=row_wise,
)
define(
    "glu_backward_(Tensor dy, Tensor(a!) gate, Tensor(b!) up, str activation) -> ()",
    _backward_,
    lambda dy, gate, up, activation: None,
    flops=row_wise,
)
