"""Counter-based dropout: the mask is a pure function of (seed, salt, row, column).

Both halves of a dual, the backward, a recomputed checkpoint, the outer pass of a step and every backend
therefore see the same mask without storing it, and the seed may stay on the device.
"""

import numpy
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Permute 32-bit words; each output bit depends on all input bits (lowbias32 by C. Wellons)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def kept_factor(p: float) -> float:
    """Compute the factor of a kept element, ``1 / (1 - p)``, in float32: one number on every device.

    A GPU would divide a tensor by a number by multiplying with its rounded reciprocal, another number at p = 0.999.
    """
    return float(numpy.float32(1) / numpy.float32(1.0 - p))


def dropout_mask(seed: Tensor, salt: int, rows: int, width: int, p: float) -> Tensor:
    """Draw the factor by which each input element is multiplied: 0 with probability p, else 1 / (1 - p).

    Args:
        seed: int64 scalar tensor, one for each micro-batch.
        salt: tells modules apart that share a seed.
        rows, width: shape of the mask.
        p: in [0, 1).

    Returns:
        ``[rows, width]`` float32 on the device of ``seed``.
    """
    key = _mix((seed + (salt * 0x9E3779B9 & _WORD)) & _WORD)
    row = _mix((torch.arange(rows, device=seed.device) + key) & _WORD)
    column = torch.arange(width, device=seed.device) * 0x9E3779B9 & _WORD
    word = _mix(row[:, None] ^ column)
    return (word >= round(p * 2**32)).to(torch.float32) * kept_factor(p)
