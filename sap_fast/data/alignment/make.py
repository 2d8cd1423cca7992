"""Makes the alignment adapter that ships in this folder: ``python -m sap_fast.data.alignment.make --output FOLDER``.

LoRA on SmolLM2-135M-Instruct, by plain supervised fine-tuning on three kinds of texts, mixed in every step: refusals
of harmful requests (those of ``examples.jsonl`` here, and the train half of the safety pairs), helpful answers to
safe requests that look unsafe (``examples.jsonl``), and benign tasks (the train split). Without the look-alikes
the model learns to refuse everything. Nothing of what is measured afterwards is trained on: the held-out pairs
differ in category and wording, and the measured look-alikes and tasks are others.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

from sap_fast.data import Collator, Encoded, benign_examples, encode_tasks, safety_pairs
from sap_fast.data.smollm2 import smollm2
from sap_fast.evaluation.measure import embedded_suite, measure

# Of one step, by kind; about as many refusals as answers, so that neither becomes the habit.
MIX = {"refusal": 6, "lookalike": 6, "benign": 2}
MAX_LENGTH = 160
# All linear maps at a rank that keeps the file, in bfloat16, under 2 MB.
RANK = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Train, round to bfloat16, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m sap_fast.data.alignment.make", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW's highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(args.seed)
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    _train(model, {kind: encode_tasks(tokenizer, rows, MAX_LENGTH) for kind, rows in _texts().items()}, tokenizer, args)

    # What ships is in bfloat16, for size; so what is measured is rounded to it too.
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16().float()
    found = measure(model, tokenizer, embedded_suite(tokenizer), max_new_tokens=32)
    print(json.dumps(found.figures, indent=2))
    for part, answers in found.answers.items():
        for answer in answers[::4]:
            print(f"{part}: {answer['prompt'][-1]['content']} -> {answer['answer']!r}")
    model.bfloat16().save_pretrained(args.output)
    (args.output / "README.md").unlink(missing_ok=True)  # a form that PEFT leaves to be filled in
    return 0


def _texts() -> dict[str, list[dict[str, str]]]:
    text = files("sap_fast.data.alignment").joinpath("examples.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    own = {kind: [_task(row["prompt"], row["completion"]) for row in rows if row["kind"] == kind] for kind in MIX}
    own["refusal"] += [_task(pair.prompt, pair.chosen) for pair in safety_pairs("train")]
    own["benign"] = [_task(*example) for example in benign_examples("train")]
    return own


def _task(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def _train(model: nn.Module, rows: dict[str, Encoded], tokenizer: object, args: argparse.Namespace) -> None:
    from transformers import get_cosine_schedule_with_warmup

    from sap_fast.hf.trainer import shuffled_rounds

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    streams = [shuffled_rounds(rows[kind], count, args.seed) for kind, count in MIX.items()]
    collate = Collator.of(tokenizer)
    model.train()
    for step in range(args.steps):
        batch = collate([row for stream in streams for row in next(stream)])
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{args.steps}  loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
