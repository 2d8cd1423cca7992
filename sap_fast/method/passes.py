"""The passes that a step is made of, each an objective, and the one solver of them. None writes to the model.

An objective is a traversal of the decoder, a number to differentiate, and the variables to differentiate it by:

    Ordinary(task)   grad_theta L                                       at a probe, or without one
    Dual(task)       grad_theta L, grad_V L and grad_V L_dot at once    the lagged step
    Inner(task)      grad_V L_dot alone; may leave a cut                the fresh step, at V = 0
    Outer(cut)       grad_theta L, restarted from the cut               the fresh step, at the probe found
    Safety(pairs)    grad_theta of the safety loss                      the direction

:func:`solve` runs one of them, or several of equal depth in lockstep: each layer multiplies its frozen weights by the
rows of all at once,

    [task x ; task x_dot ; pairs]          forward, as one product with W
    [pairs dy ; task dy ; task dy_dot]     backward, as one product with W^T

and what depends on more than a row (norms with their probes, attention, adapters, head) runs on each by itself. Nothing
of one reaches the other's numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sap_fast.batch.rows import Count, Rows
from sap_fast.config import SAPConfig
from sap_fast.method.direction import SafetyLoss
from sap_fast.method.flat import Flat
from sap_fast.method.probe import Probe
from sap_fast.method.reduce import Gradients, SafetySums
from sap_fast.model.decoder import Decoder
from sap_fast.model.layer import Stream, Traversal

Found = TypeVar("Found", covariant=True)


@dataclass(frozen=True)
class Micro:
    """Holds one packed micro-batch and the seed of its dropout masks, which all passes of a step share.

    Attributes:
        rows: of its sequences.
        seed: int64 scalar tensor; None without dropout.
        weight: how many times its share in the tangents' results counts, where it stands for sequences without
            tangents, too.
    """

    rows: Rows
    seed: Tensor | None
    weight: float = 1.0


# Of each micro-batch: sequences with tangents, and the others; None where there are none.
Split = list[tuple[Micro | None, Micro | None]]


class Objective(ABC, Generic[Found]):
    """A traversal of the decoder that is begun, and what is to be found by it.

    Attributes:
        traversal: what the decoder is to run.
        stream: where it starts; None at the embeddings.
        layer: the first layer that it runs.
        variables: what the gradients are taken by. No two that are solved together share one.
    """

    traversal: Traversal
    stream: Stream | None = None
    layer: int = 0
    variables: list[Tensor]

    @abstractmethod
    def scalar(self, nll: Tensor, nll_dot: Tensor | None) -> Tensor:
        """Make the number to differentiate from the scored tokens' negative log-likelihoods ``[M]``."""

    @abstractmethod
    def found(self, gradients: Sequence[Any]) -> Found:
        """Make the result from the gradients of that number by the variables, None where there is none."""


def solve(decoder: Decoder, objectives: Sequence[Objective[Found]]) -> Iterator[list[Found]]:
    """Find what objectives ask for, by one forward and one backward for all that can share their frozen products.

    Args:
        decoder: of the model.
        objectives: of equal depth; only the first may carry tangents.

    Yields:
        What those have found that shared products, in their order. All share, unless the products of only some may be
        in float8: then those do, and the others are solved one by one after them.
    """
    if decoder.float8 is None:
        yield _lockstep(decoder, objectives)
        return
    if together := [o for o in objectives if o.traversal.float8 is not None]:
        yield _lockstep(decoder, together)
    yield from (_lockstep(decoder, [o]) for o in objectives if o.traversal.float8 is None)


def _lockstep(decoder: Decoder, objectives: Sequence[Objective[Found]]) -> list[Found]:
    (first,) = {objective.layer for objective in objectives}
    traversals = [objective.traversal for objective in objectives]
    streams = [decoder.embed(o.traversal) if o.stream is None else o.stream for o in objectives]
    streams = decoder.run_together(traversals, streams, first, len(decoder.layers))
    scalars = [o.scalar(*decoder.score(o.traversal, stream)) for o, stream in zip(objectives, streams, strict=True)]
    del streams  # while the backward runs, its graph holds what it needs
    variables = [variable for objective in objectives for variable in objective.variables]
    assert len({id(variable) for variable in variables}) == len(variables)
    gradients, results = list(torch.autograd.grad(scalars, variables, allow_unused=True)), []
    for objective in objectives:
        count = len(objective.variables)
        results.append(objective.found(gradients[:count]))
        del gradients[:count]
    return results


class _OverTask(Objective[Gradients]):
    """Holds what the objectives over a task batch have in common: their share of the mean loss and of its slope.

    Args:
        decoder: of the model.
        micro: a micro-batch.
        scored: how many tokens the mean is over.
    """

    def __init__(self, decoder: Decoder, micro: Micro, scored: Count) -> None:
        self._decoder, self._micro, self._scored = decoder, micro, scored


class _OfLoss(_OverTask):
    """Describes an ordinary pass, which differentiates the loss."""

    def scalar(self, nll: Tensor, nll_dot: Tensor | None) -> Tensor:
        self._loss = nll.sum() / self._scored
        return self._loss


