"""What SAPTrainer refuses at once, by name."""

from pathlib import Path

import pytest
from trainers import PAIRS, ROWS, arguments, checkpointing, load, trainer

from sap_fast import SAPConfig, UnsupportedModelError
from sap_fast.errors import DataError
from sap_fast.hf import SAPTrainer


def test_offloaded_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with offload is not supported"):
        trainer(tmp_path, {checkpointing(): True, f"{checkpointing()}_kwargs": {"offload": True}})


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


@pytest.mark.parametrize("change", [{"float8": True}, {"attention": "flash_attn"}], ids=str)
def test_what_asks_for_a_device_is_tried_where_the_trainer_has_put_the_model(tmp_path: Path, change: dict) -> None:
    config = SAPConfig(**change)
    with pytest.raises(ValueError, match="cpu"):
        trainer(tmp_path, sap=config)
    with pytest.raises(DataError, match="train_dataset is empty"):  # which comes before the Trainer itself
        trainer(tmp_path, sap=config, train_dataset=[])
