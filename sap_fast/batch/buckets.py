"""Packed rows of static shapes: what every step differs in is rounded up to a size that many steps share.

A captured step (``sap_fast/graph.py``) is launched again and again on one set of buffers, so its shapes cannot follow
the batch. Rows, tokens, labels and sequences are rounded up, and the bound of the sequences' lengths, too:

    a dead row       belongs to no sequence, holds token 0, and nothing that counts reads it
    a dead token     the same, where sequences share rows and tokens are counted apart from them
    a dead label     belongs to sequence -1, takes some row, and its negative log-likelihood counts as 0
    a dead sequence  is empty: its offset repeats the last one. Pairs get none, since each of them counts

so that losses, gradients, margins and medians are those of the real ones.
"""

import numpy as np
import torch
from torch import Tensor

from sap_fast.batch.rows import Padding, PrefixSharing, Rows
from sap_fast.ops.take_rows import RowIndex

# Rows and tokens: whole tiles of 128 rows of a matrix product; from 1024 on in steps of an eighth to a quarter of the
# size. Finer ones would save rows and cost captures, each of which runs the step once more.
SIZES = (
    *range(128, 1024, 128),
    *range(1024, 2048, 256),
    *range(2048, 4096, 512),
    *range(4096, 8192, 1024),
    *range(8192, 16384, 2048),
    *range(16384, 32768, 4096),
    *range(32768, 65537, 8192),
)
# Labels, coarser: they cost a pass through the head alone.
LABELS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
# The longest sequence, coarser still: of attention it sizes the grid, and what lies beyond a sequence ends at once.
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
# Sequences: an empty one costs next to nothing.
_SEQUENCES = 8


def bucket(count: int, sizes: tuple[int, ...]) -> int:
    """Return the least of ``sizes`` that holds ``count``; beyond them, the least multiple of the last."""
    return next((size for size in sizes if size >= count), _multiple(count, sizes[-1]))


def padded(rows: Rows, *, pairs: bool = False) -> Rows:
    """Pad a packed batch to static shapes.

    Args:
        rows: packed, on the host, and not padded yet.
        pairs: whether every sequence counts, so that none is added.
    """
    count, labels = bucket(rows.rows, SIZES), bucket(len(rows.labels), LABELS)
    tokens = count if rows.shared is None else bucket(rows.tokens, SIZES)
    sequences = rows.sequences if pairs else _multiple(rows.sequences, _SEQUENCES)

    def dead(real: int, of: int) -> Tensor:
        return torch.from_numpy(np.arange(of) >= real)

    def ended(cu_seqlens: Tensor) -> Tensor:
        return _extended(cu_seqlens, sequences + 1, int(cu_seqlens[-1]))

    shared = rows.shared
    if shared is not None:
        spread, longest = _taking(shared.spread, tokens, count), bucket(shared.max_seqlen, LENGTHS)
        shared = PrefixSharing(spread, ended(shared.cu_seqlens), longest)
    return Rows(
        input_ids=_extended(rows.input_ids, count, 0),
        position_ids=_extended(rows.position_ids, count, 0),
        cu_seqlens=ended(rows.cu_seqlens),
        max_seqlen=bucket(rows.max_seqlen, LENGTHS),
        labelled=_taking(rows.labelled, labels, count),
        labels=_extended(rows.labels, labels, 0),
        label_sequence=_extended(rows.label_sequence, labels, -1),
        sequences=sequences,
        shared=shared,
        padding=Padding(
            dead(rows.tokens, tokens),
            dead(len(rows.labels), labels),
            torch.tensor(len(rows.labels), device="cpu"),
        ),
    )


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def _extended(x: Tensor, size: int, value: int) -> Tensor:
    extended = np.full(size, value, x.numpy().dtype)
    extended[: len(x)] = x.numpy()
    return torch.from_numpy(extended)


def _taking(index: RowIndex, taken: int, count: int) -> RowIndex:
    """An index of ``taken`` places into ``count`` rows. Dead places take the last rows in turn.

    In turn, because a row sums up what it gets back by one program, taker after taker.
    """
    dead = np.arange(taken - len(index.rows))
    return RowIndex.on_host(np.concatenate((index.rows.numpy(), count - 1 - dead % count)), count)
