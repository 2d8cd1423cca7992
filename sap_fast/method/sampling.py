"""Draws shares of what a step was given: some of its pairs, and the sequences that carry tangents.

Draws are of torch's global generator on the CPU, which ``torch.manual_seed`` sets.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sap_fast.batch.packer import Packer
from sap_fast.batch.rows import HostBatch
from sap_fast.method.passes import Micro, Split


def some_pairs(pairs: HostBatch, wanted: int) -> HostBatch:
    """Draw some of the pairs; all of them if no more than ``wanted`` are there."""
    count = pairs.sequences // 2
    if wanted >= count:
        return pairs
    chosen = torch.randperm(count)[:wanted].sort().values.tolist()
    return pairs.select_sequences([*chosen, *(count + i for i in chosen)])


def some_tangents(
    batches: Sequence[HostBatch],
    micros: Sequence[Micro],
    fraction: float,
    packer: Packer,
    draw_seed: Callable[[], Tensor | None],
) -> Split | None:
    """Divide each micro-batch into sequences that carry tangents and the others; None if all would.

    Args:
        batches, micros: the micro-batches, checked and packed.
        fraction: share of all their sequences together, of which at least one carries tangents.
        packer: packs what is drawn.
        draw_seed: draws the seed of a part's dropout masks.
    """
    counts = [micro.rows.sequences for micro in micros]
    total = sum(counts)
    wanted = max(1, round(fraction * total))
    if wanted == total:
        return None
    carries = torch.zeros(total, dtype=torch.bool)
    carries[torch.randperm(total)[:wanted]] = True

    def part(batch: HostBatch, micro: Micro, chosen: Tensor, weight: float) -> Micro | None:
        if not chosen.any():
            return None
        if chosen.all():
            return replace(micro, weight=weight)
        return Micro(packer.task(batch.select_sequences(chosen.nonzero()[:, 0].tolist())), draw_seed(), weight)

    return [
        (part(batch, micro, chosen, total / wanted), part(batch, micro, ~chosen, 1.0))
        for batch, micro, chosen in zip(batches, micros, carries.split(counts), strict=True)
    ]
