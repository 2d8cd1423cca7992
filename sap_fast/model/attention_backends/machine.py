"""Finds what a device has for attention: looked at, imported and tried, without ever raising."""

import functools
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from sap_fast import _C
from sap_fast.model.attention_backends.choice import Backend, Heads, Machine, obstacle
from sap_fast.model.attention_backends.determinism import deterministic
from sap_fast.model.attention_backends.serve import Ordinary, load, own_attention
from sap_fast.ops._library import architecture

_CPU = torch.device("cpu")
_IMPORTED: tuple[Backend, ...] = ("flash_attn", "varlen_attn")
# What a backend is tried on: the queries of each sequence, and its keys.
_Lengths = tuple[tuple[int, ...], tuple[int, ...]]
_LENGTHS: tuple[_Lengths, ...] = (((5, 1), (5, 1)), ((3, 0, 1), (6, 2, 1)))


def machine_of(device: torch.device, heads: Heads) -> Machine:
    """Find what ``device`` has for queries, keys and values of this kind.

    A package is imported, and tried on a few rows, only where nothing else rules it out.
    """
    nvidia = device.type == "cuda" and torch.version.hip is None
    found = Machine(
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if nvidia else None,
        own_kernel=architecture(device) is not None if device.type == "cuda" else device.type == "cpu" and _C.loaded,
        deterministic=deterministic(),
    )
    tried = {name: _trial(name, device, heads) for name in _IMPORTED if obstacle(name, found, heads) is None}
    return replace(found, unusable={name: problem for name, problem in tried.items() if problem is not None})


@functools.cache
def _trial(backend: Backend, device: torch.device, heads: Heads) -> str | None:
    """Import a backend and try it; return what went wrong, None if nothing did."""
    try:
        problem = problem_of(load(backend), device, heads)
    except Exception as error:  # a broken installation raises anything
        problem = f"it cannot be imported ({_first_line(error)})"
    return None if problem is None else f"{problem}; {_ADVICE[backend]}"


def problem_of(ordinary: Ordinary, device: torch.device, heads: Heads) -> str | None:
    """Run a backend forward and backward on a few rows. Which chips it was built for, for one, only it knows.

    Returns:
        What is wrong with it; None if nothing is.
    """
    try:
        # attach may stand in a region without gradients.
        with torch.inference_mode(False), torch.enable_grad():
            # The truth on the CPU: cuBLAS has demands of its own on deterministic products.
            duals = [
                dual
                for lengths in _LENGTHS
                for dual in zip(
                    _solved(ordinary, device, heads, lengths),
                    _solved(own_attention, _CPU, heads, lengths, torch.float64),
                    strict=True,
                )
            ]
            # Some roundings to bfloat16, each of 2^-9 at the most; a wrong mask or scale is beyond. NaN is not within.
            right = all(bool((x - y).abs().max() <= 2**-5 * y.abs().max()) for x, y in duals)
    except Exception as error:
        return f"it failed on a few rows ({_first_line(error)})"
    return None if right else "it is wrong on a few rows"


def _solved(
    ordinary: Ordinary, device: torch.device, heads: Heads, lengths: _Lengths, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Compute ``o, dq, dk, dv`` of sequences and two rows of none, with a window and a head group; float64, on the CPU.

    Args:
        lengths: of the sequences: their queries, and their keys.
        dtype: to compute in, on the same numbers; that of ``heads`` if None.
    """
    queries, keys = lengths
    cu_seqlens, cu_seqlens_k = (
        torch.tensor([*accumulate(n, initial=0)], dtype=torch.int32, device=device) for n in lengths
    )
    rows, rows_k = sum(queries) + 2, sum(keys) + 2

    def made(phase: int, rows: int, count: int) -> Tensor:
        x = torch.arange(rows * count * heads.head_dim, dtype=torch.float64) + phase
        # Of a square, so that no row resembles another and no gradient cancels; and no generator is asked.
        x = (0.618 * x * x).sin().view(rows, count, heads.head_dim).to(heads.dtype)
        return x.to(device, dtype or heads.dtype)

    q, k, v = (made(phase, *n).requires_grad_() for phase, *n in ((0, rows, 2), (1, rows_k, 1), (2, rows_k, 1)))
    of_keys = (None, None) if queries == keys else (cu_seqlens_k, max(keys))
    o = ordinary(q, k, v, cu_seqlens, max(queries), heads.head_dim**-0.5, 3, *of_keys)
    grads = torch.autograd.grad(o, (q, k, v), made(3, rows, 2))
    return [x.detach().to("cpu", torch.float64) for x in (o, *grads)]


_ADVICE: dict[Backend, str] = {
    "flash_attn": "install a flash-attn of release 2.4.1 or later that was built for this torch and this GPU",
    "varlen_attn": "install a release of torch that has it, built for this GPU",
}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
