"""What tells the bits of a few exact steps from those of others: of another run, another card, another release."""

import hashlib
from typing import Any

from torch import nn

import sap_fast
from benchmarks.common import models
from benchmarks.published.parts import trained
from benchmarks.step.floor_batches import floor_batches
from sap_fast import SAPConfig

STEPS = 3


def digest(model: nn.Module) -> dict[str, Any]:
    """Take two digests of the same steps, one after the other, and tell whether they are identical in every bit.

    Args:
        model: with adapters; two twins of it take the steps.

    Returns:
        ``first`` and ``again``: SHA-256 over the gradients of all adapters and the probe, after each of ``STEPS``
        lagged steps on the rows of ``floor_batches.py``, without an optimizer; ``identical``; ``layers``.
    """
    first, again = (_bits(models.twin(model)) for _ in range(2))
    layers: int = model.config.num_hidden_layers  # type: ignore[union-attr,assignment]
    return {"first": first, "again": again, "identical": first == again, "layers": layers, "steps": STEPS}


def _bits(model: nn.Module) -> str:
    device = next(model.parameters()).device
    batch, pairs = floor_batches(str(device))
    seen = hashlib.sha256()
    with sap_fast.attach(model, SAPConfig(schedule="lagged")) as sap:
        for _ in range(STEPS):
            model.zero_grad()
            sap.step(batch, pairs)
            for x in (*(p.grad for p in trained(model).values()), *sap.probe.values()):
                seen.update(x.detach().float().cpu().contiguous().numpy().tobytes())
    return seen.hexdigest()
