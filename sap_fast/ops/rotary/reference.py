"""Rotary position embedding: the primal alone. It is linear in its input."""

import torch
from torch import Tensor

from sap_fast.ops._library import compute_dtype


def primal(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first R channels of every head, pairing channel i with i + R/2 (the half-split layout).

    Args:
        q: ``[rows, heads, head_dim]``; k: ``[rows, kv_heads, head_dim]``; cos, sin: ``[rows, R]``.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype, rotary_dim = compute_dtype(x), cos.shape[-1]
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    wide = x[..., :rotary_dim].to(dtype)
    first, second = wide.chunk(2, -1)
    rotated = wide * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((rotated.to(x.dtype), x[..., rotary_dim:]), -1)
