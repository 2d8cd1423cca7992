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
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """``o = softmax(scale q k^T + mask) v`` within each sequence, and the log-sum-exp of its scores.

    The tangent of the log-sum-exp is ``mu = rowsum(P S_dot)``, the row statistic of the pair's backward.

    Args:
        q: ``[rows, heads, head_dim]``; k, v: ``[rows, kv_heads, head_dim]``.
        cu_seqlens: ``[B + 1]``, sequence b holds rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
        seqused: ``[B]`` or None, how many of those rows are real; the rest is padding.
        window: a query sees itself and the ``window - 1`` keys before it; 0 for all of them.

    Returns:
        ``o [rows, heads, head_dim]``, zero in padding rows, and ``lse [rows, heads]``.
    """
    dtype, storage, (rows, heads, _), kv_heads = compute_dtype(q), q.dtype, q.shape, k.shape[1]
    start, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    length = length if seqused is None else torch.minimum(length, seqused.long())
    t = torch.arange(max_seqlen if rows else 0, device=q.device)  # without rows there is no row 0
    real = t < length[:, None]  # [B, T]
    # Padded places read row 0; what they compute is finite and is never read back.
    row = torch.where(real, start[:, None] + t, 0)  # [B, T]

    q, k, v = (x.to(dtype)[row].transpose(1, 2) for x in (q, k, v))  # [B, heads or kv_heads, T, head_dim]
    q = q.unflatten(1, (kv_heads, heads // kv_heads))  # [B, kv_heads, group, T, head_dim]
    distance = t[:, None] - t
    hidden = (distance < 0) | ((distance >= window) if window else False)
    scores = (scale * q @ k[:, :, None].transpose(-1, -2)).masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    o = (scores - lse[..., None]).exp() @ v[:, :, None]

    # Back to rows. Every real row occurs once; padded places are dropped.
    o, lse = o.flatten(1, 2).transpose(1, 2)[real], lse.flatten(1, 2).transpose(1, 2)[real]
    packed = row[real]
    o = o.new_zeros((rows, *o.shape[1:])).index_copy(0, packed, o)
    return o.to(storage), lse.new_zeros((rows, heads)).index_copy(0, packed, lse)
