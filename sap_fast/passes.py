"""The passes over the task batch that a step is made of. None of them writes to the model.

Each takes the step's micro-batches and returns :class:`Gradients` of the mean loss over all their scored
tokens, so that n micro-batches give what one big batch gives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sap_fast.batch import Rows
from sap_fast.decoder import Decoder, Pass, Stream
from sap_fast.direction import widen
from sap_fast.probe import Probe


@dataclass(frozen=True)
class Micro:
    """One packed micro-batch and the seed of its dropout masks, which all passes of a step share."""

    rows: Rows
    seed: Tensor | None


@dataclass(frozen=True)
class Gradients:
    """What the passes of a step yield; a field is empty where a pass does not compute it.

    ``loss``; ``loss_dot``, the slope of the loss along u; ``theta``: grad_theta L by name;
    ``probe_dot``: grad_V L_dot by layer ``[d]``; ``probe``: grad_V L; ``rms``: per-token RMS of each probed
    layer's output ``[rows]``.
    """

    loss: Tensor
    loss_dot: Tensor
    theta: dict[str, Tensor]
    probe_dot: dict[int, Tensor]
    probe: dict[int, Tensor]
    rms: dict[int, Tensor]


def ordinary(decoder: Decoder, micros: Sequence[Micro], probe: Probe | None = None) -> Gradients:
    """grad_theta L(theta, V) by an ordinary pass; V = 0 without a probe.

    Yields ``loss``, ``theta`` and ``rms``.
    """
    scored = _scored(micros)
    parts = []
    for micro in micros:
        run = decoder.start(micro.rows, micro.seed, probe=probe.singles() if probe else None)
        nll, _ = decoder.forward(run)
        loss = nll.sum() / scored
        grads = torch.autograd.grad(loss, list(decoder.trained.values()), allow_unused=True)
        theta = widen(decoder.trained, grads)
        parts.append(_part(loss, theta=theta, rms=run.rms))
    return _sum(parts)


def dual(decoder: Decoder, micros: Sequence[Micro], probe: Probe, u: Mapping[str, Tensor]) -> Gradients:
    """Everything at once, by one dual pass: the inner and the outer problem at the same probe.

    Args:
        u: the unit direction by name of every trained weight, in float32 (float64 for a float64 model).
    """
    scored = _scored(micros)
    parts = []
    for micro in micros:
        directions = {name: t.detach().requires_grad_() for name, t in u.items()}
        leaves = probe.pairs()
        run = decoder.start(micro.rows, micro.seed, theta_dot=directions, probe=leaves)
        loss, loss_dot = _mean(decoder.forward(run), scored)
        grads = torch.autograd.grad(loss_dot, [*directions.values(), *leaves.values()], allow_unused=True)
        theta = widen(u, grads[: len(u)])
        parts.append(_part(loss, loss_dot, theta, dict(zip(leaves, grads[len(u) :], strict=True)), run.rms))
    return _sum(parts)


@dataclass(frozen=True)
class _Cut:
    """A dual pass cut beneath the lowest probe: the stream there, its tangents still attached to what lies beneath."""

    micro: Micro
    directions: dict[str, Tensor]
    residual: Tensor
    update: Tensor
    tangents: tuple[Tensor, Tensor]


def inner(
    decoder: Decoder, micros: Sequence[Micro], probe: Probe, u: Mapping[str, Tensor], *, keep: bool
) -> tuple[Gradients, list[_Cut]]:
    """grad_V L_dot alone: a dual pass whose backward ends at the lowest probe.

    Args:
        keep: whether to keep what lies beneath the lowest probe for :func:`restarted`.
    """
    scored, lowest, depth = _scored(micros), min(probe.vectors), len(decoder.layers)
    parts, cuts = [], []
    for micro in micros:
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
        loss, loss_dot = _mean(nll, scored)
        grads = torch.autograd.grad(loss_dot, list(leaves.values()))
        parts.append(_part(loss, loss_dot, {}, dict(zip(leaves, grads, strict=True)), above.rms))
        if keep:
            cuts.append(_Cut(micro, directions, residual, update, (residual_dot, update_dot)))
    return _sum(parts), cuts


def restarted(decoder: Decoder, cuts: Sequence[_Cut], probe: Probe) -> Gradients:
    """grad_theta L(theta, V) by an ordinary pass that restarts from the stream beneath the lowest probe.

    What lies beneath does not depend on V. Its backward is the half backward of the dual pass: the cotangent
    of the tangent half is the ordinary gradient, so dL/dstream is handed to the kept graph as that of the tangents.
    """
    scored, lowest, depth = _scored([cut.micro for cut in cuts]), min(probe.vectors), len(decoder.layers)
    parts = []
    for cut in cuts:
        run = decoder.start(cut.micro.rows, cut.micro.seed, probe=probe.singles())
        residual, update = cut.residual.detach().requires_grad_(), cut.update.detach().requires_grad_()
        stream = decoder.run_layers(run, Stream(residual, None, update, None), lowest + 1, depth)
        loss, _ = _mean(decoder.score(run, stream), scored)
        *above, dresidual, dupdate = torch.autograd.grad(
            loss, [*decoder.trained.values(), residual, update], allow_unused=True
        )
        theta = widen(decoder.trained, tuple(above))
        # A tangent that no adapter beneath the probe feeds has no graph.
        ends = [(t, d) for t, d in zip(cut.tangents, (dresidual, dupdate), strict=True) if t.requires_grad]
        if ends:
            tangents, cotangents = zip(*ends, strict=True)
            found = torch.autograd.grad(tangents, list(cut.directions.values()), cotangents, allow_unused=True)
            beneath = widen(cut.directions, found)
            theta = {name: g + beneath[name] for name, g in theta.items()}
        parts.append(_part(loss, theta=theta, rms=run.rms))
    return _sum(parts)


def finite_difference(
    decoder: Decoder, micros: Sequence[Micro], probe: Probe, u: Mapping[str, Tensor], radius: Tensor
) -> Gradients:
    """What :func:`dual` yields, with the derivative along u as a forward difference of two ordinary passes.

    For comparison: it costs as much, and its rounding error is that of a gradient divided by ``radius``
    (0-dim). The moved weights are copies; the model's are never written.
    """
    scored = _scored(micros)
    moved = {name: p.detach() + (radius * u[name]).to(p.dtype) for name, p in decoder.trained.items()}
    parts = []
    for micro in micros:
        leaves = probe.singles(requires_grad=True)
        run = decoder.start(micro.rows, micro.seed, probe=leaves)
        loss = decoder.forward(run)[0].sum() / scored
        grads = torch.autograd.grad(loss, [*decoder.trained.values(), *leaves.values()], allow_unused=True)
        theta = widen(decoder.trained, grads[: len(decoder.trained)])
        at_theta = grads[len(decoder.trained) :]
        ahead = decoder.start(micro.rows, micro.seed, theta=moved, probe=leaves)
        loss_moved = decoder.forward(ahead)[0].sum() / scored
        at_moved = torch.autograd.grad(loss_moved, list(leaves.values()))
        probe_dot = {
            j: torch.stack(((b - a)[0] / radius, a[0])) for j, a, b in zip(leaves, at_theta, at_moved, strict=True)
        }
        parts.append(_part(loss, (loss_moved - loss) / radius, theta, probe_dot, run.rms))
    return _sum(parts)


def _scored(micros: Sequence[Micro]) -> int:
    return sum(micro.rows.scored for micro in micros)


def _mean(nll: tuple[Tensor, Tensor | None], scored: int) -> tuple[Tensor, Tensor]:
    """A micro-batch's share of ``(L, L_dot)``; in an ordinary pass L_dot is 0."""
    loss = nll[0].sum() / scored
    return loss, torch.zeros_like(loss) if nll[1] is None else nll[1].sum() / scored


