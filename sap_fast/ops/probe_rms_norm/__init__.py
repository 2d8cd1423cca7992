"""Residual + probe + RMSNorm of a dual in one op, with capture of the probe's gradients."""

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
    compute_dtype,
    define,
    row_wise,
    split_cotangent,
    stacked_cotangent,
)
from sap_fast.ops.probe_rms_norm.reference import primal
from sap_fast.ops.rms_norm.reference import primal as rms_norm_primal

__all__ = ["probe_rms_norm"]


def probe_rms_norm(
    residual: Tensor,
    residual_dot: Tensor | None,
    update: Tensor,
    update_dot: Tensor | None,
    probe: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """Add a layer's update and the probe to the residual stream and normalise the sum.

    ``h = residual + update + probe``, ``y = (offset + weight) h rstd``, with their tangents.

    Gradient capture: with ``probe`` a stacked leaf ``[2, d]`` that requires grad, the gradient of a scalar
    L_dot with respect to it is ``[grad_v L_dot, grad_v L]``, the column sums over rows of the cotangents of
    h (half 0) and h_dot (half 1), taken in float32 before they are rounded to the storage dtype.

    Args:
        residual, residual_dot, update, update_dot: ``[rows, d]``, float32, bfloat16 or float64; both tangents
            None is an ordinary pass.
        probe: ``[S, d]`` (``[1, d]`` in an ordinary pass), float32, or None for a layer without a probe.
            In a dual its tangent half is zero: the probe does not move with the weights.
        weight: ``[d]``, frozen.
        eps: added to the mean square.
        offset: 0, or 1 for models that store ``weight - 1`` (Gemma).

    Returns:
        ``(h, h_dot, y, y_dot, rstd)``; ``rstd [rows]`` is ``(mean h^2 + eps)^(-1/2)``, without gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    check_dual("residual", residual, residual_dot, 2)
    check_dual("update", update, update_dot, 2)
    check_shape("update", update, tuple(residual.shape))
    check_dtype("update", update, "residual", residual)
    check_device("update", update, "residual", residual)
    if (residual_dot is None) != (update_dot is None):
        raise ValueError("residual and update must both have a tangent, or neither; pass zeros where it is zero")
    check_shape("weight", weight, (residual.shape[1],))
    check_device("weight", weight, "residual", residual)
    if probe is not None:
        check_shape("probe", probe, (1 if residual_dot is None else 2, residual.shape[1]))
        check_device("probe", probe, "residual", residual)
    return _ProbeRMSNorm.apply(residual, residual_dot, update, update_dot, probe, weight, eps, offset)


class _ProbeRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        residual_dot: Tensor | None,
        update: Tensor,
        update_dot: Tensor | None,
        probe: Tensor | None,
        weight: Tensor,
        eps: float,
        offset: float,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
        ctx.set_materialize_grads(False)
        need_residual, _, need_update, _, need_probe = ctx.needs_input_grad[:5]
        # At the lowest probe the primal half becomes differentiable: from here upwards the backward is full.
        ctx.mode = Mode.of(residual_dot, need_residual or need_update or need_probe)
        ctx.eps, ctx.offset = eps, offset
        h, y, rstd = torch.ops.sap_fast.probe_rms_norm(
            stacked(residual, residual_dot), stacked(update, update_dot), probe, weight, eps, offset
        )
        ctx.save_for_backward(h, rstd, weight)
        h, h_dot = halves(h)
        y, y_dot = halves(y)
        rms = rstd[0]
        ctx.mark_non_differentiable(*((rms, h, y) if ctx.mode is Mode.HALF else (rms,)))
        return h, h_dot, y, y_dot, rms

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dh: Tensor | None,
        dh_dot: Tensor | None,
        dy: Tensor | None,
        dy_dot: Tensor | None,
        _: Tensor | None,
    ) -> tuple:
        h, rstd, weight = ctx.saved_tensors
        need_residual, need_residual_dot, need_update, need_update_dot, need_probe = ctx.needs_input_grad[:5]
        unused = dh is None and dh_dot is None
        dx, dprobe = torch.ops.sap_fast.probe_rms_norm_backward(
            None if unused else stacked_cotangent(ctx.mode, dh, dh_dot, h[0]),
            stacked_cotangent(ctx.mode, dy, dy_dot, h[0]),
            h,
            rstd,
            weight,
            ctx.eps,
            ctx.offset,
            need_probe,
        )
        dx, dx_dot = split_cotangent(ctx.mode, dx)
        return (
            dx if need_residual else None,
            dx_dot if need_residual_dot else None,
            dx if need_update else None,
            dx_dot if need_update_dot else None,
            dprobe if need_probe else None,
            None,
            None,
            None,
        )


def _forward(
    residual: Tensor, update: Tensor, probe: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, ...]:
    if probe is None:
        probe = residual.new_zeros((len(residual), residual.shape[2]), dtype=compute_dtype(residual))
    return pushforward(lambda r, m, v: primal(r, m, v, weight, eps, offset), residual, update, probe)


def _backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    rstd: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    capture: bool,
) -> tuple[Tensor, Tensor]:
    # From h upwards in the compute dtype, so that the column sums see unrounded cotangents.
    dtype = compute_dtype(h)
    (dx,) = pullback(lambda h: rms_norm_primal(h, weight, eps, offset)[:1], (h.to(dtype),), (dy.to(dtype),))
    if dh is not None:
        dx = dx + dh
    return dx.to(h.dtype), dx.sum(1) if capture else dx.new_empty((0,))


define(
    "probe_rms_norm(Tensor residual, Tensor update, Tensor? probe, Tensor weight, float eps, float offset) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    lambda residual, update, probe, weight, eps, offset: (
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        residual.new_empty(residual.shape[:2], dtype=compute_dtype(residual)),
    ),
    flops=row_wise,
)
define(
    "probe_rms_norm_backward(Tensor? dh, Tensor dy, Tensor h, Tensor rstd, Tensor weight, float eps, "
    "float offset, bool capture) -> (Tensor, Tensor)",
    _backward,
    lambda dh, dy, h, rstd, weight, eps, offset, capture: (
        torch.empty_like(dy, memory_format=torch.contiguous_format),
        dy.new_empty((dy.shape[0], dy.shape[2]) if capture else (0,), dtype=compute_dtype(h)),
    ),
    flops=row_wise,
)
