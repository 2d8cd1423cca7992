"""What a device reaches while others are timed on it: FLOP/s of a large matrix product, bytes a second of a copy."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.device_timer import DeviceTimer
from benchmarks.floor.step import Device

# Rows and columns of the product's square matrices, bytes of the buffer copied (more than caches hold), and how many
# of each one visit takes: on a GPU one alone would end before its clock is sure.
MATRIX = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 2**28, "cuda": 2**30}
REPEATS = {"cpu": 1, "cuda": 10}


class Ceiling:
    """Times both at every visit; visit it between the rounds of what it is the ceiling of.

    Args:
        dtype: of the matrices.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        n, size, self._repeats = MATRIX[device], COPIED[device], REPEATS[device]
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        c, source = torch.empty_like(a), torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        self._works: dict[str, Callable[[], Any]] = {
            "product": lambda: torch.mm(a, b, out=c),
            "copy": lambda: target.copy_(source),
        }
        self._amounts = {"product": 2 * n**3, "copy": 2 * size}
        self._timer = DeviceTimer(device)
        self.seconds: dict[str, list[float]] = {name: [] for name in self._works}
        self.visit()  # not counted: what it sets up is not set up again
        self.seconds = {name: [] for name in self._works}

    def visit(self) -> None:
        """Time one product and one copy."""
        for name, work in self._works.items():
            start = self._timer()
            with self._timer.region():
                for _ in range(self._repeats):
                    work()
            self.seconds[name].append((self._timer() - start) / self._repeats)

    @property
    def device(self) -> Device:
        """Return what was reached, by the median, as steps are told of it."""
        flops, bandwidth = (self._amounts[name] / statistics.median(s) for name, s in self.seconds.items())
        return Device("measured", flops, bandwidth)

    @property
    def row(self) -> dict[str, Any]:
        """Return a row as JSON has it: medians, and the most that was reached."""
        device = self.device
        most = {name: self._amounts[name] / min(seconds) for name, seconds in self.seconds.items()}
        return {"tflops_per_s": device.peak / 1e12, "tflops_per_s_most": most["product"] / 1e12} | {
            "gb_per_s": device.bandwidth / 1e9,
            "gb_per_s_most": most["copy"] / 1e9,
            "visits": len(self.seconds["product"]),
        }
