"""Residual + probe + RMSNorm of a dual in Triton; its formulas are ``norm`` and ``norm_backward`` of rms_norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sap_fast.ops._library import architecture
from sap_fast.ops._triton import config, empty, launch, power_of_2, rows_of, stack_strides
from sap_fast.ops.rms_norm.kernels import norm, norm_backward, row_config, shape_of

# Columns of the second stage of the gradient capture that a program sums.
_SUM = config(num_warps=4, COLUMNS=32)


def capture_blocks(tiles: int) -> int:
    """Choose how many partial sums the tiles of rows are split into, by the shape alone, alike on every device.

    Each program of the backward makes one: 128 of them nearly fill the 132 multiprocessors of a Hopper chip, and 256
    do so twice, where the rows are so many that writing the sums costs nothing beside them.
    """
    return power_of_2(tiles, most=128 if tiles < 4096 else 256)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    residual,
    residual_half,
    residual_row,
    update,
    update_half,
    update_row,
    probe,
    weight,
    h,
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
    """Compute ``h = residual + update + probe``, ``y = norm(h)``, ``rstd``; contiguous stacks; one program a row block.

    ``probe`` is None or a contiguous stack ``[S, D]`` in float32.
    """
    # [ROWS, 1], [BLOCK]
    o_row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    m = (o_row < rows) & m_d[None, :]
    b_gain = (OFFSET + tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32))[None, :]

    # [ROWS, BLOCK]
    p_residual = residual + o_row * residual_row + o_d[None, :]
    p_update = update + o_row * update_row + o_d[None, :]
    b_h = tl.load(p_residual, mask=m, other=0.0).to(tl.float32) + tl.load(p_update, mask=m, other=0.0).to(tl.float32)
    if probe is not None:
        b_h += tl.load(probe + o_d, mask=m_d, other=0.0)[None, :]
    # The norm reads what the residual stream carries on, which is rounded to storage.
    b_h = b_h.to(h.dtype.element_ty).to(tl.float32)
    if DUAL:
        b_h_dot = tl.load(p_residual + residual_half, mask=m, other=0.0).to(tl.float32)
        b_h_dot += tl.load(p_update + update_half, mask=m, other=0.0).to(tl.float32)
        if probe is not None:
            b_h_dot += tl.load(probe + D + o_d, mask=m_d, other=0.0)[None, :]
        b_h_dot = b_h_dot.to(h.dtype.element_ty).to(tl.float32)
    else:
        b_h_dot = b_h
    b_y, b_y_dot, b_rstd, b_rstd_dot = norm(b_h, b_h_dot, b_gain, eps, D, DUAL)

    o_out = o_row * D + o_d[None, :]
    half = rows.to(tl.int64) * D
    tl.store(h + o_out, b_h, mask=m)
    tl.store(y + o_out, b_y, mask=m)
    tl.store(rstd + o_row, b_rstd[:, None], mask=o_row < rows)
    if DUAL:
        tl.store(h + half + o_out, b_h_dot, mask=m)
        tl.store(y + half + o_out, b_y_dot, mask=m)
        tl.store(rstd + rows + o_row, b_rstd_dot[:, None], mask=o_row < rows)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dh,
    dh_half,
    dh_row,
    dy,
    dy_half,
    dy_row,
    h,
    rstd,
    weight,
    dx,
    partial,
    rows,
    OFFSET: tl.constexpr,
    FULL: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute the cotangents of residual and update (they are equal), and the gradient capture's first stage.

    Program i takes blocks of rows i, i + programs, ... and, where ``partial [programs, n, D]`` is given, sums their
    cotangents by column in that order, in float32 before they are rounded. Without it there is a program for each
    block. ``dh`` is None where nothing but the norm reads h. The halves of dh and dy are 0 apart in half mode.
    """
    # [BLOCK]
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_gain = (OFFSET + tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32))[None, :]
    half = rows.to(tl.int64) * D
    if partial is not None:
        b_sum = tl.zeros([BLOCK], dtype=tl.float32)
        b_sum_dot = tl.zeros([BLOCK], dtype=tl.float32)

    for i_block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        # [ROWS, 1], [ROWS, BLOCK]
        o_row = (i_block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        m = (o_row < rows) & m_d[None, :]
        p_h, p_dy = h + o_row * D + o_d[None, :], dy + o_row * dy_row + o_d[None, :]
        b_h = tl.load(p_h, mask=m, other=0.0).to(tl.float32)
        b_g_dot = b_gain * tl.load(p_dy + dy_half, mask=m, other=0.0).to(tl.float32)
        b_rstd = tl.load(rstd + o_row, mask=o_row < rows, other=0.0)
        if FULL:
            b_h_dot = tl.load(p_h + half, mask=m, other=0.0).to(tl.float32)
            b_g = b_gain * tl.load(p_dy, mask=m, other=0.0).to(tl.float32)
            b_rstd_dot = tl.load(rstd + rows + o_row, mask=o_row < rows, other=0.0)
        else:
            b_h_dot, b_g, b_rstd_dot = b_h, b_g_dot, b_rstd
        b_rstd, b_rstd_dot = tl.reshape(b_rstd, [ROWS]), tl.reshape(b_rstd_dot, [ROWS])
        b_dx, b_dx_dot = norm_backward(b_g, b_g_dot, b_h, b_h_dot, b_rstd, b_rstd_dot, D, FULL)
        if dh is not None:
            p_dh = dh + o_row * dh_row + o_d[None, :]
            b_dx_dot += tl.load(p_dh + dh_half, mask=m, other=0.0).to(tl.float32)
            if FULL:
                b_dx += tl.load(p_dh, mask=m, other=0.0).to(tl.float32)

        p_dx = dx + o_row * D + o_d[None, :]
        if FULL:
            tl.store(p_dx, b_dx, mask=m)
            tl.store(p_dx + half, b_dx_dot, mask=m)
        else:
            tl.store(p_dx, b_dx_dot, mask=m)
        if partial is not None:
            b_sum_dot += tl.sum(b_dx_dot, 0)
            if FULL:
                b_sum += tl.sum(b_dx, 0)

    if partial is not None:
        # [n, D] of this program
        p_sum = partial + tl.program_id(0) * (2 * D if FULL else D) + o_d
        if FULL:
            tl.store(p_sum, b_sum, mask=m_d)
            tl.store(p_sum + D, b_sum_dot, mask=m_d)
        else:
            tl.store(p_sum, b_sum_dot, mask=m_d)


@triton.jit
def sum_kernel(partial, total, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum up, as second stage, ``total [WIDTH]`` from ``partial [BLOCKS, WIDTH]``, by the tree of one ``tl.sum``."""
    o = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # [BLOCKS, COLUMNS]
    b = tl.load(partial + tl.arange(0, BLOCKS)[:, None] * WIDTH + o[None, :], mask=(o < WIDTH)[None, :], other=0.0)
    tl.store(total + o, tl.sum(b, 0), mask=o < WIDTH)


def forward(
    residual: Tensor, update: Tensor, probe: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch what serves ``sap_fast::probe_rms_norm``."""
    residual, update = rows_of(residual), rows_of(update)
    halves, rows, d = residual.shape
    h, y = empty(residual, *residual.shape), empty(residual, *residual.shape)
    rstd = empty(residual, halves, rows, dtype=torch.float32)
    if d == 0:
        return h, y, rstd
    shape = shape_of(d)
    launch(
        forward_kernel,
        (triton.cdiv(rows, shape.ROWS),),
        row_config(str(architecture(h.device)), shape),
        *(residual, *stack_strides(residual), update, *stack_strides(update)),
        None if probe is None else probe.to(torch.float32).contiguous(),
        *(weight.contiguous(), h, y, rstd, rows, eps),
        OFFSET=offset,
        DUAL=halves == 2,
        **shape._asdict(),
    )
    return h, y, rstd


def backward(
    dh: Tensor | None,
    dy: Tensor,
    h: Tensor,
    rstd: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    capture: bool,
) -> tuple[Tensor, Tensor]:
    """Launch what serves ``sap_fast::probe_rms_norm_backward``; eps is in ``rstd`` already."""
    dh, dy, h = None if dh is None else rows_of(dh), rows_of(dy), h.contiguous()
    n, rows, d = dy.shape
    dx = empty(dy, n, rows, d)
    dprobe = empty(dy, *((n, d) if capture else (0,)), dtype=torch.float32)
    if d == 0:
        return dx, dprobe
    shape = shape_of(d)
    tiles = triton.cdiv(rows, shape.ROWS)
    blocks = capture_blocks(tiles) if capture else tiles
    partial = empty(dy, blocks, n, d, dtype=torch.float32) if capture else None
    dh_half, dh_row = (0, 0) if dh is None else stack_strides(dh)
    dy_half, dy_row = stack_strides(dy)
    full = n == 2
    launch(
        backward_kernel,
        (blocks,),
        row_config(str(architecture(h.device)), shape),
        *(dh, dh_half if full else 0, dh_row),
        *(dy, dy_half if full else 0, dy_row),
        *(h, rstd.contiguous(), weight.contiguous(), dx, partial, rows),
        OFFSET=offset,
        FULL=full,
        **shape._asdict(),
    )
    if partial is not None:
        grid = (triton.cdiv(n * d, _SUM.blocks["COLUMNS"]),)
        launch(sum_kernel, grid, _SUM, partial, dprobe, WIDTH=n * d, BLOCKS=blocks)
    return dx, dprobe