class _OfSlope(_OverTask):
    """Describes a dual pass, which differentiates the slope of the loss along u."""

    def scalar(self, nll: Tensor, nll_dot: Tensor | None) -> Tensor:
        assert nll_dot is not None  # it carries tangents
        self._loss, self._loss_dot = nll.sum() / self._scored, nll_dot.sum() / self._scored
        return self._loss_dot

    def _share(self, climb: Sequence[Any], probe: Probe, theta: Flat | None = None) -> Gradients:
        """Make the result from the gradients by the probe, ``[2, d]`` of each layer."""
        weight, rms = self._micro.weight, _rms(self.traversal, probe)
        of_slope, of_loss = (torch.stack(tuple(climb)) * weight).unbind(1)
        return Gradients.contribution(self._loss, self._loss_dot * weight, theta, of_slope, of_loss, rms)


class Ordinary(_OfLoss):
    """Finds grad_theta L(theta, V) by an ordinary pass. Yields ``loss``, ``theta``, and with a probe ``rms``.

    Args:
        decoder, micro, scored: see above.
        probe: V; None for none.
        theta: values in the place of the model's, by which nothing is then differentiated.
        of_probe: whether to yield ``probe``, grad_V L, too.
    """

    def __init__(
        self,
        decoder: Decoder,
        micro: Micro,
        scored: Count,
        probe: Probe | None = None,
        *,
        theta: Mapping[str, Tensor] | None = None,
        of_probe: bool = False,
    ) -> None:
        super().__init__(decoder, micro, scored)
        self._probe, self._of_probe = probe, of_probe
        leaves = {} if probe is None else probe.leaves(requires_grad=of_probe)
        self.traversal = decoder.start(micro.rows, micro.seed, theta=theta, probe=leaves)
        self._trained = {} if theta is not None else decoder.trained
        self.variables = [*self._trained.values(), *(leaves.values() if of_probe else ())]

    def found(self, gradients: Sequence[Any]) -> Gradients:
        count, trained = len(self._trained), self._trained
        return Gradients.contribution(
            self._loss,
            theta=Flat.of(trained, gradients[:count]) if trained else None,
            probe=torch.cat(tuple(gradients[count:])) if self._of_probe else None,
            rms=None if self._probe is None else _rms(self.traversal, self._probe),
        )


class Dual(_OfSlope):
    """Solves the inner and the outer problem at the same probe, by one dual pass. Yields all there is.

    What depends on the tangents (``loss_dot``, ``probe_dot``, ``probe``) carries the micro-batch's weight, and is an
    unbiased estimate where its sequences are a random draw.

    Args:
        decoder, micro, scored: see above.
        probe: V.
        u: the unit direction over all trained weights.
    """

    def __init__(self, decoder: Decoder, micro: Micro, scored: Count, probe: Probe, u: Flat) -> None:
        super().__init__(decoder, micro, scored)
        self._probe = probe
        self._directions = {name: t.detach().requires_grad_() for name, t in u.items()}
        leaves = probe.dual_leaves()
        self.traversal = decoder.start(micro.rows, micro.seed, theta_dot=self._directions, probe=leaves)
        self.variables = [*self._directions.values(), *leaves.values()]

    def found(self, gradients: Sequence[Any]) -> Gradients:
        count = len(self._directions)
        return self._share(gradients[count:], self._probe, Flat.of(self._directions, gradients[:count]))


class Safety(Objective[SafetySums]):
    """Finds the safety loss's gradient by a pass without dropout: the direction is a property of the weights.

    Args:
        decoder: of the model.
        rows: packed pairs, chosen sequences first.
        pairs: how many the means are over.
        probe: ``[1, d]`` by layer, what acts during this pass; empty for none.
        config: says which safety loss.
    """

    def __init__(
        self, decoder: Decoder, rows: Rows, pairs: Count, probe: Mapping[int, Tensor], config: SAPConfig
    ) -> None:
        self._decoder, self._pairs, self._config = decoder, pairs, config
        # An ordinary pass, but one whose gradient only has to point somewhere.
        self.traversal = replace(decoder.start(rows, seed=None, probe=probe), float8=decoder.float8)
        self.variables = [*decoder.trained.values()]

    def scalar(self, nll: Tensor, nll_dot: Tensor | None) -> Tensor:
        self._seen = SafetyLoss.of(-nll, self.traversal.rows, self._pairs, self._config)
        return self._seen.loss

    def found(self, gradients: Sequence[Any]) -> SafetySums:
        return self._seen.sums(Flat.of(self._decoder.trained, gradients), self._pairs, self.traversal.rows.tokens)


@dataclass(frozen=True)
class Cut:
    """Holds a dual pass cut beneath the lowest probe: the stream, its tangents still attached to what lies beneath."""

    micro: Micro
    directions: dict[str, Tensor]
    residual: Tensor
    update: Tensor
    tangents: tuple[Tensor, Tensor]


