"""Measures the time of phases and of steps, and the most memory that a step takes.

The time of phases is taken on a GPU by events on its stream, which nobody waits for, and on a CPU by the clock.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


class Clock:
    """Takes the time of phases, each from where it begins to where the next one does.

    On a GPU that is the time between two events on the stream that was current when the clock was made; it includes
    what the GPU waits for.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.synchronize()
        self._marks: list[tuple[str, Any]] = []

    def begin(self, phase: str) -> None:
        """Let a phase begin, and the one before it end."""
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """End the last phase, and return seconds by phase, added up where a phase came more than once."""
        ends = [at for _, at in self._marks[1:]] + [self._now()]
        if self._stream is not None:
            self._stream.synchronize()
        found: dict[str, float] = {}
        for (phase, start), end in zip(self._marks, ends, strict=True):
            found[phase] = found.get(phase, 0.0) + self._between(start, end)
        return found

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _between(self, start: Any, end: Any) -> float:
        return end - start if self._stream is None else 1e-3 * start.elapsed_time(end)


def seconds_of(device: torch.device, step: Any) -> float:
    """Return how many seconds ``step()`` takes; the device is waited for before and after it, and not within."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Memory:
    """Holds the most memory that was in use during a step.

    Attributes:
        peak: bytes in use at the peak.
        added: how many of them the step itself took; None on a CPU, where that is not known.
    """

    peak: int
    added: int | None


def peak_of(device: torch.device, step: Callable[[], None]) -> Memory:
    """Run ``step()`` and return the most memory that was in use during it.

    On a GPU that is torch's ``max_memory_allocated``, whose count begins anew here. On a CPU it is the highest
    resident set of the process up to now, which does not come down again: a step that holds less than one before it
    shows that one's.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return Memory(peak, peak - before)
    step()
    return Memory(_resident(), None)


def _resident() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
