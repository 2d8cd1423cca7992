"""The benchmark scripts run end to end, and write what they say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import demo_search, fidelity, steering
from benchmarks.common import models, record


def finite(x: Any) -> bool:
    """Tell whether every number in a JSON value is finite."""
    if isinstance(x, dict):
        return all(map(finite, x.values()))
    if isinstance(x, list):
        return all(map(finite, x))
    return not isinstance(x, float) or math.isfinite(x)


def read(path: Path) -> dict[str, Any]:
    """Read a result, checked for what every result has, and for what none may have: paths."""
    text = path.read_text(encoding="utf-8")
    result = json.loads(text)
    assert {"device", "cpu", "threads", "torch", "transformers", "peft", "triton", "command", "date", "commit"} <= (
        result["environment"].keys()
    )
    assert str(path.parent) not in text
    assert str(record.ROOT) not in text
    assert finite(result)
    return result


def test_fidelity_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert fidelity.main(["--tiny", "--json", str(path)]) == 0
    rows = read(path)["rows"]
    keys = {"model", "when", "gradient", "dtype", "radius", "cosine", "length_ratio", "truth"}
    assert all(row.keys() == keys for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    for when in ("at initialisation", "after 2 steps"):
        chosen = [row for row in rows if row["when"] == when]
        kinds = {(row["gradient"], row["dtype"], row["radius"]) for row in chosen}
        assert kinds >= {("dual", "float32", None), ("dual", "bfloat16", None)}
        assert kinds >= {("finite difference", "float64", r) for r in fidelity.FLOAT64_RADII}
        for dtype in ("float32", "bfloat16"):
            assert kinds >= {("finite difference", dtype, r) for r in fidelity.RADII}
    exact = next(row for row in rows if row["gradient"] == "double backward")
    assert exact["cosine"] > 1 - 1e-9
    # The point of the table: at the published radius, in bfloat16, the difference is noise.
    published = [row for row in rows if (row["dtype"], row["radius"]) == ("bfloat16", 2e-5)]
    assert published
    assert all(row["cosine"] < 0.5 for row in published)
    # The move rounds to nothing, or its noise is all there is; how long that is depends on how a CPU multiplies
    # bfloat16, and on one without units for it the noise after training happened to be 2.4 times the derivative.
    assert any(not 0.1 < row["length_ratio"] < 10 for row in published)


def test_fidelity_fails_when_a_bound_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"model": "m", "when": "now", "gradient": "dual", "dtype": dtype, "radius": None}
        | {"cosine": cosine, "length_ratio": 1.0, "truth": "float32 weights"}
        for dtype, cosine in (("float32", 1.0), ("bfloat16", 0.994))
    ]
    assert [fidelity.misses(row) for row in rows] == [False, True]
    assert fidelity.misses(rows[0] | {"cosine": math.nan})
    monkeypatch.setattr(fidelity, "measure", lambda *_, **__: rows)
    assert fidelity.main(["--tiny", "--json", str(tmp_path / "result.json")]) == 1


@pytest.mark.parametrize("from_csv", [False, True], ids=["embedded", "csv"])
def test_steering_writes_its_rows(tmp_path: Path, from_csv: bool) -> None:
    path, prompts = tmp_path / "result.json", tmp_path / "requests.csv"
    lines = [f'"Do a harmful thing, number {i}"' for i in range(14)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--tiny", "--seeds", "2", "--json", str(path)]
    assert steering.main([*arguments, "--prompts", str(prompts)] if from_csv else arguments) == 0
    result = read(path)
    assert "harmful thing" not in path.read_text(encoding="utf-8")
    kinds = [(row["probe"].partition(",")[0], row["strength"]) for row in result["rows"]]
    exact = [("exact", s) for s in (*steering.NORMALISED, *steering.SIGNS)]
    noise = [(kind, s) for kind in ("published", "random") for s in steering.NOISE_SIGNS]
    assert kinds == exact + noise
    for row in result["rows"]:
        # What the exact gradient predicts is what a small probe does.
        if row["probe"].startswith("exact") and row["strength"] == 0.001:
            assert row["slope_change"] == pytest.approx(row["first_order"], rel=0.05)
        assert ("slope_change_std" in row) == row["probe"].startswith("random")


def test_models_are_what_they_are_said_to_be() -> None:
    base, tokenizer = models.random_base(layers=2, width=64)
    ids = torch.tensor([tokenizer("Some text, as a row of words.")["input_ids"]])
    with torch.no_grad():
        out = base(input_ids=ids, output_hidden_states=True, output_attentions=False)
    # Not degenerate: layers change the stream, and predictions are neither uniform nor certain.
    first, last = out.hidden_states[0], out.hidden_states[-2]
    assert (last - first).norm() > 0.3 * first.norm()
    entropy = torch.distributions.Categorical(logits=out.logits).entropy().mean()
    assert 0.5 < entropy < 0.99 * math.log(tokenizer.vocab_size)
    again, _ = models.random_base(layers=2, width=64)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), again.parameters(), strict=True))


def test_texts_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi.", "output": "Hi."}]
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert models.examples(path) == [("Add.\n1 2", "3"), ("Hi.", "Hi.")]


def test_the_search_for_the_demonstrations_settings_is_bounded() -> None:
    """The search is bounded by its list and by its record: misses are there too, so no record is the best run alone."""
    assert len(demo_search.RUNS) <= demo_search.MOST_RUNS == 16
    record = json.loads((Path(demo_search.__file__).parent / "results" / "demo-search-cpu-2026-11-21.json").read_text())
    assert 4 <= len(record["runs"]) <= demo_search.MOST_RUNS
    assert record["shared"]["steps"] == 25
    for run in record["runs"].values():
        assert [p["step"] for p in run["way"]] == [0, 5, 10, 15, 20, 25]
        assert run["way"][0]["margin"] == record["start"]["margin_unseen"]


def test_steering_has_a_verdict() -> None:
    """The verdict holds on the stored run; with exact and random exchanged it does not."""
    run = json.loads((Path(steering.__file__).parent / "results" / "steering-cpu-2026-11-21.json").read_text())
    assert steering.steers(run["rows"])
    names = {"exact, sign x RMS": "random, sign x RMS", "random, sign x RMS": "exact, sign x RMS"}
    exchanged = [{**row, "probe": names.get(row["probe"], row["probe"])} for row in run["rows"]]
    for row in exchanged:
        row.setdefault("slope_change_std", 0.0)
    assert not steering.steers(exchanged)
