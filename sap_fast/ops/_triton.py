"""Holds what the Triton launchers share. Only ``kernels.py`` files import it, so importing sap_fast imports no Triton.

Every kernel is written in one grammar: ``i_`` an index, ``o_`` offsets, ``m_`` a mask, ``p_`` pointers, ``b_`` the
value of a block, with its shape in a comment above. A tensor's argument has the tensor's name, and its strides
follow it: ``x, x_half, x_row`` are a stack ``[S, rows, d]``, the distance of its halves and that of its rows, in
elements; its last dimension is contiguous. Rows are multiplied in int64, because rows x width can pass 2^31.

A kernel is compiled for the shape of a model (widths, heads) and for what a pass carries (``DUAL``: S = 2;
``FULL``: n = 2), never for the number of rows, which differs from step to step.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# What CUDA and ROCm allow in the second and third dimension of a grid.
_MOST_PROGRAMS = 65535


class Config(NamedTuple):
    """Tells how a kernel is launched: its block sizes by name, warps, and depth of software pipelining."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int


def config(num_warps: int, num_stages: int = 2, **blocks: int) -> Config:
    """Make one entry of an op's table of configurations."""
    return Config(blocks, num_warps, num_stages)


def launch(kernel: Any, grid: tuple[int, ...], chosen: Config, *args: Any, **constants: Any) -> None:
    """Launch a kernel, unless its grid is empty.

    Args:
        kernel: a ``triton.jit`` function.
        grid: number of programs in each dimension.
        chosen: block sizes and compilation options.
        args: tensors and numbers, in the kernel's order.
        constants: its other ``tl.constexpr`` arguments.

    Raises:
        ValueError: more programs than a GPU can count.
    """
    if 0 in grid:
        return
    if max(grid[1:], default=0) > _MOST_PROGRAMS:
        raise ValueError(
            f"{kernel.__name__} would need a grid of {grid}, but a GPU has at most {_MOST_PROGRAMS} programs in all "
            "dimensions but the first: use fewer rows or sequences in one batch"
        )
    kernel[grid](
        *args,
        **constants,
        **chosen.blocks,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        enable_fp_fusion=True,  # Triton's default changes with 3.10, and results with it
    )


def power_of_2(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """Find the smallest power of two that is not less than n, within bounds."""
    return min(max(triton.next_power_of_2(n), least), most)


def rows_of(x: Tensor) -> Tensor:
    """Return ``x`` itself, or a copy of it where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def stack_strides(x: Tensor) -> tuple[int, int]:
    """Return ``(half, row)``: the distances, in elements, that a kernel needs of a stack ``[S, rows, d]``."""
    return x.stride(0), x.stride(1)


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Make a fresh contiguous tensor on the device of ``like``."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
