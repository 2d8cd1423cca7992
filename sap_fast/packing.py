"""Packs what a step is given, for one model and one configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sap_fast.batch import Rows, packed, packed_pairs
from sap_fast.config import SAPConfig
from sap_fast.decoder import Decoder
from sap_fast.prefixes import share_prefixes
from sap_fast.transfer import fetched


@dataclass(frozen=True)
class Packer:
    """Checks and packs batches on the host; see :func:`sap_fast.batch.pack`.

    ``shares_tasks, shares_pairs``: whether sequences share the rows of what they begin with in common.
    """

    vocab_size: int
    embeddings: int
    device: torch.device
    shares_tasks: bool
    shares_pairs: bool

    @classmethod
    def of(cls, decoder: Decoder, config: SAPConfig) -> "Packer":
        shares, embeddings = config.share_prefixes, decoder.embedding.num_embeddings
        # Dropout gives each token of the task a mask of its own; the direction is computed without.
        return cls(decoder.vocab_size, embeddings, decoder.device, shares and not decoder.drops_out(), shares)

    def fetched(self, batches: Sequence[Any]) -> list[Any]:
        """Batches on the host: all that lies on the device is waited for at once, not batch after batch."""
        return fetched(batches, self.device)

    def task(self, batch: Mapping[str, Tensor], name: str = "batch", *, may_lack_labels: bool = False) -> Rows:
        """A task batch, packed on the host."""
        rows = packed(
            batch,
            vocab_size=self.vocab_size,
            embeddings=self.embeddings,
            device=self.device,
            name=name,
            may_lack_labels=may_lack_labels,
        )
        return share_prefixes(rows) if self.shares_tasks else rows

    def pairs(self, pairs: Mapping[str, Tensor]) -> Rows:
        """Pairs, checked and packed on the host, their rows not shared yet: some steps only check them."""
        return packed_pairs(pairs, vocab_size=self.vocab_size, embeddings=self.embeddings, device=self.device)

    def shared(self, pairs: Rows) -> Rows:
        """Packed pairs, as they are computed on."""
        return share_prefixes(pairs) if self.shares_pairs else pairs
