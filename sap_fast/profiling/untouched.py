"""Leaves a model as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode, without gradients; afterwards what was there before, whatever has happened.

    That is ``.grad`` (the very tensors), every module's ``training``, and torch's generators on the CPU and on
    ``device``. Nothing here, and no step within, writes a weight.
    """
    gradients = [(p, p.grad) for p in model.parameters()]
    flags = [(module, module.training) for module in model.modules()]
    state = torch.get_rng_state()
    state_there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        for p, _ in gradients:
            p.grad = None
        model.train()
        yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        for module, flag in flags:
            module.training = flag
        torch.set_rng_state(state)
        if state_there is not None:
            torch.cuda.set_rng_state(state_there, device)
