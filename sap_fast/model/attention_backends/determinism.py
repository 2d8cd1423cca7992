"""Tells whether PyTorch's own attention kernels give the same bits from run to run."""

import torch
from torch import Tensor


def deterministic() -> bool:
    """Tell whether PyTorch's backwards sum in a fixed order on CUDA: with ``warn_only`` they just say they do not."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def check_still_deterministic(backend: str, x: Tensor) -> None:
    """Refuse to run a backend that was chosen under a switch that is off by now.

    Raises:
        RuntimeError: saying what to do.
    """
    if x.is_cuda and not deterministic():
        raise RuntimeError(
            f"attention is served by {backend}, whose gradients are the same from run to run only under "
            "torch.use_deterministic_algorithms(True): it was on at attach and is off now. Leave it on, or set "
            "attention='own'"
        )
