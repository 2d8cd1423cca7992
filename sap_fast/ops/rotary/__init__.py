"""Rotary position embedding of query and key duals; grouped heads, partial rotary."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sap_fast.dual import halves, pullback, stacked
from sap_fast.ops._library import (
    Mode,
    check_device,
    check_dtype,
    check_dual,
    check_shape,
    define,
    row_wise,
    split_cotangent,
    stacked_cotangent,
)
from sap_fast.ops.rotary.reference import primal

__all__ = ["rotary"]


def rotary(
    q: Tensor, q_dot: Tensor | None, k: Tensor, k_dot: Tensor | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Rotate query and key duals by their position's angles. The map is linear: both halves turn alike.

    Args:
        q, q_dot: ``[rows, heads, head_dim]``; k, k_dot: ``[rows, kv_heads, head_dim]``; float32, bfloat16 or
            float64; both tangents None is an ordinary pass.
        cos, sin: ``[rows, R]`` with R even and at most head_dim; channels from R on pass unrotated.

    Returns:
        ``(q, q_dot, k, k_dot)``, rotated.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    check_dual("q", q, q_dot, 3)
    check_dual("k", k, k_dot, 3)
    check_shape("k", k, (q.shape[0], k.shape[1], q.shape[2]))
    check_dtype("k", k, "q", q)
    check_device("k", k, "q", q)
    if (q_dot is None) != (k_dot is None):
        raise ValueError("q and k must both have a tangent, or neither; pass zeros where it is zero")
    rotary_dim = cos.shape[-1]
    if rotary_dim % 2 or rotary_dim > q.shape[2]:
        raise ValueError(f"cos must have an even width of at most head_dim = {q.shape[2]}, but has {rotary_dim}")
    check_shape("cos", cos, (q.shape[0], rotary_dim))
    check_shape("sin", sin, (q.shape[0], rotary_dim))
    check_device("cos", cos, "q", q)
    check_device("sin", sin, "q", q)
    return _Rotary.apply(q, q_dot, k, k_dot, cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        q_dot: Tensor | None,
        k: Tensor,
        k_dot: Tensor | None,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.mode = Mode.of(q_dot, ctx.needs_input_grad[0] or ctx.needs_input_grad[2])
        # The map is linear: its backward needs the angles and no activation. Of q and k it keeps the shapes.
        ctx.save_for_backward(cos, sin)
        ctx.q_shape, ctx.k_shape, ctx.dtype = q.shape, k.shape, q.dtype
        q_stack, k_stack = torch.ops.sap_fast.rotary(stacked(q, q_dot), stacked(k, k_dot), cos, sin)
        q, q_dot = halves(q_stack)
        k, k_dot = halves(k_stack)
        if ctx.mode is Mode.HALF:
            ctx.mark_non_differentiable(q, k)
        return q, q_dot, k, k_dot

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor | None, dq_dot: Tensor | None, dk: Tensor | None, dk_dot: Tensor | None) -> tuple:
        cos, sin = ctx.saved_tensors
        like = cos.new_empty((), dtype=ctx.dtype)
        dq = stacked_cotangent(ctx.mode, dq, dq_dot, like.expand(ctx.q_shape))
        dk = stacked_cotangent(ctx.mode, dk, dk_dot, like.expand(ctx.k_shape))
        dq, dk = torch.ops.sap_fast.rotary_backward(dq, dk, cos, sin)
        return *split_cotangent(ctx.mode, dq), *split_cotangent(ctx.mode, dk), None, None


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Rotate all halves alike: of a linear map, no tangent rule is needed."""
    halves_of = [primal(q_half, k_half, cos, sin) for q_half, k_half in zip(q, k, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*halves_of, strict=True))


def _backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Turn back: the transpose of a rotation does not depend on where it is taken, which is here at zero."""
    halves_of = [
        pullback(lambda q, k: primal(q, k, cos, sin), (torch.zeros_like(q), torch.zeros_like(k)), (q, k))
        for q, k in zip(dq.split(1), dk.split(1), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*halves_of, strict=True))


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", _forward, _fake, flops=row_wise)
define(
    "rotary_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    _backward,
    _fake,
    flops=row_wise,
)
