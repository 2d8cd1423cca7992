"""What the tests of a step share: configurations, and runs of two steps."""

from typing import Any

import pytest
import torch
from oracle import (
    lora,
    task_loss,
)
from torch import Tensor, nn

import sap_fast
from sap_fast import SAPConfig

CONFIG = SAPConfig(probe_layers=(1, 2), strength=0.05)
CONFIGS = {
    "lagged": CONFIG,
    "fresh-store": CONFIG.replace(schedule="fresh", restart="store"),
    "fresh-recompute": CONFIG.replace(schedule="fresh", restart="recompute"),
    "difference": CONFIG.replace(gradient="finite_difference", radius=1e-3),
    "fresh-difference": CONFIG.replace(schedule="fresh", gradient="finite_difference", radius=1e-3),
    "project": CONFIG.replace(guard="project"),
    "counter": CONFIG.replace(guard="counter"),
    "probe+project": CONFIG.replace(guard="probe+project"),
    "normalised": CONFIG.replace(probe_update="normalised"),
    "released": SAPConfig.released(probe_layers=(1, 2)),
    "paper": SAPConfig.paper(probe_layers=(1, 2)),
    "last-layer": CONFIG.replace(probe_layers=(3,)),
    "every-layer": CONFIG.replace(probe_layers=(0, 1, 2, 3), schedule="fresh"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in lora(model).items()}


def gap(a: dict, b: dict) -> float:
    """Compute the relative distance of two dicts of tensors, taken together."""
    assert a.keys() == b.keys()
    distance = sum(float((a[k] - b[k]).square().sum()) for k in b)
    return (distance / sum(float(b[k].square().sum()) for k in b)) ** 0.5


def plain_gradient(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    found = torch.autograd.grad(task_loss(model, batch), list(lora(model).values()))
    return dict(zip(lora(model), found, strict=True))


def two_steps(model: nn.Module, config: SAPConfig, batches: list, pairs: list) -> tuple[dict, dict, Any]:
    """Take two steps without an optimizer, so that a lagged probe acts: gradients and probe of the second."""
    with sap_fast.attach(model, config) as sap:
        for batch, pair in zip(batches, pairs, strict=True):
            model.zero_grad()
            report = sap.step(batch, pair)
        return grads(model), sap.probe, report
