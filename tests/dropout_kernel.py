"""A kernel that does nothing but draw a dropout mask, as those of lora_linear do."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sap_fast.ops.lora_linear.kernels import dropout_constants
from sap_fast.ops.lora_linear.products import kept, marked, row_words


@triton.jit
def _mask_kernel(seed, salt, mask, rows, width, LIMIT: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    # [BLOCK]
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_z = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_mask = tl.full([BLOCK, BLOCK], KEPT, tl.float32)
    if LIMIT >= 0:
        b_mask = tl.where(kept(row_words(seed, salt, o_row), o_z, LIMIT), b_mask, 0.0)
    m = (o_row < rows)[:, None] & (o_z < width)[None, :]
    tl.store(mask + o_row[:, None] * width + o_z[None, :], b_mask, mask=m)


def mask(seed: Tensor, salt: int, rows: int, width: int, p: float) -> Tensor:
    """Draw what ``dropout_mask`` returns, by the kernel."""
    result = torch.empty(rows, width, device=seed.device)
    block = 64
    grid = (triton.cdiv(rows, block), triton.cdiv(width, block))
    _mask_kernel[grid](seed, marked(salt), result, rows, width, *dropout_constants(p), BLOCK=block)
    return result
