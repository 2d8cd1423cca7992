"""The passes over the task batch that a step is made of. None of them writes to the model.

Each takes the step's micro-batches and returns :class:`Gradients` of the mean loss over all their scored
tokens, so that n micro-batches give what one big batch gives.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from sap_fast.batch.rows import Count, Rows
from sap_fast.method.flat import Flat
from sap_fast.method.probe import Probe
from sap_fast.model.decoder import Decoder, Pass, Stream


@dataclass(frozen=True)
class Micro:
    """One packed micro-batch and the seed of its dropout masks, which all passes of a step share.

    ``weight``: how many times its share in the tangents' results counts, where it stands for sequences without
    tangents, too.
    """

    rows: Rows
    seed: Tensor | None
    weight: float = 1.0


# Of each micro-batch: sequences with tangents, and the others; None where there are none.
Parts = list[tuple[Micro | None, Micro | None]]


@dataclass(frozen=True)
class Gradients:
    """What the passes of a step yield; a field is empty where a pass does not compute it.

    ``loss``; ``loss_dot``, the slope of the loss along u; ``theta``: grad_theta L by name;
    ``probe_dot``: grad_V L_dot ``[P, d]``; ``probe``: grad_V L ``[P, d]``; ``rms``: per-token RMS of each probed
    layer's output ``[P, tokens]``.
    """

    loss: Tensor
    loss_dot: Tensor
    theta: Flat
    probe_dot: Tensor
    probe: Tensor
    rms: Tensor

    def __add__(self, other: "Gradients") -> "Gradients":
        """The shares of further micro-batches added, and the RMS of their tokens appended."""
        return Gradients(
            self.loss + other.loss,
            self.loss_dot + other.loss_dot,
            self.theta + other.theta,
            self.probe_dot + other.probe_dot,
            self.probe + other.probe,
            torch.cat((self.rms, other.rms), 1),
        )


def ordinary(
    decoder: Decoder, micros: Sequence[Micro], probe: Probe | None = None, *, scored: Count | None = None
) -> Gradients:
    """grad_theta L(theta, V) by an ordinary pass; V = 0 without a probe.

    Yields ``loss`` and ``theta``, and with a probe ``rms``.

    Args:
        scored: tokens that the mean is over; those of ``micros`` if None.
    """
    scored = tokens_scored(micros) if scored is None else scored

    def share(micro: Micro) -> Gradients:
        run = decoder.start(micro.rows, micro.seed, probe=probe.singles() if probe else None)
        nll, _ = decoder.forward(run)
        loss = nll.sum() / scored
        grads = torch.autograd.grad(loss, list(decoder.trained.values()), allow_unused=True)
        return _share(loss, theta=Flat.of(decoder.trained, grads), rms=_rms(run, probe) if probe else None)

    return _sum(map(share, micros))


@dataclass(frozen=True)
class DualPass:
    """A dual pass over one micro-batch: begun, to be run alone or together with another.

    ``directions`` and ``leaves`` are the variables that its backward finds gradients of.
    """

    micro: Micro
    probe: Probe
    directions: dict[str, Tensor]
    leaves: dict[int, Tensor]
    run: Pass

    @classmethod
    def start(cls, decoder: Decoder, micro: Micro, probe: Probe, u: Flat) -> "DualPass":
        directions = {name: t.detach().requires_grad_() for name, t in u.items()}
        leaves = probe.pairs()
        run = decoder.start(micro.rows, micro.seed, theta_dot=directions, probe=leaves)
        return cls(micro, probe, directions, leaves, run)

    @property
    def variables(self) -> list[Tensor]:
        return [*self.directions.values(), *self.leaves.values()]

    def share(self, loss: Tensor, loss_dot: Tensor, grads: Sequence[Any]) -> Gradients:
        """What comes of its share of ``(L, L_dot)`` and of the gradients of L_dot, None where there is none."""
        theta = Flat.of(self.directions, grads[: len(self.directions)])
        climb = torch.stack(tuple(grads[len(self.directions) :]))
        weight = self.micro.weight
        return _share(loss, loss_dot * weight, theta, climb * weight, _rms(self.run, self.probe))


def dual(decoder: Decoder, micros: Sequence[Micro], probe: Probe, u: Flat, *, scored: Count | None = None) -> Gradients:
    """Everything at once, by one dual pass: the inner and the outer problem at the same probe.

    Args:
        u: the unit direction over all trained weights.
        scored: tokens that the mean is over; those of ``micros`` if None.
    """
    scored = tokens_scored(micros) if scored is None else scored

    def share(micro: Micro) -> Gradients:
        task = DualPass.start(decoder, micro, probe, u)
        loss, loss_dot = mean(decoder.forward(task.run), scored)
        return task.share(loss, loss_dot, torch.autograd.grad(loss_dot, task.variables, allow_unused=True))

    return _sum(map(share, micros))


def divided(decoder: Decoder, parts: Parts, probe: Probe, u: Flat) -> Gradients:
    """What :func:`dual` yields, with tangents for some sequences only.

    The loss and grad_theta L are those of all sequences. ``probe_dot`` and ``probe`` are estimates, unbiased where
    the sequences with tangents are a random draw.

    Args:
        parts: of each micro-batch the sequences with tangents, which carry the weight, and the others.
    """
    chosen, others, scored = sides(parts)
    if decoder.float8 is not None:
        # What is run together shares its frozen products, and of the others' none may be in float8.
        return completed(decoder, dual(decoder, chosen, probe, u, scored=scored), others, probe, u, scored=scored)
    found = []
    for some, rest in parts:
        if some is not None and rest is not None:
            found.append(_together(decoder, some, rest, probe, u, scored))
        elif some is not None:
            found.append(dual(decoder, [some], probe, u, scored=scored))
    alone = [rest for some, rest in parts if some is None and rest is not None]
    return completed(decoder, _sum(found), alone, probe, u, scored=scored)


def _together(decoder: Decoder, some: Micro, rest: Micro, probe: Probe, u: Flat, scored: Count) -> Gradients:
    """A dual pass over some sequences and an ordinary one over the rest, each frozen product once for the rows of both.

    They share no variable: what the rest yields goes to the weights themselves, not to their directions.
    """
    ordinary_run = decoder.start(rest.rows, rest.seed, probe=probe.singles())
    task = DualPass.start(decoder, some, probe, u)
    runs = [task.run, ordinary_run]
    streams = decoder.run_together(runs, [decoder.embed(run) for run in runs], 0, len(decoder.layers))
    loss, loss_dot = mean(decoder.score(runs[0], streams[0]), scored)
    of_rest, _ = mean(decoder.score(runs[1], streams[1]), scored)
    variables, count = [*task.variables, *decoder.trained.values()], len(task.variables)
    grads = torch.autograd.grad([loss_dot, of_rest], variables, allow_unused=True)
    found = task.share(loss, loss_dot, grads[:count])
    return replace(
        found,
        loss=found.loss + of_rest.detach(),
        theta=found.theta + Flat.of(decoder.trained, grads[count:]),
        rms=torch.cat((found.rms, _rms(runs[1], probe)), 1),
    )


def sides(parts: Parts) -> tuple[list[Micro], list[Micro], Count]:
    """Those with tangents, the others, and the scored tokens of all."""
    chosen, others = ([part for part in side if part is not None] for side in zip(*parts, strict=True))
    return chosen, others, tokens_scored(chosen) + tokens_scored(others)


def completed(
    decoder: Decoder, with_tangents: Gradients, others: Sequence[Micro], probe: Probe, u: Flat, *, scored: Count
) -> Gradients:
    """What a dual pass over some sequences has found, completed by an ordinary one over the others."""
    if not others:
        return replace(with_tangents, loss_dot=with_tangents.theta.dot(u))
    without = ordinary(decoder, others, probe, scored=scored)
    theta = with_tangents.theta + without.theta
    return replace(
        with_tangents,
        loss=with_tangents.loss + without.loss,
        loss_dot=theta.dot(u),
        theta=theta,
        rms=torch.cat((with_tangents.rms, without.rms), 1),
    )


@dataclass(frozen=True)
class _Cut:
    """A dual pass cut beneath the lowest probe: the stream there, its tangents still attached to what lies beneath."""

    micro: Micro
    directions: dict[str, Tensor]
    residual: Tensor
    update: Tensor
    tangents: tuple[Tensor, Tensor]


def inner(
    decoder: Decoder, micros: Sequence[Micro], probe: Probe, u: Flat, *, keep: bool, scored: Count | None = None
) -> tuple[Gradients, list[_Cut]]:
    """grad_V L_dot alone: a dual pass whose backward ends at the lowest probe.

    Args:
        keep: whether to keep what lies beneath the lowest probe for :func:`restarted`.
        scored: tokens that the mean is over; those of ``micros`` if None.
    """
    scored = tokens_scored(micros) if scored is None else scored
    lowest, depth = min(probe.layers), len(decoder.layers)
    cuts = []

    def share(micro: Micro) -> Gradients:
        assert not keep or micro.weight == 1
        directions = {name: t.detach().requires_grad_(keep) for name, t in u.items()}
        leaves = probe.pairs()
        with torch.set_grad_enabled(keep):
            beneath = decoder.start(micro.rows, micro.seed, theta_dot=directions)
            stream = decoder.run_layers(beneath, decoder.embed(beneath), 0, lowest + 1)
        # From here upwards only the probe is a variable; the direction and what lies beneath are constants.
        above = replace(beneath, theta_dot=_detached(beneath), probe=leaves, rms={})
        residual, residual_dot, update, update_dot = stream
        assert residual_dot is not None and update is not None and update_dot is not None  # it is a pair
        start = Stream(residual.detach(), residual_dot.detach(), update.detach(), update_dot.detach())
        nll = decoder.score(above, decoder.run_layers(above, start, lowest + 1, depth))
        loss, loss_dot = mean(nll, scored)
        grads = torch.autograd.grad(loss_dot, list(leaves.values()))
        if keep:
            cuts.append(_Cut(micro, directions, residual, update, (residual_dot, update_dot)))
        return _share(loss, loss_dot * micro.weight, probe=torch.stack(grads) * micro.weight, rms=_rms(above, probe))

    return _sum(map(share, micros)), cuts


def restarted(decoder: Decoder, cuts: Sequence[_Cut], probe: Probe) -> Gradients:
    """grad_theta L(theta, V) by an ordinary pass that restarts from the stream beneath the lowest probe.

    What lies beneath does not depend on V. Its backward is the half backward of the dual pass: the cotangent
    of the tangent half is the ordinary gradient, so dL/dstream is handed to the kept graph as that of the tangents.
    """
    scored, lowest, depth = tokens_scored([cut.micro for cut in cuts]), min(probe.layers), len(decoder.layers)

    def share(cut: _Cut) -> Gradients:
        run = decoder.start(cut.micro.rows, cut.micro.seed, probe=probe.singles())
        residual, update = cut.residual.detach().requires_grad_(), cut.update.detach().requires_grad_()
        stream = decoder.run_layers(run, Stream(residual, None, update, None), lowest + 1, depth)
        loss, _ = mean(decoder.score(run, stream), scored)
        *above, dresidual, dupdate = torch.autograd.grad(
            loss, [*decoder.trained.values(), residual, update], allow_unused=True
        )
        theta = Flat.of(decoder.trained, above)
        # A tangent that no adapter beneath the probe feeds has no graph.
        ends = [(t, d) for t, d in zip(cut.tangents, (dresidual, dupdate), strict=True) if t.requires_grad]
        if ends:
            tangents, cotangents = zip(*ends, strict=True)
            found = torch.autograd.grad(tangents, list(cut.directions.values()), cotangents, allow_unused=True)
            theta = theta + Flat.of(cut.directions, found)
        return _share(loss, theta=theta)

    return _sum(map(share, cuts))


def finite_difference(decoder: Decoder, micros: Sequence[Micro], probe: Probe, u: Flat, radius: Tensor) -> Gradients:
    """What :func:`dual` yields, with the derivative along u as a forward difference of two ordinary passes.

    For comparison: it costs as much, and its rounding error is that of a gradient divided by ``radius``
    (0-dim). The moved weights are copies; the model's are never written.
    """
    scored, trained = tokens_scored(micros), decoder.trained
    moved = (Flat.of(trained) + u * radius).copies(trained)

    def share(micro: Micro) -> Gradients:
        leaves = probe.singles(requires_grad=True)
        run = decoder.start(micro.rows, micro.seed, probe=leaves)
        loss = decoder.forward(run)[0].sum() / scored
        grads = torch.autograd.grad(loss, [*trained.values(), *leaves.values()], allow_unused=True)
        at_theta = torch.cat(grads[len(trained) :])
        ahead = decoder.start(micro.rows, micro.seed, theta=moved, probe=leaves)
        loss_moved = decoder.forward(ahead)[0].sum() / scored
        at_moved = torch.cat(torch.autograd.grad(loss_moved, list(leaves.values())))
        climb = torch.stack(((at_moved - at_theta) / radius, at_theta), 1)
        theta = Flat.of(trained, grads[: len(trained)])
        return _share(loss, (loss_moved - loss) / radius, theta, climb, _rms(run, probe))

    return _sum(map(share, micros))


def tokens_scored(micros: Sequence[Micro]) -> Count:
    """... of all micro-batches."""
    return sum(micro.rows.scored for micro in micros)


def mean(nll: tuple[Tensor, Tensor | None], scored: Count) -> tuple[Tensor, Tensor]:
    """A micro-batch's share of ``(L, L_dot)``; in an ordinary pass L_dot is 0."""
    loss = nll[0].sum() / scored
    return loss, torch.zeros_like(loss) if nll[1] is None else nll[1].sum() / scored


