"""Attention of a dual in Triton: the launchers and their table of configurations."""

from typing import Any

import torch
import triton
from torch import Tensor

from sap_fast.ops._library import architecture
from sap_fast.ops._triton import Config, config, empty, launch, power_of_2, rows_of
from sap_fast.ops.attention.backward_kernels import delta_kernel, key_kernel, query_kernel
from sap_fast.ops.attention.forward_kernel import forward_kernel

# Queries and keys of a tile, and warps, by architecture and the least width that holds the head dimension. Columns:
# of a dual the forward, dq, dk and dv; without tangents the forward, dq, and dk with dv. How chosen: README.md.
_BFLOAT16 = {
    ("sm_80", 64): ((128, 32, 8), (128, 32, 8), (32, 128, 8), (32, 128, 8), (128, 64, 8), (128, 64, 8), (64, 128, 8)),
    ("sm_80", 128): ((128, 16, 8), (32, 32, 8), (16, 128, 8), (32, 64, 4), (128, 64, 8), (128, 32, 8), (32, 64, 4)),
    ("sm_80", 256): ((16, 32, 8), (16, 32, 8), (32, 16, 8), (16, 32, 8), (32, 32, 8), (32, 32, 8), (32, 32, 8)),
    ("sm_86", 64): ((128, 32, 8), (128, 32, 8), (32, 128, 8), (32, 128, 8), (128, 64, 8), (128, 64, 8), (32, 128, 8)),
    ("sm_86", 128): ((128, 16, 8), (32, 32, 8), (32, 32, 4), (32, 64, 4), (128, 64, 8), (128, 32, 8), (32, 64, 4)),
    ("sm_86", 256): ((16, 32, 8), (16, 16, 4), (32, 16, 8), (16, 32, 8), (32, 32, 8), (32, 32, 8), (32, 32, 8)),
    ("sm_90", 64): ((128, 64, 8), (128, 64, 8), (32, 128, 8), (64, 128, 8), (128, 64, 8), (128, 64, 8), (64, 128, 8)),
    ("sm_90", 128): ((128, 32, 8), (128, 16, 8), (16, 128, 8), (32, 128, 8), (128, 64, 8), (128, 64, 8), (64, 128, 8)),
    ("sm_90", 256): ((64, 16, 8), (64, 16, 8), (16, 64, 8), (16, 64, 8), (128, 32, 8), (128, 32, 8), (32, 64, 8)),
    ("sm_100", 64): ((128, 64, 8), (128, 32, 8), (32, 128, 8), (64, 128, 8), (128, 64, 8), (128, 64, 8), (64, 128, 8)),
    ("sm_100", 128): ((128, 16, 8), (128, 16, 8), (16, 128, 8), (32, 128, 8), (128, 64, 8), (128, 64, 8), (64, 128, 8)),
    ("sm_100", 256): ((16, 32, 8), (16, 32, 8), (32, 16, 8), (16, 32, 8), (128, 32, 8), (128, 32, 8), (32, 64, 8)),
    ("gfx942", 64): ((128, 32, 8), (64, 64, 4), (32, 64, 4), (32, 64, 4), (128, 64, 8), (128, 32, 8), (64, 64, 4)),
    ("gfx942", 128): ((64, 32, 4), (64, 16, 4), (16, 64, 8), (32, 64, 4), (128, 64, 8), (128, 32, 8), (32, 64, 4)),
    ("gfx942", 256): ((32, 16, 4), (16, 16, 4), (16, 32, 4), (16, 32, 4), (64, 32, 4), (64, 32, 4), (16, 32, 4)),
}
# The same for float32, whose exact products have no tensor cores on NVIDIA: there registers are what decides.
_FLOAT32 = {
    32: ((32, 32, 8), (32, 32, 8), (32, 32, 8), (32, 32, 8), (64, 32, 8), (32, 32, 8), (32, 32, 8)),
    64: ((16, 16, 8), (16, 16, 8), (16, 16, 8), (16, 16, 8), (16, 16, 4), (16, 16, 4), (16, 16, 4)),
    128: ((16, 16, 8), (16, 16, 8), (16, 16, 8), (16, 16, 8), (16, 16, 4), (16, 16, 4), (16, 16, 4)),
    256: ((8, 16, 4), (8, 16, 8), (16, 8, 8), (16, 8, 4), (16, 16, 4), (16, 16, 4), (16, 16, 4)),
}
_FLOAT32_GFX942 = ((16, 16, 4),) * 7
_COLUMNS = {
    ("forward", True): 0,
    ("dq", True): 1,
    ("dk", True): 2,
    ("dv", True): 3,
    ("forward", False): 4,
    ("dq", False): 5,
    ("dkdv", False): 6,
}


