"""What a step is computed from, what comes of it, and what of that is told.

All of it is immutable: a step that is refused has changed nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sap_fast.batch.buckets import padded
from sap_fast.batch.rows import Rows
from sap_fast.batch.transfer import sent
from sap_fast.method.direction import Direction
from sap_fast.method.flat import Flat
from sap_fast.method.passes import Gradients, Micro, Parts
from sap_fast.method.probe import Probe
from sap_fast.method.rhythm import Rhythm
from sap_fast.report import StepReport


@dataclass(frozen=True)
class State:
    """What one step hands to the next."""

    probe: Probe
    direction: Flat | None  # u, as last found
    rhythm: Rhythm


@dataclass(frozen=True)
class Task:
    """A step's task batch: all of it, and, if only some of its sequences carry tangents, those and the others."""

    micros: list[Micro]
    parts: Parts | None = None


@dataclass(frozen=True)
class Given:
    """All that a step is computed from, beside the model. Rows are on the host until they are sent.

    ``pairs``: packed, if this step finds a direction; ``plain``: without pairs there is neither a direction nor a
    probe; ``probes``: whether this step finds a probe; ``delayed``: whether the pairs run with the task, which uses the
    last direction. The state's rhythm is that of no step: the host counts.
    """

    task: Task
    pairs: Rows | None
    state: State
    plain: bool
    probes: bool
    delayed: bool = False

    def padded(self) -> "Given":
        """... on static shapes."""

        def micro(x: Micro) -> Micro:
            return replace(x, rows=padded(x.rows))

        def part(x: Micro | None) -> Micro | None:
            return None if x is None else micro(x)

        task, pairs = self.task, self.pairs
        parts = None if task.parts is None else [(part(some), part(others)) for some, others in task.parts]
        task = Task([micro(x) for x in task.micros], parts)
        return replace(self, task=task, pairs=None if pairs is None else padded(pairs, pairs=True))

    def sent(self, device: torch.device) -> "Given":
        """... on a device, by one copy that nobody waits for."""
        task, pairs = sent((self.task, self.pairs), device)
        return replace(self, task=task, pairs=pairs)

    def counted(self, report: StepReport) -> StepReport:
        """A report on padded rows, or one that was recorded, with the numbers of tokens that are these rows' own."""
        micros, pairs = self.task.micros, self.pairs
        return replace(
            report,
            tokens=sum(m.rows.tokens for m in micros),
            scored_tokens=sum(len(m.rows.labels) for m in micros),
            safety_tokens=0 if pairs is None else pairs.tokens,
        )


@dataclass(frozen=True)
class Outcome:
    """A step's results, before any of them is written."""

    theta: Flat  # what goes to .grad
    direction: Direction | None  # if one was found
    state: State  # for the next step
    report: StepReport
    seen: Tensor  # what may refuse the step: see refusal.py


@dataclass(frozen=True)
class Deferred:
    """A step's numbers, to be looked at in the next one, and what to go back to if they are refused."""

    seen: Tensor
    state: State


def report_of(
    gradients: Gradients, direction: Direction | None, before: Flat | None, used: Probe, micros: Sequence[Micro]
) -> StepReport:
    """What a step has measured.

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


def seen(loss: Tensor, theta: Flat, probe: Probe, direction: Direction | None) -> Tensor:
    """The numbers that may refuse a step, in the order of ``refusal.py``."""
    one = torch.ones_like(loss)
    numbers = [loss, theta.norm(), probe.vectors.norm()]
    numbers += [direction.norm, direction.margin, direction.saturated] if direction else [one, one, 0 * one]
    return torch.stack(numbers).double()


def _cosine(product: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a * b > 0, product / (a * b), torch.zeros_like(product))
