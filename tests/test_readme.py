"""The README's example runs as it stands, but for the model's folder."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from chat import save_chat_model

README = Path(__file__).parents[1] / "README.md"


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


def test_figures_stand_in_the_results() -> None:
    """A number in the README's tables names the file it comes from, and that file is there."""
    named = re.findall(r"`(benchmarks/results/[\w.-]+\.json)`", README.read_text(encoding="utf-8"))
    assert named
    for name in named:
        assert (README.parent / name).exists(), name
