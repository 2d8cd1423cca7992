"""What a step takes beside time: launches, and memory at its peak."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# What allocates or asks, and computes nothing.
_IDLE = {
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}


class Ops(TorchDispatchMode):
    """Counts the ops that compute, forward and backward: of views, and of what only allocates, there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.name() not in _IDLE:
            self.count += 1
        return func(*args, **(kwargs or {}))


class Counting:
    """A step that counts its ops, call by call."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self._step = step
        self.counts: list[int] = []

    def __call__(self) -> Tensor:
        with Ops() as ops:
            result = self._step()
        self.counts.append(ops.count)
        return result


def launches(work: Callable[[], None], device: str) -> int:
    """What is launched: ops on a CPU, kernels on a GPU (copies and fills by the driver are not counted)."""
    if torch.device(device).type != "cuda":
        with Ops() as ops:
            work()
        return ops.count
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    # An optimizer's name for its step is shown on the device, too.
    events = [e for e in profiled.events() or [] if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)


def peak_memory(work: Callable[[], None], model: nn.Module, device: str) -> int | None:
    """Bytes that the model's weights take, and what is allocated beside them at the peak; None on a CPU.

    What others hold meanwhile does not count.
    """
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return torch.cuda.max_memory_allocated() - before + weights
