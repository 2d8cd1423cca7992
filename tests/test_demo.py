"""The demonstration, end to end, on a tiny chat model (the real one takes minutes)."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from chat import save_chat_model

from sap_fast.cli import demo


def run(tmp_path: Path, *more: str) -> tuple[int, dict]:
    folder = save_chat_model(tmp_path / "model")
    arguments = ["--model", str(folder), "--output", str(tmp_path / "out"), "--steps", "3", "--batch", "2"]
    code = demo.main([*arguments, "--pairs", "1", "--device", "cpu", *more])
    return code, json.loads((tmp_path / "out" / "report.json").read_text())


def test_demo_trains_and_writes_a_plain_adapter_and_a_report(tmp_path: Path, capsys: Any) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    code, report = run(tmp_path)
    assert code == 0
    printed = capsys.readouterr().out
    assert "safety margin" in printed
    assert [step["step"] for step in report["steps"]] == [1, 2, 3]
    assert {"loss", "safety_margin", "steering", "seconds", "probe_norm"} <= report["steps"][0].keys()
    assert report["steps"][0]["steering"] == 0
    assert report["steps"][1]["steering"] != 0
    assert report["environment"]["torch"] == version("torch")
    weights = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")


def test_demo_is_reproducible(tmp_path: Path) -> None:
    _, first = run(tmp_path / "a")
    _, second = run(tmp_path / "b")
    for a, b in zip(first["steps"], second["steps"], strict=True):
        assert a["loss"] == b["loss"]
        assert a["steering"] == b["steering"]


def test_an_interrupt_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    real, calls = demo.collate_pairs, [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 + 4:  # four batches of held-out pairs are measured first
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(demo, "collate_pairs", interrupted)
    code, report = run(tmp_path)
    assert code == 130
    assert len(report["steps"]) == 1
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert "Interrupted after 1 steps" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--steps", "--batch", "--pairs"])
def test_bad_counts_are_refused(flag: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        demo.main([flag, "0"])
    assert "must be at least 1" in capsys.readouterr().err
