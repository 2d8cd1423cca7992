"""The harmful direction ``u``: the unit gradient, over all trained weights, of a contrastive safety loss.

Going along ``+u`` lowers the log-probability of chosen answers against rejected ones: the model becomes less
safe. The answers are teacher-forced and the labels shifted (``sap_fast/batch/rows.py``); sums are in float32.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sap_fast.batch.rows import Count, Rows
from sap_fast.config import SAPConfig
from sap_fast.method.flat import Flat
from sap_fast.method.reduce import SafetySums

# A pair whose weight sigmoid(-margin / temperature) lies beneath this adds nothing to the direction.
SATURATED = 1e-4


@dataclass(frozen=True)
class Direction:
    """The harmful direction, and what was seen on the way to it.

    Attributes:
        u: the unit vector by parameter name, in float32, or in float64 of a float64 model.
        norm: of the gradient before it was normalised, 0-dim.
        loss: the safety loss, 0-dim.
        margin: mean over pairs of log p(chosen) - log p(rejected) in nats, per token or summed as configured, 0-dim.
        saturated: share of pairs without weight (``"logsigmoid"`` only), 0-dim.
        tokens: how many tokens the pairs have.
    """

    u: Flat
    norm: Tensor
    loss: Tensor
    margin: Tensor
    saturated: Tensor
    tokens: int

    @classmethod
    def of(cls, sums: SafetySums) -> "Direction":
        """Normalise the gradient of all pairs, and keep what was seen on the way to it."""
        norm = sums.theta.norm()
        return cls(sums.theta / norm, norm, sums.loss, sums.margin, sums.saturated, sums.tokens)


class SafetyLoss(NamedTuple):
    """Holds the pairs' share of the safety loss, and of each pair its weight in the gradient and its margin ``[P]``."""

    loss: Tensor
    weight: Tensor
    margin: Tensor

    @classmethod
    def of(cls, log_p: Tensor, rows: Rows, pairs: Count, config: SAPConfig) -> "SafetyLoss":
        """Compute the loss that the model lowers by becoming safer.

        Args:
            log_p: of the scored tokens, ``[M]``.
            rows: packed pairs, chosen sequences first.
            pairs: how many the mean is over.
            config: says which loss.
        """
        margin = pair_margins(log_p, rows, per_token=config.per_token)
        if config.safety_loss == "difference":
            return cls(-(margin.sum() / pairs), torch.ones_like(margin), margin)
        scaled = margin / config.temperature
        loss = -(torch.nn.functional.logsigmoid(scaled).sum() / pairs)
        return cls(loss, torch.sigmoid(-scaled.detach()), margin)

    def sums(self, theta: Flat, pairs: Count, tokens: int) -> SafetySums:
        """Sum up what was seen, beside the gradient ``theta`` of the loss."""
        margin, saturated = self.margin.detach().sum() / pairs, (self.weight < SATURATED).float().sum() / pairs
        return SafetySums(theta, self.loss.detach(), margin, saturated, tokens)


def pair_margins(log_p: Tensor, rows: Rows, *, per_token: bool) -> Tensor:
    """Subtract log p(rejected) from log p(chosen) in each pair.

    Args:
        log_p: of the scored tokens, ``[M]``.
        rows: packed pairs, chosen sequences first.
        per_token: whether an answer's log-probability is the mean over its tokens, not the sum.

    Returns:
        Margins in nats, ``[P]``.
    """
    # A dense sum over [2P, M]: index_add would add in an order that changes from run to run on a GPU, and bincount
    # would wait for the device.
    member = rows.label_sequence == torch.arange(rows.sequences, device=log_p.device)[:, None]
    totals = torch.where(member, log_p, 0).sum(1)
    if per_token:
        totals = totals / member.sum(1)
    chosen, rejected = totals.chunk(2)
    return chosen - rejected
