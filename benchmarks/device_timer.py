"""A clock for pytest-benchmark that counts what a device does, not what Python does to start it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class DeviceTimer:
    """Seconds that a device has spent inside ``with timer.region():``, all told.

    pytest-benchmark reads its clock before and after what it times, and takes the difference. Were the device
    waited for at the first reading, it would stand idle until Python had launched the first kernel, and that delay
    would be counted. So the clock stands still outside of regions, and a region is the time between two events on
    the device. Give the device something to do just before, and it finds the region's kernels already queued.

    On a CPU a region is the time it took.
    """

    __name__ = "device"  # pytest-benchmark writes a timer's name

    def __init__(self, device: str) -> None:
        self.is_cuda = torch.device(device).type == "cuda"
        self.seconds = 0.0
        self._regions: list[tuple[Any, Any]] = []

    def __call__(self) -> float:
        for start, end in self._regions:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1e3
        self._regions.clear()
        return self.seconds

    @contextmanager
    def region(self) -> Iterator[None]:
        """What happens in here counts."""
        if not self.is_cuda:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._regions.append((start, end))


class Flush:
    """Overwrites what a device's cache holds, and keeps the device busy while Python queues what is timed.

    Inside a model a kernel finds nothing of its last round in the cache. A GiB is many times any GPU's cache, and
    writing it takes a few tenths of a millisecond: as long as Python needs to queue some dozen kernels.
    """

    def __init__(self, device: str) -> None:
        self.buffer = torch.empty(2**30, dtype=torch.int8, device=device) if device == "cuda" else None

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()
