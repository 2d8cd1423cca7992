"""SAPTrainer: transformers' Trainer with the step inside, on a tiny chat model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chat import save_chat_model

import sap_fast
from sap_fast import SAPConfig, UnsupportedModelError
from sap_fast.data import Collator, encode_pairs, encode_tasks
from sap_fast.errors import DataError, StepRefusedError
from sap_fast.hf import SAPTrainer
from sap_fast.hf.trainer import shuffled_rounds

ROWS = [{"prompt": f"Say {i}", "completion": f"It is {i * 7}" + "!" * i} for i in range(12)]
PAIRS = [{"prompt": f"Do harm {i}", "chosen": f"No, not {i}.", "rejected": "Sure" + "," * i} for i in range(5)]
CONFIG = SAPConfig(probe_layers=(1, 2))


def load(tmp_path: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    if not folder.exists():
        save_chat_model(folder)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], **lora))
    return model, AutoTokenizer.from_pretrained(folder)


def arguments(tmp_path: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments

    defaults: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **changes})


def trainer(tmp_path: Path, args: dict[str, Any] | None = None, **changes: Any) -> SAPTrainer:
    model, tokenizer = load(tmp_path)
    given: dict[str, Any] = {
        "train_dataset": ROWS,
        "safety_dataset": PAIRS,
        "processing_class": tokenizer,
        "sap": CONFIG,
        "safety_batch_size": 2,
    }
    return SAPTrainer(changes.pop("model", model), arguments(tmp_path, **(args or {})), **{**given, **changes})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_it_does_what_the_own_loop_does(tmp_path: Path) -> None:
    """Three steps of AdamW without clipping, on the same batches: the same weights, bit for bit."""
    inner = trainer(
        tmp_path, {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    )
    inner.train()

    model, tokenizer = load(tmp_path)
    tasks, pairs = encode_tasks(tokenizer, ROWS), encode_pairs(tokenizer, PAIRS)
    collate, rounds = Collator.of(tokenizer), shuffled_rounds(pairs, 2, inner.args.seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, fused=True
    )
    model.train()
    with sap_fast.attach(model, CONFIG) as sap:
        for step in range(3):
            sap.step(collate(tasks[2 * step : 2 * step + 2]), collate(next(rounds)))
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in weights(model).items():
        assert torch.equal(weight, weights(inner.model)[name]), name


def test_one_direction_and_one_probe_update_for_each_optimizer_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sap_fast import step

    calls = {"direction": 0, "climb": 0}
    direction, climb = step.harmful_direction, step.Probe.climbed

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(step, "harmful_direction", counted("direction", direction))
    monkeypatch.setattr(step.Probe, "climbed", counted("climb", climb))
    run = trainer(tmp_path, {"gradient_accumulation_steps": 3, "max_steps": 2})
    run.train()
    assert calls == {"direction": 2, "climb": 2}
    assert run.state.global_step == 2


@pytest.mark.parametrize("rows", [12, 10], ids=["whole windows", "a short last window"])
def test_accumulating_equals_one_big_batch(tmp_path: Path, rows: int) -> None:
    """In float64's absence: float32 sums in another order. The last window of an epoch may hold fewer batches."""
    common = {
        "train_sampling_strategy": "sequential",
        "max_steps": -1,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
    }
    big = trainer(tmp_path, {**common, "per_device_train_batch_size": 4}, train_dataset=ROWS[:rows])
    small = trainer(
        tmp_path,
        {**common, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        train_dataset=ROWS[:rows],
    )
    big.train()
    small.train()
    assert small.state.global_step == big.state.global_step == 3
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (big, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, weight in weights(big.model).items():
        # AdamW divides by the gradient's size, so entries that are rounding noise move by up to the learning rate.
        moved = (weight - weights(small.model)[name]).abs()
        assert moved.mean() < 1e-4, name


def test_the_log_tells_what_the_steps_measured(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"max_steps": 4, "logging_steps": 2})
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 2
    wanted = {
        "sap/steering",
        "sap/safety_margin",
        "sap/safety_loss",
        "sap/direction_cosine",
        "sap/loss_dot",
        "sap/probe_norm",
    }
    assert all({key for key in entry if key.startswith("sap/")} == wanted for entry in logs)
    # The first step has neither a probe nor a direction before it, so its share of the mean is 0.
    assert logs[0]["sap/probe_norm"] == pytest.approx(logs[1]["sap/probe_norm"] / 2, rel=0.2)
    assert 0.2 < logs[0]["sap/direction_cosine"] <= 0.5 < logs[1]["sap/direction_cosine"] <= 1


def test_evaluation_knows_no_probe_and_is_logged_apart(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"eval_strategy": "steps", "eval_steps": 1}, eval_dataset={"a": ROWS[:4], "b": ROWS[4:6]})
    run.train()
    evaluations = [entry for entry in run.state.log_history if "eval_a_loss" in entry]
    assert len(evaluations) == 3
    assert not any(key.startswith("sap/") for entry in evaluations for key in entry)
    from sap_fast.evaluation import task_loss

    # The Trainer averages over batches: with one batch of all rows it is the mean over tokens.
    run.args.per_device_eval_batch_size = 4
    loss = run.evaluate({"a": ROWS[:4]} if False else run.eval_dataset["a"])["eval_loss"]
    assert loss == pytest.approx(task_loss(run.model, run.task_data[:4]), rel=1e-5)


