"""Registers the private raw ops ``torch.ops.sap_fast.*`` and holds what their public functions share.

A raw op works on stacks ``[S, ...]`` (see ``sap_fast/dual.py``), on inputs without grad. Its schema is
written once; the PyTorch reference is its CompositeExplicitAutograd kernel, which serves every device for
which no faster kernel is registered (C++ on key CPU, Triton on key CUDA, which ROCm's devices use too).
"""

import enum
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sap_fast.dual import stacked

_LIBRARY = torch.library.Library("sap_fast", "DEF")
# What serves each raw op on key CUDA, and where nothing faster does, for launchers_on_cpu and references_on_cpu.
_LAUNCHED: dict[str, Callable[..., Any]] = {}
_REFERENCES: dict[str, Callable[..., Any]] = {}
# What counts the floating-point operations of each raw op.
_FLOPS: dict[str, Callable[[Mapping[str, Any]], int]] = {}

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


@functools.cache
def architecture(device: torch.device) -> str | None:
    """Name the table of configurations that serves a device; None if its kernels were made for none like it.

    ``sm_86`` stands for the chips of compute capability 8.6, 8.9 and 12.x, which have 99 KiB of shared memory a
    block where their bigger sisters have 163 or 227. A CPU runs kernels by Triton's interpreter alone.
    """
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.partition(":")[0] == "gfx942" else None
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12 or (major == 8 and minor > 0):
        return "sm_86"
    # Not 10.3: Triton 3.6 to 3.8 miscompile two products chained on one accumulator there (triton issue 10821).
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100"}.get((major, minor))


def launcher(name: str) -> Callable[..., Any]:
    """Import a raw op's Triton launcher: ``forward`` or ``backward`` of its ``kernels.py``, or ``forward_``, ..."""
    in_place = "_" * name.endswith("_")
    op, backward, _ = name.removesuffix("_").partition("_backward")
    return getattr(import_module(f"sap_fast.ops.{op}.kernels"), f"{'backward' if backward else 'forward'}{in_place}")


def _triton(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Make what serves a raw op on key CUDA. Triton is imported at the first call."""
    found = functools.cache(launcher)

    def kernel(*args: Any) -> Any:
        x = _first_tensor(args)
        # In float64 the reference rules are what one wants: they are the oracle.
        if x.dtype == torch.float64 or architecture(x.device) is None:
            return reference(*args)
        with torch.cuda.device_of(x):
            return found(name)(*args)

    return kernel


def raw_ops() -> list[str]:
    """Return the names of all raw ops, without the library's."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.partition("::")[2] for name in names if name.startswith("sap_fast::"))


def reference_rule(name: str) -> Callable[..., Any]:
    """Return the rule in PyTorch that serves a raw op where it has no kernel."""
    return _REFERENCES[name]


def flop_formula(name: str) -> Callable[[Mapping[str, Any]], int]:
    """Return what counts a raw op's floating-point operations; see :func:`define`."""
    return _FLOPS[name]


def launchers_on_cpu() -> AbstractContextManager[None]:
    """Let the Triton launchers serve key CPU as well, where ``TRITON_INTERPRET=1`` has their kernels interpreted."""
    return _serving_cpu(_LAUNCHED)


def references_on_cpu() -> AbstractContextManager[None]:
    """Let the reference rules serve key CPU in place of the C++ kernels."""
    return _serving_cpu(_REFERENCES)


@contextmanager
def _serving_cpu(implementations: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    library = torch.library.Library("sap_fast", "IMPL")
    try:
        with warnings.catch_warnings():
            # The dispatcher remarks that the C++ kernels step aside. They come back when the library goes.
            warnings.simplefilter("ignore")
            for name, implementation in implementations.items():
                library.impl(name, implementation, "CPU")
        yield
    finally:
        library._destroy()


def _first_tensor(args: Iterable[Any]) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return arg[0]
    raise AssertionError("every raw op takes a tensor")


def row_wise(named: Mapping[str, Any]) -> int:
    """Count the matrix products' operations of an op that only reads and writes rows: none."""
    return 0


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    flops: Callable[[Mapping[str, Any]], int],
) -> None:
    """Register ``sap_fast::<schema>`` with its reference rule, its fake (shape) implementation and its Triton launcher.

    Args:
        schema: the op's schema, such as ``"glu(Tensor gate, Tensor up, str activation) -> Tensor"``.
        reference: the rule in PyTorch; must return fresh tensors, never views of its inputs.
        fake: returns empty outputs of the right shapes and dtypes.
        flops: from the arguments by their names in the schema, how many floating-point operations the matrix products
            take that the rule asks for (``sap_fast/dual.py``), a multiply and an add as two; :func:`row_wise` if it
            asks for none.
    """
    name = schema.partition("(")[0]
    _FLOPS[name] = flops
    _LIBRARY.define(schema)
    rule = _with_autograd(reference)
    _REFERENCES[name] = rule
    _LIBRARY.impl(name, rule, "CompositeExplicitAutograd")
    _LAUNCHED[name] = _triton(name, rule)
    _LIBRARY.impl(name, _LAUNCHED[name], "CUDA")
    torch.library.register_fake(f"sap_fast::{name}", fake, lib=_LIBRARY)


class Mode(enum.Enum):
    """Tells what a pass carries: see ``sap_fast/dual.py``."""

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


def may_overwrite(*saved: Tensor) -> bool:
    """Tell whether a backward may write its results into tensors that it saved, which nobody can see afterwards.

    That is so where the graph is not kept and their memory has no other owner. Two count here: the tensor saved and
    unpacked, which must have been detached from what the forward was given, and the handle by which this looks.
    (torch gives buffers away by the same two tests in its compiled backwards.)
    """
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    return all(
        x.numel() and x.is_contiguous() and torch._C._storage_Use_Count(x.untyped_storage()._cdata) <= 2 for x in saved
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64 input, else float32: what statistics, sums and probabilities are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_dual(name: str, x: Tensor, x_dot: Tensor | None, ndim: int) -> None:
    """Refuse a dual whose halves differ or whose shape is not the op's."""
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
