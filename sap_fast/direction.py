"""The harmful direction ``u``: the unit gradient, over all trained weights, of a contrastive safety loss.

Going along ``+u`` lowers the log-probability of chosen answers against rejected ones: the model becomes less
safe. The answers are teacher-forced and the labels shifted (``sap_fast/batch.py``); sums are in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_fast.batch import Rows
from sap_fast.config import SAPConfig
from sap_fast.decoder import Decoder
from sap_fast.flat import Flat

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


def harmful_direction(decoder: Decoder, rows: Rows, probe: Mapping[int, Tensor], config: SAPConfig) -> Direction:
    """Compute the direction from packed pairs, without dropout (it is a property of the weights).

    Args:
        rows: packed pairs, chosen sequences first.
        probe: ``[1, d]`` by layer, what acts during this pass; empty for none.
    """
    run = decoder.start(rows, seed=None, probe=probe)
    nll, _ = decoder.forward(run)
    margin = pair_margins(-nll, rows, per_token=config.per_token)
    loss, weight = safety_loss(margin, config)
    found = torch.autograd.grad(loss, list(decoder.trained.values()), allow_unused=True)
    gradient = Flat.of(decoder.trained, found)
    norm = gradient.norm()
    return Direction(
        u=gradient / norm,
        norm=norm,
        loss=loss.detach(),
        margin=margin.detach().mean(),
        saturated=(weight < SATURATED).float().mean(),
        tokens=rows.tokens,
    )


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
