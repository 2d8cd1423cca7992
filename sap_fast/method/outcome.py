"""Holds what a step is computed from, what comes of it, what of that is told, and what of it refuses the step.

All of it is immutable: a step that is refused has changed nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sap_fast.batch.buckets import padded
from sap_fast.batch.rows import Rows
from sap_fast.batch.transfer import sent
from sap_fast.errors import StepRefusedError
from sap_fast.method.direction import Direction
from sap_fast.method.flat import Flat
from sap_fast.method.passes import Micro, Split
from sap_fast.method.probe import Probe
from sap_fast.method.reduce import Gradients
from sap_fast.method.rhythm import Rhythm
from sap_fast.report import StepReport


@dataclass(frozen=True)
class State:
    """Holds what one step hands to the next.

    Attributes:
        probe: that which a lagged step uses next, with AdamW's moments.
        direction: u, as last found; None before the first.
        rhythm: when a direction and a probe are found next.
    """

    probe: Probe
    direction: Flat | None
    rhythm: Rhythm


@dataclass(frozen=True)
class StepInputs:
    """Holds all that a step is computed from, beside the model. Rows are on the host until they are sent.

    Attributes:
        micros: the task batch.
        split: the same, divided, if only some of its sequences carry tangents.
        pairs: packed, if this step finds a direction.
        direction: u, if it was given; else the step finds one, or uses the last.
        state: what the last step has handed on; its rhythm is that of no step, since the host counts.
        finds_probe: whether this step finds a probe.
        plain: whether there is neither a direction nor a probe: plain fine-tuning.
        delayed: whether the pairs run with the task, which uses the last direction.
    """

    micros: list[Micro]
    split: Split | None
    pairs: Rows | None
    direction: Flat | None
    state: State
    finds_probe: bool
    plain: bool
    delayed: bool = False

    def padded(self) -> "StepInputs":
        """Pad the rows to static shapes."""

        def micro(x: Micro) -> Micro:
            return replace(x, rows=padded(x.rows))

        def part(x: Micro | None) -> Micro | None:
            return None if x is None else micro(x)

        split = None if self.split is None else [(part(some), part(others)) for some, others in self.split]
        pairs = None if self.pairs is None else padded(self.pairs, pairs=True)
        return replace(self, micros=[micro(x) for x in self.micros], split=split, pairs=pairs)

    def sent(self, device: torch.device) -> "StepInputs":
        """Send the rows to a device, by one copy that nobody waits for."""
        micros, split, pairs = sent((self.micros, self.split, self.pairs), device)
        return replace(self, micros=micros, split=split, pairs=pairs)

    def counted(self, report: StepReport) -> StepReport:
        """Give a report on padded rows, or one that was recorded, the numbers of tokens that are these rows' own."""
        return replace(
            report,
            tokens=sum(m.rows.tokens for m in self.micros),
            scored_tokens=sum(len(m.rows.labels) for m in self.micros),
            safety_tokens=0 if self.pairs is None else self.pairs.tokens,
        )


@dataclass(frozen=True)
class Outcome:
    """Holds a step's results, before any of them is written.

    Attributes:
        loss: L(theta, V), the mean over all scored tokens, 0-dim.
        loss_dot: its slope along u, 0-dim; 0 in plain fine-tuning.
        theta: g, the gradient after the guard, which goes to ``.grad``.
        probe_dot: G = grad_V L_dot ``[P, d]``, which the probe climbs; empty if no probe was found.
        probe: h = grad_V L ``[P, d]``; empty if no probe was found.
        u: the direction that the step used; None in plain fine-tuning.
        direction: what was found of a direction, if one was.
        state: for the next step; with it the probe found.
        report: what is told of the step.
        vitals: what may refuse it, packed: see :class:`Vitals`.
    """

    loss: Tensor
    loss_dot: Tensor
    theta: Flat
    probe_dot: Tensor
    probe: Tensor
    u: Flat | None
    direction: Direction | None
    state: State
    report: StepReport
    vitals: Tensor


@dataclass(frozen=True)
class Deferred:
    """Holds a step's vitals, to be looked at in the next one, and the state to go back to if they are refused."""

    vitals: Tensor
    state: State


