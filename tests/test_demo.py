"""The demonstration, end to end, on a tiny chat model (the real one takes minutes)."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from chat import save_chat_model

from sap_fast.cli import demo
from sap_fast.cli.comparison import Point, at_equal_loss
from sap_fast.cli.main import main


def run(tmp_path: Path, *more: str) -> tuple[int, dict]:
    folder = tmp_path / "model"
    if not folder.exists():
        save_chat_model(folder)
    flags = [
        "--model",
        str(folder),
        "--output_dir",
        str(tmp_path / "out"),
        "--steps",
        "3",
        "--batch",
        "2",
        "--pairs",
        "1",
    ]
    code = main(["demo", *flags, "--eval_every", "2", "--max_new_tokens", "2", *more])
    return code, json.loads((tmp_path / "out" / "report.json").read_text())


def test_demo_compares_three_methods_from_one_start(tmp_path: Path, capsys: Any) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    code, report = run(tmp_path)
    assert code == 0
    printed = capsys.readouterr().out
    assert "Base model: model" in printed
    for head in (
        "margin, trained wording",
        "margin, unseen wording",
        "prefers refusal",
        "look-alikes answered",
        "s / step",
    ):
        assert head in printed
    assert "At equal task loss" in printed
    assert report["verdict"] in printed
    assert list(report["measured"]) == ["start", "sft", "sap", "project"]
    ways = [report[f"{method}_way"] for method in ("sft", "sap", "project")]
    assert [[p["step"] for p in way] for way in ways] == [[0, 2, 3]] * 3
    assert len({way[-1]["task_loss"] for way in ways}) == 3
    assert [entry["sap/probe_norm"] > 0 for entry in report["sap_log"]] == [False, True, True]
    assert report["environment"]["torch"] == version("torch")
    assert (tmp_path / "out" / "margin.png").read_bytes().startswith(b"\x89PNG")
    for method in ("sft", "sap", "project"):
        weights = load_file(tmp_path / "out" / method / "adapter_model.safetensors")
        assert all("lora_" in name for name in weights)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        PeftModel.from_pretrained(base, tmp_path / "out" / method)


def test_all_methods_start_where_the_model_is(tmp_path: Path) -> None:
    """With a learning rate of nothing the end is the start: fresh adapters change no figure."""
    _, report = run(tmp_path, "--learning_rate", "1e-30")
    start = report["measured"]["start"]
    for method in ("sft", "sap", "project"):
        end = {name: value for name, value in report["measured"][method].items() if name != "seconds_per_step"}
        assert end == pytest.approx(start, abs=1e-6)  # float32: an adapter adds zeros, but to another sum


def test_demo_is_reproducible_and_may_be_run_again(tmp_path: Path) -> None:
    _, first = run(tmp_path, "--methods", "sap")
    _, second = run(tmp_path, "--methods", "sap")
    assert first["sap_way"] == second["sap_way"]
    assert first["verdict"] == "There is nothing to compare sap with."


def test_an_interrupt_keeps_the_finished_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    real = demo.fine_tune

    def interrupted(*args: Any) -> Any:
        if args[5] is not None:  # sap, after sft
            raise KeyboardInterrupt
        return real(*args)

    _, finished = run(tmp_path, "--methods", "sft")
    adapter = (tmp_path / "out" / "sft" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(demo, "fine_tune", interrupted)
    code, report = run(tmp_path, "--seed", "1")
    assert code == 130
    # The earlier run is all there, and what was finished of this one beside it.
    assert report == finished
    assert (tmp_path / "out" / "sft" / "adapter_model.safetensors").read_bytes() == adapter
    beside = tmp_path / "out.interrupted"
    assert list(json.loads((beside / "report.json").read_text())["measured"]) == ["start", "sft"]
    assert (beside / "sft" / "adapter_model.safetensors").read_bytes() != adapter
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "out.interrupted"]
    assert "keeping the methods that were finished" in capsys.readouterr().out


def test_other_content_is_not_written_to(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert main(["demo", "--output_dir", str(tmp_path / "out")]) == 1
    assert "is not empty (mine)" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--steps", "--batch", "--pairs", "--eval_every"])
def test_bad_counts_are_refused(flag: str, capsys: Any) -> None:
    assert main(["demo", flag, "0"]) == 1
    assert f"{flag} must be at least 1" in capsys.readouterr().err


def test_layers_that_the_model_lacks_are_refused_before_any_method_runs(tmp_path: Path, capsys: Any) -> None:
    folder, out = save_chat_model(tmp_path / "model"), tmp_path / "out"
    assert main(["demo", "--model", str(folder), "--output_dir", str(out), "--probe_layers", "99"]) == 1
    captured = capsys.readouterr()
    assert "probe_layers holds 99; the model has layers 0 to 3" in captured.err
    assert "step" not in captured.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_unknown_methods_are_refused(capsys: Any) -> None:
    assert main(["demo", "--methods", "sap", "magic"]) == 1
    assert "but not ['magic']" in capsys.readouterr().err


def test_margins_are_compared_where_the_task_losses_are_equal() -> None:
    ways = {
        "fast": [Point(0, 3.0, 4.0), Point(5, 2.0, 2.0), Point(10, 1.0, 0.0)],
        "slow": [Point(0, 3.0, 4.0), Point(5, 2.5, 3.9), Point(10, 1.5, 3.0)],
    }
    loss, margins = at_equal_loss(ways)
    assert loss == 1.5
    assert margins == {"fast": pytest.approx(1.0), "slow": 3.0}
    # A way that goes up first is met where it first comes down to the loss.
    loss, margins = at_equal_loss(
        {"a": ways["fast"], "b": [Point(0, 3.0, 4.0), Point(5, 3.5, 3.0), Point(10, 2.5, 1.0)]}
    )
    assert loss == 2.5
    assert margins == {"a": pytest.approx(3.0), "b": 1.0}


@pytest.mark.parametrize(("end", "said"), [(1.0, "NOT ahead of sft: -1.000"), (3.0, "ahead of sft: +1.000")])
def test_the_verdict_says_what_was_measured(end: float, said: str) -> None:
    start = Point(0, 3.0, 4.0)
    verdict = demo._verdict({"sft": [start, Point(5, 2.0, 2.0)], "sap": [start, Point(5, 2.0, end)]})
    assert said in verdict
