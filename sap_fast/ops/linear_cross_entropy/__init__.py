"""Output head and cross-entropy of a dual, over labelled rows only; the logits never exist as a whole."""

from collections.abc import Mapping
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
from sap_fast.ops.linear_cross_entropy.reference import combined, primal

__all__ = ["linear_cross_entropy"]

# Rows whose logits exist at once: 2 x 512 rows of a 128k vocabulary are half a gigabyte in float32.
_CHUNK_ROWS = 512


def linear_cross_entropy(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Compute each row's negative log-likelihood of its target under ``softmax(W x)``, and its tangent.

    ``nll = lse(z) - z[target]``, ``nll_dot = sum softmax(z) z_dot - z_dot[target]``. Sum and weight the rows
    outside: a task loss is their mean, a pair's log-probability the negative sum over its sequence.

    Args:
        x, x_dot: ``[rows, d]``, the labelled rows only; float32, bfloat16 or float64; ``x_dot=None`` is an
            ordinary pass.
        weight: ``[vocab, d]``, frozen.
        targets: ``[rows]`` int64 in [0, vocab).

    Returns:
        ``(nll, nll_dot)``, ``[rows]`` in float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    check_dual("x", x, x_dot, 2)
    check_shape("weight", weight, (weight.shape[0], x.shape[1]))
    check_device("weight", weight, "x", x)
    check_shape("targets", targets, (x.shape[0],))
    check_device("targets", targets, "x", x)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, but are {targets.dtype}")
    return _LinearCrossEntropy.apply(x, x_dot, weight, targets, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_dot: Tensor | None, weight: Tensor, targets: Tensor, grad_enabled: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.mode = Mode.of(x_dot, ctx.needs_input_grad[0])
        ctx.dtype = x.dtype
        # Without grad mode, tensors that require grad still say so.
        differentiated = grad_enabled and any(ctx.needs_input_grad[:2])
        grads = 0 if not differentiated else 2 if ctx.mode is Mode.FULL else 1
        nll, basis = torch.ops.sap_fast.linear_cross_entropy(stacked(x, x_dot), weight, targets, grads)
        ctx.save_for_backward(basis)
        nll, nll_dot = halves(nll)
        if ctx.mode is Mode.HALF:
            ctx.mark_non_differentiable(nll)
        return nll, nll_dot

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnll: Tensor | None, dnll_dot: Tensor | None) -> tuple:
        (basis,) = ctx.saved_tensors
        dnll = stacked_cotangent(ctx.mode, dnll, dnll_dot, basis.new_empty(basis.shape[1]))
        dx = torch.ops.sap_fast.linear_cross_entropy_backward(dnll, basis, ctx.dtype)
        return *split_cotangent(ctx.mode, dx), None, None, None


def _forward(x: Tensor, weight: Tensor, targets: Tensor, grads: int) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    nll, basis = x.new_empty(x.shape[:2], dtype=dtype), x.new_empty((grads, *x.shape[1:]), dtype=dtype)
    # Of the loss, or of its tangent.
    unit = x.new_zeros((grads, _CHUNK_ROWS), dtype=dtype)
    unit[-1:] = 1
    for first in range(0, x.shape[1], _CHUNK_ROWS):
        part = slice(first, first + _CHUNK_ROWS)
        rows, t = x[:, part].to(dtype), targets[part]
        (nll[:, part],) = pushforward(lambda x: primal(x, weight, t), rows)  # noqa: B023
        if grads:
            dnll = unit[:, : len(t)]
            (basis[:, part],) = pullback(lambda x: primal(x, weight, t), (rows,), (dnll,))  # noqa: B023
    return nll, basis


def _flops(named: Mapping[str, Any]) -> int:
    # The logits of each half, and the products with their cotangents that the backward weights row by row.
    return 2 * (named["x"].shape[0] + named["grads"]) * named["x"].shape[1] * named["weight"].numel()


define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int grads) -> (Tensor, Tensor)",
    _forward,
    lambda x, weight, targets, grads: (
        x.new_empty(x.shape[:2], dtype=compute_dtype(x)),
        x.new_empty((grads, *x.shape[1:]), dtype=compute_dtype(x)),
    ),
    flops=_flops,
)
define(
    "linear_cross_entropy_backward(Tensor dnll, Tensor basis, ScalarType dtype) -> Tensor",
    combined,
    lambda dnll, basis, dtype: basis.new_empty((dnll.shape[0], *basis.shape[1:]), dtype=dtype),
    flops=row_wise,
)
