"""Attention over packed rows by ``torch.nn.functional.scaled_dot_product_attention``, which wants equal lengths.

Every sequence is padded on the right to ``max_seqlen``, its keys to ``max_seqlen_k``. Causal queries do not see what
comes after them, so that padding needs no mask, and PyTorch can take its flash kernels: unless there is a window, or
keys before the queries.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sap_fast.model.attention_backends.determinism import check_still_deterministic


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Attend over padded copies of rows ``[rows, heads, head_dim]``; rows of no sequence are zero, in gradients too."""
    check_still_deterministic("sdpa", q)
    there, back = _moves(cu_seqlens, max_seqlen, q.shape[0])
    there_k, back_k, longest_k, offset = there, back, max_seqlen, cu_seqlens.new_zeros(1)
    if cu_seqlens_k is not None and max_seqlen_k is not None:
        there_k, back_k = _moves(cu_seqlens_k, max_seqlen_k, k.shape[0])
        longest_k, offset = max_seqlen_k, cu_seqlens_k.diff() - cu_seqlens.diff()

    def padded(x: Tensor, moves: tuple[Tensor, ...], longest: int) -> Tensor:
        return _Move.apply(x, *moves).unflatten(0, (-1, longest)).transpose(1, 2)

    q = padded(q, (*there, *back), max_seqlen)
    k, v = (padded(x, (*there_k, *back_k), longest_k) for x in (k, v))
    mask = None
    if cu_seqlens_k is not None or (window is not None and window < longest_k):
        # Each query's own key, the last that it sees. Those of padding have the last: some key they must see.
        own = (torch.arange(max_seqlen, device=q.device) + offset[:, None]).clamp_max(longest_k - 1)
        distance = own[:, None, :, None] - torch.arange(longest_k, device=q.device)  # [B or 1, 1, T, T_k]
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    o = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return _Move.apply(o.transpose(1, 2).flatten(0, 1), *back, *there)


def _moves(cu_seqlens: Tensor, longest: int, rows: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Index moves from rows to places ``[sequences, longest]``, flattened, and back: each source, and which are empty.

    All of it on the device, which is not waited for.
    """
    device, starts = cu_seqlens.device, cu_seqlens[:-1].long()
    t = torch.arange(longest, device=device)
    empty = (t >= cu_seqlens.diff()[:, None]).flatten()
    row_of_place = (starts[:, None] + t).flatten().masked_fill(empty, 0)
    row = torch.arange(rows, device=device)
    outside = row >= cu_seqlens[-1]
    sequence = torch.bucketize(row, cu_seqlens[1:].long(), right=True).clamp_max(len(starts) - 1)
    place_of_row = (sequence * longest + row - starts[sequence]).masked_fill(outside, 0)
    return (row_of_place, empty), (place_of_row, outside)


class _Move(torch.autograd.Function):
    """Moves rows, ``y[i] = x[source[i]]``, zero where ``empty``; the backward moves back by what undoes it.

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
