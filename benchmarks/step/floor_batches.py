"""The batch that the floor of a step is computed for: 768 task tokens, and pairs of 2,458 tokens on 2,027 rows.

Its sizes are the published ones, 10 sequences of up to 128 tokens and 8 pairs of up to 256, less padding: 60% of the
tokens are real, the prompt is 35% of a pair's sequence, half of the task's tokens are scored. Lengths are fixed here,
so that the work is the same whatever data are at hand; rows of data come out shorter or longer. Token ids are drawn,
and no two sequences begin alike but those of a pair, which share their prompt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sap_fast.batch.rows import IGNORED

TASK_LENGTHS = (128, 112, 101, 93, 84, 72, 61, 50, 39, 28)
PROMPT_LENGTHS = (75, 68, 61, 54, 50, 46, 41, 36)
CHOSEN_LENGTHS = (60, 72, 85, 95, 104, 118, 130, 142)
REJECTED_LENGTHS = (150, 131, 119, 106, 92, 81, 67, 44)
# Ids that every tokenizer here has, without the first ones, which are special.
_IDS = range(3, 1000)


def floor_batches(device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make the task batch ``[10, 128]`` and the pairs ``[16, 225]``, padded on the right to the longest."""
    rng = torch.Generator().manual_seed(0)

    def drawn(length: int, first: int) -> Tensor:
        """Draw ids whose first is their own."""
        ids = torch.randint(_IDS.start, _IDS.stop, (length,), generator=rng)
        ids[0] = _IDS.start + first
        return ids

    tasks = [drawn(length, i) for i, length in enumerate(TASK_LENGTHS)]
    prompts = [drawn(length, i) for i, length in enumerate(PROMPT_LENGTHS)]
    sides = [
        [torch.cat((prompt, drawn(length, side))) for prompt, length in zip(prompts, lengths, strict=True)]
        for side, lengths in enumerate((CHOSEN_LENGTHS, REJECTED_LENGTHS))
    ]
    batch = _padded(tasks, [length // 2 for length in TASK_LENGTHS])
    pairs = _padded([*sides[0], *sides[1]], [*PROMPT_LENGTHS, *PROMPT_LENGTHS])
    on_device = [{key: x.to(device) for key, x in each.items()} for each in (batch, pairs)]
    return on_device[0], on_device[1]


def _padded(sequences: Sequence[Tensor], unscored: Sequence[int]) -> dict[str, Tensor]:
    """Pad sequences to a batch; of each, the first ``unscored`` tokens have no label."""
    shape, fills = (len(sequences), max(map(len, sequences))), {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    batch = {key: torch.full(shape, fill) for key, fill in fills.items()}
    for i, (ids, start) in enumerate(zip(sequences, unscored, strict=True)):
        batch["input_ids"][i, : len(ids)], batch["attention_mask"][i, : len(ids)] = ids, 1
        batch["labels"][i, start : len(ids)] = ids[start:]
    return batch
