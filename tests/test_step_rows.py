"""The rows that a whole step is timed on are of the kinds that their names say, drawn from the data given."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common import models
from benchmarks.step.batches import PUBLISHED, Given, Shapes, lengths, rows, scored
from sap_fast.model.read import read_decoder

SHAPES = Shapes(4, 40, 2, 40)


def given(kind: str = "real", shapes: Shapes = SHAPES) -> Given:
    return rows(models.WordTokenizer(), models.examples(), shapes, kind, "cpu")


def test_kinds_of_rows_hold_what_they_say() -> None:
    real, released, full = (given(kind) for kind in ("real", "released", "full"))
    assert real.batch["input_ids"].shape == (4, max(lengths(real.batch)))
    assert real.pairs["input_ids"].shape == (4, max(lengths(real.pairs)))
    assert len({*lengths(real.batch), *lengths(real.pairs)}) > 1
    for some, padded in ((real.batch, released.batch), (real.pairs, released.pairs)):
        assert padded["input_ids"].shape == (4, 40)
        assert (lengths(some), scored(some)) == (lengths(padded), scored(padded))
    assert lengths(full.batch) == [40] * 4 and lengths(full.pairs) == [40] * 4
    assert len({tuple(row) for row in full.batch["input_ids"].tolist()}) == 4
    published = given("full", PUBLISHED)
    assert (lengths(published.batch), lengths(published.pairs)) == ([128] * 10, [256] * 16)


def test_floor_rows_are_those_that_the_floor_is_computed_for() -> None:
    """Whatever the data: 768 tokens of tasks, of which half are scored, and pairs of 2,458 tokens on 2,027 rows."""
    found = given("floor")
    assert (found.shapes, sum(lengths(found.batch)), sum(lengths(found.pairs))) == (PUBLISHED, 768, 2458)
    assert max(lengths(found.batch)) <= PUBLISHED.task_length and max(lengths(found.pairs)) <= PUBLISHED.pair_length
    assert scored(found.batch) == pytest.approx(384, abs=5)
    model = models.with_lora(models.tiny_base()[0])
    packer = read_decoder(model).packer(share_prefixes=True)
    task, pairs = packer.task(packer.read(found.batch)), packer.pairs(packer.read_pairs(found.pairs))
    assert (task.rows, task.shared, pairs.rows, pairs.tokens) == (768, None, 2027, 2458)
    # Of a pair the prompt is what it shares, on average 35% of a sequence.
    assert (pairs.tokens - pairs.rows) / 8 == pytest.approx(0.35 * 2458 / 16, abs=0.5)
    again = given("floor")
    assert all(torch.equal(found.batch[key], x) for key, x in again.batch.items())


def test_rows_need_enough_data() -> None:
    with pytest.raises(ValueError, match="a step takes 4 examples, but only 0 of 128 keep an answer within 4 tokens"):
        given(shapes=Shapes(4, 4, 2, 40))
    with pytest.raises(ValueError, match="a step takes 500 examples, but there are 128"):
        given(shapes=Shapes(500, 40, 2, 40))
    with pytest.raises(ValueError, match="do not fill rows of 40 and 5000 tokens"):
        given("full", Shapes(4, 40, 2, 5000))


def test_examples_that_lose_their_answer_are_not_drawn(tmp_path: Path) -> None:
    """Most examples of a file lose it: exactly the others are drawn, with lengths of their own."""
    words = "a question of many words " * 20
    texts = [{"instruction": words, "output": "lost"} for _ in range(60)]
    texts += [{"instruction": "a b c " * i, "output": f"kept {i}"} for i in range(1, 5)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(texts), encoding="utf-8")
    drawn = rows(models.WordTokenizer(), models.examples(path), SHAPES, "real", "cpu")
    assert len({*lengths(drawn.batch)}) == 4 and max(lengths(drawn.batch)) < 40
    assert (drawn.batch["labels"] != -100).any(1).all()
    other = rows(models.WordTokenizer(), models.examples(path), SHAPES, "real", "cpu", seed=1)
    assert sorted(lengths(other.batch)) == sorted(lengths(drawn.batch)) and other.shapes == drawn.shapes
