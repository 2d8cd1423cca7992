"""Causal attention over sequences packed one after another: the primal alone."""

import torch
from torch import Tensor

from sap_fast.ops._library import compute_dtype


def primal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seqused: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    max_seqlen_k: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Compute ``o = softmax(scale q k^T + mask) v`` within each sequence, and the log-sum-exp of its scores.

    The tangent of the log-sum-exp is ``mu = rowsum(P S_dot)``, the row statistic of the dual's backward.

    Args:
        q: ``[rows, heads, head_dim]``; k, v: ``[rows or those of cu_seqlens_k, kv_heads, head_dim]``.
        cu_seqlens: ``[B + 1]``, sequence b holds rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
        seqused: ``[B]`` or None, how many of those rows are real; the rest is padding.
        cu_seqlens_k: ``[B + 1]``, the rows of k and v alike, of which the last query sees the last; None if they are
            those of q.
        window: a query sees its own key and the ``window - 1`` keys before it; 0 for all of them.

    Returns:
        ``o [rows, heads, head_dim]``, zero in padding rows, and ``lse [rows, heads]``.
    """
    dtype, storage, (rows, heads, _), kv_heads = compute_dtype(q), q.dtype, q.shape, k.shape[1]
    longest_k = max_seqlen_k if k.shape[0] else 0  # without rows there is no row 0
    row, real = _places(cu_seqlens, seqused, max_seqlen if rows and longest_k else 0)  # [B, T]
    row_k, real_k = (row, real) if cu_seqlens_k is None else _places(cu_seqlens_k, None, longest_k)  # [B, T_k]

    q = q.to(dtype)[row].transpose(1, 2).unflatten(1, (kv_heads, heads // kv_heads))
    k, v = (x.to(dtype)[row_k].transpose(1, 2) for x in (k, v))  # [B, kv_heads, T_k, head_dim]; q has group before T
    t, t_k = (torch.arange(x.shape[1], device=q.device) for x in (row, row_k))
    own = t + (real_k.sum(1) - real.sum(1))[:, None]  # [B, T]: each query's own key
    # Padded queries must see some key: what they compute is finite, so that its cotangent of zero stays zero.
    own = torch.where(real, own, t.clamp_max(len(t_k) - 1))
    distance = own[:, :, None] - t_k
    hidden = (distance < 0) | ((distance >= window) if window else False)
    hidden = hidden[:, None, None]  # [B, 1, 1, T, T_k]
    scores = (scale * q @ k[:, :, None].transpose(-1, -2)).masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    o = (scores - lse[..., None]).exp() @ v[:, :, None]

    # Back to rows. Every real row occurs once; padded places are dropped.
    o, lse = o.flatten(1, 2).transpose(1, 2)[real], lse.flatten(1, 2).transpose(1, 2)[real]
    packed = row[real]
    o = o.new_zeros((rows, *o.shape[1:])).index_copy(0, packed, o)
    return o.to(storage), lse.new_zeros((rows, heads)).index_copy(0, packed, lse)


def _places(cu_seqlens: Tensor, used: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    """Find ``[B, longest]``: the row of each place, and whether there is one. Places without one read row 0."""
    start, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    length = length if used is None else torch.minimum(length, used.long())
    t = torch.arange(longest, device=cu_seqlens.device)
    real = t < length[:, None]
    return torch.where(real, start[:, None] + t, 0), real
