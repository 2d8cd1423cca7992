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

# A pair whose weight sigmoid(-margin / temperature) lies beneath this adds nothing to the direction.
SATURATED = 1e-4


@dataclass(frozen=True)
class Direction:
    """``u`` by parameter name (float32, or float64 for a float64 model) and what was seen on the way.

    ``norm``: of the gradient before it was normalised; ``loss``: the safety loss; ``margin``: mean over pairs
    of log p(chosen) - log p(rejected), per token or summed as configured; ``saturated``: share of pairs
    without weight (``"logsigmoid"`` only). All 0-dim tensors.
    """

    u: Mapping[str, Tensor]
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
    gradients = widen(decoder.trained, found)
    norm = norm_of(gradients)
    return Direction(
        u={name: g / norm for name, g in gradients.items()},
        norm=norm,
        loss=loss.detach(),
        margin=margin.detach().mean(),
        saturated=(weight < SATURATED).float().mean(),
        tokens=rows.tokens,
    )


def pair_margins(log_p: Tensor, rows: Rows, *, per_token: bool) -> Tensor:
    """``log p(chosen) - log p(rejected)`` of each pair, ``[P]``, from the scored tokens' ``log_p [M]``."""
    totals = log_p.new_zeros(rows.sequences).index_add(0, rows.label_sequence, log_p)
    if per_token:
        totals = totals / torch.bincount(rows.label_sequence, minlength=rows.sequences)
    chosen, rejected = totals.chunk(2)
    return chosen - rejected


def safety_loss(margin: Tensor, config: SAPConfig) -> tuple[Tensor, Tensor]:
    """The loss that the model lowers by becoming safer, and each pair's weight in its gradient ``[P]``."""
    if config.safety_loss == "difference":
        return -margin.mean(), torch.ones_like(margin)
    scaled = margin / config.temperature
    return -torch.nn.functional.logsigmoid(scaled).mean(), torch.sigmoid(-scaled.detach())


def widen(trained: Mapping[str, Tensor], gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """Name gradients, in float32 (float64 for float64), zeros where a weight took no part."""
    named = {}
    for (name, weight), g in zip(trained.items(), gradients, strict=True):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        named[name] = torch.zeros_like(weight, dtype=dtype) if g is None else g.detach().to(dtype)
    return named


def norm_of(tensors: Mapping) -> Tensor:
    """The Euclidean norm over all tensors together, 0-dim, in float32 (float64 for float64)."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors.values()]
    return torch.linalg.vector_norm(torch.stack(norms))


def dot(a: Mapping, b: Mapping) -> Tensor:
    """The inner product over all tensors together, 0-dim."""
    return torch.stack([(a[key] * b[key]).sum() for key in a]).sum()