class Inner(_OfSlope):
    """Finds grad_V L_dot alone, by a dual pass whose backward ends at the lowest probe. Yields all but ``theta``.

    Args:
        decoder, micro, scored, probe, u: as for :class:`Dual`.
        keep: whether to keep what lies beneath the lowest probe, as ``cut``, for :class:`Outer` to restart from.
    """

    def __init__(self, decoder: Decoder, micro: Micro, scored: Count, probe: Probe, u: Flat, *, keep: bool) -> None:
        super().__init__(decoder, micro, scored)
        assert not keep or micro.weight == 1
        self._probe, self.layer = probe, min(probe.layers) + 1
        directions = {name: t.detach().requires_grad_(keep) for name, t in u.items()}
        with torch.set_grad_enabled(keep):
            beneath = decoder.start(micro.rows, micro.seed, theta_dot=directions)
            residual, residual_dot, update, update_dot = decoder.run_layers(
                beneath, decoder.embed(beneath), 0, self.layer
            )
        assert residual_dot is not None and update is not None and update_dot is not None  # it carries tangents
        self.cut = Cut(micro, directions, residual, update, (residual_dot, update_dot)) if keep else None
        # From here upwards only the probe is a variable; the direction and what lies beneath are constants.
        constant = {name: t.detach() for name, t in (beneath.theta_dot or {}).items()}
        leaves = probe.dual_leaves()
        self.traversal = replace(beneath, theta_dot=constant, probe=leaves, rms={})
        self.stream = Stream(residual.detach(), residual_dot.detach(), update.detach(), update_dot.detach())
        self.variables = [*leaves.values()]

    def found(self, gradients: Sequence[Any]) -> Gradients:
        return self._share(gradients, self._probe)


class Outer(_OfLoss):
    """Finds grad_theta L(theta, V) by an ordinary pass that restarts from a cut. Yields ``loss`` and ``theta``.

    What lies beneath the lowest probe does not depend on V. Its backward is the half backward of the dual pass: the
    cotangent of the tangent half is the ordinary gradient, so dL/dstream is handed to the kept graph as that of the
    tangents.
    """

    def __init__(self, decoder: Decoder, cut: Cut, scored: Count, probe: Probe) -> None:
        super().__init__(decoder, cut.micro, scored)
        self._cut, self.layer = cut, min(probe.layers) + 1
        self.traversal = decoder.start(cut.micro.rows, cut.micro.seed, probe=probe.leaves())
        residual, update = cut.residual.detach().requires_grad_(), cut.update.detach().requires_grad_()
        self.stream = Stream(residual, None, update, None)
        self.variables = [*decoder.trained.values(), residual, update]

    def found(self, gradients: Sequence[Any]) -> Gradients:
        *above, dresidual, dupdate = gradients
        cut, theta = self._cut, Flat.of(self._decoder.trained, above)
        # A tangent that no adapter beneath the probe feeds has no graph.
        ends = [(t, d) for t, d in zip(cut.tangents, (dresidual, dupdate), strict=True) if t.requires_grad]
        if ends:
            tangents, cotangents = zip(*ends, strict=True)
            beneath = torch.autograd.grad(tangents, list(cut.directions.values()), cotangents, allow_unused=True)
            theta = theta + Flat.of(cut.directions, beneath)
        return Gradients.contribution(self._loss, theta=theta)


def finite_difference(
    decoder: Decoder, micro: Micro, scored: Count, probe: Probe, ahead: Mapping[str, Tensor], radius: Tensor
) -> Gradients:
    """Compute what :class:`Dual` yields by a forward difference along u of two ordinary passes.

    For comparison: it costs as much, and its rounding error is that of a gradient divided by ``radius``.

    Args:
        decoder, micro, scored, probe: as for :class:`Dual`.
        ahead: the trained weights moved by ``radius`` along u: copies, since the model's are never written.
        radius: 0-dim.
    """
    [[here]] = solve(decoder, [Ordinary(decoder, micro, scored, probe, of_probe=True)])
    [[there]] = solve(decoder, [Ordinary(decoder, micro, scored, probe, theta=ahead, of_probe=True)])
    # Halves of one tensor, as those of a dual pass: what is computed from them then adds up in the same order.
    of_slope, of_loss = torch.stack(((there.probe - here.probe) / radius, here.probe), 1).unbind(1)
    return replace(here, loss_dot=(there.loss - here.loss) / radius, probe_dot=of_slope, probe=of_loss)


def scored_tokens(micros: Sequence[Micro]) -> Count:
    """Add up the numbers of scored tokens in all micro-batches, which their mean loss is over."""
    return sum(micro.rows.scored for micro in micros)


def split_sides(split: Split) -> tuple[list[Micro], list[Micro]]:
    """Return the micro-batches of sequences with tangents, and those of the others."""
    chosen, others = ([part for part in side if part is not None] for side in zip(*split, strict=True))
    return chosen, others


def _rms(traversal: Traversal, probe: Probe) -> Tensor:
    """Compute ``[P, tokens]``: a row that sequences share counts for each of them; that of a dead token is infinite."""
    rms, rows = torch.stack([traversal.rms[j] for j in probe.layers]), traversal.rows
    rms = rms if rows.shared is None else rms.index_select(1, rows.shared.spread.rows)
    return rms if rows.padding is None else rms.masked_fill(rows.padding.tokens, torch.inf)
