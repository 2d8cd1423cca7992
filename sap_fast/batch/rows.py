"""Checks a batch and packs it: real tokens only, sequence after sequence.

The library computes on packed rows ``[rows, d]``; padding never reaches a kernel. Batches are checked and packed on the
host, in NumPy, and what comes of it is sent to the device in one piece (``transfer.py``): there, some hundred small
operations, and waits for what they find, would keep it idle before every step. A batch is a dict of

    input_ids       [B, T] int64
    attention_mask  [B, T], 1 for real tokens; may be absent if all are. Padding may be left or right.
    labels          [B, T] int64, unshifted: labels[b, t] is token t of sequence b or -100 (not scored)

and pairs are the same with ``B = 2P``: all chosen rows first, then all rejected, in the same order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sap_fast.batch.transfer import fetched, sent
from sap_fast.errors import BatchError
from sap_fast.ops.take_rows import RowIndex

IGNORED = -100
_KEYS = {"input_ids", "attention_mask", "labels"}
Count = int | Tensor


@dataclass(frozen=True)
class PrefixSharing:
    """Says where sequences share rows.

    ``spread`` takes the row of each token; ``cu_seqlens`` and ``max_seqlen`` count tokens.

    A sequence owns the rows that no sequence before it has. They are its last tokens, and stand together.
    """

    spread: RowIndex
    cu_seqlens: Tensor
    max_seqlen: int


@dataclass(frozen=True)
class Padding:
    """Holds what is dead in rows of static shapes (``sap_fast/batch/buckets.py``), on the device.

    ``tokens [tokens]`` and ``labels [M]`` bool: which of them; ``scored`` 0-dim: how many labels are not.
    """

    tokens: Tensor
    labels: Tensor
    scored: Tensor


@dataclass(frozen=True)
class Rows:
    """A packed batch.

    ``input_ids, position_ids [rows]`` (a position is the token's column in the padded batch, as transformers
    counts); ``cu_seqlens [B + 1]`` int32 and ``max_seqlen``, both of rows; ``labelled``: takes the rows that predict
    a scored token, ``labels [M]``: those tokens, ``label_sequence [M]``: their sequences. A token has a row of its
    own, unless ``shared``: then rows are counted for the sequence that owns them (``sap_fast/batch/prefixes.py``). All
    of it is real, unless ``padding`` says what is not.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labelled: RowIndex
    labels: Tensor
    label_sequence: Tensor
    sequences: int
    shared: PrefixSharing | None = None
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
        """The number of scored tokens; of padded rows 0-dim, on the device."""
        return self.labels.shape[0] if self.padding is None else self.padding.scored


@dataclass(frozen=True)
class HostBatch:
    """A batch that was checked, on the host: ``input_ids, labels [B, T]`` int64, ``real [B, T]`` bool, not padding."""

    input_ids: np.ndarray
    labels: np.ndarray
    real: np.ndarray

    @property
    def sequences(self) -> int:
        return len(self.real)

    @property
    def scored(self) -> np.ndarray:
        """Marks ``[B, T - 1]`` where row t predicts a token that the loss is over; a first token has no predecessor."""
        return (self.labels[:, 1:] != IGNORED) & self.real[:, :-1] & self.real[:, 1:]

    def select_sequences(self, sequences: Sequence[int]) -> "HostBatch":
        """Take some of the batch's sequences, in the order given."""
        return HostBatch(*(x[list(sequences)] for x in (self.input_ids, self.labels, self.real)))


def read(
    batch: Mapping[str, Tensor],
    *,
    vocab_size: int,
    device: torch.device,
    embeddings: int | None = None,
    name: str = "batch",
) -> HostBatch:
    """Check a batch, on the host. One that lies on a device is waited for, and copied, once.

    Args:
        batch: on the CPU, or on ``device``.
        vocab_size: of the output head, which bounds the labels.
        device: the model's.
        embeddings: rows of the embedding table, which bounds the token ids; ``vocab_size`` if None.
        name: what errors call the batch.

    Raises:
        BatchError: missing, unknown or misshapen entries; another device; token ids or labels out of range;
            a mask with holes; labels on padding; nothing to score.
    """
    if not isinstance(batch, Mapping):
        raise BatchError(f"{name} must be a dict of tensors, but is a {type(batch).__name__}")
    if missing := {"input_ids", "labels"} - batch.keys():
        raise BatchError(f"{name} lacks {sorted(missing)}; it holds {sorted(batch)}")
    if unknown := batch.keys() - _KEYS:
        raise BatchError(
            f"{name} holds {sorted(unknown)}, which the pair forward does not read; pass only {sorted(_KEYS)}"
        )
    mask = batch.get("attention_mask")
    given = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    given |= {} if mask is None else {"attention_mask": mask}
    if other := [key for key, x in given.items() if not isinstance(x, Tensor)]:
        raise BatchError(f"{name} holds {other}, which are no tensors")
    shape = given["input_ids"].shape
    if len(shape) != 2 or shape.numel() == 0:
        raise BatchError(f"{name}['input_ids'] must be [B, T] and not empty, but has shape {tuple(shape)}")
    for key, x in given.items():
        if x.shape != shape:
            raise BatchError(
                f"{name}['{key}'] has shape {tuple(x.shape)}, but input_ids {tuple(shape)}; they must agree"
            )
        if x.device.type != "cpu" and x.device != device:
            raise BatchError(
                f"{name}['{key}'] is on {x.device}, but the model on {device}; leave the batch on the CPU, or move it "
                "there"
            )
        if x.is_floating_point() or x.is_complex():
            raise BatchError(f"{name}['{key}'] must hold integers, but is {x.dtype}")

    (here,) = fetched([given], device)
    arrays = {key: x.detach().numpy() for key, x in here.items()}
    input_ids, labels = (arrays[key].astype(np.int64, copy=False) for key in ("input_ids", "labels"))
    real = arrays["attention_mask"] != 0 if "attention_mask" in arrays else np.ones(input_ids.shape, bool)
    checked = HostBatch(input_ids, labels, real)
    _check_values(name, checked, embeddings or vocab_size, vocab_size)
    return checked


