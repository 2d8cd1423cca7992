"""Registers the private raw ops ``torch.ops.sap_fast.*`` and holds what their public functions share.

A raw op works on stacks ``[S, ...]`` (see ``sap_fast/dual.py``), on inputs without grad. Its schema is
written once; the PyTorch reference is its CompositeExplicitAutograd kernel, which serves every device for
which no faster kernel is registered (C++ on key CPU, Triton on key CUDA).
"""

import enum
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sap_fast.dual import stacked

_LIBRARY = torch.library.Library("sap_fast", "DEF")

# The dispatcher's thread-local state outside of any mode, to which a reference rule returns (see _with_autograd).
_INCLUDED = torch._C._dispatch_tls_local_include_set()
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()


def _with_autograd(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``torch.func`` work inside a kernel.

    Reference rules derive tangents and cotangents by autograd. Called beneath a ``TorchDispatchMode`` (opcheck,
    fake tensors), a kernel finds the autograd keys switched off, and ``torch.func.jvp`` fails.
    """

    @functools.wraps(reference)
    def kernel(*args: Any) -> Any:
        if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality):
            with torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED):
                return reference(*args)
        return reference(*args)

    return kernel


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``sap_fast::<schema>`` with its reference rule and its fake (shape) implementation.

    Args:
        schema: the op's schema, such as ``"glu(Tensor gate, Tensor up, str activation) -> Tensor"``.
        reference: the rule in PyTorch; must return fresh tensors, never views of its inputs.
        fake: returns empty outputs of the right shapes and dtypes.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _with_autograd(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sap_fast::{name}", fake, lib=_LIBRARY)


class Mode(enum.Enum):
    """What a pass carries: see ``sap_fast/dual.py``."""

    SINGLE = "single"  # S = 1, n = 1
    HALF = "half"  # S = 2, n = 1: the primal half is not differentiable
    FULL = "full"  # S = 2, n = 2

    @staticmethod
    def of(tangent: Tensor | None, primal_needs_grad: bool) -> "Mode":
        if tangent is None:
            return Mode.SINGLE
        return Mode.FULL if primal_needs_grad else Mode.HALF


def stacked_cotangent(mode: Mode, dy: Tensor | None, dy_dot: Tensor | None, y: Tensor) -> Tensor:
    """Stack what autograd hands to a backward as ``[n, ...]``, zeros where an output was not used.

    Args:
        mode: the mode of the forward pass.
        dy, dy_dot: cotangents of the output's halves, or None.
        y: a tensor of the output half's shape, dtype and device.
    """
    if mode is Mode.SINGLE:
        return (torch.zeros_like(y) if dy is None else dy)[None]
    dy_dot = torch.zeros_like(y) if dy_dot is None else dy_dot
    if mode is Mode.HALF:
        return dy_dot[None]
    return stacked(torch.zeros_like(y) if dy is None else dy, dy_dot)


def split_cotangent(mode: Mode, dx: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Hand stacked cotangents ``[n, ...]`` back to autograd as those of ``(x, x_dot)``."""
    if mode is Mode.SINGLE:
        return dx[0], None
    if mode is Mode.HALF:
        return None, dx[0]
    return dx[0], dx[1]


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32: what statistics, sums and probabilities are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_pair(name: str, x: Tensor, x_dot: Tensor | None, ndim: int) -> None:
    """Refuse a pair whose halves differ or whose shape is not the op's."""
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, but has shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(f"{name} must be float32, bfloat16 or float64, but is {x.dtype}")
    if x_dot is not None and (x_dot.shape, x_dot.dtype, x_dot.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"{name} and its tangent must agree in shape, dtype and device, but are "
            f"{tuple(x.shape)} {x.dtype} {x.device} and {tuple(x_dot.shape)} {x_dot.dtype} {x_dot.device}"
        )


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that does not have the shape expected."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, but has {tuple(x.shape)}")


def check_dtype(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """Refuse tensors that must have one dtype and have two."""
    if x.dtype != reference.dtype:
        raise TypeError(f"{name} and {reference_name} must have one dtype, but are {x.dtype} and {reference.dtype}")


def check_device(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """Refuse tensors on different devices."""
    if x.device != reference.device:
        raise ValueError(f"{name} is on {x.device}, but {reference_name} on {reference.device}; move one of them")
