"""The benchmark of the options' price runs end to end, and compares what it says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmarks import read

import sap_fast
from benchmarks import options
from benchmarks.common import models
from benchmarks.published.parts import trained


def test_options_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert options.main(["--model", "tiny", "--steps", "1", "--looks", "5", "--json", str(path)]) == 0
    result, said = read(path), capsys.readouterr().out
    by_option: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        assert row.keys() == {"options", "look", "direction_age", "probe_age", *options.COSINES}
        assert all(abs(row[name]) <= 1 + 1e-9 for name in options.COSINES)
        by_option.setdefault(options.said(row["options"]), []).append(row)
    every = [*options.OPTIONS, options.CONTROL]
    assert list(by_option) == [options.said(option) for option in every]
    assert all([row["look"] for row in found] == [1, 2, 3, 4, 5] for found in by_option.values())
    ages = {name: [(row["direction_age"], row["probe_age"]) for row in found] for name, found in by_option.items()}
    assert ages["probe_every=8"] == [(i, i) for i in range(5)]
    assert ages["direction_every=4"] == [(i % 4, 0) for i in range(5)]
    # What an option leaves alone is exact.
    for name in ("tangent_fraction=0.5", "tangent_fraction=0.25"):
        assert all(row["direction"] > 1 - 1e-6 and row["probe_gradient"] < 0.999 for row in by_option[name])
    for name in ("probe_every=8", "direction_every=4"):
        first, *later = by_option[name]
        assert all(first[column] > 1 - 1e-6 for column in options.COSINES)
        assert all(row["direction"] < 0.999 for row in later[:3])
    # The second look is at the first step that uses the direction of the one before it.
    first, *later = by_option["delayed_direction=True"]
    assert first["direction_age"] == 0 and all(first[column] > 1 - 1e-6 for column in options.COSINES)
    assert all(row["direction_age"] == 1 and row["direction"] < 0.999 for row in later)
    # Off by the rounding of single products, at random.
    assert all(0.9 < row["direction"] < 1 and 0.9 < row["probe_gradient"] < 1 for row in by_option["float8=emulated"])
    half = by_option["pairs_per_step=2"]
    assert all(0 < row["direction"] < 0.999 for row in half)
    for entry in result["summary"]:
        found = [row["probe"] for row in by_option[options.said(entry["options"])]]
        assert entry["probe"] == {"mean": pytest.approx(sum(found) / 5), "least": min(found)}
        assert options.said(entry["options"]) in said


def test_the_exact_step_agrees_with_itself() -> None:
    """What is looked at is what a plain handle's step leaves."""
    model = models.with_lora(models.tiny_base()[0])
    data = options.Batches(models.WordTokenizer(), models.examples(), sap_fast.data.safety_pairs(), "cpu")
    twin = models.twin(model)
    found = options.look(model, data, 0, 2, [{}])
    own = [row for row in found if row["options"] == {}]
    assert len(own) == 2 and all(row[name] > 1 - 1e-6 for row in own for name in options.COSINES)
    # Two steps of training, by the public handle, lead to the same weights.
    optimizer = torch.optim.AdamW(trained(twin).values(), lr=options.LEARNING_RATE)
    with sap_fast.attach(twin, options.EXACT) as sap:
        for i in range(3):
            optimizer.zero_grad()
            sap.step(*data(i))
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(trained(model).values(), trained(twin).values(), strict=True))


def test_the_effect_is_what_the_probe_adds() -> None:
    """A probe of no strength adds nothing, and the cosine of nothing is 0."""
    model = models.with_lora(models.tiny_base()[0])
    data = options.Batches(models.WordTokenizer(), models.examples(), sap_fast.data.safety_pairs(), "cpu")
    rows = options.look(model, data, 0, 1, [{"strength": 0.0}])
    (row,) = (row for row in rows if row["options"] != options.CONTROL)
    assert row["probe"] == 0 and row["effect"] == pytest.approx(0, abs=1e-3)
    assert row["probe_gradient"] > 1 - 1e-6 and row["update"] < 1 - 1e-9


def test_options_refuses_no_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        options.main(["--looks", "0", "--json", str(tmp_path / "result.json")])
    assert "--looks must be at least 1" in capsys.readouterr().err
