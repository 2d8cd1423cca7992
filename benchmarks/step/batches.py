"""The batches that a whole step is timed on: task rows and pairs of three kinds.

- ``real``: drawn from the data and padded to the longest, as a collator does. Rows whose answer would be cut off
  entirely are not drawn, so that lengths are those of the data that such a batch can hold;
- ``released``: the same rows, padded to the fixed lengths to which the released code pads;
- ``full``: all of one length, so that there is no padding, and all compute on the same tokens;
- ``floor``: those that the floor is computed for, whatever the data (``floor_batches.py``).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from benchmarks.step.floor_batches import floor_batches
from sap_fast.batch.rows import IGNORED
from sap_fast.data import Example, Pair, collate, collate_pairs, encode_pairs, encode_tasks, safety_pairs
from sap_fast.errors import DataError

Batch = Mapping[str, Tensor]

KINDS = ("full", "real", "released", "floor")


@dataclass(frozen=True)
class Shapes:
    """Holds the sequences of a task batch and pairs of a step, and the most tokens of each; longer rows are cut."""

    tasks: int
    task_length: int
    pairs: int
    pair_length: int


# What a CPU can take, and the settings of the released code (``main.py``).
SMALL = Shapes(4, 64, 4, 96)
PUBLISHED = Shapes(10, 128, 8, 256)


@dataclass(frozen=True)
class Given:
    """Holds what a step is given: ``batch [B, T]`` and ``pairs [2P, T]``, as ``SAP.step`` takes them.

    Attributes:
        kind: one of ``KINDS``.
        shapes: the sizes asked for; the released step pads to their lengths by itself.
    """

    kind: str
    shapes: Shapes
    batch: Batch
    pairs: Batch


def rows(tokenizer: Any, examples: Sequence[Example], shapes: Shapes, kind: str, device: str, seed: int = 0) -> Given:
    """Make the rows of one kind, on a device.

    Args:
        examples: task data; the pairs are the embedded ones. Rows of kind ``floor`` have neither.
        seed: of the draw.

    Raises:
        ValueError: too little data.
    """
    if kind == "floor":
        return Given(kind, PUBLISHED, *floor_batches(device))
    chosen = []
    for name, data, count in (("examples", examples, shapes.tasks), ("pairs", safety_pairs(), shapes.pairs)):
        if len(data) < count:
            raise ValueError(f"a step takes {count} {name}, but there are {len(data)}")
        if kind == "full":
            chosen.append([joined(turned(data, i)) for i in range(count)])
            continue
        length = shapes.task_length if name == "examples" else shapes.pair_length
        order = random.Random(seed).sample(list(data), len(data))
        chosen.append(list(islice((row for row in order if answered(tokenizer, row, length)), count)))
        if len(chosen[-1]) < count:
            raise ValueError(
                f"a step takes {count} {name}, but only {len(chosen[-1])} of {len(data)} keep an answer within "
                f"{length} tokens; give others, or longer rows"
            )
    tasks, contrast = chosen
    batch = collate(tokenizer, tasks, shapes.task_length)
    pair_batch = collate_pairs(tokenizer, contrast, shapes.pair_length)
    if kind != "real":
        batch, pair_batch = padded_to(batch, shapes.task_length), padded_to(pair_batch, shapes.pair_length)
    if kind == "full" and not (batch["attention_mask"].all() and pair_batch["attention_mask"].all()):
        raise ValueError(f"all data together do not fill rows of {shapes.task_length} and {shapes.pair_length} tokens")
    return Given(kind, shapes, *({key: x.to(device) for key, x in b.items()} for b in (batch, pair_batch)))


def answered(tokenizer: Any, row: Any, length: int) -> bool:
    """Tell whether tokens of an example's answer, or of both of a pair's, are left where it is cut."""
    encoded = encode_tasks if isinstance(row, Example) else encode_pairs
    try:
        return not encoded(tokenizer, [row._asdict()], length).dropped
    except DataError:
        return False


def turned(data: Sequence[Any], start: int) -> list[Any]:
    """Return all of the data, going round from one of them."""
    return [*data[start:], *data[:start]]


def joined(examples: Sequence[Any]) -> Any:
    """Join the first one's prompt with all their answers as its answer: long enough to be cut to any length."""
    if isinstance(examples[0], Example):
        return Example(examples[0].prompt, " ".join(example.completion for example in examples))
    chosen, rejected = (" ".join(getattr(pair, side) for pair in examples) for side in ("chosen", "rejected"))
    return Pair(examples[0].category, examples[0].prompt, chosen, rejected)


def padded_to(batch: Batch, length: int) -> dict[str, Tensor]:
    """Pad a batch's rows on the right to ``length`` tokens; their ids there are that of padding, or 0."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {key: F.pad(x, (0, length - x.shape[1]), value=fill[key]) for key, x in batch.items()}


def as_if_real(batch: Batch) -> dict[str, Tensor]:
    """Return the batch with padding counted as tokens: they are computed on and not scored.

    Padding is on the right and attention is causal, so nothing that is scored changes.
    """
    return {**batch, "attention_mask": batch["attention_mask"].new_ones(batch["attention_mask"].shape)}


def lengths(batch: Batch) -> list[int]:
    """Count the tokens of each row that are not padding."""
    return batch["attention_mask"].sum(1).tolist()


def scored(batch: Batch) -> int:
    """Count the tokens that the loss is over; a row's first has none before it to be predicted from."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
