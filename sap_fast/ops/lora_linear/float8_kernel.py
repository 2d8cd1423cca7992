"""Rounds rows to float8 in Triton: what ``float8.rounded`` says, read once from memory and written as e4m3."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sap_fast.ops._triton import config, empty, launch, power_of_2, rows_of

# Rows wider than a block are read a second time, from the caches.
_WIDEST = 8192


@triton.jit
def round_kernel(x, x_row, y, scale, D: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr):
    """Compute ``y = x / scale`` in e4m3 with ``scale = max |x| / LARGEST``, at least TINY; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    # [BLOCK]
    b_most = tl.zeros([BLOCK], tl.float32)
    for i in range(0, D, BLOCK):
        o_d = i + tl.arange(0, BLOCK)
        b_x = tl.load(x + row * x_row + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_most = tl.maximum(b_most, tl.abs(b_x), propagate_nan=tl.PropagateNan.ALL)
    most = tl.max(b_most, 0)
    # What is not a number must stay seen: the maximum of a reduction drops it.
    most += tl.sum(b_most - b_most, 0)
    b_scale = tl.maximum(tl.div_rn(most, LARGEST), TINY, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scale + row, b_scale)
    for i in range(0, D, BLOCK):
        o_d = i + tl.arange(0, BLOCK)
        b_x = tl.load(x + row * x_row + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        tl.store(y + row * D + o_d, tl.div_rn(b_x, b_scale).to(tl.float8e4nv), mask=o_d < D)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel on ``x [n, k]``: values ``[n, k]`` and scales ``[n, 1]``."""
    x = rows_of(x)
    rows, width = x.shape
    values, scale = empty(x, rows, width, dtype=torch.float8_e4m3fn), empty(x, rows, 1, dtype=torch.float32)
    block = power_of_2(width, 16, _WIDEST)
    launch(
        round_kernel,
        (rows,),
        config(num_warps=power_of_2(block // 512, 1, 16), BLOCK=block),
        *(x, x.stride(0), values, scale),
        D=width,
        LARGEST=torch.finfo(values.dtype).max,
        TINY=torch.finfo(scale.dtype).tiny,
    )
    return values, scale
