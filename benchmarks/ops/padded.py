"""Packed rows as a dense attention takes them: every sequence padded to the longest."""

import torch
from torch import Tensor


class Padded:
    """Turns rows ``[S, rows, heads, d]`` into ``[S, B, kv_heads, group T, d]`` and back; padding is zero in both."""

    def __init__(self, cu_seqlens: Tensor, seqused: Tensor | None, max_seqlen: int, rows: int, kv_heads: int) -> None:
        start, length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        self.length = length = length if seqused is None else torch.minimum(length, seqused.long())
        self.t = torch.arange(max_seqlen if rows else 0, device=cu_seqlens.device)
        self.real = self.t < length[:, None]  # [B, T]
        self.row = torch.where(self.real, start[:, None] + self.t, 0)  # [B, T]
        # Where each row is among the padded ones. Rows after the last sequence are in none.
        row = torch.arange(rows, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:].long(), row, right=True)
        inside = sequence < len(length)
        sequence = sequence.clamp(max=max(len(length) - 1, 0))
        place = row - (start[sequence] if len(length) else 0)
        self.kept = inside & (place < length[sequence]) if len(length) else inside
        self.place = torch.where(self.kept, sequence * len(self.t) + place, 0)
        self.kv_heads = kv_heads

    def pad(self, x: Tensor) -> Tensor:
        x = x[:, self.row] * self.real[..., None, None]  # [S, B, T, heads, d]
        x = x.unflatten(3, (self.kv_heads, x.shape[3] // self.kv_heads)).permute(0, 1, 3, 4, 2, 5)
        return x.flatten(3, 4)

    def unpad(self, x: Tensor, group: int) -> Tensor:
        x = x.unflatten(3, (group, len(self.t)))
        x = x.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)  # [S, B T, heads, d]
        x = x[:, self.place] if x.shape[1] else x.new_zeros((len(x), len(self.place), *x.shape[2:]))
        return x * self.kept[:, None, None]

    def hidden(self, keys: "Padded", group: int, window: int) -> Tensor:
        """Mark what a query does not see: ``[group T, T]``, or ``[B, 1, group T, T_k]`` with keys of their own."""
        own = self.t
        if keys is not self:
            # Padding has the last key as its own, so that it sees some.
            own = (self.t + (keys.length - self.length)[:, None, None]).clamp_max(len(keys.t) - 1)
        distance = torch.cat([own] * group, -1)[..., None] - keys.t
        return (distance < 0) | (distance >= window) if window else distance < 0


def padded_dual(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    seqused: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    max_seqlen_k: int,
) -> tuple[Padded, Padded]:
    """Lay out queries and keys; both have one layout without ``cu_seqlens_k``."""
    queries = Padded(cu_seqlens, seqused, max_seqlen, q.shape[1], k.shape[2])
    if cu_seqlens_k is None:
        return queries, queries
    return queries, Padded(cu_seqlens_k, None, max_seqlen_k, k.shape[1], k.shape[2])
