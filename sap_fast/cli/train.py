"""``sap-fast train``: fine-tune a model on a data file, and keep it safe.

Writes to the output folder: ``adapter/`` (a plain PEFT adapter, with the tokenizer), ``checkpoints/``, and
``report.json`` with every setting, what was measured before and after, and the log of the steps.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from sap_fast import atomic
from sap_fast.cli import output
from sap_fast.cli.arguments import parse
from sap_fast.cli.errors import CommandError
from sap_fast.cli.main import INTERRUPTED
from sap_fast.cli.method import MethodArguments
from sap_fast.cli.models import is_adapter, load_model, load_tokenizer, quiet
from sap_fast.config import SAPConfig
from sap_fast.data import Collator, Encoded, encode_pairs, encode_tasks
from sap_fast.environment import environment
from sap_fast.evaluation import margins, task_loss
from sap_fast.hf import SAPTrainer


@dataclass
class RunArguments:
    """Holds what is trained, and on what."""

    model: str = field(metadata={"help": "folder of a chat model, or its name on the Hugging Face hub"})
    data: str = field(metadata={"help": "task data: .jsonl, .json, .csv, .parquet, or a hub dataset's name"})
    pairs: str | None = field(default=None, metadata={"help": "safety pairs: rows of prompt, chosen, rejected"})
    eval_data: str | None = field(default=None, metadata={"help": "task data to measure on, before and after"})
    eval_pairs: str | None = field(default=None, metadata={"help": "pairs to measure on; else those of training"})
    method: Literal["sap", "sft"] = field(default="sap", metadata={"help": "sft is plain fine-tuning"})
    chat_template: str | None = field(default=None, metadata={"help": "a Jinja file, for a model without one"})
    max_length: int = field(default=1024, metadata={"help": "longer rows are cut at their end (tokens)"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "of the model; auto: bfloat16 where its weights are stored in 16 bits"}
    )
    lora_r: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "their scale, times the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "their dropout"})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "adapted linear maps, or all-linear"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})
    safety_batch_size: int = field(default=8, metadata={"help": "pairs in each step"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in the output folder"})


@dataclass
class SAPTrainingArguments(TrainingArguments):
    """Holds transformers' TrainingArguments, with defaults for a run that is watched."""

    output_dir: str | None = field(default="runs/train", metadata={"help": "the output folder"})
    logging_steps: float = field(default=1, metadata={"help": "log every so many steps"})
    save_steps: float = field(default=50, metadata={"help": "write a checkpoint every so many steps"})
    save_total_limit: int | None = field(default=2, metadata={"help": "keep so many checkpoints"})
    learning_rate: float = field(default=1e-4, metadata={"help": "the highest one"})

    def __post_init__(self) -> None:
        super().__post_init__()
        # Without a GPU there is nothing to pin for, and torch warns of it.
        self.dataloader_pin_memory &= torch.cuda.is_available()


