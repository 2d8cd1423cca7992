"""Bad batches: each is refused with what was expected, what came and what to do, before any work is done."""

from collections.abc import Callable

import pytest
import torch
from oracle import VOCAB, lora, random_batch, random_pairs, tiny_model
from torch import Tensor

import sap_fast
from sap_fast import BatchError, SAPConfig
from sap_fast.batch.rows import pack, pack_pairs
from sap_fast.ops import RowIndex
from sap_fast.tensors import tensors_of

CPU = torch.device("cpu")


def changed(batch: dict[str, Tensor], change: Callable[[dict], None]) -> dict[str, Tensor]:
    batch = {key: value.clone() for key, value in batch.items()}
    change(batch)
    return batch


def put(key: str, place: tuple, value: int) -> Callable[[dict], None]:
    def change(batch: dict) -> None:
        batch[key][place] = value

    return change


BAD_BATCH = {
    "labels all masked": (
        lambda b: b["labels"].fill_(-100),
        "no scored token: all labels are -100",
    ),
    "only the first token labelled": (lambda b: b["labels"][:, 1:].fill_(-100), "no scored token"),
    "token id too large": (put("input_ids", (0, 1), VOCAB), rf"1 token ids outside \[0, {VOCAB}\)"),
    "token id negative": (put("input_ids", (0, 1), -1), r"1 token ids outside"),
    "label too large": (put("labels", (0, 4), VOCAB), r"1 labels outside"),
    "label negative": (put("labels", (0, 4), -1), r"1 labels outside.*-100"),
    "labels on padding": (put("labels", (2, 8), 5), r"1 labels where attention_mask is 0"),
    "mask with a hole": (put("attention_mask", (0, 4), 0), r"not one run of ones"),
    "row of padding": (lambda b: b["attention_mask"][1].fill_(0), "1 rows without a real token"),
    "labels missing": (lambda b: b.pop("labels"), r"lacks \['labels'\]"),
    "unknown key": (lambda b: b.update(position_ids=b["input_ids"]), r"holds \['position_ids'\]"),
    "other shape": (
        lambda b: b.update(labels=b["labels"][:, :-1]),
        r"\(3, 8\), but input_ids \(3, 9\)",
    ),
    "one dimension": (lambda b: b.update(input_ids=b["input_ids"][0]), r"must be \[B, T\]"),
    "empty": (lambda b: b.update(input_ids=b["input_ids"][:0]), "not empty"),
    "floats": (lambda b: b.update(labels=b["labels"].float()), "must hold integers"),
    "no tensors": (lambda b: b.update(labels=b["labels"].tolist()), r"holds \['labels'\], which are no tensors"),
    "another device": (
        lambda b: b.update(labels=b["labels"].to("meta")),
        "on meta, but the model on cpu; leave the batch on the CPU",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_BATCH.values(), ids=BAD_BATCH.keys())
def test_bad_batch_is_refused_before_work(change: Callable, message: str) -> None:
    batch = changed(random_batch(), change)
    with pytest.raises(BatchError, match=message):
        pack(batch, vocab_size=VOCAB, device=CPU)
    model = tiny_model()
    with sap_fast.attach(model, SAPConfig(probe_layers=(1,))) as sap:
        with pytest.raises(BatchError, match=message):
            sap.step([random_batch(), batch], random_pairs())
        assert all(p.grad is None for p in lora(model).values())


def same_sides(batch: dict) -> None:
    for value in batch.values():
        value[2 + 1] = value[1]


BAD_PAIRS = {
    "odd count": (lambda b: b.update({k: v[:3] for k, v in b.items()}), "3 rows; it must be even"),
    "chosen equal to rejected": (same_sides, "pair 1 has equal chosen and rejected"),
    "silent chosen": (
        lambda b: b["labels"][1].fill_(-100),
        "pair 1 has no scored token on its chosen side",
    ),
    "silent rejected": (
        lambda b: b["labels"][2].fill_(-100),
        "pair 0 has no scored token on its rejected side",
    ),
    "token id too large": (put("input_ids", (0, 1), VOCAB), "pairs has 1 token ids outside"),
}


@pytest.mark.parametrize(("change", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_bad_pairs_are_refused(change: Callable, message: str) -> None:
    pairs = changed(random_pairs(), change)
    with pytest.raises(BatchError, match=message):
        pack_pairs(pairs, vocab_size=VOCAB, device=CPU)


def test_something_else_than_a_batch_is_refused() -> None:
    with sap_fast.attach(tiny_model(), SAPConfig(probe_layers=(1,))) as sap:
        with pytest.raises(ValueError, match="empty sequence"):
            sap.step([])
        with pytest.raises(BatchError, match="must be a dict of tensors, but is a Tensor"):
            sap.step([torch.zeros(2, 3)])


def test_packing_drops_padding_and_shifts_labels() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [0, 8, 9, 10]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
        "labels": torch.tensor([[-100, 6, 7, -100], [-100, 8, -100, 10]]),
    }
    rows = pack(batch, vocab_size=VOCAB, device=CPU)
    assert rows.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert rows.position_ids.tolist() == [0, 1, 2, 1, 2, 3]
    assert rows.cu_seqlens.tolist() == [0, 3, 6]
    assert rows.max_seqlen == 3
    # Row 0 predicts 6, row 1 predicts 7, row 4 predicts 10; 8 begins its sequence and has no predecessor.
    assert rows.label_rows.tolist() == [0, 1, 4]
    assert rows.labels.tolist() == [6, 7, 10]
    assert rows.label_sequence.tolist() == [0, 0, 1]


def test_without_a_mask_all_tokens_are_real() -> None:
    ids = torch.randint(0, VOCAB, (2, 5), dtype=torch.int32)
    rows = pack({"input_ids": ids, "labels": ids}, vocab_size=VOCAB, device=CPU)
    assert rows.tokens == 10
    assert rows.scored == 8


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_masks_and_ids_of_any_integers_are_the_same_batch(dtype: torch.dtype) -> None:
    batch = random_batch()
    other = {**batch, "attention_mask": batch["attention_mask"].to(dtype), "labels": batch["labels"].short()}
    other["input_ids"] = batch["input_ids"].int().t().contiguous().t()  # not in the order of its memory
    found, expected = (tensors_of(pack(b, vocab_size=VOCAB, device=CPU))[0] for b in (other, batch))
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(found, expected, strict=True))


def test_packing_leaves_the_batch_alone() -> None:
    batch = random_batch()
    before = {key: x.clone() for key, x in batch.items()}
    for x in tensors_of(pack(batch, vocab_size=VOCAB, device=CPU))[0]:
        x.zero_()  # rows are memory of their own
    assert all(torch.equal(x, before[key]) for key, x in batch.items())


def test_an_index_made_on_the_host_is_the_same() -> None:
    for rows, count in ([3, 1, 3, 0, 3], 5), ([], 3), ([0, 1, 2], 3):
        taken = torch.tensor(rows, dtype=torch.int64)
        for x, y in zip(RowIndex.on_host(taken.numpy(), count), RowIndex.of(taken, count), strict=True):
            assert torch.equal(x, y) and x.dtype == y.dtype
