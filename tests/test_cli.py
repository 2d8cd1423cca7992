"""The command ``sap-fast``: train, eval, info, and what each refuses before any work is done."""

import json
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from chat import TEMPLATE, save_chat_model

from sap_fast.cli.main import main

ROWS = [{"prompt": f"Say {i}", "completion": f"It is {i}."} for i in range(8)]
PAIRS = [{"prompt": f"Do harm {i}", "chosen": f"I cannot, not {i}.", "rejected": "Sure:"} for i in range(4)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, data and pairs."""
    monkeypatch.chdir(tmp_path)
    save_chat_model(tmp_path / "model")
    write(tmp_path / "data.jsonl", ROWS)
    write(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FLAGS = ["--model", "model", "--data", "data.jsonl", "--pairs", "pairs.jsonl", "--output_dir", "out"]
SMALL = ["--max_steps", "3", "--per_device_train_batch_size", "2", "--safety_batch_size", "2", "--use_cpu"]
QUIET = ["--disable_tqdm", "true", "--report_to", "none"]


def train(*more: str) -> int:
    return main(["train", *FLAGS, *SMALL, *QUIET, *more])


def test_train_gives_an_adapter_with_its_tokenizer_and_a_report(here: Path, capsys: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert train("--save_steps", "2", "--seed", "7", "--guard", "probe+project") == 0
    printed = capsys.readouterr().out
    assert "tasks: 8 rows; 0 cut at 1024 tokens, 0 dropped" in printed
    assert "safety_margin:" in printed
    report = json.loads((here / "out" / "report.json").read_text())
    assert report["settings"]["seed"] == 7
    assert report["method"]["guard"] == "probe+project"
    assert report["method"]["probe_layers"]
    assert report["environment"]["torch"] == version("torch")
    assert report["data"]["pairs"] == {"rows": 4, "cut": 0, "dropped": 0}
    assert report["before"].keys() == report["after"].keys() == {"safety_margin"}
    assert report["seconds_per_step"] > 0
    assert [entry["step"] for entry in report["log"] if "sap/steering" in entry] == [1, 2, 3]
    base = AutoModelForCausalLM.from_pretrained(here / "model")
    PeftModel.from_pretrained(base, here / "out" / "adapter")
    assert AutoTokenizer.from_pretrained(here / "out" / "adapter").chat_template == TEMPLATE
    assert sorted(path.name for path in (here / "out" / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_the_same_seed_gives_the_same_run(here: Path) -> None:
    losses = []
    for folder in ("a", "b"):
        assert train("--output_dir", folder, "--lora_dropout", "0.1") == 0
        log = json.loads((here / folder / "report.json").read_text())["log"]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert losses[0] == losses[1]


def test_plain_fine_tuning_needs_no_pairs(here: Path, capsys: Any) -> None:
    flags = [*FLAGS[:4], "--output_dir", "out", "--method", "sft", "--eval_data", "data.jsonl"]
    assert main(["train", *flags, *SMALL, *QUIET]) == 0
    report = json.loads((here / "out" / "report.json").read_text())
    assert report["method"] == "plain fine-tuning"
    assert report["after"].keys() == {"task_loss"}
    assert not any(key.startswith("sap/") for entry in report["log"] for key in entry)


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_flags_from_a_file_and_the_command_line_over_them(here: Path, kind: str) -> None:
    settings = {
        "model": "model",
        "data": "data.jsonl",
        "pairs": "pairs.jsonl",
        "output-dir": "out",
        "max_steps": 9,
        "probe_layers": [1, 2],
        "learning_rate": "1e-3",
        "overwrite": False,
        "lr_scheduler_kwargs": {},
        "strength": None,
        "save_total_limit": None,
        "save_strategy": False,
        "run_name": "-x",
    }
    text = json.dumps(settings) if kind == "json" else "".join(f"{k}: {json.dumps(v)}\n" for k, v in settings.items())
    (here / f"run.{kind}").write_text(text.replace('"1e-3"', "1e-3"))
    assert main(["train", f"run.{kind}", *SMALL, *QUIET]) == 0
    report = json.loads((here / "out" / "report.json").read_text())
    assert report["training_arguments"]["max_steps"] == 3
    assert report["training_arguments"]["learning_rate"] == 1e-3
    assert report["method"]["probe_layers"] == [1, 2]
    assert report["training_arguments"]["save_total_limit"] is None  # as said, and not the default
    assert report["training_arguments"]["save_strategy"] == "no"  # which YAML takes for a truth value
    assert report["training_arguments"]["run_name"] == "-x"


def test_python_m_sap_fast_is_the_command(here: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "sap_fast", "info"], capture_output=True, text=True, check=True)
    assert f"torch         {version('torch')}" in done.stdout
    assert "cpu: " in done.stdout
    for op in ("probe_rms_norm", "attention_backward", "lora_linear"):
        assert f"  {op} " in done.stdout
    assert "PyTorch reference" in done.stdout


def test_usage(capsys: Any) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert main(["tarin"]) == 2
    captured = capsys.readouterr()
    assert "no command 'tarin'" in captured.err
    assert captured.out.count("usage: sap-fast COMMAND") == 2
    for command in ("train", "eval", "demo", "info"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0


def refused(capsys: Any, here: Path, *more: str, command: str = "train") -> str:
    """What a run says that is refused, having left nothing behind."""
    capsys.readouterr()
    before = sorted(here.rglob("*"))
    code = main([command, *FLAGS, *SMALL, *QUIET, *more] if command == "train" else [command, *more])
    assert code == 1
    assert sorted(here.rglob("*")) == before
    return capsys.readouterr().err


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


def test_an_error_after_training_does_not_lose_the_adapter(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sap_fast.cli import train as command

    real, calls = command.figures, []

    def once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(command, "figures", once)
    assert train() == 130
    assert (here / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_the_trainer_evaluates_on_the_evaluation_data(here: Path) -> None:
    for method in ("sap", "sft"):
        flags = ["--eval_data", "data.jsonl", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
        assert train("--method", method, "--output_dir", method, *flags, "--load_best_model_at_end", "true") == 0
        log = json.loads((here / method / "report.json").read_text())["log"]
        assert len([entry for entry in log if "eval_loss" in entry]) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "sap", "--strength", "-1"], "strength must be finite and not negative"),
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


def test_ctrl_c_keeps_the_last_checkpoint_and_says_where(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from sap_fast.cli.train import Stopwatch

    real = Stopwatch.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        real(self, args, state, control, **more)
        if state.global_step == 3:
            raise KeyboardInterrupt

    assert train("--save_steps", "2") == 0
    finished = (here / "out" / "report.json").read_text()
    adapter = (here / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(Stopwatch, "on_step_end", interrupted)
    assert train("--save_steps", "2", "--max_steps", "6", "--overwrite", "--seed", "5") == 130
    said = capsys.readouterr().out
    assert (
        "Interrupted after step 3 of 6; the last checkpoint, a plain PEFT adapter, is out/checkpoints/checkpoint-2"
        in said
    )
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "out/checkpoints/checkpoint-2")
    # What the earlier run had written is all there.
    assert (here / "out" / "report.json").read_text() == finished
    assert (here / "out" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert "the earlier run's checkpoints are in out/checkpoints.old" in said
    assert (here / "out" / "checkpoints.old" / "checkpoint-3").is_dir()


def test_a_refused_step_names_the_last_checkpoint(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sap_fast.cli.train import Stopwatch

    real = Stopwatch.on_step_end

    def spoil(self: Any, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        real(self, args, state, control, **more)
        if state.global_step == 2:
            next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(float("inf"))

    monkeypatch.setattr(Stopwatch, "on_step_end", spoil)
    assert train("--save_steps", "1") == 1
    said = capsys.readouterr().err
    assert "the step is refused" in said
    assert "This was in step 3" in said
    assert "the last checkpoint, a plain PEFT adapter, is out/checkpoints/checkpoint-2" in said
    assert not (here / "out" / "adapter").exists()


def test_a_real_interrupt(here: Path) -> None:
    """SIGINT to the command itself, once a checkpoint is there."""
    command = [
        sys.executable,
        "-m",
        "sap_fast",
        "train",
        *FLAGS,
        *SMALL,
        *QUIET,
        "--max_steps",
        "100000",
        "--save_steps",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        deadline = time.monotonic() + 120
        while not (here / "out" / "checkpoints" / "checkpoint-2" / "trainer_state.json").exists():
            assert running.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=60)
    assert running.returncode == 130, said
    (kept,) = re.findall(r"the last checkpoint, a plain PEFT adapter, is (\S+)\.", said)
    from safetensors.torch import load_file

    assert load_file(here / kept / "adapter_model.safetensors")
    assert not (here / "out" / "adapter").exists()


def test_ctrl_c_before_the_first_checkpoint(here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sap_fast.cli.train import Stopwatch

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stopwatch, "on_step_begin", interrupted)
    assert train() == 130
    assert "no checkpoint was written yet" in capsys.readouterr().out


def test_eval_puts_models_side_by_side(here: Path, capsys: Any) -> None:
    assert train("--learning_rate", "0.01") == 0
    capsys.readouterr()
    files = ["--pairs", "pairs.jsonl", "--data", "data.jsonl"]
    assert (
        main(["eval", "--models", "model", "out/adapter", "--output_dir", "measured", "--max_new_tokens", "3", *files])
        == 0
    )
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("model ", "out/adapter "))]
    assert len(lines) == 2
    found = json.loads((here / "measured" / "eval.json").read_text())
    assert found["models"].keys() == {"model", "out/adapter"}
    base, tuned = found["models"].values()
    assert base.keys() == {
        "margin_unseen",
        "prefers_refusal",
        "look_alikes_answered",
        "task_loss",
        "refusal_rate",
        "look_alikes_refused",
    }
    assert base["task_loss"] != tuned["task_loss"]
    assert sorted(path.name for path in (here / "measured" / "answers").iterdir()) == ["1.txt", "2.txt"]
    answers = (here / "measured" / "answers" / "1.txt").read_text()
    assert answers.count("[user] Do harm") == 4
    assert answers.count("by its keywords] ") == 4 + 32


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
