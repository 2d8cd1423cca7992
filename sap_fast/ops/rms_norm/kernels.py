"""RMSNorm of a dual in Triton. ``norm`` and ``norm_backward`` are the formulas; probe_rms_norm uses them too."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sap_fast.ops._library import architecture
from sap_fast.ops._triton import Config, config, empty, launch, power_of_2, rows_of, stack_strides

# Elements of one half that a program holds at least: narrow rows (heads) share one, to have enough loads in flight.
_ELEMENTS = 2048


class Shape(NamedTuple):
    """Describes what a row kernel is compiled for."""

    D: int
    BLOCK: int
    ROWS: int


def shape_of(d: int) -> Shape:
    """Make the shape of whole rows of width ``d``, and of as many as a program holds at once."""
    block = power_of_2(d)
    return Shape(d, block, max(1, _ELEMENTS // block))


def row_config(arch: str, shape: Shape) -> Config:
    """Look up the configuration of row kernels: 16 elements of a half for each thread, whatever the dtype."""
    lanes, most = (64, 16) if arch.startswith("gfx") else (32, 32)
    return config(num_warps=power_of_2(shape.ROWS * shape.BLOCK // (16 * lanes), 4, most))


@triton.jit
def norm(b_h, b_h_dot, b_gain, eps, D: tl.constexpr, DUAL: tl.constexpr):
    """Compute ``y = gain h rstd``, ``y_dot = gain (h_dot rstd + h rstd_dot)``; all in float32, h ``[ROWS, BLOCK]``."""
    # [ROWS]
    rstd = tl.rsqrt(tl.sum(b_h * b_h, 1) / D + eps)
    b_y = b_gain * b_h * rstd[:, None]
    if DUAL:
        rstd_dot = -rstd * rstd * rstd * (tl.sum(b_h * b_h_dot, 1) / D)
        b_y_dot = b_gain * (b_h_dot * rstd[:, None] + b_h * rstd_dot[:, None])
    else:
        rstd_dot = rstd
        b_y_dot = b_y
    return b_y, b_y_dot, rstd, rstd_dot


@triton.jit
def norm_backward(b_g, b_g_dot, b_h, b_h_dot, rstd, rstd_dot, D: tl.constexpr, FULL: tl.constexpr):
    """Pull ``g = gain dy``, ``g_dot = gain dy_dot`` back to cotangents of (h, h_dot); without FULL of h_dot alone."""
    cube = rstd * rstd * rstd
    # [ROWS]
    mean_h_g_dot = tl.sum(b_h * b_g_dot, 1) / D
    b_dh_dot = rstd[:, None] * b_g_dot - (cube * mean_h_g_dot)[:, None] * b_h
    if FULL:
        mean_h_g = tl.sum(b_h * b_g, 1) / D
        mean_h_dot_g_dot = tl.sum(b_h_dot * b_g_dot, 1) / D
        along_h = cube * (mean_h_g + mean_h_dot_g_dot) + 3 * rstd * rstd * rstd_dot * mean_h_g_dot
        b_dh = (
            rstd[:, None] * b_g
            + rstd_dot[:, None] * b_g_dot
            - (cube * mean_h_g_dot)[:, None] * b_h_dot
            - along_h[:, None] * b_h
        )
    else:
        b_dh = b_dh_dot
    return b_dh, b_dh_dot


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    x_half,
    x_row,
    weight,
    y,
    rstd,
    rows,
    eps,
    OFFSET: tl.constexpr,
    DUAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute ``y`` and ``rstd``, both contiguous stacks: one program a block of rows."""
    # [ROWS, 1], [BLOCK]
    o_row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_d = tl.arange(0, BLOCK)
    m = (o_row < rows) & (o_d < D)[None, :]
    b_gain = OFFSET + tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    # [ROWS, BLOCK]
    p_x = x + o_row * x_row + o_d[None, :]
    b_x = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    b_x_dot = tl.load(p_x + x_half, mask=m, other=0.0).to(tl.float32) if DUAL else b_x
    b_y, b_y_dot, b_rstd, b_rstd_dot = norm(b_x, b_x_dot, b_gain[None, :], eps, D, DUAL)

    half = rows.to(tl.int64) * D
    p_y = y + o_row * D + o_d[None, :]
    tl.store(p_y, b_y, mask=m)
    tl.store(rstd + o_row, b_rstd[:, None], mask=o_row < rows)
    if DUAL:
        tl.store(p_y + half, b_y_dot, mask=m)
        tl.store(rstd + rows + o_row, b_rstd_dot[:, None], mask=o_row < rows)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dy,
    dy_half,
    dy_row,
    x,
    x_half,
    x_row,
    rstd,
    weight,
    dx,
    rows,
    OFFSET: tl.constexpr,
    FULL: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute ``dx``, one program a block of rows. ``dy_half`` is 0 in half mode: there is one half, the gradient."""
    # [ROWS, 1], [BLOCK]
    o_row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_d = tl.arange(0, BLOCK)
    m = (o_row < rows) & (o_d < D)[None, :]
    b_gain = (OFFSET + tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32))[None, :]
    # [ROWS, BLOCK]
    p_x, p_dy = x + o_row * x_row + o_d[None, :], dy + o_row * dy_row + o_d[None, :]
    b_x = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    b_g_dot = b_gain * tl.load(p_dy + dy_half, mask=m, other=0.0).to(tl.float32)
    b_rstd = tl.load(rstd + o_row, mask=o_row < rows, other=0.0)
    if FULL:
        b_x_dot = tl.load(p_x + x_half, mask=m, other=0.0).to(tl.float32)
        b_g = b_gain * tl.load(p_dy, mask=m, other=0.0).to(tl.float32)
        b_rstd_dot = tl.load(rstd + rows + o_row, mask=o_row < rows, other=0.0)
    else:
        b_x_dot, b_g, b_rstd_dot = b_x, b_g_dot, b_rstd
    b_rstd, b_rstd_dot = tl.reshape(b_rstd, [ROWS]), tl.reshape(b_rstd_dot, [ROWS])
    b_dx, b_dx_dot = norm_backward(b_g, b_g_dot, b_x, b_x_dot, b_rstd, b_rstd_dot, D, FULL)

    p_dx = dx + o_row * D + o_d[None, :]
    tl.store(p_dx, b_dx, mask=m)
    if FULL:
        tl.store(p_dx + rows.to(tl.int64) * D, b_dx_dot, mask=m)


def forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Launch what serves ``sap_fast::rms_norm``."""
    x = rows_of(x)
    halves, rows, d = x.shape
    y, rstd = empty(x, *x.shape), empty(x, halves, rows, dtype=torch.float32)
    if d == 0:
        return y, rstd
    shape = shape_of(d)
    launch(
        forward_kernel,
        (triton.cdiv(rows, shape.ROWS),),
        row_config(str(architecture(x.device)), shape),
        *(x, *stack_strides(x), weight.contiguous(), y, rstd, rows, eps),
        OFFSET=offset,
        DUAL=halves == 2,
        **shape._asdict(),
    )
    return y, rstd


def backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Launch what serves ``sap_fast::rms_norm_backward``; eps is in ``rstd`` already."""
    x, dy = rows_of(x), rows_of(dy)
    n, rows, d = dy.shape
    dx = empty(x, n, rows, d)
    if d == 0:
        return dx
    shape = shape_of(d)
    dy_half, dy_row = stack_strides(dy)
    launch(
        backward_kernel,
        (triton.cdiv(rows, shape.ROWS),),
        row_config(str(architecture(x.device)), shape),
        *(dy, dy_half if n == 2 else 0, dy_row),
        *(x, *stack_strides(x), rstd.contiguous(), weight.contiguous(), dx, rows),
        OFFSET=offset,
        FULL=n == 2,
        **shape._asdict(),
    )
    return dx
