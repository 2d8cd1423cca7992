"""SAPTrainer: transformers' Trainer with the step inside, on a tiny chat model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import CONFIG, PAIRS, ROWS, checkpointing, load, trainer, weights

import sap_fast
from sap_fast.data import Collator, encode_pairs, encode_tasks
from sap_fast.errors import StepRefusedError
from sap_fast.hf import SAPTrainer
from sap_fast.hf.trainer import shuffled_rounds


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


def test_training_batches_stay_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training batches stay where a step packs them; those of evaluation go to the model, for its own forward."""
    prepared: list[Any] = []
    inner = trainer(tmp_path, {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}, eval_dataset=ROWS[:3])
    prepare = inner._prepare_inputs

    def noted(inputs: Any) -> Any:
        prepared.append(inner.model.training)
        return prepare(inputs)

    monkeypatch.setattr(inner, "_prepare_inputs", noted)
    inner.train()
    assert prepared and not any(prepared)
    # A loader of accelerate's puts batches on its device, if it has one.
    assert inner.get_train_dataloader().device is None and inner.get_eval_dataloader().device is not None
    assert inner.accelerator.device_placement


def test_one_direction_and_one_probe_update_for_each_optimizer_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sap_fast.method.probe import Probe
    from sap_fast.method.schedule import Schedule

    calls = {"direction": 0, "climb": 0}
    direction, climb = Schedule.direction, Probe.climbed

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Schedule, "direction", counted("direction", direction))
    monkeypatch.setattr(Probe, "climbed", counted("climb", climb))
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
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32, a hundred roundings
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
    # The first step has neither a probe nor a direction before it, so its share of the mean is 0. A sign probe's norm
    # follows the layers' scale, which differs between batches by a tenth or so: 0.2 tells a half from a whole.
    assert logs[0]["sap/probe_norm"] == pytest.approx(logs[1]["sap/probe_norm"] / 2, rel=0.2)
    assert 0.2 < logs[0]["sap/direction_cosine"] <= 0.5 < logs[1]["sap/direction_cosine"] <= 1


def test_batches_stay_on_the_host_for_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation runs the model's own forward, which needs them on its device."""
    import accelerate.data_loader

    moved: list[str] = []
    send = accelerate.data_loader.send_to_device
    run = trainer(tmp_path, eval_dataset=ROWS[:2])

    def noted(kind: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            moved.append(kind)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(accelerate.data_loader, "send_to_device", noted("loader", send))
    monkeypatch.setattr(run, "_prepare_input", noted("trainer", run._prepare_input))
    run.train()
    assert moved == []
    run.evaluate()
    assert {"loader", "trainer"} <= {*moved}
    assert run.accelerator.device_placement and run.get_eval_dataloader().device == run.args.device


def test_batches_that_accelerate_dispatches_are_taken_from_the_device(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"accelerator_config": {"dispatch_batches": True}})
    run.train()
    plain = trainer(tmp_path)
    plain.train()
    for name, weight in weights(plain.model).items():
        assert torch.equal(weight, weights(run.model)[name]), name


def test_evaluation_knows_no_probe_and_is_logged_apart(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"eval_strategy": "steps", "eval_steps": 1}, eval_dataset={"a": ROWS[:4], "b": ROWS[4:6]})
    run.train()
    evaluations = [entry for entry in run.state.log_history if "eval_a_loss" in entry]
    assert len(evaluations) == 3
    assert not any(key.startswith("sap/") for entry in evaluations for key in entry)
    from sap_fast.evaluation import task_loss

    # Its loss is over tokens in a batch, and averaged over batches: one batch of all rows compares.
    run.args.per_device_eval_batch_size = 4
    loss = run.evaluate(run.eval_dataset["a"])["eval_loss"]
    assert loss == pytest.approx(task_loss(run.model, run.task_data[:4]), rel=1e-5)  # float32, a hundred roundings


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


@pytest.mark.parametrize("check", ["now", "deferred"])
def test_the_model_is_free_after_training_and_after_an_error(tmp_path: Path, check: str) -> None:
    run = trainer(tmp_path)
    run.train()
    sap_fast.attach(run.model).detach()
    run.train()  # a second time

    # The optimizer is not given what is not finite, with a deferred check either.
    broken = trainer(tmp_path, sap=CONFIG.replace(check=check))
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
        """List the tokens of each step."""
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
