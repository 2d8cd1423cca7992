"""Whole models through the Triton kernels, in float32: the step as a whole, two steps one after another."""

import copy
from contextlib import nullcontext

import pytest
import torch
from oracle import ALL_LINEAR, random_batch, random_pairs, tiny_model
from steps import CONFIGS, gap, two_steps
from torch import nn
from triton_kernels import INTERPRETED, needs_kernels

from sap_fast import SAPConfig
from sap_fast.ops._library import launchers_on_cpu
from sap_fast.ops._tolerances import ROUNDINGS

pytestmark = [
    needs_kernels[0],
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # see test_kernels.py
]
DEVICE = "cpu" if INTERPRETED else "cuda"


def moved(batches: list[dict], device: str) -> list[dict]:
    return [{key: x.to(device) for key, x in batch.items()} for batch in batches]


# The sign of a gradient that is nearly zero is rounding noise, so the probe is updated by a smooth rule.
LAGGED = CONFIGS["normalised"]
DELAYED = LAGGED.replace(delayed_direction=True)
FRESH = LAGGED.replace(schedule="fresh", restart="store")


def outcome(model: nn.Module, config: SAPConfig, batches: list, pairs: list, device: str) -> tuple[dict, dict]:
    gradients, probe, _ = two_steps(model.to(device), config, moved(batches, device), moved(pairs, device))
    return {k: g.cpu() for k, g in gradients.items()}, {j: v.cpu() for j, v in probe.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "config"),
    [("llama-biased", LAGGED), ("llama-biased", DELAYED), ("gemma3", LAGGED), ("qwen3", FRESH)],
    ids=["llama-biased-lagged", "llama-biased-delayed", "gemma3-lagged", "qwen3-fresh"],
)
def test_step_agrees_with_the_reference(family: str, config: SAPConfig) -> None:
    """The error against the reference step in float64 is what the reference makes in float32, as in test_kernels.py."""
    model = tiny_model(family, targets=ALL_LINEAR, layers=3)
    # A lagged step uses the probe of the step before; a fresh one its own.
    steps = 1 if config is FRESH else 2
    batches = [random_batch(2, 7) for _ in range(steps)]
    pairs = [random_pairs(1, 6) for _ in range(steps)]
    truth = outcome(copy.deepcopy(model), config, batches, pairs, "cpu")
    single = model.float()
    reference = outcome(copy.deepcopy(single), config, batches, pairs, "cpu")
    with launchers_on_cpu() if INTERPRETED else nullcontext():
        found = outcome(single, config, batches, pairs, DEVICE)
    floor = ROUNDINGS[torch.float32] * torch.finfo(torch.float32).eps
    for what, actual, expected, yardstick in zip(("gradient", "probe"), found, truth, reference, strict=True):
        # Three times and not twice: both are sums of roundings, whose luck differs from CPU to CPU. Of gemma3's probe
        # the kernels are off by 5.2e-6 where the reference is by 2.3e-6 on one, and by less than twice that on another.
        allowed = 3 * gap(yardstick, expected) + floor
        assert floor < allowed < 1e-3, f"{what}: no yardstick, {allowed:.2g}"
        assert gap(actual, expected) <= allowed, what
