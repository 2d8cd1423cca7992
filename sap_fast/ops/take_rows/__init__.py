"""Rows of duals, taken by an index: from rows that sequences share to the sequences, and back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sap_fast.dual import halves, stacked
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
from sap_fast.ops.take_rows.reference import primal

__all__ = ["RowIndex", "take_rows"]


class RowIndex(NamedTuple):
    """Tells which rows are taken, and whence each gets its cotangent back. All int64, on the device of the rows.

    ``rows [taken]``: the row that each place takes; rows may be taken many times, or never. ``offsets [count + 1]``
    and ``takers [taken]``: row r is taken by the places ``takers[offsets[r]:offsets[r + 1]]``, in this order.
    """

    rows: Tensor
    offsets: Tensor
    takers: Tensor

    @classmethod
    def of(cls, rows: Tensor, count: int) -> "RowIndex":
        """Make the index that takes ``rows`` of ``count`` ones. Waits for no device."""
        takers = rows.argsort(stable=True)
        every = torch.arange(count + 1, device=rows.device)
        return cls(rows, torch.searchsorted(rows[takers], every), takers)

    @classmethod
    def on_host(cls, rows: np.ndarray, count: int) -> "RowIndex":
        """Make the index of numbers that are known on the host, on the CPU."""
        offsets = np.zeros(count + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=count), out=offsets[1:])
        return cls(*map(torch.from_numpy, (rows, offsets, rows.argsort(kind="stable"))))


def take_rows(duals: Sequence[tuple[Tensor, Tensor | None]], index: RowIndex) -> list[tuple[Tensor, Tensor | None]]:
    """Take ``y[i] = x[rows[i]]`` of each dual, both halves alike; in the backward each row sums up what it gets back.

    The sums are in float32 (float64 for float64), in the order of ``takers``: the same bits in every run.

    Args:
        duals: ``(x, x_dot)``, each ``[count, ...]``, float32, bfloat16 or float64; all ``x_dot`` None in an ordinary
            pass.
        index: see :class:`RowIndex`. Its numbers are not checked on a GPU.

    Returns:
        ``(y, y_dot)`` for each dual, ``[taken, ...]``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    if not duals:
        return []
    count = index.offsets.shape[0] - 1
    for name, part in zip(RowIndex._fields, index, strict=True):
        if part.dtype != torch.int64 or part.ndim != 1:
            raise TypeError(f"{name} must be int64 of one dimension, but is {part.dtype} {tuple(part.shape)}")
    check_shape("takers", index.takers, tuple(index.rows.shape))
    for x, x_dot in duals:
        check_dual("x", x, x_dot, max(x.ndim, 2))  # rows have some width
        check_shape("x", x, (count, *x.shape[1:]))
        check_device("rows", index.rows, "x", x)
        if (x_dot is None) != (duals[0][1] is None):
            raise ValueError("all duals must have a tangent, or none; pass zeros where it is zero")
    ys = _TakeRows.apply(*index, *(half for dual in duals for half in dual))
    return list(zip(ys[0::2], ys[1::2], strict=True))


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, offsets: Tensor, takers: Tensor, *flat: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.mode = Mode.of(flat[1], any(ctx.needs_input_grad[3::2]))
        ctx.save_for_backward(offsets, takers)
        stacks = [stacked(x, x_dot) for x, x_dot in zip(flat[0::2], flat[1::2], strict=True) if x is not None]
        ys = torch.ops.sap_fast.take_rows(stacks, rows)
        ctx.like = [(y.shape[1:], y.dtype) for y in ys]
        outputs = tuple(half for y in ys for half in halves(y))
        if ctx.mode is Mode.HALF:
            ctx.mark_non_differentiable(*outputs[0::2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple:
        offsets, takers = ctx.saved_tensors
        stacks = [
            stacked_cotangent(ctx.mode, dy, dy_dot, torch.empty((), dtype=dtype, device=offsets.device).expand(shape))
            for dy, dy_dot, (shape, dtype) in zip(dys[0::2], dys[1::2], ctx.like, strict=True)
        ]
        dxs = torch.ops.sap_fast.take_rows_backward(stacks, offsets, takers)
        return None, None, None, *(half for dx in dxs for half in split_cotangent(ctx.mode, dx))


def _forward(xs: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [torch.stack([primal(half, rows) for half in x]) for x in xs]


def _backward(dys: list[Tensor], offsets: Tensor, takers: Tensor) -> list[Tensor]:
    dxs = []
    for dy in dys:
        # Unlike index_add, this adds up in order on a GPU, too. It cuts the first dimension into segments.
        given = dy.index_select(1, takers).to(compute_dtype(dy)).transpose(0, 1).contiguous()
        sums = torch.segment_reduce(given, "sum", offsets=offsets, axis=0, initial=0, unsafe=True)
        dxs.append(sums.transpose(0, 1).to(dy.dtype, memory_format=torch.contiguous_format, copy=True))
    return dxs


define(
    "take_rows(Tensor[] x, Tensor rows) -> Tensor[]",
    _forward,
    lambda xs, rows: [x.new_empty((x.shape[0], rows.shape[0], *x.shape[2:])) for x in xs],
    flops=row_wise,
)
define(
    "take_rows_backward(Tensor[] dy, Tensor offsets, Tensor takers) -> Tensor[]",
    _backward,
    lambda dys, offsets, takers: [dy.new_empty((dy.shape[0], offsets.shape[0] - 1, *dy.shape[2:])) for dy in dys],
    flops=row_wise,
)