def test_checkpoints_are_plain_adapters(tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    run = trainer(tmp_path, {"save_strategy": "steps", "save_steps": 2, "max_steps": 4})
    run.train()
    folder = tmp_path / "out" / "checkpoint-4"
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == len(weights(run.model))
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in saved)
    for name in folder.iterdir():
        assert b"sap_fast" not in name.read_bytes(), name
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = PeftModel.from_pretrained(base, folder).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, run.model.eval()(ids).logits)


def test_the_model_is_free_after_training_and_after_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    sap_fast.attach(run.model).detach()
    run.train()  # a second time

    broken = trainer(tmp_path)
    with torch.no_grad():
        next(p for n, p in broken.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    before = weights(broken.model)
    with pytest.raises(StepRefusedError):
        broken.train()
    assert all(torch.equal(w, before[n]) or w.isnan().any() for n, w in weights(broken.model).items())
    sap_fast.attach(broken.model).detach()


def test_tokenized_rows_are_taken_without_what_their_mask_hides(tmp_path: Path) -> None:
    _, tokenizer = load(tmp_path)
    tokens = list(encode_tasks(tokenizer, ROWS))
    padded = [
        {
            "input_ids": [0] * i + row.input_ids,
            "labels": [-100] * i + row.labels,
            "attention_mask": [0] * i + [1] * len(row.input_ids),
        }
        for i, row in enumerate(tokens)
    ]
    texts, ids = trainer(tmp_path), trainer(tmp_path, train_dataset=padded)
    assert list(ids.task_data) == tokens
    texts.train()
    ids.train()
    for name, weight in weights(texts.model).items():
        assert torch.equal(weight, weights(ids.model)[name]), name


def test_an_epoch_that_ends_early_leaves_no_half_window_behind(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        stopped = False

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1 and not self.stopped:
                control.should_epoch_stop = self.stopped = True

    def tokens(run: SAPTrainer) -> list[int]:
        """Of each step."""
        seen: list[int] = []
        log = run.log
        run.log = lambda logs, *more: (seen.extend(r.tokens for r in run._reports), log(logs, *more))[1]
        run.train()
        return seen

    args = {"gradient_accumulation_steps": 2, "max_steps": 4, "train_sampling_strategy": "sequential"}
    whole, stopped = tokens(trainer(tmp_path, args)), tokens(trainer(tmp_path, args, callbacks=[Stop()]))
    # The first window; then the epoch ends in the middle of the second, and the next one begins anew.
    assert stopped[:2] == [whole[0], whole[0]]


def test_an_interrupt_leaves_no_half_window_behind(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    run = trainer(tmp_path, {"gradient_accumulation_steps": 2}, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.callback_handler.callbacks = [c for c in run.callback_handler.callbacks if not isinstance(c, Interrupt)]
    run.train()
    fresh = trainer(tmp_path, {"gradient_accumulation_steps": 2})
    fresh.train()
    for name, weight in weights(fresh.model).items():
        assert torch.equal(weight, weights(run.model)[name]), name


def test_bf16_with_a_bf16_model(tmp_path: Path) -> None:
    """accelerate then puts an autocast on the model's forward: the step goes without it, evaluation with it."""
    model, _ = load(tmp_path, torch.bfloat16)
    run = trainer(tmp_path, {"bf16": True}, model=model, eval_dataset=ROWS[:2])
    run.train()
    assert "forward" in model.__dict__
    assert run.evaluate()["eval_loss"] > 0
    run.train()
    assert "forward" in model.__dict__


def checkpointing() -> str:
    """The argument's name: its releases changed it, and warn of the old one."""
    from transformers import TrainingArguments

    return next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))


def test_offloaded_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with offload is not supported"):
        trainer(tmp_path, {checkpointing(): True, f"{checkpointing()}_kwargs": {"offload": True}})


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, stored = trainer(tmp_path), trainer(tmp_path, {checkpointing(): True})
    plain.train()
    stored.train()
    for name, weight in weights(plain.model).items():
        assert torch.equal(weight, weights(stored.model)[name]), name


def test_every_pair_comes_once_in_a_round() -> None:
    rounds = shuffled_rounds(range(5), 2, seed=3)
    drawn = [x for _ in range(10) for x in next(rounds)]
    assert [sorted(drawn[i : i + 5]) for i in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4
    assert drawn[:5] != drawn[5:10]
    again = shuffled_rounds(range(5), 2, seed=3)
    assert drawn == [x for _ in range(10) for x in next(again)]


def test_cut_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, max_length=45)
    assert run.task_data.cut > 0
    assert run.task_data.dropped == 0
    assert len(run.train_dataset) == len(ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safety_dataset": None}, "safety_dataset is missing.*use transformers' Trainer"),
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"train_dataset": [{"input_ids": [1, 2]}]}, "input_ids but no labels"),
        ({"processing_class": None}, r"holds texts, and there is no tokenizer \(processing_class"),
        ({"train_dataset": [{"input_ids": [1, 2], "labels": [1]}]}, r"row 0: .* have the lengths \[2, 1, 2\]"),
        ({"train_dataset": [{"input_ids": [1, 2], "labels": [-100, -100]}]}, "no token of any row is scored"),
        ({"train_dataset": {"train": ROWS}}, r"a mapping of \['train'\]; give one of its parts"),
        ({"safety_dataset": [{"prompt": "a", "chosen": "b"}]}, r"safety_dataset, row 0: \['rejected'\] missing"),
        ({"max_length": 3}, "train_dataset: after cutting at max_length=3"),
    ],
)
def test_unusable_data_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        trainer(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha=5"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"torch_compile": True}, "torch_compile=True"),
        ({"resume_from_checkpoint": "x"}, "resume_from_checkpoint='x'"),
        ({"optim": "lomo"}, "steps inside backward"),
        ({"bf16": True}, "bf16=True.* with a float32 model"),
    ],
)
def test_arguments_that_a_step_would_ignore_are_refused(tmp_path: Path, args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, args)


