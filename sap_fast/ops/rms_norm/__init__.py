"""RMSNorm of a dual, at any width: q/k norms, sandwich norms, the first norm of a model."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sap_fast.dual import halves, pullback, pushforward, stacked
from sap_fast.ops._library import (
    Mode,
    check_device,
    check_dual,
    check_shape,
    compute_dtype,
    define,
    row_wise,
    split_cotangent,
    stacked_cotangent,
)
from sap_fast.ops.rms_norm.reference import primal

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, *, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Normalise each row of a dual: ``y = (offset + weight) x rstd`` and its tangent ``y_dot``.

    Args:
        x, x_dot: ``[rows, d]``, float32, bfloat16 or float64; ``x_dot=None`` is an ordinary pass.
        weight: ``[d]``, frozen.
        eps: added to the mean square.
        offset: 0, or 1 for models that store ``weight - 1`` (Gemma).

    Returns:
        ``(y, y_dot)`` of the shape and dtype of ``x``; ``y_dot`` is None if ``x_dot`` is.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    check_dual("x", x, x_dot, 2)
    check_shape("weight", weight, (x.shape[1],))
    check_device("weight", weight, "x", x)
    return _RMSNorm.apply(x, x_dot, weight, eps, offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_dot: Tensor | None, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.mode, ctx.eps, ctx.offset = Mode.of(x_dot, ctx.needs_input_grad[0]), eps, offset
        x_stack = stacked(x, x_dot)
        y, rstd = torch.ops.sap_fast.rms_norm(x_stack, weight, eps, offset)
        ctx.save_for_backward(x_stack, rstd, weight)
        y, y_dot = halves(y)
        if ctx.mode is Mode.HALF:
            ctx.mark_non_differentiable(y)
        return y, y_dot

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dy_dot: Tensor | None) -> tuple:
        x, rstd, weight = ctx.saved_tensors
        dy = stacked_cotangent(ctx.mode, dy, dy_dot, x[0])
        dx = torch.ops.sap_fast.rms_norm_backward(dy, x, rstd, weight, ctx.eps, ctx.offset)
        return *split_cotangent(ctx.mode, dx), None, None, None


def _forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, ...]:
    return pushforward(lambda x: primal(x, weight, eps, offset), x)


def _backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    # rstd (and its tangent) is what a kernel reads; the reference derives it again from x.
    (dx,) = pullback(lambda x: primal(x, weight, eps, offset)[:1], (x,), (dy,))
    return dx


define(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
    _forward,
    lambda x, weight, eps, offset: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[:2], dtype=compute_dtype(x)),
    ),
    flops=row_wise,
)
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor weight, float eps, float offset) -> Tensor",
    _backward,
    lambda dy, x, rstd, weight, eps, offset: torch.empty_like(dy, memory_format=torch.contiguous_format),
    flops=row_wise,
)
