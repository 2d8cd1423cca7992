"""Batches: rows padded right to the longest, chosen rows first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sap_fast.batch.rows import IGNORED
from sap_fast.data.encode import Tokens, encode_pairs, encode_tasks
from sap_fast.data.examples import Example, Pair
from sap_fast.errors import DataError


@dataclass(frozen=True)
class Collator:
    """Makes a batch ``{input_ids, attention_mask, labels}``, each ``[B, T]`` int64, of encoded rows.

    ``pad`` is the token id written on padding, where ``attention_mask`` is 0 and ``labels`` are -100. Pairs become
    ``[2P, T]``: all chosen rows first, then all rejected.
    """

    pad: int

    @classmethod
    def of(cls, tokenizer: Any) -> "Collator":
        """Make a collator for a tokenizer, which need not have a padding token: what is written there is never read."""
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        return cls(next((i for i in ids if i is not None), 0))

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Collate :class:`Tokens`, (chosen, rejected) of them, or dicts of ``input_ids`` and ``labels``."""
        if not rows:
            raise DataError("there is no row to make a batch of")
        if isinstance(rows[0], tuple) and not isinstance(rows[0], Tokens):
            rows = [side for sides in zip(*rows, strict=True) for side in sides]
        return self._pad([row if isinstance(row, Tokens) else Tokens(row["input_ids"], row["labels"]) for row in rows])

    def _pad(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        shape = len(rows), max(len(row.input_ids) for row in rows)
        batch = {
            "input_ids": torch.full(shape, self.pad),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            batch["input_ids"][i, :length] = torch.as_tensor(row.input_ids)
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, :length] = torch.as_tensor(row.labels)
        return batch


def collate(tokenizer: Any, examples: Sequence[Example], max_length: int | None = None) -> dict[str, Tensor]:
    """Make a task batch of examples (or of rows in any format), each ``[B, T]`` int64.

    Raises:
        DataError: an answer that does not fit into ``max_length``.
    """
    return _all(tokenizer, encode_tasks(tokenizer, _rows(examples), max_length), max_length)


def collate_pairs(tokenizer: Any, pairs: Sequence[Pair], max_length: int | None = None) -> dict[str, Tensor]:
    """Make one batch ``[2P, T]`` of pairs (or rows in any format): all chosen rows first, then all rejected."""
    return _all(tokenizer, encode_pairs(tokenizer, _rows(pairs), max_length), max_length)


def _rows(examples: Sequence[Any]) -> list[Any]:
    return [x._asdict() if hasattr(x, "_asdict") else x for x in examples]


def _all(tokenizer: Any, encoded: Any, max_length: int | None) -> dict[str, Tensor]:
    if encoded.dropped:
        raise DataError(
            f"of {encoded.dropped} examples nothing of the answer is left after cutting at max_length={max_length}"
        )
    return Collator.of(tokenizer)(encoded.rows)
