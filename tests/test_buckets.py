"""Rows of static shapes: what is added is dead, and a step on them is the same step."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import ALL_LINEAR, FAMILIES, VOCAB, random_batch, random_pairs, tiny_model
from recorders import Eager, attached
from steps import CONFIG, CONFIGS, gap, grads
from test_prefixes import alike, sequences_of
from torch import Tensor, nn

import sap_fast
from sap_fast import SAPConfig
from sap_fast.batch.buckets import LABELS, LENGTHS, SIZES, bucket, padded
from sap_fast.batch.prefixes import share_prefixes
from sap_fast.batch.rows import Rows, pack, pack_pairs
from sap_fast.tensors import tensors_of

CPU = torch.device("cpu")


def packed(batch: dict[str, Tensor]) -> Rows:
    return pack(batch, vocab_size=VOCAB, device=CPU)


def test_sizes() -> None:
    for sizes in (SIZES, LABELS, LENGTHS):
        assert list(sizes) == sorted(set(sizes))
    assert all(size % 128 == 0 for size in SIZES)
    assert [bucket(n, SIZES) for n in (0, 1, 128, 129, 768, 769, 1025)] == [128, 128, 128, 256, 768, 896, 1280]
    assert bucket(SIZES[-1] + 1, SIZES) == 2 * SIZES[-1]
    # From 1024 on, of the rows that a step computes on, less than a quarter are dead.
    assert all(b <= 1.25 * (a + 1) for a, b in pairwise(SIZES) if a >= 1024)


@pytest.mark.parametrize("shares", [False, True])
def test_what_is_added_is_dead(shares: bool) -> None:
    plain = packed(alike())
    rows = share_prefixes(plain) if shares else plain
    found = padded(rows)
    assert (found.shared is not None) == shares
    assert (found.rows, found.tokens, len(found.labels), found.max_seqlen) == (128, 128, 64, 128)
    assert found.sequences == 8 and len(found.cu_seqlens) == 9
    assert found.cu_seqlens.dtype == torch.int32
    assert found.cu_seqlens.tolist() == [*rows.cu_seqlens.tolist(), *4 * [rows.rows]]
    assert found.padding is not None
    assert found.padding.tokens.tolist() == [i >= rows.tokens for i in range(128)]
    assert found.padding.labels.tolist() == [i >= rows.scored for i in range(64)]
    assert found.scored == rows.scored
    assert (found.label_sequence[found.padding.labels] == -1).all()
    # The real ones are what they were, by way of the rows they have.
    assert sequences_of(found)[:4] == sequences_of(rows)
    assert torch.equal(found.labels[: rows.scored], rows.labels)
    assert torch.equal(found.label_rows[: rows.scored], rows.label_rows)
    if shares:
        assert found.shared is not None and rows.shared is not None
        assert found.shared.cu_seqlens.tolist() == [*rows.shared.cu_seqlens.tolist(), *4 * [rows.tokens]]
        assert found.shared.max_seqlen == 128


@pytest.mark.parametrize("shares", [False, True])
def test_every_index_gives_back_to_whom_it_took_from(shares: bool) -> None:
    rows = packed(alike())
    found = padded(share_prefixes(rows) if shares else rows)
    indices = [found.labelled] + ([] if found.shared is None else [found.shared.spread])
    for index in indices:
        assert index.offsets[0] == 0 and index.offsets[-1] == len(index.rows)
        for row, (begin, end) in enumerate(zip(index.offsets[:-1].tolist(), index.offsets[1:].tolist(), strict=True)):
            assert index.takers[begin:end].tolist() == (index.rows == row).nonzero()[:, 0].tolist()
        # One program sums up what a row gets back, so no row may be taken by all that is dead.
        assert index.offsets.diff().max() <= 4


def test_batches_of_one_bucket_have_one_signature() -> None:
    one, two = (padded(packed(random_batch(n, length))) for n, length in ((3, 9), (5, 12)))
    assert tensors_of(one)[1] == tensors_of(two)[1]
    assert tensors_of(one)[1] != tensors_of(padded(packed(random_batch(9, 9))))[1]  # more sequences
    assert tensors_of(one)[1] != tensors_of(padded(packed(random_batch(8, 30))))[1]  # more rows


def test_pairs_get_no_further_sequences() -> None:
    rows = pack_pairs(random_pairs(3), vocab_size=VOCAB, device=CPU)
    found = padded(rows, pairs=True)
    assert found.sequences == rows.sequences == 6
    assert torch.equal(found.cu_seqlens, rows.cu_seqlens)


def same(found: Any, expected: Any, bound: float) -> None:
    """Compare a step on padded rows with the same on rows as packed: gradients, probe and report."""
    (gradients, probe, report), (expected_gradients, expected_probe, expected_report) = found, expected
    assert gap(gradients, expected_gradients) < bound
    torch.testing.assert_close(dict(probe), dict(expected_probe), rtol=bound, atol=bound)
    told, expected_told = report.to_dict(), expected_report.to_dict()
    assert told.keys() == expected_told.keys()
    for name, value in told.items():
        # A probe found on a sign may be near zero in the steering, whose terms cancel.
        assert value == pytest.approx(expected_told[name], rel=bound, abs=bound), name


OPTIONS = {
    "tangents": CONFIG.replace(tangent_fraction=0.5),
    "fresh-tangents": CONFIG.replace(tangent_fraction=0.5, schedule="fresh"),
    "half-the-pairs": CONFIG.replace(pairs_per_step=1),
    "probe-every": CONFIG.replace(probe_every=2),
    "direction-every": CONFIG.replace(direction_every=2),
    "logsigmoid": CONFIG.replace(safety_loss="logsigmoid", per_token=False),
    "absolute": CONFIG.replace(strength_unit="absolute"),
}


@pytest.mark.parametrize(("micros", "shares"), [(1, False), (2, True)], ids=["apart", "shared-micros"])
@pytest.mark.parametrize("name", [*CONFIGS, *OPTIONS])
def test_a_step_on_padded_rows_is_the_same_step(name: str, micros: int, shares: bool) -> None:
    config = {**CONFIGS, **OPTIONS}[name].replace(share_prefixes=shares)
    model = tiny_model(targets=ALL_LINEAR)
    batches = [[alike() for _ in range(micros)] for _ in range(2)]
    pairs = [random_pairs(), random_pairs()]

    def run(sap: Any, model: nn.Module) -> list:
        torch.manual_seed(1)
        found = []
        for batch, pair in zip(batches, pairs, strict=True):
            model.zero_grad()
            found.append((report := sap.step(batch, pair), grads(model), sap.probe))
            assert report.scored_tokens == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batch)
        return [(g, p, r) for r, g, p in found]

    own = copy.deepcopy(model)
    with sap_fast.attach(own, config) as sap:
        expected = run(sap, own)
    with attached(model, config, Eager) as (handle, _):
        found = run(handle, model)
    # Sums run over more places, whose order of additions may differ. A finite difference divides that by its radius
    # (1e-3 of |theta|, or 2e-5 as released).
    bound = 1e-6 if config.gradient == "finite_difference" else 1e-12
    for one, other in zip(found, expected, strict=True):
        same(one, other, bound)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family(family: str) -> None:
    model, batch, pairs = tiny_model(family, ALL_LINEAR), random_batch(), random_pairs()
    own = copy.deepcopy(model)
    with sap_fast.attach(own, CONFIG) as sap:
        expected = [(sap.step(batch, pairs), own.zero_grad())[0], sap.step(batch, pairs)]
        probe = sap.probe
    with attached(model, CONFIG, Eager) as (handle, _):
        found = [(handle.step(batch, pairs), model.zero_grad())[0], handle.step(batch, pairs)]
        same((grads(model), handle.probe, found[1]), (grads(own), probe, expected[1]), 1e-12)


def test_under_dropout_with_the_same_seeds() -> None:
    model = tiny_model(targets=ALL_LINEAR, lora_dropout=0.3).train()
    own = copy.deepcopy(model)
    batch, pairs = random_batch(), random_pairs()
    torch.manual_seed(2)
    with sap_fast.attach(own, CONFIG) as sap:
        report = sap.step(batch, pairs)
        expected = grads(own), sap.probe, report
    torch.manual_seed(2)
    with attached(model, CONFIG, Eager) as (handle, _):
        report = handle.step(batch, pairs)
        same((grads(model), handle.probe, report), expected, 1e-12)


def test_plain_fine_tuning() -> None:
    model, batch = tiny_model(), random_batch()
    own = copy.deepcopy(model)
    with sap_fast.attach(own, SAPConfig(probe_layers=(1, 2))) as sap:
        report = sap.step(batch)
        expected = grads(own), sap.probe, report
    with attached(model, SAPConfig(probe_layers=(1, 2)), Eager) as (handle, _):
        report = handle.step(batch)
        same((grads(model), handle.probe, report), expected, 1e-12)
