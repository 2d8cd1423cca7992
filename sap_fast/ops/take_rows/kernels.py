"""Taking rows in Triton: both halves of up to three tensors in one launch, so that k and v are one."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sap_fast.ops._library import architecture
from sap_fast.ops._triton import Config, config, empty, launch, power_of_2, rows_of, stack_strides

_AT_ONCE = 3


def row_config(arch: str, width: int) -> Config:
    """Look up the configuration: eight elements for each thread, which are 16 bytes in bfloat16."""
    lanes = 64 if arch.startswith("gfx") else 32
    block = power_of_2(width, 16, 1024)
    return config(power_of_2(block // (8 * lanes), 1, 8), 1, BLOCK=block)


@triton.jit
def copy_row(x, y, x_half, y_half, WIDTH: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr):
    """Copy this program's block of a row of ``WIDTH`` elements, of each half."""
    # [BLOCK]
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for i_half in tl.static_range(HALVES):
        b = tl.load(x + i_half * x_half + o, mask=o < WIDTH, other=0.0)
        tl.store(y + i_half * y_half + o, b, mask=o < WIDTH)


@triton.jit(do_not_specialize=["taken"])
def take_kernel(
    x0,
    x0_half,
    x0_row,
    x1,
    x1_half,
    x1_row,
    x2,
    x2_half,
    x2_row,
    y0,
    y1,
    y2,
    rows,
    taken,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take one place, block and tensor a program. Outputs are contiguous; a width of 0 is no tensor."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    count = taken.to(tl.int64)
    if tl.program_id(2) == 0:
        copy_row(x0 + row * x0_row, y0 + i * WIDTH0, x0_half, count * WIDTH0, WIDTH0, HALVES, BLOCK)
    elif tl.program_id(2) == 1:
        copy_row(x1 + row * x1_row, y1 + i * WIDTH1, x1_half, count * WIDTH1, WIDTH1, HALVES, BLOCK)
    else:
        copy_row(x2 + row * x2_row, y2 + i * WIDTH2, x2_half, count * WIDTH2, WIDTH2, HALVES, BLOCK)


@triton.jit
def sum_row(
    dy, dx, takers, begin, end, dy_half, dy_row, dx_half, WIDTH: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum up what the takers from ``begin`` up to ``end`` have in this program's block, of each half, in order."""
    # [BLOCK]
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for i_half in tl.static_range(HALVES):
        b_sum = tl.zeros([BLOCK], tl.float32)
        for i_taker in range(begin, end):
            p = dy + i_half * dy_half + tl.load(takers + i_taker) * dy_row + o
            b_sum += tl.load(p, mask=o < WIDTH, other=0.0).to(tl.float32)
        tl.store(dx + i_half * dx_half + o, b_sum, mask=o < WIDTH)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(
    dy0,
    dy0_half,
    dy0_row,
    dy1,
    dy1_half,
    dy1_row,
    dy2,
    dy2_half,
    dy2_row,
    dx0,
    dx1,
    dx2,
    offsets,
    takers,
    count,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum up what a row's takers got: one program a row, block and tensor."""
    i = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + i), tl.load(offsets + i + 1)
    rows = count.to(tl.int64)
    if tl.program_id(2) == 0:
        sum_row(dy0, dx0 + i * WIDTH0, takers, begin, end, dy0_half, dy0_row, rows * WIDTH0, WIDTH0, HALVES, BLOCK)
    elif tl.program_id(2) == 1:
        sum_row(dy1, dx1 + i * WIDTH1, takers, begin, end, dy1_half, dy1_row, rows * WIDTH1, WIDTH1, HALVES, BLOCK)
    else:
        sum_row(dy2, dx2 + i * WIDTH2, takers, begin, end, dy2_half, dy2_row, rows * WIDTH2, WIDTH2, HALVES, BLOCK)


def forward(xs: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """Launch what serves ``sap_fast::take_rows``."""
    return _launched(take_kernel, xs, (rows.contiguous(),), rows.shape[0])


def backward(dys: Sequence[Tensor], offsets: Tensor, takers: Tensor) -> list[Tensor]:
    """Launch what serves ``sap_fast::take_rows_backward``."""
    return _launched(sum_kernel, dys, (offsets.contiguous(), takers.contiguous()), offsets.shape[0] - 1)


def _launched(kernel: object, xs: Sequence[Tensor], index: tuple[Tensor, ...], count: int) -> list[Tensor]:
    """Return the tensors with ``count`` rows that a kernel makes of ``xs``."""
    ys = [empty(x, x.shape[0], count, *x.shape[2:]) for x in xs]
    for start in range(0, len(xs), _AT_ONCE):
        some = [rows_of(x.flatten(2)) for x in xs[start : start + _AT_ONCE]]
        missing = _AT_ONCE - len(some)
        widths = [x.shape[2] for x in some] + [0] * missing
        chosen = row_config(str(architecture(some[0].device)), max(widths))
        strided = [argument for x in some + some[:1] * missing for argument in (x, *stack_strides(x))]
        outputs = ys[start : start + len(some)] + ys[start : start + 1] * missing
        sizes = {f"WIDTH{i}": width for i, width in enumerate(widths)}
        launch(
            kernel,
            (count, triton.cdiv(max(widths), chosen.blocks["BLOCK"]), len(some)),
            chosen,
            *strided,
            *outputs,
            *index,
            count,
            **sizes,
            HALVES=some[0].shape[0],
        )
    return ys
