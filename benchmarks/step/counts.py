"""What a step takes beside time: launches, and memory at its peak."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType, _enable_record_function
from torch.autograd.profiler import MEMORY_EVENT_NAME
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


class Allocations:
    """Follows what is allocated on a device, while ``with allocations.recording():``.

    On a CPU every allocation and release of torch's allocator is seen, as its profiler reports them, also those made
    within an op and by the library's C++ kernels; what oneDNN or a BLAS takes for itself is not torch's and is not.
    On a GPU the caching allocator's own counts are read.

    Attributes:
        held: bytes that were allocated in recordings, less those freed in them.
        peak: the most that ever was.
    """

    def __init__(self, device: str) -> None:
        self.held = self.peak = 0
        self._is_cuda = torch.device(device).type == "cuda"

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count what happens in here; what others do between recordings does not count."""
        if self._is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            torch.cuda.synchronize()
            most, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                # Of what is called nothing is wanted, and noting it takes several times as long as a small step.
                _enable_record_function(False)
                try:
                    yield
                finally:
                    _enable_record_function(True)
            most, kept = _followed(profiled)
        self.peak = max(self.peak, self.held + most)
        self.held += kept


def _followed(profiled: Any) -> tuple[int, int]:
    """Count bytes at the peak of a profile, and at its end, beside what was there at its beginning."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == MEMORY_EVENT_NAME]
    sizes = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    course = [0, *sizes]
    return max(course), course[-1]


class Counting:
    """Counts a step call by call: its ops on a CPU, and what it allocates.

    Attributes:
        counts: ops of each call; on a GPU none.
    """

    def __init__(self, step: Callable[[], Tensor], device: str, allocations: Allocations) -> None:
        self._step, self._device, self._allocations = step, device, allocations
        self.counts: list[int] = []

    def __call__(self) -> Tensor:
        with self._allocations.recording():
            if torch.device(self._device).type == "cuda":
                return self._step()
            with Ops() as ops:
                result = self._step()
        self.counts.append(ops.count)
        return result


def launches(work: Callable[[], None], device: str) -> int:
    """Count what is launched: ops on a CPU, kernels on a GPU (copies and fills by the driver are not counted)."""
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


def weights_of(model: nn.Module) -> int:
    """Count the bytes that a model's weights take, frozen and trained."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