class Stopwatch(TrainerCallback):
    """Takes the seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def median(self) -> float:
        """The median of all steps; 0 before the first."""
        return sorted(self.seconds)[len(self.seconds) // 2] if self.seconds else 0.0


@dataclass(frozen=True)
class Data:
    """Holds encoded rows; ``pairs`` is None for plain fine-tuning."""

    tasks: Encoded
    pairs: Encoded | None
    eval_tasks: Encoded | None = None
    eval_pairs: Encoded | None = None

    def counts(self) -> dict[str, dict[str, int]]:
        """Count how many rows there are, and how many were cut or dropped."""
        parts = {name: part for name, part in vars(self).items() if part is not None}
        return {name: {"rows": len(x), "cut": x.cut, "dropped": x.dropped} for name, x in parts.items()}


def main(argv: Sequence[str]) -> int:
    """Check everything, then train."""
    run, method, args = parse("train", (RunArguments, MethodArguments, SAPTrainingArguments), argv, __doc__ or "")
    folder = Path(args.output_dir)
    config = method.config()
    if run.method == "sap" and run.pairs is None:
        raise CommandError("--method sap needs --pairs FILE: rows of prompt, chosen (safe) and rejected (unsafe)")
    if is_adapter(run.model):
        raise CommandError(f"{run.model} is an adapter; --model takes the model that a new adapter is trained on")
    if args.resume_from_checkpoint:
        raise CommandError("--resume_from_checkpoint is not supported yet: start anew")
    if args.per_device_train_batch_size < 1 or not 0 <= args.learning_rate < math.inf:
        raise CommandError(
            "--per_device_train_batch_size must be at least 1 and --learning_rate finite and not negative, but they "
            f"are {args.per_device_train_batch_size} and {args.learning_rate}"
        )
    output.claim_run(folder, overwrite=run.overwrite)

    tokenizer = load_tokenizer(run.model, chat_template=run.chat_template, trust_remote_code=run.trust_remote_code)
    data = read_data(run, tokenizer)
    for name, count in data.counts().items():
        print(
            f"{name}: {count['rows']} rows; {count['cut']} cut at {run.max_length} tokens, {count['dropped']} dropped"
        )
    base = load_model(run.model, dtype=run.dtype, trust_remote_code=run.trust_remote_code)
    model = add_adapter(base, run, args.seed)
    args.output_dir = str(folder / "checkpoints")
    watch = Stopwatch()
    trainer = make_trainer(
        model, args, data, tokenizer, config if run.method == "sap" else None, run.safety_batch_size, [watch]
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{run.model}: {trained:,} trained weights in adapters on {', '.join(run.target_modules)}, {args.device}")
    if run.method == "sap":
        settings = describe(config, model)
        probes = f"probes on layers {settings['probe_layers']}" if config.uses_probe else "no probe"
        print(f"Safety-Aware Probing: guard {config.guard}, {probes}", flush=True)
    return _train(trainer, run, config, data, folder, watch)


def _train(trainer: Trainer, run: RunArguments, config: SAPConfig, data: Data, folder: Path, watch: Stopwatch) -> int:
    model, started = trainer.model, time.perf_counter()
    before = figures(model, data)
    old = atomic.set_aside(folder / "checkpoints")
    try:
        trainer.train()
    except KeyboardInterrupt:
        print(
            f"\nInterrupted after step {trainer.state.global_step} of {trainer.state.max_steps}; {_kept(folder, old)}."
        )
        return INTERRUPTED
    except Exception as error:
        error.add_note(f"This was in step {trainer.state.global_step + 1}; {_kept(folder, old)}.")
        raise
    # First of all, so that nothing that comes after can lose it.
    write_adapter(model, trainer.processing_class, folder / "adapter")
    print(f"Adapter (plain PEFT, no probe in it): {folder / 'adapter'}", flush=True)
    after = figures(model, data)
    report = {
        "settings": {**asdict(run), "output_dir": str(folder), "seed": trainer.args.seed},
        "training_arguments": trainer.args.to_dict(),
        "method": describe(config, model) if run.method == "sap" else "plain fine-tuning",
        "environment": environment(trainer.args.device),
        "data": data.counts(),
        "before": before,
        "after": after,
        "seconds": time.perf_counter() - started,
        "seconds_per_step": watch.median,
        "log": trainer.state.log_history,
    }
    atomic.write_json(folder / "report.json", report)
    atomic.discard(old)
    for name, value in after.items():
        print(f"{name}: {before[name]:+.3f} before, {value:+.3f} after (nats per token)")
    print(f"Report: {folder / 'report.json'}")
    return 0


def _kept(folder: Path, old: Path | None) -> str:
    """Say what a run that did not finish leaves behind."""
    last = last_checkpoint(folder / "checkpoints")
    kept = f"the last checkpoint, a plain PEFT adapter, is {last}" if last else "no checkpoint was written yet"
    return kept + (f"; the earlier run's checkpoints are in {old}" if old else "")


def read_data(run: RunArguments, tokenizer: Any) -> Data:
    """Read everything that a run needs, checked and tokenized.

    Raises:
        DataError: naming the file and its line.
    """
    return Data(
        tasks=encode_tasks(tokenizer, run.data, run.max_length),
        pairs=encode_pairs(tokenizer, run.pairs, run.max_length) if run.pairs else None,
        eval_tasks=encode_tasks(tokenizer, run.eval_data, run.max_length) if run.eval_data else None,
        eval_pairs=encode_pairs(tokenizer, run.eval_pairs, run.max_length) if run.eval_pairs else None,
    )


def add_adapter(base: nn.Module, run: Any, seed: int) -> nn.Module:
    """Add fresh LoRA adapters, the same for the same seed.

    Raises:
        CommandError: target modules that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if run.target_modules == ["all-linear"] else run.target_modules
    set_seed(seed)
    try:
        lora = LoraConfig(
            r=run.lora_r, lora_alpha=run.lora_alpha, lora_dropout=run.lora_dropout, target_modules=targets
        )
        with quiet():
            return get_peft_model(base, lora)
    except ValueError as error:
        raise CommandError(f"no adapters for target_modules={targets}: {error}") from None


def make_trainer(
    model: nn.Module,
    args: TrainingArguments,
    data: Data,
    tokenizer: Any,
    sap: SAPConfig | None,
    safety_batch_size: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Make the trainer of a run; transformers' own, for plain fine-tuning, where ``sap`` is None.

    Raises:
        CommandError: arguments that cannot be honoured.
    """
    shared: dict[str, Any] = {"processing_class": tokenizer, "callbacks": list(callbacks)}
    try:
        if sap is None:
            shared |= {"data_collator": Collator.of(tokenizer), "eval_dataset": _rows(data.eval_tasks)}
            return Trainer(model, args, train_dataset=_rows(data.tasks), **shared)
        return SAPTrainer(
            model,
            args,
            train_dataset=data.tasks,
            eval_dataset=data.eval_tasks,
            safety_dataset=data.pairs,
            sap=sap,
            safety_batch_size=safety_batch_size,
            **shared,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error


def _rows(encoded: Encoded | None) -> list[dict[str, list[int]]] | None:
    return None if encoded is None else [row._asdict() for row in encoded]


def figures(model: nn.Module, data: Data) -> dict[str, float]:
    """Measure the safety margin and the task loss, on the evaluation parts where there are some."""
    found: dict[str, float] = {}
    pairs = data.eval_pairs or data.pairs
    if pairs is not None:
        found["safety_margin"] = float(margins(model, pairs).mean())
    if data.eval_tasks is not None:
        found["task_loss"] = task_loss(model, data.eval_tasks)
    return found


def write_adapter(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the adapter and its tokenizer, whole or not at all."""

    def write(scratch: Path) -> None:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)

    atomic.write_folder(folder, write)


def describe(config: SAPConfig, model: Any) -> dict[str, Any]:
    """Describe the method's settings, with the probed layers by number."""
    settings = {name: value for name, value in asdict(config).items() if name != "probe_layers"}
    layers = list(config.layers_of(model.config.num_hidden_layers)) if config.uses_probe else []
    return {**settings, "probe_layers": layers}


def last_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that was written to its end: its trainer_state.json is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if path.stat().st_size]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
