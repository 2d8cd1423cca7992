"""``python -m sap_fast.cli.demo``: fine-tune SmolLM2-135M-Instruct with Safety-Aware Probing, on a CPU if need be.

Real model, real tokenizer, the embedded benign examples and safety pairs, and the own-loop interface.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sap_fast
from sap_fast.data import Pair, benign_examples, collate, collate_pairs, safety_pairs
from sap_fast.data.smollm2 import smollm2

_COLUMNS = "step    loss  safety margin  steering  seconds"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    name = args.model.name if args.model else "SmolLM2-135M-Instruct"
    first = "" if args.model else " (the first time it is converted, which takes a minute)"
    print(f"Reading {name}{first} ...", flush=True)
    model, tokenizer = _load(args.model, device)
    config = sap_fast.SAPConfig()
    # Every other pair is for training; the rest, of the same kinds but other wording, measures.
    pairs = safety_pairs()
    train_pairs, held_out = pairs[0::2], pairs[1::2]
    before = _margin(model, tokenizer, held_out)

    done: list[dict[str, Any]] = []
    interrupted = False
    try:
        _train(model, tokenizer, train_pairs, config, args, done)
    except KeyboardInterrupt:
        interrupted = True
        print(f"\nInterrupted after {len(done)} steps; keeping what there is.")
    after = _margin(model, tokenizer, held_out)
    adapter = args.output / "adapter"
    model.save_pretrained(adapter)
    report = {
        "model": name,
        "config": {key: value for key, value in asdict(config).items() if not callable(value)},
        "probe_layers": list(config.layers_of(model.config.num_hidden_layers)),
        "settings": {
            "steps": args.steps,
            "batch": args.batch,
            "pairs": args.pairs,
            "lr": args.lr,
            "seed": args.seed,
        },
        "environment": environment(device),
        "held_out_margin": {"before": before, "after": after},
        "steps": done,
    }
    _write(args.output / "report.json", report)
    if done:
        print(
            f"\nTask loss {done[0]['loss']:.3f} -> {done[-1]['loss']:.3f} (on each step's own batch); "
            f"median {sorted(s['seconds'] for s in done)[len(done) // 2]:.1f} s per step on {device}."
        )
    print(f"Margin log p(refusal) - log p(compliant opening) on {len(held_out)} held-out pairs, nats per token:")
    print(f"  before {before:+.3f}, after {after:+.3f}")
    if not args.model:
        print("This model hardly refuses as it ships, so there is little to lose: this shows the mechanism.")
    print(f"Adapter (plain PEFT, no probe in it): {adapter}\nReport: {args.output / 'report.json'}")
    return 130 if interrupted else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sap_fast.cli.demo", description=__doc__)
    parser.add_argument("--steps", type=_positive, default=20)
    parser.add_argument("--batch", type=_positive, default=4, help="benign examples a step")
    parser.add_argument("--pairs", type=_positive, default=4, help="safety pairs a step")
    parser.add_argument("--lr", type=float, default=2e-4, help="AdamW's learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, help="folder of another chat model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {number}")
    return number


def _load(folder: Path | None, device: torch.device) -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    folder = folder or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.05)
    return get_peft_model(base, lora), tokenizer


def _train(
    model: nn.Module,
    tokenizer: Any,
    pairs: list[Pair],
    config: sap_fast.SAPConfig,
    args: argparse.Namespace,
    done: list[dict[str, Any]],
) -> None:
    """Train; each finished step's numbers are appended to ``done``."""
    from tqdm import tqdm

    examples = benign_examples()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    model.train()
    with (
        sap_fast.attach(model, config) as sap,
        tqdm(total=args.steps, unit="step", disable=None) as bar,
    ):
        bar.write(f"Probes on the outputs of layers {sap.probe_layers[0]} to {sap.probe_layers[-1]}, counted from 0.")
        bar.write(_COLUMNS)
        for step in range(args.steps):
            batch = collate(tokenizer, _take(examples, step, args.batch))
            pair_batch = collate_pairs(tokenizer, _take(pairs, step, args.pairs))
            start = time.perf_counter()
            report = sap.step(_to(batch, args.device), _to(pair_batch, args.device))
            optimizer.step()
            optimizer.zero_grad()
            numbers = report.to_dict()
            seconds = time.perf_counter() - start
            done.append({"step": step + 1, "seconds": seconds, **numbers})
            bar.update()
            bar.write(
                f"{step + 1:4d}  {numbers['loss']:6.3f}  {numbers['safety_margin']:+13.3f}  "
                f"{numbers['steering']:+8.4f}  {seconds:7.1f}"
            )


def _take(items: list, step: int, count: int) -> list:
    """The next ``count`` items, round and round."""
    return [items[(step * count + i) % len(items)] for i in range(count)]


def _to(batch: dict[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def _margin(model: nn.Module, tokenizer: Any, pairs: list[Pair]) -> float:
    """Mean of log p(refusal) - log p(compliant opening), nats per token, through the model's own forward."""
    training = model.training
    model.eval()
    margins = []
    for i in range(0, len(pairs), 4):
        batch = _to(collate_pairs(tokenizer, pairs[i : i + 4]), next(model.parameters()).device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        nll = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # 0 where not scored
        chosen, rejected = (-nll.sum(1) / (labels != -100).sum(1)).chunk(2)
        margins += (chosen - rejected).tolist()
    model.train(training)
    return sum(margins) / len(margins)


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place a number: device, versions, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    packages = ("torch", "transformers", "peft")
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "sap-fast": sap_fast.__version__,
        **{package: version(package) for package in packages},
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    """Write beside the target and rename, so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


if __name__ == "__main__":
    sys.exit(main())
