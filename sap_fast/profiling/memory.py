"""The most memory that a step takes."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """``peak``: bytes. ``added``: how many of them the step itself took; None where that is not known, on a CPU."""

    peak: int
    added: int | None


def peak_of(device: torch.device, step: Callable[[], None]) -> Memory:
    """Run ``step()`` and say the most memory it held.

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
