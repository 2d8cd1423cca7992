"""The attention of a layer: the library's op for duals, and for ordinary passes the backend chosen."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from sap_fast.model.attention_backends.choice import Backend
from sap_fast.model.attention_backends.packed import flash_attn, packed_attention, varlen_attn
from sap_fast.model.attention_backends.padded import padded_attention
from sap_fast.ops import attention

# (q, k, v, cu_seqlens, max_seqlen, scale, window, cu_seqlens_k, max_seqlen_k) -> o
Ordinary = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None, Tensor | None, int | None], Tensor]


def own_attention(
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
    """Attend by the library's op, without tangents."""
    keys: dict[str, Any] = {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k}
    o, _ = attention(q, None, k, None, v, None, cu_seqlens, max_seqlen=max_seqlen, scale=scale, window=window, **keys)
    return o


def load(backend: Backend) -> Ordinary:
    """Load a backend as a function of an ordinary pass that takes and returns what ``sap_fast.ops.attention`` does.

    Raises:
        ImportError: it is not installed, or too old.
    """
    if backend == "flash_attn":
        return partial(packed_attention, flash_attn())
    if backend == "varlen_attn":
        return partial(packed_attention, varlen_attn())
    return padded_attention if backend == "sdpa" else own_attention


@dataclass(frozen=True)
class Attention:
    """Takes the place of ``sap_fast.ops.attention`` in a layer.

    Attributes:
        backend: what serves ordinary passes.
        ordinary: it, as :func:`load` gives it.
    """

    backend: Backend
    ordinary: Ordinary

    def __call__(
        self,
        q: Tensor,
        q_dot: Tensor | None,
        k: Tensor,
        k_dot: Tensor | None,
        v: Tensor,
        v_dot: Tensor | None,
        cu_seqlens: Tensor,
        *,
        max_seqlen: int,
        scale: float,
        window: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as ``sap_fast.ops.attention`` does."""
        # Where there is nothing to attend to, others have no answer.
        nothing = not q.shape[0] or len(cu_seqlens) < 2 or not max_seqlen
        if q_dot is not None or nothing:
            options: dict[str, Any] = {"max_seqlen": max_seqlen, "scale": scale, "window": window}
            options |= {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k}
            return attention(q, q_dot, k, k_dot, v, v_dot, cu_seqlens, **options)
        return self.ordinary(q, k, v, cu_seqlens, max_seqlen, scale, window, cu_seqlens_k, max_seqlen_k), None
