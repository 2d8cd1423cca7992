"""Checks a batch and packs it: real tokens only, sequence after sequence.

The library computes on packed rows ``[rows, d]``; padding never reaches a kernel. A batch is a dict of

    input_ids       [B, T] int64
    attention_mask  [B, T], 1 for real tokens; may be absent if all are. Padding may be left or right.
    labels          [B, T] int64, unshifted: labels[b, t] is token t of sequence b or -100 (not scored)

and pairs are the same with ``B = 2P``: all chosen rows first, then all rejected, in the same order.

All of this is done on the host, in NumPy, where the device may be busy with the step before meanwhile;
``sap_fast/transfer.py`` brings the result to the device. A batch that lies there already has to be read first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sap_fast.errors import BatchError
from sap_fast.ops.take_rows import RowIndex
from sap_fast.transfer import fetched, sent

IGNORED = -100
_KEYS = {"input_ids", "attention_mask", "labels"}
Count = int | Tensor


@dataclass(frozen=True)
class Shared:
    """Where sequences share rows: ``spread`` takes the row of each token; ``cu_seqlens`` and ``max_seqlen`` of tokens.

    A sequence owns the rows that no sequence before it has. They are its last tokens, and stand together.
    """

    spread: RowIndex
    cu_seqlens: Tensor
    max_seqlen: int


@dataclass(frozen=True)
class Padding:
    """What of rows of static shapes is dead (``sap_fast/buckets.py``).

    ``tokens [tokens]`` and ``labels [M]`` bool: which of them; ``scored`` 0-dim: how many labels are not.
    """

    tokens: Tensor
    labels: Tensor
    scored: Tensor


@dataclass(frozen=True)
class Rows:
    """A packed batch: on the host as it is made, on the device once it is sent.

    ``input_ids, position_ids [rows]`` (a position is the token's column in the padded batch, as transformers
    counts); ``cu_seqlens [B + 1]`` int32 and ``max_seqlen``, both of rows; ``labelled``: takes the rows that predict
    a scored token, ``labels [M]``: those tokens, ``label_sequence [M]``: their sequences. A token has a row of its
    own, unless ``shared``: then rows are counted for the sequence that owns them (see ``sap_fast/prefixes.py``). All of
    it is real, unless ``padding`` says what is not.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labelled: RowIndex
    labels: Tensor
    label_sequence: Tensor
    sequences: int
    shared: Shared | None = None
    padding: Padding | None = None

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        return self.rows if self.shared is None else self.shared.spread.rows.shape[0]

    @property
    def label_rows(self) -> Tensor:
        return self.labelled.rows

    @property
    def scored(self) -> Count:
        """How many tokens are scored; of padded rows a 0-dim tensor."""
        return self.labels.shape[0] if self.padding is None else self.padding.scored


def pack(
    batch: Mapping[str, Tensor],
    *,
    vocab_size: int,
    device: torch.device,
    embeddings: int | None = None,
    name: str = "batch",
    may_lack_labels: bool = False,
) -> Rows:
    """Check a batch and pack it on the host, and send it to the model's device by one copy.

    Args:
        batch: on the host, or on the device, which is then waited for once.
        vocab_size: of the output head, which bounds the labels.
        device: of the model.
        embeddings: rows of the embedding table, which bounds the token ids; ``vocab_size`` if None.
        name: what errors call the batch.
        may_lack_labels: whether nothing to score is let pass, as in a part of a batch.

    Raises:
        BatchError: missing, unknown or misshapen entries; another device; token ids or labels out of range;
            a mask with holes; labels on padding; nothing to score.
    """
    rows = packed(
        batch, vocab_size=vocab_size, device=device, embeddings=embeddings, name=name, may_lack_labels=may_lack_labels
    )
    return sent(rows, device)


def pack_pairs(
    pairs: Mapping[str, Tensor], *, vocab_size: int, device: torch.device, embeddings: int | None = None
) -> Rows:
    """Check pairs and pack them, as :func:`pack`; chosen sequences are the first half.

    Raises:
        BatchError: as :func:`pack`; an odd number of rows; a pair without scored tokens on a side; a pair
            whose chosen and rejected rows are equal, which has no direction.
    """
    return sent(packed_pairs(pairs, vocab_size=vocab_size, device=device, embeddings=embeddings), device)


