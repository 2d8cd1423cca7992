"""Attention over packed rows by ``torch.nn.functional.scaled_dot_product_attention``, which wants equal lengths.

Every sequence is padded on the right to ``max_seqlen``. Causal queries do not see what comes after them, so that
padding needs no mask, and without a window PyTorch can take its flash kernels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sap_fast.attention_backends.determinism import check_still_deterministic


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> Tensor:
    """On rows ``[rows, heads, head_dim]``, with zeros in rows of no sequence, in gradients too."""
    check_still_deterministic("sdpa", q)
    rows, sequences, device = q.shape[0], len(cu_seqlens) - 1, q.device
    # All of it on the device, which is not waited for. A place is one of [sequences, max_seqlen], flattened.
    t = torch.arange(max_seqlen, device=device)
    starts = cu_seqlens[:-1].long()
    empty = (t >= cu_seqlens.diff()[:, None]).flatten()
    row_of_place = (starts[:, None] + t).flatten().masked_fill(empty, 0)
    row = torch.arange(rows, device=device)
    outside = row >= cu_seqlens[-1]
    sequence = torch.bucketize(row, cu_seqlens[1:].long(), right=True).clamp_max(sequences - 1)
    place_of_row = (sequence * max_seqlen + row - starts[sequence]).masked_fill(outside, 0)
    there, back = (row_of_place, empty), (place_of_row, outside)

    q, k, v = (_Move.apply(x, *there, *back).unflatten(0, (sequences, max_seqlen)).transpose(1, 2) for x in (q, k, v))
    mask = None
    if window is not None and window < max_seqlen:
        distance = t[:, None] - t
        mask = (distance >= 0) & (distance < window)
    o = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return _Move.apply(o.transpose(1, 2).flatten(0, 1), *back, *there)


class _Move(torch.autograd.Function):
    """``y[i] = x[source[i]]``, zero where ``empty``; the backward moves back by what undoes it.

    Each row has one place: no sum is formed, whose order could change.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, empty: Tensor, source_back: Tensor, empty_back: Tensor) -> Tensor:
        ctx.save_for_backward(source_back, empty_back)
        return x.index_select(0, source).masked_fill_(empty[:, None, None], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        source, empty = ctx.saved_tensors
        return dy.index_select(0, source).masked_fill_(empty[:, None, None], 0), None, None, None, None