def _check_values(name: str, batch: HostBatch, embeddings: int, vocab_size: int) -> None:
    """Refuse bad values."""
    ids, labels, real = batch.input_ids, batch.labels, batch.real
    labelled = labels != IGNORED
    count = np.count_nonzero
    if outside := count(real & ((ids < 0) | (ids >= embeddings))):
        raise BatchError(
            f"{name} has {outside} token ids outside [0, {embeddings}), the model's vocabulary: was it made "
            "with this model's tokenizer?"
        )
    if outside := count(labelled & ((labels < 0) | (labels >= vocab_size))):
        raise BatchError(f"{name} has {outside} labels outside [0, {vocab_size}) that are not {IGNORED} (not scored)")
    if empty := count(~real.any(1)):
        raise BatchError(f"{name} has {empty} rows without a real token (attention_mask all 0); drop them")
    # One run of real tokens a row: its length is the distance from the first to the last.
    spans = real.shape[1] - real[:, ::-1].argmax(1) - real.argmax(1)
    if hollow := count(spans != real.sum(1)):
        raise BatchError(
            f"{name} has {hollow} rows whose attention_mask is not one run of ones; pad on the left or the right only"
        )
    if padded := count(labelled & ~real):
        raise BatchError(f"{name} has {padded} labels where attention_mask is 0; set labels to {IGNORED} on padding")
    if not batch.scored.any():
        raise BatchError(
            f"{name} has no scored token: all labels are {IGNORED} (or on a sequence's first token). "
            "Was the answer truncated away, or the whole text masked as prompt?"
        )


def read_pairs(
    pairs: Mapping[str, Tensor], *, vocab_size: int, device: torch.device, embeddings: int | None = None
) -> HostBatch:
    """Check pairs, on the host; chosen sequences are the first half.

    Raises:
        BatchError: as :func:`read`; an odd number of rows; a pair without scored tokens on a side; a pair
            whose chosen and rejected rows are equal, which has no direction.
    """
    batch = read(pairs, vocab_size=vocab_size, device=device, embeddings=embeddings, name="pairs")
    if batch.sequences % 2:
        raise BatchError(f"pairs has {batch.sequences} rows; it must be even: all chosen rows first, then all rejected")
    half = batch.sequences // 2
    silent = ~batch.scored.any(1)
    if silent.any():
        side, index = divmod(int(silent.argmax()), half)
        sides = ("chosen", "rejected")
        raise BatchError(f"pair {index} has no scored token on its {sides[side]} side; was its answer truncated away?")
    ids = np.where(batch.real, batch.input_ids, -1)
    same = ((ids[:half] == ids[half:]) & (batch.labels[:half] == batch.labels[half:])).all(1)
    if same.any():
        raise BatchError(f"pair {same.argmax()} has equal chosen and rejected rows, so it points nowhere; drop it")
    return batch


def packed(batch: HostBatch) -> Rows:
    """Pack a checked batch, still on the host; a subset that was drawn may have no scored token."""
    real, lengths = batch.real, batch.real.sum(1)
    row = real.ravel().cumsum().reshape(real.shape) - 1
    # labels[:, t + 1] is predicted by row t.
    sequence, column = map(np.ascontiguousarray, batch.scored.nonzero())
    return Rows(
        input_ids=torch.from_numpy(batch.input_ids[real]),
        position_ids=torch.from_numpy(np.broadcast_to(np.arange(real.shape[1]), real.shape)[real]),
        cu_seqlens=torch.from_numpy(np.concatenate(([0], lengths.cumsum())).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        labelled=RowIndex.on_host(row[sequence, column], int(lengths.sum())),
        labels=torch.from_numpy(batch.labels[sequence, column + 1]),
        label_sequence=torch.from_numpy(sequence),
        sequences=batch.sequences,
    )


def pack(
    batch: Mapping[str, Tensor],
    *,
    vocab_size: int,
    device: torch.device,
    embeddings: int | None = None,
    name: str = "batch",
) -> Rows:
    """Check a batch, as :func:`read` does, and pack it, on the device."""
    return sent(packed(read(batch, vocab_size=vocab_size, device=device, embeddings=embeddings, name=name)), device)


def pack_pairs(
    pairs: Mapping[str, Tensor], *, vocab_size: int, device: torch.device, embeddings: int | None = None
) -> Rows:
    """Check pairs, as :func:`read_pairs` does, and pack them, on the device."""
    return sent(packed(read_pairs(pairs, vocab_size=vocab_size, device=device, embeddings=embeddings)), device)