def configuration(arch: str, kernel: str, tangents: bool, block: int, dtype: torch.dtype) -> Config:
    """Look up the table of configurations.

    Raises:
        ValueError: a head dimension that no kernel was configured for.

    Args:
        arch: see ``_library.architecture``.
        kernel: ``"forward"``, ``"dq"``, ``"dk"`` and ``"dv"``, or, without tangents, ``"dkdv"``.
        tangents: whether the kernel has those: of a dual in the forward, of full mode in the backward.
        block: the head dimension as a power of two.
        dtype: of storage.
    """
    if block > 256:
        raise ValueError(
            f"attention on a GPU serves head dimensions up to 256, but was given one of more than {block // 2}"
        )
    if dtype == torch.float32:
        row, stages = _FLOAT32_GFX942 if arch == "gfx942" else _FLOAT32[power_of_2(block, 32, 256)], 1
    else:
        row, stages = _BFLOAT16[arch, power_of_2(block, 64, 256)], 2
    queries, keys, warps = row[_COLUMNS[kernel, tangents]]
    return config(warps, stages, BM=queries, BN=keys)


def forward(
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
    """Launch what serves ``sap_fast::attention``."""
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    halves, rows, heads, d = q.shape
    o, lse = empty(q, *q.shape), empty(q, halves, rows, heads, dtype=torch.float32)
    dual, block = halves == 2, power_of_2(d, 16)
    chosen = configuration(str(architecture(q.device)), "forward", dual, block, q.dtype)
    launch(
        forward_kernel,
        _grid(chosen.blocks["BM"], rows, max_seqlen, heads, cu_seqlens),
        chosen,
        *(q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], o, lse),
        *(cu_seqlens, seqused, cu_seqlens_k, rows, _rows_of_keys(k, cu_seqlens_k), scale),
        DUAL=dual,
        WINDOW=window,
        HEADS=heads,
        GROUP=heads // k.shape[2],
        D=d,
        BD=block,
    )
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    seqused: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int,
    max_seqlen_k: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch what serves ``sap_fast::attention_backward``."""
    do, q, k, v = rows_of(do), rows_of(q), rows_of(k), rows_of(v)
    o, lse = o.contiguous(), lse.contiguous()
    n, rows, heads, d = do.shape
    kv_heads, full, block = k.shape[2], n == 2, power_of_2(d, 16)
    arch = str(architecture(q.device))
    dq = empty(q, n, rows, heads, d)
    dk, dv = empty(k, n, *k.shape[1:]), empty(v, n, *k.shape[1:])
    delta = empty(q, n, rows, heads, dtype=torch.float32)
    cotangent = (do, do.stride(0) if full else 0, *do.stride()[1:3])
    inputs = (*cotangent, q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3])
    numbers = (cu_seqlens, seqused, cu_seqlens_k, rows, _rows_of_keys(k, cu_seqlens_k), scale)
    shape: dict[str, Any] = {"FULL": full, "HEADS": heads, "D": d, "BD": block}
    band: dict[str, Any] = {"WINDOW": window, "GROUP": heads // kv_heads}

    chosen = config(4, 1, ROWS=max(1, 1024 // block))
    grid = (triton.cdiv(rows * heads, chosen.blocks["ROWS"]), 1, 1)
    launch(delta_kernel, grid, chosen, *cotangent, o, delta, rows, **shape)
    # The kernel of queries goes before those of keys: it makes delta better for them.
    chosen = configuration(arch, "dq", full, block, q.dtype)
    grid = _grid(chosen.blocks["BM"], rows, max_seqlen, heads, cu_seqlens)
    launch(query_kernel, grid, chosen, *inputs, lse, delta, dq, *numbers, **shape, **band)
    for role in ("dk", "dv") if full else ("dkdv",):
        chosen = configuration(arch, role, full, block, q.dtype)
        grid = _grid(chosen.blocks["BN"], k.shape[1], max_seqlen_k, kv_heads, cu_seqlens)
        outputs: dict[str, Any] = {"DK": "dk" in role, "DV": "dv" in role}
        launch(key_kernel, grid, chosen, *inputs, lse, delta, dk, dv, *numbers, **outputs, **shape, **band)
    return dq, dk, dv


def _rows_of_keys(k: Tensor, cu_seqlens_k: Tensor | None) -> int | None:
    """Return None where keys lie as q does: an argument less for the kernels, which are then compiled without it."""
    return None if cu_seqlens_k is None else k.shape[1]


def _grid(tile: int, rows: int, max_seqlen: int, heads: int, cu_seqlens: Tensor) -> tuple[int, int, int]:
    """Return ``(tiles, heads, sequences + 1)``; see ``_tiles.py``. At least one tile, for the rows of no sequence."""
    return max(triton.cdiv(min(max_seqlen, rows), tile), 1), heads, len(cu_seqlens)
