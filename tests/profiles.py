"""What the profiler's tests share: a short profile of a tiny model, and the phases that its steps have."""

from typing import Any

import pytest
import torch
from oracle import random_batch, random_pairs, tiny_model
from steps import CONFIG
from torch import nn

import sap_fast
from sap_fast import Profile, SAPConfig
from sap_fast.profiling.steps import Optimizer, Steps, TimedStep

f32 = torch.float32
DIRECTION = ["direction_forward", "direction_head", "direction_backward"]
DUAL = ["dual_forward", "dual_head", "backward_above", "backward_beneath"]
ORDINARY = ["forward", "head", "backward"]
END = ["update", "write", "optimizer"]


def contenders(model: nn.Module, sap: sap_fast.SAP) -> dict[str, TimedStep]:
    return {c.key: c for c in Steps(model, sap).contenders()}


def profiled(config: SAPConfig = CONFIG, *, model: nn.Module | None = None, **more: Any) -> Profile:
    with torch.random.fork_rng():
        batch, pairs = random_batch(), random_pairs(4)
        model = tiny_model(dtype=f32) if model is None else model
    return sap_fast.profile(model, batch, pairs, config, **{"steps": 1, "warmup": 1, **more})


def stopping(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """Let the optimizer's step fail the ``at``-th time, where every weight has a gradient."""
    real, calls = Optimizer.step, []

    def step(self: Optimizer) -> None:
        calls.append(self)
        if len(calls) == at:
            raise error
        real(self)

    monkeypatch.setattr(Optimizer, "step", step)