def _detached(run: Pass) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in (run.theta_dot or {}).items()}


def _part(
    loss: Tensor,
    loss_dot: Tensor | None = None,
    theta: dict[str, Tensor] | None = None,
    probe: dict[int, Tensor] | None = None,
    rms: dict[int, Tensor] | None = None,
) -> Gradients:
    """One micro-batch's share; ``probe`` holds stacks ``[2, d]``: grad_V L_dot, grad_V L."""
    loss = loss.detach()
    return Gradients(
        loss,
        torch.zeros_like(loss) if loss_dot is None else loss_dot.detach(),
        theta or {},
        {j: g[0] for j, g in (probe or {}).items()},
        {j: g[1] for j, g in (probe or {}).items()},
        rms or {},
    )


def _sum(parts: Sequence[Gradients]) -> Gradients:
    first, *rest = parts
    for part in rest:
        first = Gradients(
            first.loss + part.loss,
            first.loss_dot + part.loss_dot,
            {name: g + part.theta[name] for name, g in first.theta.items()},
            {j: g + part.probe_dot[j] for j, g in first.probe_dot.items()},
            {j: g + part.probe[j] for j, g in first.probe.items()},
            {j: torch.cat((x, part.rms[j])) for j, x in first.rms.items()},
        )
    return first
