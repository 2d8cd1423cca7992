"""The command ``sap-fast``: train, eval, info, and what an interrupt or an error leaves."""

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
from chat import TEMPLATE
from command import FLAGS, QUIET, SMALL, prepare, train

from sap_fast import _C
from sap_fast.cli.main import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return prepare(tmp_path)


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
        "probe_every": 2,
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
    assert report["method"]["probe_every"] == 2
    assert report["training_arguments"]["save_total_limit"] is None  # as said, and not the default
    assert report["training_arguments"]["save_strategy"] == "no"  # which YAML takes for a truth value
    assert report["training_arguments"]["run_name"] == "-x"


def test_python_m_sap_fast_is_the_command(here: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "sap_fast", "info"], capture_output=True, text=True, check=True)
    assert f"torch         {version('torch')}" in done.stdout
    assert "cpu: " in done.stdout
    for op in ("probe_rms_norm", "attention_backward", "lora_linear"):
        assert f"  {op} " in done.stdout
    assert ("C++ kernel" if _C.loaded else "PyTorch reference") in done.stdout  # on a CPU
    assert _C.status in done.stdout
    assert "Triton kernel" in done.stdout  # on a GPU, whether or not there is one


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
    """The command gets SIGINT itself, once a checkpoint is there."""
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
