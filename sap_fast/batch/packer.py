"""Packs what a step is given, for one model and one configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sap_fast.batch.prefixes import share_prefixes
from sap_fast.batch.rows import HostBatch, Rows, packed, read, read_pairs
from sap_fast.batch.transfer import fetched


@dataclass(frozen=True)
class Packer:
    """Checks and packs batches on the host; see ``sap_fast/batch/rows.py``.

    ``shares_tasks, shares_pairs``: whether sequences share the rows of what they begin with in common.
    """

    vocab_size: int
    embeddings: int
    device: torch.device
    shares_tasks: bool
    shares_pairs: bool

    def fetched(self, batches: Sequence[Any]) -> list[Any]:
        """Fetch batches to the host: all that lies on the device is waited for at once, not batch after batch."""
        return fetched(batches, self.device)

    def read(self, batch: Mapping[str, Tensor], name: str = "batch") -> HostBatch:
        """Check a task batch, on the host."""
        return read(batch, **self._limits, name=name)

    def read_pairs(self, pairs: Mapping[str, Tensor]) -> HostBatch:
        """Check pairs, on the host."""
        return read_pairs(pairs, **self._limits)

    def task(self, batch: HostBatch) -> Rows:
        """Pack a checked task batch as it is computed on, still on the host."""
        return share_prefixes(packed(batch)) if self.shares_tasks else packed(batch)

    def pairs(self, pairs: HostBatch) -> Rows:
        """Pack checked pairs as they are computed on, still on the host."""
        return share_prefixes(packed(pairs)) if self.shares_pairs else packed(pairs)

    @property
    def _limits(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "embeddings": self.embeddings, "device": self.device}
