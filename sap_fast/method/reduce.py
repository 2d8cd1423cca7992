"""The one place where a step's sums are closed: over micro-batches, and over the processes that share the step.

What is added up here is raw: counts of tokens, gradients, the direction before it is normalised, the probe's gradient
before its sign. Normalising, taking signs and looking at numbers come after it. So several micro-batches, or several
processes with some of them each, come to what one batch comes to.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from sap_fast.batch.rows import Count
from sap_fast.method.flat import Flat


class Ranks:
    """The processes that take a step together. This one is alone: what it has is all there is.

    A subclass adds and gathers over several; each must then call the same methods in the same order.
    """

    def count(self, n: Count) -> Count:
        """Add a number of tokens or pairs over all processes."""
        return n

    def add(self, x: Tensor) -> Tensor:
        """Sum up tensors of one shape over all processes."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Put the tensors ``[n, tokens]`` of all processes side by side; ``tokens`` may differ between them."""
        return x


ALONE = Ranks()


@dataclass(frozen=True)
class Gradients:
    """Holds what passes over the task batch yield; a tensor is empty where a pass does not compute it.

    Attributes:
        loss: the share of the mean loss, 0-dim.
        loss_dot: that of its slope along u, 0-dim.
        theta: grad_theta L by name.
        probe_dot: grad_V L_dot ``[P, d]``.
        probe: grad_V L ``[P, d]``.
        rms: per-token RMS of each probed layer's output, ``[P, tokens]``. It is gathered, not added: the probe's unit
            is a median over all tokens.
    """

    loss: Tensor
    loss_dot: Tensor
    theta: Flat
    probe_dot: Tensor
    probe: Tensor
    rms: Tensor

    @classmethod
    def contribution(
        cls,
        loss: Tensor,
        loss_dot: Tensor | None = None,
        theta: Flat | None = None,
        probe_dot: Tensor | None = None,
        probe: Tensor | None = None,
        rms: Tensor | None = None,
    ) -> "Gradients":
        """Make a micro-batch's share of what it is given of."""
        loss = loss.detach()
        empty = loss.new_empty(0, 0)
        return cls(
            loss,
            torch.zeros_like(loss) if loss_dot is None else loss_dot.detach(),
            Flat(empty.view(0), ()) if theta is None else theta,
            *(empty if x is None else x for x in (probe_dot, probe, rms)),
        )

    def __add__(self, other: "Gradients") -> "Gradients":
        """Add a further share; the RMS of its tokens come after those here."""
        return Gradients(
            self.loss + other.loss,
            self.loss_dot + other.loss_dot,
            self.theta + other.theta,
            _sum(self.probe_dot, other.probe_dot),
            _sum(self.probe, other.probe),
            torch.cat([x for x in (self.rms, other.rms) if x.numel()] or [self.rms], 1),
        )

    def over(self, ranks: Ranks) -> "Gradients":
        """Add, and gather, over all processes. Each of them has what one of them has."""
        theta = Flat(ranks.add(self.theta.vector), self.theta.layout)
        probe_dot, probe = (ranks.add(x) if x.numel() else x for x in (self.probe_dot, self.probe))
        rms = ranks.gather(self.rms) if self.rms.numel() else self.rms
        return Gradients(ranks.add(self.loss), ranks.add(self.loss_dot), theta, probe_dot, probe, rms)


@dataclass(frozen=True)
class SafetySums:
    """Holds what a pass over pairs yields, before the direction is normalised.

    Attributes:
        theta: the gradient of the safety loss by name.
        loss, margin, saturated: the pairs' shares of the safety loss, of the mean margin in nats, and of the part of
            them that is without weight; 0-dim.
        tokens: of this process.
    """

    theta: Flat
    loss: Tensor
    margin: Tensor
    saturated: Tensor
    tokens: int

    def over(self, ranks: Ranks) -> "SafetySums":
        """Add the sums over all processes."""
        theta = Flat(ranks.add(self.theta.vector), self.theta.layout)
        loss, margin, saturated = (ranks.add(x) for x in (self.loss, self.margin, self.saturated))
        return SafetySums(theta, loss, margin, saturated, self.tokens)


def total(solved: Iterable[Sequence[Gradients]], ranks: Ranks = ALONE) -> Gradients:
    """Close the sum over micro-batches and processes.

    Args:
        solved: what was solved together, one after another; each is let go as soon as it is added.
        ranks: the processes.
    """
    # Float addition depends on its order, so there is one: what carries tangents, then what does not.
    sums: dict[bool, Gradients] = {}
    for together in solved:
        share = reduce(add, together)
        carries = share.probe_dot.numel() > 0
        sums[carries] = sums[carries] + share if carries in sums else share
        del together, share  # while the next passes run
    return reduce(add, (sums[carries] for carries in (True, False) if carries in sums)).over(ranks)


def along(gradients: Gradients, u: Flat) -> Gradients:
    """Replace the slope by that of the whole gradient along ``u``, where not every pass has computed its own."""
    return replace(gradients, loss_dot=gradients.theta.dot(u))


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return a + b if a.numel() and b.numel() else a if a.numel() else b
