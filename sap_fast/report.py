"""Holds what a step tells its caller."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """Holds what one step measured. Numbers are 0-dim tensors on the model's device; ``to_dict`` copies them at once.

    Attributes:
        loss: mean negative log-likelihood over the scored tokens, at the probe in use (nats per token).
        loss_dot: its slope along the unit harmful direction, ``<grad_theta L, u>``. Negative: training drifts
            toward harm.
        safety_loss, safety_margin: of the pairs; the margin is the mean of log p(chosen) - log p(rejected),
            per token or summed as configured (nats).
        saturated: share of pairs too well separated to have weight in the direction (``"logsigmoid"``).
        direction_norm: norm of the safety loss's gradient before it was normalised.
        direction_cosine: cosine of the direction with the last step's (0 in the first step).
        steering: ``V . grad_V L_dot``, what the probe in use adds to ``loss_dot``, to first order. Positive
            pushes away from harm.
        probe_cosine: cosine of the probe in use with this step's ``grad_V L_dot``.
        probe_norm: norm of the probe in use, by layer.
        found_direction, found_probe: whether this step found them, or went on with those of an earlier one. What is
            measured in finding them (``safety_*``, ``saturated``, ``direction_*``; ``steering``, ``probe_cosine``)
            is 0 otherwise.
        tokens, scored_tokens, safety_tokens: real tokens of the batch, those scored, those of the pairs; of this
            process, where several take a step together.

    What a step has no use for is 0: without pairs, everything but the loss.
    """

    loss: Tensor
    loss_dot: Tensor
    safety_loss: Tensor
    safety_margin: Tensor
    saturated: Tensor
    direction_norm: Tensor
    direction_cosine: Tensor
    steering: Tensor
    probe_cosine: Tensor
    probe_norm: Mapping[int, Tensor]
    tokens: int
    scored_tokens: int
    safety_tokens: int
    found_direction: bool
    found_probe: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, read from the device in one copy; ``probe_norm`` is a dict by layer."""
        scalars = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        stack = torch.stack([*scalars.values(), *self.probe_norm.values()]).double().tolist()
        numbers: dict[str, Any] = dict(zip(scalars, stack, strict=False))
        numbers["probe_norm"] = dict(zip(self.probe_norm, stack[len(scalars) :], strict=True))
        counts = {"tokens", "scored_tokens", "safety_tokens", "found_direction", "found_probe"}
        return numbers | {name: x for name, x in vars(self).items() if name in counts}