class Vitals(NamedTuple):
    """Holds the numbers that may refuse a step.

    Attributes:
        loss: of the task batch.
        gradient, probe: the norms of what is written and of the probe found.
        direction: the norm of the direction before it was normalised; 1 where none was found.
        margin: the pairs' mean; 1 where no direction was found.
        saturated: the share of pairs that are without weight.
    """

    loss: float
    gradient: float
    probe: float
    direction: float
    margin: float
    saturated: float

    @staticmethod
    def packed(loss: Tensor, theta: Flat, probe: Probe, direction: Direction | None) -> Tensor:
        """Put a step's numbers into one tensor ``[6]``, in the order of the fields, for one look at all of them."""
        one = torch.ones_like(loss)
        numbers = [loss, theta.norm(), probe.vectors.norm()]
        numbers += [direction.norm, direction.margin, direction.saturated] if direction else [one, one, 0 * one]
        return torch.stack(numbers).double()

    @classmethod
    def read(cls, packed: Tensor) -> "Vitals":
        """Wait for the device, and read a step's numbers."""
        return cls(*packed.tolist())

    def check(self, consequence: str) -> None:
        """Refuse a step whose numbers are unusable.

        Args:
            consequence: what the error says of what was written.

        Raises:
            StepRefusedError: a number is not finite, or there is no direction.
        """
        if problem := self._problem():
            raise StepRefusedError(f"the step is refused: {problem}. {consequence}")

    def _problem(self) -> str | None:
        if not math.isfinite(self.direction) or not math.isfinite(self.margin):
            return (
                f"the harmful direction is not finite (norm {self.direction}, safety margin {self.margin}): look at "
                "the pairs and at the weights; a smaller learning rate or strength avoids overflow"
            )
        if self.direction == 0 and not self.saturated:
            return (
                "the harmful direction is zero: no trained weight receives a gradient from the pairs. Is lora_B zero "
                "and frozen?"
            )
        if self.direction == 0:
            return (
                f"the harmful direction is zero: {self.saturated:.0%} of the pairs are saturated at a mean margin of "
                f"{self.margin:.4g} nats. safety_loss='difference' does not saturate; per_token=True or a larger "
                "temperature also help"
            )
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        if not math.isfinite(self.gradient) or not math.isfinite(self.probe):
            return (
                f"the gradient (norm {self.gradient}) or the probe (norm {self.probe}) is not finite although the "
                f"loss is {self.loss:.4g}"
            )
        return None


def report_of(
    gradients: Gradients, direction: Direction | None, before: Flat | None, used: Probe, micros: Sequence[Micro]
) -> StepReport:
    """Make the report of what a step has measured.

    Args:
        gradients, direction: what it found, the direction if it did.
        before: the last direction.
        used: the probe that acted.
        micros: its task batch; of padded rows the report counts dead tokens, too.
    """
    zero = torch.zeros_like(gradients.loss)
    steering = probe_cosine = zero
    if gradients.probe_dot.numel():
        steering = (used.vectors * gradients.probe_dot).sum()
        probe_cosine = _cosine(steering, used.vectors.norm(), gradients.probe_dot.norm())
    cosine = zero
    if direction is not None and before is not None:
        cosine = direction.u.dot(before)
    return StepReport(
        loss=gradients.loss,
        loss_dot=gradients.loss_dot,
        safety_loss=direction.loss if direction else zero,
        safety_margin=direction.margin if direction else zero,
        saturated=direction.saturated if direction else zero,
        direction_norm=direction.norm if direction else zero,
        direction_cosine=cosine,
        steering=steering,
        probe_cosine=probe_cosine,
        probe_norm=used.by_layer(used.vectors.norm(dim=1)),
        tokens=sum(m.rows.tokens for m in micros),
        scored_tokens=sum(len(m.rows.labels) for m in micros),
        safety_tokens=direction.tokens if direction else 0,
        found_direction=direction is not None,
        found_probe=bool(gradients.probe_dot.numel()),
    )


def _cosine(product: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a * b > 0, product / (a * b), torch.zeros_like(product))
