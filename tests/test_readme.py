"""The README's example runs as it stands, but for the model's folder."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from chat import save_chat_model

README = Path(__file__).parents[1] / "README.md"
RESULTS = README.parent / "benchmarks" / "results"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    folder = save_chat_model(tmp_path / "model")
    code = example.replace("path/to/a/chat/model", str(folder))
    assert code != example
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert all(re.fullmatch(r"loss \d+\.\d+  margin [+-]\d+\.\d+  steering [+-]\d+\.\d+", line) for line in printed)
    assert "adapter_model.safetensors" in os.listdir("adapter")


def test_the_figures_are_those_of_the_results() -> None:
    """The tables' dual and published rows, cell by cell, against the run that the README names."""
    text = README.read_text(encoding="utf-8")
    named = re.findall(r"`benchmarks/results/([\w.-]+\.json)`", text)
    runs = {name.removesuffix("-cpu-2026-11-21.json"): json.loads((RESULTS / name).read_text()) for name in named}
    rows = [row for row in runs["fidelity"]["rows"] if row["truth"] == "float32 weights"]
    for start, gradient, dtype, radius in (
        ("| **finite difference, bfloat16, 2e-5", "finite difference", "bfloat16", 2e-5),
        ("| **dual batch, bfloat16", "dual", "bfloat16", None),
        ("| dual batch, float32", "dual", "float32", None),
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(start)]
        wanted = [row for row in rows if (row["gradient"], row["dtype"], row["radius"]) == (gradient, dtype, radius)]
        cells = [f"{row['cosine']:.3f} ({row['length_ratio']:.3g}×)" for row in wanted]
        assert [cell.strip().replace("**", "") for cell in line.split("|")[2:-1]] == cells
    for row in runs["steering"]["rows"]:
        assert re.search(rf"\| {row['strength']:g} \| {row['task_loss']:.3f} \| \{row['slope_change']:+.3f}", text)
