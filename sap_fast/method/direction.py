"""The harmful direction ``u``: the unit gradient, over all trained weights, of a contrastive safety loss.

Going along ``+u`` lowers the log-probability of chosen answers against rejected ones: the model becomes less
safe. The answers are teacher-forced and the labels shifted (``sap_fast/batch/rows.py``); sums are in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sap_fast.batch.rows import Rows
from sap_fast.config import SAPConfig
from sap_fast.method.flat import Flat
from sap_fast.model.decoder import Decoder, Pass

# A pair whose weight sigmoid(-margin / temperature) lies beneath this adds nothing to the direction.
SATURATED = 1e-4


@dataclass(frozen=True)
class Direction:
    """``u`` by parameter name (float32, or float64 for a float64 model) and what was seen on the way.

    ``norm``: of the gradient before it was normalised; ``loss``: the safety loss; ``margin``: mean over pairs
    of log p(chosen) - log p(rejected), per token or summed as configured; ``saturated``: share of pairs
    without weight (``"logsigmoid"`` only). All 0-dim tensors.
    """

    u: Flat
    norm: Tensor
    loss: Tensor
    margin: Tensor
    saturated: Tensor
    tokens: int


@dataclass(frozen=True)
class SafetyPass:
    """The pass over packed pairs whose gradient is the direction: begun, to be run alone or together with another.

    It is without dropout, since the direction is a property of the weights. ``run``: what the decoder is to run.
    """

    decoder: Decoder
    rows: Rows
    run: Pass
    config: SAPConfig

    @classmethod
    def start(cls, decoder: Decoder, rows: Rows, probe: Mapping[int, Tensor], config: SAPConfig) -> "SafetyPass":
        """Prepare it.

        Args:
            rows: packed pairs, chosen sequences first.
            probe: ``[1, d]`` by layer, what acts during this pass; empty for none.
        """
        run = decoder.start(rows, seed=None, probe=probe)
        # An ordinary pass, but one whose gradient only has to point somewhere.
        return cls(decoder, rows, replace(run, float8=decoder.float8), config)

    def scored(self, nll: Tensor) -> "_Scored":
        """What the negative log-likelihoods of its scored tokens, ``nll [M]``, come to."""
        margin = pair_margins(-nll, self.rows, per_token=self.config.per_token)
        return _Scored(*safety_loss(margin, self.config), margin)

    def direction(self, scored: "_Scored", gradient: Sequence[Tensor | None]) -> Direction:
        """The direction that the gradient of ``scored.loss``, with respect to ``decoder.trained``, points in."""
        whole = Flat.of(self.decoder.trained, gradient)
        norm = whole.norm()
        return Direction(
            u=whole / norm,
            norm=norm,
            loss=scored.loss.detach(),
            margin=scored.margin.detach().mean(),
            saturated=(scored.weight < SATURATED).float().mean(),
            tokens=self.rows.tokens,
        )


class _Scored(NamedTuple):
    """The safety loss, and of each pair its weight in the gradient and its margin ``[P]``."""

    loss: Tensor
    weight: Tensor
    margin: Tensor


def harmful_direction(decoder: Decoder, rows: Rows, probe: Mapping[int, Tensor], config: SAPConfig) -> Direction:
    """Compute the direction by a pass of its own; the arguments are those of :meth:`SafetyPass.start`."""
    safety = SafetyPass.start(decoder, rows, probe, config)
    nll, _ = decoder.forward(safety.run)
    scored = safety.scored(nll)
    found = torch.autograd.grad(scored.loss, list(decoder.trained.values()), allow_unused=True)
    return safety.direction(scored, found)


def pair_margins(log_p: Tensor, rows: Rows, *, per_token: bool) -> Tensor:
    """``log p(chosen) - log p(rejected)`` of each pair, ``[P]``, from the scored tokens' ``log_p [M]``."""
    # A dense sum over [2P, M]: index_add would add in an order that changes from run to run on a GPU, and bincount
    # would wait for the device.
    member = rows.label_sequence == torch.arange(rows.sequences, device=log_p.device)[:, None]
    totals = torch.where(member, log_p, 0).sum(1)
    if per_token:
        totals = totals / member.sum(1)
    chosen, rejected = totals.chunk(2)
    return chosen - rejected


def safety_loss(margin: Tensor, config: SAPConfig) -> tuple[Tensor, Tensor]:
    """The loss that the model lowers by becoming safer, and each pair's weight in its gradient ``[P]``."""
    if config.safety_loss == "difference":
        return -margin.mean(), torch.ones_like(margin)
    scaled = margin / config.temperature
    return -torch.nn.functional.logsigmoid(scaled).mean(), torch.sigmoid(-scaled.detach())
