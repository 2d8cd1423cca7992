"""Checks a batch and packs it: real tokens only, sequence after sequence.

The library computes on packed rows ``[rows, d]``; padding never reaches a kernel. A batch is a dict of

    input_ids       [B, T] int64
    attention_mask  [B, T], 1 for real tokens; may be absent if all are. Padding may be left or right.
    labels          [B, T] int64, unshifted: labels[b, t] is token t of sequence b or -100 (not scored)

and pairs are the same with ``B = 2P``: all chosen rows first, then all rejected, in the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sap_fast.errors import BatchError
from sap_fast.ops.take_rows import RowIndex

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
    """What of rows of static shapes is dead (``sap_fast/buckets.py``), on the device.

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
        """How many tokens are scored; of padded rows 0-dim, on the device."""
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
    """Check a batch and pack it.

    Args:
        vocab_size: of the output head, which bounds the labels.
        embeddings: rows of the embedding table, which bounds the token ids; ``vocab_size`` if None.
        name: what errors call the batch.
        may_lack_labels: whether nothing to score is let pass, as in a part of a batch.

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
    input_ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise BatchError(f"{name}['input_ids'] must be [B, T] and not empty, but has shape {tuple(input_ids.shape)}")
    for key, x in (("input_ids", input_ids), ("labels", labels), ("attention_mask", mask)):
        if x.shape != input_ids.shape:
            raise BatchError(
                f"{name}['{key}'] has shape {tuple(x.shape)}, but input_ids {tuple(input_ids.shape)}; they must agree"
            )
        if x.device != device:
            raise BatchError(f"{name}['{key}'] is on {x.device}, but the model on {device}; move the batch there")
        if x.is_floating_point() or x.is_complex():
            raise BatchError(f"{name}['{key}'] must hold integers, but is {x.dtype}")

    real = mask != 0
    # labels[:, t + 1] is predicted by row t; the first token of a sequence has no predecessor and is not scored.
    scored = (labels[:, 1:] != IGNORED) & real[:, :-1] & real[:, 1:]
    _check_values(name, input_ids, labels, real, scored, (embeddings or vocab_size, vocab_size), may_lack_labels)

    lengths = real.sum(1)
    row = real.flatten().cumsum(0).view_as(mask) - 1
    sequence, column = scored.nonzero(as_tuple=True)
    return Rows(
        input_ids=input_ids[real].long(),
        position_ids=torch.arange(mask.shape[1], device=device).expand_as(mask)[real],
        cu_seqlens=torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int(),
        max_seqlen=int(lengths.max()),
        labelled=RowIndex.of(row[sequence, column], int(lengths.sum())),
        labels=labels[sequence, column + 1].long(),
        label_sequence=sequence,
        sequences=mask.shape[0],
    )


def _check_values(
    name: str,
    input_ids: Tensor,
    labels: Tensor,
    real: Tensor,
    scored: Tensor,
    limits: tuple[int, int],
    may_lack_labels: bool,
) -> None:
    """Refuse bad values. All tests are made on the device and read in one copy."""
    embeddings, vocab_size = limits
    labelled = labels != IGNORED
    bad_ids = real & ((input_ids < 0) | (input_ids >= embeddings))
    bad_labels = labelled & ((labels < 0) | (labels >= vocab_size))
    # One run of real tokens a row: its length is the distance from the first to the last.
    t = torch.arange(real.shape[1], device=real.device)
    first = torch.where(real, t, real.shape[1]).amin(1)
    last = torch.where(real, t, -1).amax(1)
    holes = (last - first + 1).clamp_min(0) != real.sum(1)
    counts = torch.stack(
        [
            bad_ids.sum(),
            bad_labels.sum(),
            holes.sum(),
            (labelled & ~real).sum(),
            scored.sum(),
            (~real).all(1).sum(),
        ]
    )
    ids, bad, hollow, padded, kept, empty = counts.tolist()
    if ids:
        raise BatchError(
            f"{name} has {ids} token ids outside [0, {embeddings}), the model's vocabulary: was it made "
            "with this model's tokenizer?"
        )
    if bad:
        raise BatchError(f"{name} has {bad} labels outside [0, {vocab_size}) that are not {IGNORED} (not scored)")
    if empty:
        raise BatchError(f"{name} has {empty} rows without a real token (attention_mask all 0); drop them")
    if hollow:
        raise BatchError(
            f"{name} has {hollow} rows whose attention_mask is not one run of ones; pad on the left or the right only"
        )
    if padded:
        raise BatchError(f"{name} has {padded} labels where attention_mask is 0; set labels to {IGNORED} on padding")
    if not kept and not may_lack_labels:
        raise BatchError(
            f"{name} has no scored token: all labels are {IGNORED} (or on a sequence's first token). "
            "Was the answer truncated away, or the whole text masked as prompt?"
        )


def drawn(batch: Mapping[str, Tensor], sequences: list[int]) -> dict[str, Tensor]:
    """Some sequences of a batch, in the order given."""
    index = torch.tensor(sequences, device=batch["input_ids"].device)
    return {key: x.index_select(0, index) for key, x in batch.items()}


def pack_pairs(
    pairs: Mapping[str, Tensor], *, vocab_size: int, device: torch.device, embeddings: int | None = None
) -> Rows:
    """Check pairs and pack them; chosen sequences are the first half.

    Raises:
        BatchError: as :func:`pack`; an odd number of rows; a pair without scored tokens on a side; a pair
            whose chosen and rejected rows are equal, which has no direction.
    """
    rows = pack(pairs, vocab_size=vocab_size, device=device, embeddings=embeddings, name="pairs")
    if rows.sequences % 2:
        raise BatchError(f"pairs has {rows.sequences} rows; it must be even: all chosen rows first, then all rejected")
    half = rows.sequences // 2
    scored = torch.bincount(rows.label_sequence, minlength=rows.sequences)
    mask = pairs.get("attention_mask")
    visible = torch.ones_like(pairs["input_ids"], dtype=torch.bool) if mask is None else mask != 0
    ids = torch.where(visible, pairs["input_ids"], -1)
    equal = ((ids[:half] == ids[half:]) & (pairs["labels"][:half] == pairs["labels"][half:])).all(1)
    silent, same = (scored == 0).tolist(), equal.tolist()
    if any(silent):
        side, index = divmod(silent.index(True), half)
        sides = ("chosen", "rejected")
        raise BatchError(f"pair {index} has no scored token on its {sides[side]} side; was its answer truncated away?")
    if any(same):
        raise BatchError(f"pair {same.index(True)} has equal chosen and rejected rows, so it points nowhere; drop it")
    return rows