def packed(
    batch: Mapping[str, Tensor],
    *,
    vocab_size: int,
    device: torch.device,
    embeddings: int | None = None,
    name: str = "batch",
    may_lack_labels: bool = False,
) -> Rows:
    """:func:`pack`, whose rows stay on the host."""
    (batch,) = fetched([batch], device)
    if not isinstance(batch, Mapping):
        raise BatchError(f"{name} must be a dict of tensors, but is a {type(batch).__name__}")
    if missing := {"input_ids", "labels"} - batch.keys():
        raise BatchError(f"{name} lacks {sorted(missing)}; it holds {sorted(batch)}")
    if unknown := batch.keys() - _KEYS:
        raise BatchError(
            f"{name} holds {sorted(unknown)}, which the pair forward does not read; pass only {sorted(_KEYS)}"
        )
    mask = batch.get("attention_mask")
    entries = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    entries |= {} if mask is None else {"attention_mask": mask}
    if other := [key for key, x in entries.items() if not isinstance(x, Tensor)]:
        raise BatchError(f"{name} holds {other}, which are no tensors")
    shape = batch["input_ids"].shape
    if len(shape) != 2 or shape.numel() == 0:
        raise BatchError(f"{name}['input_ids'] must be [B, T] and not empty, but has shape {tuple(shape)}")
    for key, x in entries.items():
        if x.shape != shape:
            raise BatchError(
                f"{name}['{key}'] has shape {tuple(x.shape)}, but input_ids {tuple(shape)}; they must agree"
            )
        if x.device.type != "cpu" and x.device != device:
            raise BatchError(
                f"{name}['{key}'] is on {x.device}, but the model on {device}; leave the batch on the host (the CPU), "
                "or move it there"
            )
        if x.is_floating_point() or x.is_complex():
            raise BatchError(f"{name}['{key}'] must hold integers, but is {x.dtype}")

    input_ids, labels, real = _arrays(batch)
    # labels[:, t + 1] is predicted by row t; the first token of a sequence has no predecessor and is not scored.
    scored = (labels[:, 1:] != IGNORED) & real[:, :-1] & real[:, 1:]
    _check_values(name, input_ids, labels, real, scored, (embeddings or vocab_size, vocab_size), may_lack_labels)

    lengths = real.sum(1)
    row = real.cumsum().reshape(real.shape) - 1
    sequence, column = scored.nonzero()
    return Rows(
        input_ids=torch.from_numpy(input_ids[real]),
        position_ids=torch.from_numpy(real.nonzero()[1]),
        cu_seqlens=torch.from_numpy(np.concatenate(([0], lengths.cumsum())).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        labelled=row_index(row[sequence, column], int(lengths.sum())),
        labels=torch.from_numpy(labels[sequence, column + 1]),
        label_sequence=torch.from_numpy(sequence),
        sequences=len(real),
    )


def packed_pairs(
    pairs: Mapping[str, Tensor], *, vocab_size: int, device: torch.device, embeddings: int | None = None
) -> Rows:
    """:func:`pack_pairs`, whose rows stay on the host."""
    (pairs,) = fetched([pairs], device)
    rows = packed(pairs, vocab_size=vocab_size, device=device, embeddings=embeddings, name="pairs")
    if rows.sequences % 2:
        raise BatchError(f"pairs has {rows.sequences} rows; it must be even: all chosen rows first, then all rejected")
    half = rows.sequences // 2
    input_ids, labels, real = _arrays(pairs)
    silent = np.bincount(rows.label_sequence.numpy(), minlength=rows.sequences) == 0
    ids = np.where(real, input_ids, -1)
    same = ((ids[:half] == ids[half:]) & (labels[:half] == labels[half:])).all(1)
    if silent.any():
        side, index = divmod(int(silent.argmax()), half)
        sides = ("chosen", "rejected")
        raise BatchError(f"pair {index} has no scored token on its {sides[side]} side; was its answer truncated away?")
    if same.any():
        raise BatchError(f"pair {same.argmax()} has equal chosen and rejected rows, so it points nowhere; drop it")
    return rows


def row_index(rows: np.ndarray, count: int) -> RowIndex:
    """:meth:`RowIndex.of` on the host: the index that takes ``rows [taken]`` int64 of ``count`` ones."""
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=count), out=offsets[1:])
    return RowIndex(*map(torch.from_numpy, (rows, offsets, rows.argsort(kind="stable"))))


def drawn(batch: Mapping[str, Tensor], sequences: list[int]) -> dict[str, Tensor]:
    """Some sequences of a batch, in the order given."""
    index = torch.tensor(sequences, device=batch["input_ids"].device)
    return {key: x.index_select(0, index) for key, x in batch.items()}


def _arrays(batch: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(input_ids, labels, whether a token is real)``, each ``[B, T]``, the numbers int64."""
    input_ids, labels = (batch[key].numpy().astype(np.int64, copy=False) for key in ("input_ids", "labels"))
    mask = batch.get("attention_mask")
    return input_ids, labels, np.ones(input_ids.shape, bool) if mask is None else mask.numpy() != 0


def _check_values(
    name: str,
    input_ids: np.ndarray,
    labels: np.ndarray,
    real: np.ndarray,
    scored: np.ndarray,
    limits: tuple[int, int],
    may_lack_labels: bool,
) -> None:
    """Refuse bad values."""
    embeddings, vocab_size = limits
    labelled = labels != IGNORED
    # One run of real tokens a row begins once.
    begins = real.copy()
    begins[:, 1:] &= ~real[:, :-1]
    if ids := (real & ((input_ids < 0) | (input_ids >= embeddings))).sum():
        raise BatchError(
            f"{name} has {ids} token ids outside [0, {embeddings}), the model's vocabulary: was it made "
            "with this model's tokenizer?"
        )
    if bad := (labelled & ((labels < 0) | (labels >= vocab_size))).sum():
        raise BatchError(f"{name} has {bad} labels outside [0, {vocab_size}) that are not {IGNORED} (not scored)")
    if empty := (~real.any(1)).sum():
        raise BatchError(f"{name} has {empty} rows without a real token (attention_mask all 0); drop them")
    if hollow := (begins.sum(1) > 1).sum():
        raise BatchError(
            f"{name} has {hollow} rows whose attention_mask is not one run of ones; pad on the left or the right only"
        )
    if padded := (labelled & ~real).sum():
        raise BatchError(f"{name} has {padded} labels where attention_mask is 0; set labels to {IGNORED} on padding")
    if not may_lack_labels and not scored.any():
        raise BatchError(
            f"{name} has no scored token: all labels are {IGNORED} (or on a sequence's first token). "
            "Was the answer truncated away, or the whole text masked as prompt?"
        )