def _detached(run: Pass) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in (run.theta_dot or {}).items()}


def _rms(run: Pass, probe: Probe) -> Tensor:
    """``[P, tokens]``: a row that sequences share counts for each of them; that of a dead token is infinite."""
    rms, rows = torch.stack([run.rms[j] for j in probe.layers]), run.rows
    rms = rms if rows.shared is None else rms.index_select(1, rows.shared.spread.rows)
    return rms if rows.padding is None else rms.masked_fill(rows.padding.tokens, torch.inf)


def _share(
    loss: Tensor,
    loss_dot: Tensor | None = None,
    theta: Flat | None = None,
    probe: Tensor | None = None,
    rms: Tensor | None = None,
) -> Gradients:
    """One micro-batch's share; ``probe`` holds ``[P, 2, d]``: grad_V L_dot, grad_V L."""
    loss = loss.detach()
    empty = loss.new_empty(0, 0)
    probe_dot, probe = (empty, empty) if probe is None else probe.unbind(1)
    return Gradients(
        loss,
        torch.zeros_like(loss) if loss_dot is None else loss_dot.detach(),
        Flat(empty.view(0), ()) if theta is None else theta,
        probe_dot,
        probe,
        empty if rms is None else rms,
    )


def _sum(shares: Iterable[Gradients]) -> Gradients:
    """The sum over micro-batches, each share let go as soon as it is added."""
    return reduce(add, shares)
