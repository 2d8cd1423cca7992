"""What the command ``sap-fast`` refuses, before any work is done and with nothing left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chat import TEMPLATE, save_chat_model
from command import FLAGS, PAIRS, prepare, refused, train, write

from sap_fast.cli.main import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return prepare(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.jsonl is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a" "b"}\n', "data.jsonl, line 2: not JSON"),
        ('{"instruction": "a", "output": "b"}\n', "data.jsonl, line 1: expected prompt and completion"),
        ('{"prompt": "a", "completion": ""}\n', "data.jsonl, line 1: completion is empty"),
    ],
)
def test_bad_data(here: Path, capsys: Any, content: str, message: str) -> None:
    (here / "data.jsonl").write_text(content)
    assert message in refused(capsys, here)


def test_answers_all_cut_away(here: Path, capsys: Any) -> None:
    message = "data.jsonl: after cutting at max_length=10 tokens nothing of any answer is left (8 rows); raise"
    assert message in refused(capsys, here, "--max_length", "10")


def test_chosen_equal_to_rejected(here: Path, capsys: Any) -> None:
    write(here / "pairs.jsonl", [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}])
    assert "pairs.jsonl, line 5: chosen and rejected are equal" in refused(capsys, here)


def test_missing_columns_of_pairs(here: Path, capsys: Any) -> None:
    write(here / "pairs.jsonl", [{"prompt": "a", "chosen": "b"}])
    assert "pairs.jsonl, line 1: ['rejected'] missing; expected prompt, chosen and rejected" in refused(capsys, here)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "no model folder nowhere; a name on the Hugging Face hub has the form owner/name"),
        ("./no/where", "no model folder ./no/where"),
        ("~/where", "no model folder ~/where"),
        ("model/nowhere", "no model folder model/nowhere"),
        ("data.jsonl", "data.jsonl is a file; name the model's folder"),
        ("empty", "the folder empty: expected a tokenizer"),
    ],
)
def test_an_unknown_model(here: Path, capsys: Any, model: str, message: str) -> None:
    (here / "empty").mkdir()
    assert message in refused(capsys, here, "--model", model)


def test_a_hub_name_that_the_hub_does_not_give(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused(capsys, here, "--model", "owner/no-such-model")
    assert "neither a folder here nor a model that the Hugging Face hub would give" in said


def test_nothing_is_fetched_for_a_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def connect(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert train() == 0


def test_only_safetensors(here: Path, capsys: Any) -> None:
    weights = here / "model" / "model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), here / "model" / "pytorch_model.bin")
    weights.unlink()
    assert "expected a causal language model in safetensors" in refused(capsys, here)


def test_a_model_with_missing_weights(here: Path, capsys: Any) -> None:
    """transformers would fill them with random numbers."""
    from safetensors.torch import load_file, save_file

    path = here / "model" / "model.safetensors"
    weights = {name: w for name, w in load_file(path).items() if ".layers.1.mlp" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    assert "model lacks 3 weights of a LlamaForCausalLM: ['model.layers.1.mlp" in refused(capsys, here)
    path.write_bytes(path.read_bytes()[:1000])
    assert "expected a causal language model in safetensors" in refused(capsys, here)


def test_an_adapter_for_another_model(here: Path, capsys: Any) -> None:
    from safetensors.torch import load_file, save_file

    assert train() == 0
    path = here / "out" / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    flags = ["--models", "out/adapter", "--output_dir", "measured"]
    save_file({name: w for name, w in weights.items() if ".layers.3." not in name}, path)
    assert "is no adapter for model: they differ in 4 weights" in refused(capsys, here, *flags, command="eval")
    save_file({name: w[:, :-1].contiguous() for name, w in weights.items()}, path)
    assert "expected an adapter for model (" in refused(capsys, here, *flags, command="eval")


def test_a_model_without_a_chat_template(here: Path, capsys: Any) -> None:
    save_chat_model(here / "bare", template=None)
    for file in (here / "bare").glob("*.jinja"):
        file.unlink()
    assert "data.jsonl, line 1: the tokenizer has no chat template" in refused(capsys, here, "--model", "bare")
    (here / "chat.jinja").write_text(TEMPLATE)
    assert train("--model", "bare", "--chat-template", "chat.jinja") == 0
    said = refused(capsys, here, "--model", "bare", "--chat-template", "none.jinja", "--output_dir", "other")
    assert "none.jinja: no chat template can be read" in said


def test_an_output_folder_with_other_content(here: Path, capsys: Any) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("all of it")
    assert "out is not empty (thesis.tex); name another folder" in refused(capsys, here)
    assert train("--overwrite") == 0
    assert (here / "out" / "thesis.tex").read_text() == "all of it"
    first = (here / "out" / "report.json").read_text()
    assert train("--overwrite", "--seed", "3") == 0
    assert (here / "out" / "report.json").read_text() != first
    kept = sorted(path.name for path in (here / "out").iterdir())
    assert kept == ["adapter", "checkpoints", "report.json", "thesis.tex"]
    assert "is a file; name a folder" in refused(capsys, here, "--output_dir", "data.jsonl")


@pytest.mark.parametrize("name", ["adapter/thesis.tex", "checkpoints/thesis.tex"])
def test_overwriting_takes_nothing_that_no_run_has_written(here: Path, capsys: Any, name: str) -> None:
    assert train() == 0
    (here / "out" / name).write_text("all of it")
    said = refused(capsys, here, "--overwrite")
    assert f"out/{name.partition('/')[0]} holds thesis.tex, which no run has written" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "sap", "--strength", "-1"], "strength must be finite and not negative"),
        (["--probe_every", "0"], "probe_every must be a whole number of at least 1"),
        (["--probe_layers", "7"], "probe_layers holds 7; the model has layers 0 to 3"),
        (["--target_modules", "no_proj"], "no adapters for target_modules=['no_proj']"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor=0.1"),
        (["--frobnicate", "1"], "unknown arguments: --frobnicate 1"),
        (["--safety_batch_size", "0"], "safety_batch_size must be at least 1"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1"),
        (["--learning_rate", "nan"], "--learning_rate finite"),
        (["--max_length", "1"], "max_length must be at least 2"),
        (["--warmup_steps", "-1"], "warmup_steps"),
        (["--resume_from_checkpoint", "x"], "--resume_from_checkpoint is not supported yet"),
    ],
)
def test_bad_settings(here: Path, capsys: Any, flags: list[str], message: str) -> None:
    assert message in refused(capsys, here, *flags)


def test_sap_needs_pairs(here: Path, capsys: Any) -> None:
    assert main(["train", *FLAGS[:4], "--output_dir", "out"]) == 1
    assert "--method sap needs --pairs FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", None, "run.yaml: no such file"),
        ("run.txt", "", "expected flags, or a file of them"),
        ("run.yaml", "- a\n- b\n", "expected settings by name"),
        ("run.yaml", "modle: model\n", "no flag is called 'modle'"),
        ("run.yaml", "model: [unclosed\n", "cannot be read as settings"),
        ("run.json", "{", "cannot be read as settings"),
    ],
)
def test_a_bad_settings_file(here: Path, capsys: Any, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (here / name).write_text(text)
    assert main(["train", name, *FLAGS]) == 1
    assert message in capsys.readouterr().err


def test_eval_refuses(here: Path, capsys: Any) -> None:
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    flags = ["--models", "adapter", "--output_dir", "measured"]
    assert "for 'owner/base', which is no folder here; name its base with --base" in refused(
        capsys, here, *flags, command="eval"
    )
    said = refused(capsys, here, *flags, "--base", "model", command="eval")
    assert "no adapter_model.safetensors; only safetensors are read" in said
    assert "no model folder nowhere" in refused(capsys, here, "--models", "nowhere", command="eval")
    said = refused(capsys, here, "--models", "model", "nowhere", "--output_dir", "measured", command="eval")
    assert "no model folder nowhere" in said  # before the first is measured
    for flags, message in (
        (["--models", "model", "model"], "names a model twice"),
        (["--models", "model", "--device", "quantum"], "--device quantum cannot be used here"),
        (["--models", "model", "--max_new_tokens", "-1"], "--max_new_tokens must not be negative"),
    ):
        assert message in refused(capsys, here, *flags, command="eval")
    (here / "full").mkdir()
    (here / "full" / "x").touch()
    said = refused(capsys, here, "--models", "model", "--output_dir", "full", command="eval")
    assert "full is not empty (x)" in said
