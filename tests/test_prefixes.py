"""Rows that sequences share: the tree, and that nothing but the work changes."""

import copy
from itertools import pairwise

import pytest
import torch
from oracle import (
    ALL_LINEAR,
    FAMILIES,
    VOCAB,
    everything_in_float64,
    exact,
    random_batch,
    random_pairs,
    tiny_model,
    unit_direction,
)
from steps import CONFIGS, gap, two_steps
from torch import Tensor

from benchmarks.common import solved
from sap_fast import SAPConfig
from sap_fast.batch.prefixes import share_prefixes
from sap_fast.batch.rows import Rows, pack, pack_pairs
from sap_fast.method.flat import Flat
from sap_fast.method.passes import Micro
from sap_fast.method.probe import Probe
from sap_fast.model.read import read_decoder

CPU = torch.device("cpu")


def alike(sequences: int = 4, length: int = 9, prefix: int = 5) -> dict[str, Tensor]:
    """Make a ragged batch whose sequences begin alike; its second half goes on alike for one token more.

    Every token is scored, those of the prefix too: their rows predict tokens of several sequences.
    """
    batch = random_batch(sequences, length)
    ids = batch["input_ids"]
    ids[:, :prefix] = ids[0, :prefix]
    ids[sequences // 2 :, prefix] = ids[-1, prefix]
    batch["input_ids"] = torch.where(batch["attention_mask"] == 1, ids, 0)
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    return batch


def packed(batch: dict[str, Tensor]) -> Rows:
    return pack(batch, vocab_size=VOCAB, device=CPU)


def sequences_of(rows: Rows) -> list[list[tuple[int, int]]]:
    """Return the ``(token, position)`` of every sequence, by way of the rows it has."""
    index = torch.arange(rows.tokens) if rows.shared is None else rows.shared.spread.rows
    pairs = list(zip(rows.input_ids[index].tolist(), rows.position_ids[index].tolist(), strict=True))
    ends = (rows if rows.shared is None else rows.shared).cu_seqlens.tolist()
    return [pairs[a:b] for a, b in pairwise(ends)]


def test_one_row_for_each_distinct_prefix() -> None:
    batch = alike()
    plain = packed(batch)
    rows = share_prefixes(plain)
    whole = sequences_of(plain)
    assert sequences_of(rows) == whole
    assert rows.tokens == plain.tokens and rows.scored == plain.scored
    prefixes = {tuple(sequence[: t + 1]) for sequence in whole for t in range(len(sequence))}
    assert rows.rows == len(prefixes) < plain.rows


def test_a_sequence_within_another_and_equal_ones_add_no_rows() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 0, 0], [9, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    rows = share_prefixes(
        packed({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    )
    assert rows.input_ids.tolist() == [5, 6, 7, 8, 9, 6, 7, 8]
    assert rows.shared is not None
    assert rows.shared.spread.rows.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert rows.shared.cu_seqlens.tolist() == [0, 4, 8, 10, 14] and rows.shared.max_seqlen == 4
    # Each row is owned by the first sequence that has it: four by the first, four by the last.
    assert rows.cu_seqlens.tolist() == [0, 4, 4, 4, 8] and rows.max_seqlen == 4
    assert rows.label_rows.tolist() == [0, 1, 2, 0, 1, 2, 0, 4, 5, 6]
    # Row 0 predicts the second token of three sequences.
    begin, end = rows.labelled.offsets[:2].tolist()
    assert rows.labelled.takers[begin:end].tolist() == [0, 3, 6]


def test_a_sequence_owns_its_last_tokens() -> None:
    """The rows that stand for a sequence are, in order, those of its last tokens."""
    rows = share_prefixes(packed(alike()))
    assert rows.shared is not None
    owned, tokens = rows.cu_seqlens.tolist(), rows.shared.cu_seqlens.tolist()
    assert owned[-1] == rows.rows and tokens[-1] == rows.tokens
    for (a, b), (_, end) in zip(pairwise(owned), pairwise(tokens), strict=True):
        assert rows.shared.spread.rows[end - (b - a) : end].tolist() == list(range(a, b))
    assert rows.max_seqlen == max(b - a for a, b in pairwise(owned)) < rows.shared.max_seqlen + 1


def test_sequences_that_begin_in_other_columns_share_nothing() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [0, 5, 6, 7]])
    mask = (ids != 0).long()
    rows = packed({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    assert share_prefixes(rows) is rows


def test_little_in_common_is_not_worth_it() -> None:
    ids = torch.arange(3, 3 + 40).view(2, 20) % VOCAB
    ids[1, 0] = ids[0, 0]
    rows = packed({"input_ids": ids, "labels": ids})
    assert share_prefixes(rows) is rows  # 1 row of 40


@pytest.mark.parametrize("family", FAMILIES)
def test_dual_pass_on_shared_rows_equals_double_backward(family: str) -> None:
    model, batch, pairs = tiny_model(family, ALL_LINEAR), alike(), random_pairs()
    vectors = {j: 0.3 * torch.randn(32, dtype=torch.float64) for j in (1, 3)}
    with everything_in_float64(model):
        u = unit_direction(model, pairs)
        truth = exact(model, batch, u, vectors)
    decoder, probe, direction = read_decoder(model), Probe.of(vectors), Flat.of(u)
    rows = share_prefixes(packed(batch))
    assert rows.shared is not None
    with decoder.installed():
        found = solved.dual(decoder, [Micro(rows, None)], probe, direction)
        ordinary = solved.ordinary(decoder, [Micro(rows, None)], probe)
        apart = solved.dual(decoder, [Micro(packed(batch), None)], probe, direction)
    loss, slope, theta, at_probe, at_probe_dot = truth
    assert abs(found.loss - loss) < 1e-8 * abs(loss)
    assert abs(found.loss_dot - slope) < 1e-8 * abs(slope)
    assert gap(dict(found.theta.items()), theta) < 1e-8
    assert gap(dict(ordinary.theta.items()), theta) < 1e-8
    assert gap(probe.by_layer(found.probe), at_probe) < 1e-8
    assert gap(probe.by_layer(found.probe_dot), at_probe_dot) < 1e-8
    # Of every token, not of every row: the median over them must stay what it is. To float64's rounding, since products
    # of fewer rows may add up in another order.
    torch.testing.assert_close(found.rms, apart.rms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_direction_from_pairs_that_share_their_prompts_is_the_same(family: str) -> None:
    model, pairs = tiny_model(family, ALL_LINEAR), random_pairs(3)
    with everything_in_float64(model):
        truth = unit_direction(model, pairs)
    decoder, rows = read_decoder(model), pack_pairs(pairs, vocab_size=VOCAB, device=CPU)
    shared = share_prefixes(rows)
    assert shared.rows < rows.rows
    with decoder.installed():
        direction = solved.direction(decoder, shared, {}, SAPConfig())
    assert gap(dict(direction.u.items()), truth) < 1e-8
    assert direction.tokens == rows.rows


@pytest.mark.parametrize("name", [*CONFIGS, "tangents", "half-the-pairs"])
def test_every_configuration_takes_the_same_step(name: str) -> None:
    options = {"tangents": {"tangent_fraction": 0.5}, "half-the-pairs": {"pairs_per_step": 1}}
    config = CONFIGS["lagged"].replace(**options[name]) if name in options else CONFIGS[name]
    model, batches, pairs = tiny_model(targets=ALL_LINEAR), [alike(), alike()], [random_pairs(), random_pairs()]
    results = []
    for shares in (True, False):
        torch.manual_seed(1)
        results.append(two_steps(copy.deepcopy(model), config.replace(share_prefixes=shares), batches, pairs))
    (gradients, probe, report), (expected, expected_probe, expected_report) = results
    # A finite difference divides float64's rounding by its radius (1e-3 of |theta|, or 2e-5 as released).
    bound = 1e-6 if config.gradient == "finite_difference" else 1e-10
    assert gap(gradients, expected) < bound
    assert gap(dict(probe), dict(expected_probe)) < bound if probe else not expected_probe
    assert report.tokens == expected_report.tokens and report.safety_tokens == expected_report.safety_tokens


def test_a_task_batch_under_dropout_shares_nothing() -> None:
    model = tiny_model(targets=ALL_LINEAR, lora_dropout=0.1).train()
    packer = read_decoder(model).packer(share_prefixes=True)
    batch, pairs = packer.read(alike()), packer.read_pairs(random_pairs())
    assert packer.task(batch).shared is None
    assert packer.pairs(pairs).shared is not None
    off = read_decoder(model.eval()).packer(share_prefixes=False)
    assert off.task(batch).shared is None and off.pairs(pairs).shared is None
    assert read_decoder(model).packer(share_prefixes=True).task(batch).shared is not None