def test_several_processes_and_half_precision_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sap_fast.hf.arguments import check_arguments

    model, _ = load(tmp_path)
    args = arguments(tmp_path)
    for name, value, message in (
        ("fp16", True, "fp16=True"),
        ("deepspeed", "ds.json", "deepspeed='ds.json'"),
        ("fsdp", "full_shard", "fsdp='full_shard'"),
        ("debug", ["underflow_overflow"], "debug="),
    ):
        monkeypatch.setattr(args, name, value)
        with pytest.raises(ValueError, match=message):
            check_arguments(args, model)
        monkeypatch.undo()
    for name in ("world_size", "n_gpu"):
        monkeypatch.setattr(type(args), name, property(lambda self: 2))
        with pytest.raises(ValueError, match="2 devices: training on several is not supported yet"):
            check_arguments(args, model)
        monkeypatch.undo()


def test_trl_arguments_are_refused(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    class SFTConfig(TrainingArguments):
        pass

    SFTConfig.__module__ = "trl.trainer.sft_config"
    model, tokenizer = load(tmp_path)
    with pytest.raises(ValueError, match="trl SFTConfig: trl's trainers are not supported yet"):
        SAPTrainer(
            model,
            SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True),
            train_dataset=ROWS,
            safety_dataset=PAIRS,
            processing_class=tokenizer,
        )


def test_what_a_step_would_refuse_is_refused_at_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    load(tmp_path)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="is trained but is not a LoRA weight"):
        trainer(tmp_path, model=bare)
    with pytest.raises(ValueError, match="probe_layers holds 9"):
        trainer(tmp_path, sap=SAPConfig(probe_layers=(9,)))
    with pytest.raises(ValueError, match="safety_batch_size must be at least 1"):
        trainer(tmp_path, safety_batch_size=0)
    with pytest.raises(ValueError, match=r"pass transformers.TrainingArguments\(output_dir"):
        SAPTrainer(load(tmp_path)[0], None, train_dataset=ROWS, safety_dataset=PAIRS)
    for name in ("model_init", "compute_loss_func"):
        with pytest.raises(ValueError, match=f"does not support {name}"):
            trainer(tmp_path, **{name: lambda *_: None})


def test_resuming_is_refused_by_name(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"resuming .* not supported yet"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(RuntimeError, match=r"outside train\(\)"):
        run.training_step(run.model, {})
