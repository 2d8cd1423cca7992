"""``sap-fast profile``: see where the time of your training step goes, by plain fine-tuning and by SAP.

Writes to the output folder: ``profile.html`` (a page that needs nothing else), ``profile.json``, and ``trace.json``
for chrome://tracing or Perfetto. Nothing is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from sap_fast.cli.arguments import parse
from sap_fast.cli.errors import CommandError
from sap_fast.cli.method import MethodArguments
from sap_fast.cli.models import is_adapter, load_model, load_tokenizer
from sap_fast.cli.train import add_adapter
from sap_fast.data import Collator, Encoded, encode_pairs, encode_tasks
from sap_fast.hf.trainer import shuffled_rounds
from sap_fast.profiling import profile
from sap_fast.profiling.files import why_taken


@dataclass
class ProfileArguments:
    """Holds what is profiled, and on what."""

    model: str = field(metadata={"help": "folder of a chat model, or its name on the Hugging Face hub"})
    data: str = field(metadata={"help": "task data: .jsonl, .json, .csv, .parquet, or a hub dataset's name"})
    pairs: str = field(metadata={"help": "safety pairs: rows of prompt, chosen, rejected"})
    output_dir: str = field(default="runs/profile", metadata={"help": "the output folder"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier profile in the output folder"})
    steps: int = field(default=10, metadata={"help": "measured rounds"})
    warmup: int = field(default=2, metadata={"help": "rounds before them"})
    batch: int = field(default=8, metadata={"help": "sequences in each step"})
    pairs_per_batch: int = field(default=8, metadata={"help": "pairs given to each step"})
    max_length: int = field(default=1024, metadata={"help": "longer rows are cut at their end (tokens)"})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto: cuda where there is one"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "of the model; auto: bfloat16 where its weights are stored in 16 bits"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute activations in the backward"})
    lora_r: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "their scale, times the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "their dropout"})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "adapted linear maps, or all-linear"}
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "the device's TFLOP/s in the model's dtype, for the distance to the floor"}
    )
    bandwidth_gbs: float | None = field(default=None, metadata={"help": "its memory's GB/s, for the same"})
    seed: int = field(default=0, metadata={"help": "of adapters and the order of the data"})
    chat_template: str | None = field(default=None, metadata={"help": "a Jinja file, for a model without one"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})

    def check(self) -> None:
        """Refuse settings that make no profile.

        Raises:
            CommandError: naming the flag.
        """
        for name in ("steps", "warmup", "batch", "pairs_per_batch"):
            if getattr(self, name) < 1:
                raise CommandError(f"--{name} must be at least 1, but is {getattr(self, name)}")
        for name in ("peak_tflops", "bandwidth_gbs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise CommandError(f"--{name} must be positive and finite, but is {value}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise CommandError("--device cuda: torch finds no GPU here; leave it at auto, or say cpu")
        if is_adapter(self.model):
            raise CommandError(f"{self.model} is an adapter; --model takes the model that a new adapter is put on")
        if reason := why_taken(Path(self.output_dir), overwrite=self.overwrite):
            raise CommandError(reason)


def main(argv: Sequence[str]) -> int:
    """Check everything, measure, print, write."""
    args, options = parse("profile", (ProfileArguments, MethodArguments), argv, __doc__ or "")
    args.check()
    config = options.config()

    tokenizer = load_tokenizer(args.model, chat_template=args.chat_template, trust_remote_code=args.trust_remote_code)
    tasks = encode_tasks(tokenizer, args.data, args.max_length)
    pairs = encode_pairs(tokenizer, args.pairs, args.max_length)
    for name, rows in (("tasks", tasks), ("pairs", pairs)):
        print(f"{name}: {len(rows)} rows; {rows.cut} cut at {args.max_length} tokens, {rows.dropped} dropped")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    base = load_model(args.model, dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code)
    model: Any = add_adapter(base, args, args.seed)
    if args.gradient_checkpointing:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # by release of transformers
        next(getattr(model, name) for name in names if hasattr(model, name))({"use_reentrant": False})
    rounds = args.warmup + args.steps
    try:
        found = profile(
            model,
            _batches(tokenizer, tasks, args.batch, args.seed, rounds),
            _batches(tokenizer, pairs, args.pairs_per_batch, args.seed, rounds),
            config,
            steps=args.steps,
            warmup=args.warmup,
            output_dir=args.output_dir,
            overwrite=args.overwrite,
            peak_flops=None if args.peak_tflops is None else 1e12 * args.peak_tflops,
            bandwidth=None if args.bandwidth_gbs is None else 1e9 * args.bandwidth_gbs,
            tell=lambda line: print(f"  {line} ...", flush=True),
        )
    except ValueError as error:  # probe layers that the model does not have
        raise CommandError(str(error)) from error
    print(f"\n{found.summary()}\n\nPage: {Path(args.output_dir) / 'profile.html'}")
    return 0


def _batches(tokenizer: Any, rows: Encoded, size: int, seed: int, rounds: int) -> list[dict[str, torch.Tensor]]:
    drawn = islice(shuffled_rounds(rows, min(size, len(rows)), seed), rounds)
    return [Collator.of(tokenizer)(some) for some in drawn]
