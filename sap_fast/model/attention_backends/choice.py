"""Chooses the backend for attention in ordinary passes: an order for each kind of device, and what rules one out.

Duals have no choice: no other backend knows tangents. Windows and grouped heads rule nothing out: every backend has
them. A backend is ruled out where its backward sums in an order that changes from run to run, since a step promises
the same bits in a fixed configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

Backend = Literal["own", "flash_attn", "varlen_attn", "sdpa"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# By kind of device, the order of preference and its reason. On CUDA it is not yet measured. Other devices have `own`.
ORDER: dict[str, dict[Backend, str]] = {
    "cuda": {
        "flash_attn": "packed, CUDA kernels made for one stream, with a deterministic backward of its own",
        "varlen_attn": "packed, PyTorch's copy of flash attention, which is deterministic by a global switch alone",
        "own": "packed, the Triton kernels that serve duals too",
        "sdpa": "pads every sequence to the longest, and builds a mask for a window",
    },
    "cpu": {
        "own": "packed, C++ kernels that compute no padding",
        "sdpa": "pads every sequence to the longest, and builds a mask for a window",
    },
}

_REFERENCE = "PyTorch reference rules, which serve every device"
_LEAST_CAPABILITY = (8, 0)
_MOST_HEAD_DIM, _HEAD_DIM_STEP = 256, 8
_NARROW = (torch.bfloat16, torch.float16)
_SWITCH = "torch.use_deterministic_algorithms(True)"


@dataclass(frozen=True)
class Machine:
    """Describes what a device has.

    Attributes:
        device: torch's name of its kind, such as ``"cuda"``.
        capability: NVIDIA's compute capability; None for every other maker's.
        own_kernel: whether the library has a kernel for it, beside the reference rules.
        deterministic: whether ``torch.use_deterministic_algorithms(True)`` is in force, without ``warn_only``.
        unusable: of the backends that cannot be imported or failed their trial, why.
    """

    device: str
    capability: tuple[int, int] | None = None
    own_kernel: bool = True
    deterministic: bool = False
    unusable: Mapping[Backend, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Heads:
    """Describes what queries, keys and values are like."""

    dtype: torch.dtype
    head_dim: int

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}, head_dim {self.head_dim}"


@dataclass(frozen=True)
class Choice:
    """Holds the backend that serves, why it does, and why each of the others does not."""

    backend: Backend
    because: str
    others: Mapping[Backend, str]


def obstacle(backend: Backend, machine: Machine, heads: Heads) -> str | None:
    """Say what rules a backend out, and what to do about it; None if nothing does."""
    if backend == "own":
        return None
    if backend == "sdpa":
        if machine.device not in ("cpu", "cuda"):
            return f"it is tried on CPU and CUDA devices, not on {machine.device}"
    else:
        if machine.device != "cuda":
            return f"it serves CUDA devices, not {machine.device}"
        if machine.capability is None:
            return "it is tried on NVIDIA's devices only"
        if machine.capability < _LEAST_CAPABILITY:
            major, minor = machine.capability
            return f"it needs a device of compute capability 8.0 or more, and this one has {major}.{minor}"
        if heads.dtype not in _NARROW:
            return f"it computes in bfloat16 or float16, not in {dtype_name(heads.dtype)}"
        if heads.head_dim > _MOST_HEAD_DIM or heads.head_dim % _HEAD_DIM_STEP:
            return f"it needs a head_dim that is a multiple of 8 up to 256, and this one is {heads.head_dim}"
    if machine.device == "cuda" and backend != "flash_attn" and not machine.deterministic:
        return f"the sums of its backward change from run to run; {_SWITCH}, before attach, makes them the same"
    return machine.unusable.get(backend)


def choose(wanted: Backend | Literal["auto"], machine: Machine, heads: Heads) -> Choice:
    """Choose the backend wanted, or with ``"auto"`` the first in the device's order that nothing rules out.

    Raises:
        ValueError: the backend wanted cannot serve here; the message says what is missing and what to do.
    """
    order = ORDER.get(machine.device, {})
    if wanted != "auto":
        if problem := obstacle(wanted, machine, heads):
            raise ValueError(
                f"attention={wanted!r} cannot serve here ({machine.device}, {heads}): {problem}. Or set "
                "attention='auto', which takes what is there (sap-fast info tells what that is)"
            )
        return Choice(wanted, "as asked for", {name: f"{wanted} was asked for" for name in BACKENDS if name != wanted})
    # Those without a place in the order have an obstacle, or are the library's own, which is what remains.
    found: Backend | None = None
    others: dict[Backend, str] = {}
    for name in sorted(BACKENDS, key=[*order, *BACKENDS].index):
        if problem := obstacle(name, machine, heads) or _left_aside(name, machine, heads):
            others[name] = problem
        elif found is None:
            found = name
        else:
            others[name] = f"comes after {found}: {order[name]}"
    if found is not None:
        return Choice(found, order.get(found, _REFERENCE), others)
    others.pop("own")
    return Choice("own", _REFERENCE, others)


def _left_aside(backend: Backend, machine: Machine, heads: Heads) -> str | None:
    """Say why ``"auto"`` does not take a backend that could serve."""
    if backend == "own":
        return None if machine.own_kernel else "the library has no kernel for this device, only reference rules"
    if heads.dtype not in _NARROW:
        return f"{dtype_name(heads.dtype)} stays with the rules that duals follow: it is asked for to be exact"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as people write it, such as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
