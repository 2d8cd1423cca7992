"""What a profile is given, checked before any work."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from sap_fast.batch.rows import Rows
from sap_fast.config import SAPConfig
from sap_fast.errors import BatchError
from sap_fast.model.decoder import Decoder
from sap_fast.profiling.files import why_taken
from sap_fast.profiling.steps import Batch


def check_settings(
    steps: int, warmup: int, peak_flops: float | None, bandwidth: float | None, folder: Path | None, overwrite: bool
) -> None:
    """Refuse settings that make no profile, before any work is done.

    Raises:
        ValueError: a number is out of range; the message names the setting.
        FileExistsError: the output folder is taken.
    """
    for name, number in (("steps", steps), ("warmup", warmup)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, but is {number!r}")
    for name, figure in (("peak_flops", peak_flops), ("bandwidth", bandwidth)):
        if figure is not None and not (math.isfinite(figure) and figure > 0):
            raise ValueError(f"{name} must be positive and finite (a second's), or None, but is {figure!r}")
    if folder is not None and (reason := why_taken(folder, overwrite=overwrite)):
        raise FileExistsError(reason)


@dataclass(frozen=True)
class Rounds:
    """Holds a batch and pairs for each round; every step of a round gets the same ones."""

    batches: list[Batch]
    pairs: list[Batch]
    rows: list[Rows]
    pair_rows: list[Rows]

    @classmethod
    def of(cls, decoder: Decoder, config: SAPConfig, batches: Any, pairs: Any, rounds: int) -> "Rounds":
        """Draw a batch and pairs for each round; where there are fewer, they are gone through again and again.

        Raises:
            BatchError: a batch is malformed, and the message has its number; or there is none at all.
        """
        packer = decoder.packer(share_prefixes=config.share_prefixes)
        drawn = [_drawn(given, name, rounds) for given, name in ((batches, "batches"), (pairs, "pairs"))]
        rows = []
        for i, batch in enumerate(drawn[0]):
            rows.append(packer.task(packer.read(_checked(batch, f"batches[{i}]"), f"batches[{i}]")))
        pair_rows = []
        for i, pair in enumerate(drawn[1]):
            try:
                pair_rows.append(packer.pairs(packer.read_pairs(_checked(pair, f"pairs[{i}]"))))
            except BatchError as error:
                error.add_note(f"This is of pairs[{i}].")
                raise
        return cls(drawn[0], drawn[1], rows, pair_rows)

    def __getitem__(self, i: int) -> tuple[Batch, Batch]:
        return self.batches[i % len(self.batches)], self.pairs[i % len(self.pairs)]

    def typical(self, rounds: Iterable[int]) -> int:
        """Find the round whose number of tokens is the median, and return its number."""
        lengths = {i: self._rows(i)[0].tokens + self._rows(i)[1].tokens for i in rounds}
        ranked = sorted(lengths, key=lambda i: (lengths[i], i))
        return ranked[(len(ranked) - 1) // 2]

    def sizes(self, i: int) -> tuple[int, int]:
        """Return how many sequences and how many pairs round ``i`` has."""
        rows, pairs = self._rows(i)
        return rows.sequences, pairs.sequences // 2

    def tokens(self) -> dict[str, float]:
        """Return the sizes of a round by name, each the median over all batches that were drawn.

        There are fewer rows than tokens where sequences share a prefix.
        """
        return {
            "sequences": median(r.sequences for r in self.rows),
            "tokens": median(r.tokens for r in self.rows),
            "rows": median(r.rows for r in self.rows),
            "tokens_padded": median(b["input_ids"].numel() for b in self.batches),
            "tokens_scored": median(len(r.labels) for r in self.rows),
            "pairs": median(r.sequences // 2 for r in self.pair_rows),
            "pair_tokens": median(r.tokens for r in self.pair_rows),
            "pair_rows": median(r.rows for r in self.pair_rows),
            "pair_tokens_padded": median(b["input_ids"].numel() for b in self.pairs),
            "pair_tokens_scored": median(len(r.labels) for r in self.pair_rows),
        }

    def _rows(self, i: int) -> tuple[Rows, Rows]:
        return self.rows[i % len(self.rows)], self.pair_rows[i % len(self.pair_rows)]


def _drawn(given: Any, name: str, rounds: int) -> list[Batch]:
    if isinstance(given, Mapping):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise BatchError(f"{name} must be a dict of tensors, or several of them, but is a {type(given).__name__}")
    drawn = list(islice(given, rounds))
    if not drawn:
        raise BatchError(f"{name} is empty; give at least one")
    return drawn


def _checked(batch: Any, name: str) -> Batch:
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"{name} must be a dict of tensors, but is a {type(batch).__name__}; a step is profiled with one "
            "batch, not with several micro-batches"
        )
    if other := [key for key, x in batch.items() if not isinstance(x, Tensor)]:
        raise BatchError(f"{name} holds {other}, which are no tensors")
    return batch
