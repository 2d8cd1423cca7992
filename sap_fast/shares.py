"""Draws shares of what a step was given: some of its pairs, and the sequences that carry tangents.

Draws are of torch's global generator on the CPU, which ``torch.manual_seed`` sets.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sap_fast.batch import Rows, drawn
from sap_fast.packing import Packer
from sap_fast.passes import Micro, Parts

Batch = Mapping[str, Tensor]


def some_pairs(pairs: Batch, rows: Rows, wanted: int, packer: Packer) -> Rows:
    """Some of the pairs, packed.

    Args:
        pairs, rows: all of them, padded and packed.
        wanted: how many; all if there are no more.
        packer: packs what is drawn.
    """
    count = rows.sequences // 2
    if wanted >= count:
        return rows
    chosen = torch.randperm(count)[:wanted].sort().values.tolist()
    return packer.pairs(drawn(pairs, [*chosen, *(count + i for i in chosen)]))


def some_tangents(
    batches: Sequence[Batch],
    micros: Sequence[Micro],
    fraction: float,
    packer: Packer,
    draw_seed: Callable[[], Tensor | None],
) -> Parts | None:
    """Each micro-batch in two parts: sequences that carry tangents, and the others; None if all would.

    Args:
        batches, micros: the micro-batches, padded and packed.
        fraction: share of each one's sequences, of which at least one carries tangents.
        packer: packs what is drawn.
        draw_seed: draws the seed of a part's dropout masks.
    """
    parts: Parts = []
    for batch, micro in zip(batches, micros, strict=True):
        count = micro.rows.sequences
        wanted = max(1, round(fraction * count))
        if wanted == count:
            parts.append((micro, None))
            continue
        order = torch.randperm(count)
        chosen, others = (
            Micro(packer.task(drawn(batch, some.sort().values.tolist()), may_lack_labels=True), draw_seed(), weight)
            for some, weight in ((order[:wanted], count / wanted), (order[wanted:], 1.0))
        )
        parts.append((chosen, others))
    return parts if any(others for _, others in parts) else None
