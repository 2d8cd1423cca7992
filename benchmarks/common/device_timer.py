"""A clock for pytest-benchmark that counts what a device does, not what Python does to start it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class DeviceTimer:
    """Counts the seconds that a device has spent inside ``with timer.region():``, all told.

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
        """Count what happens within the block."""
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
    """Empties a device's cache of what is timed, and keeps the device busy while Python queues the next round.

    Inside a model a kernel finds nothing of its last round in the cache. The cache is emptied by reading something many
    times its size: what was written would have to be written back to memory while the next kernel runs, up to 50 MB.
    Then the device sleeps for longer than Python needs to queue what is timed, which is a millisecond or two where a
    backward launches some dozen kernels; else their launches would be timed, not they.
    """

    # Bytes that are read: a few hundred microseconds. Seconds of sleep.
    READ, ASLEEP = 2**30, 2e-3
    # Clock cycles of a sleep that tells how fast the clock is, and how many of them wake it up: a tenth of a second.
    _TRIED, _WAKING = 2 * 10**6, 100

    def __init__(self, device: str) -> None:
        self._buffer: Tensor | None = None
        if torch.device(device).type == "cuda":
            self._buffer = torch.zeros(self.READ // 4, device=device)
            self._sum = torch.empty((), device=device)
            self._cycles = round(self.ASLEEP * self._cycles_a_second())

    def __call__(self) -> None:
        if self._buffer is not None:
            torch.sum(self._buffer, dim=0, out=self._sum)
            torch.cuda._sleep(self._cycles)

    def _cycles_a_second(self) -> float:
        timer = DeviceTimer("cuda")
        for _ in range(self._WAKING):  # a clock at rest is slow, and the sleep would be short when it is not
            torch.cuda._sleep(self._TRIED)
        for _ in range(3):
            before = timer()
            with timer.region():
                torch.cuda._sleep(self._TRIED)
            seconds = timer() - before
        return self._TRIED / seconds
