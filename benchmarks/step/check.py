"""Checks that a contender's loss and gradient are right, by plain autograd on a float64 copy of the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import models
from benchmarks.published.parts import gradients, probes, task_loss, trained
from benchmarks.step.batches import Batch
from benchmarks.step.run import Run

# Of the norm of the whole gradient, by the dtype of the frozen weights: roundings add up over the layers of a model.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
STEPS = 2

Result = tuple[Tensor, dict[str, Tensor]]


class Exact:
    """Holds a float64 copy of a model: its task's loss and gradient at the model's weights, as they are stored.

    Attributes:
        tolerance: what the model's dtype allows a contender.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = models.twin(model, torch.float64).double().eval()
        self._without_probe: list[tuple[Batch, Result]] = []
        self.tolerance = TOLERANCE[next(p.dtype for p in model.parameters() if not p.requires_grad)]

    def at(self, batch: Batch, probe: Mapping[int, Tensor]) -> Result:
        """Compute the loss, and its gradient by name, in a probe's presence."""
        if any(v.any() for v in probe.values()):
            return self._computed(batch, probe)
        for known, result in self._without_probe:
            if known is batch:
                return result
        self._without_probe.append((batch, self._computed(batch, {})))
        return self._without_probe[-1][1]

    def _computed(self, batch: Batch, probe: Mapping[int, Tensor]) -> Result:
        with probes(self._model, {j: v.double() for j, v in probe.items()}):
            loss = task_loss(self._model, batch)
            return loss.detach(), gradients(loss, trained(self._model))


def check(name: str, model: nn.Module, run: Run, exact: Exact) -> int:
    """See that a contender's first two steps have the loss and the gradient that they should have.

    Returns:
        The steps taken.

    Raises:
        AssertionError: they have not.
    """
    for step in range(1, STEPS + 1):
        before = run.probe()
        loss = run.step()
        acting = run.probe() if run.fresh else before
        expected, weights = exact.at(run.scored, acting), dict(model.named_parameters())
        # By the expected names: the released form makes parameters of its probe.
        found = {n: weights[n].grad for n in expected[1]}
        compare(f"{name}, step {step}", loss, found, expected, exact.tolerance)
    return STEPS


def compare(name: str, loss: Tensor, found: Mapping[str, Any], expected: Result, tolerance: float) -> None:
    """See that a contender's loss and gradient are right.

    Args:
        tolerance: of the loss, relative to it, and of the whole gradient, relative to its norm.

    Raises:
        AssertionError: they are not.
    """
    off = abs(float(loss) / float(expected[0]) - 1)
    assert off <= tolerance, f"{name}: the loss is off by {off:.2g} of itself"
    assert all(x is not None for x in found.values()), f"{name}: a weight has no gradient"
    pairs = [(found[n].double(), x) for n, x in expected[1].items()]
    error, scale = (
        sum(float(x.square().sum()) for x in xs) ** 0.5 for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    assert error <= tolerance * scale, f"{name}: the gradient is off by {error / scale:.2g} of its norm"
