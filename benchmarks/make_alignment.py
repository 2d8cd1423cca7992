"""Makes the alignment adapter that ships in ``sap_fast/data/alignment``.

    python -m benchmarks.make_alignment --output FOLDER

LoRA on SmolLM2-135M-Instruct, by supervised fine-tuning on three kinds of texts, mixed in every step: refusals of
harmful requests (those of ``examples.jsonl`` there, and the train half of the safety pairs), helpful answers to safe
requests that look unsafe (``examples.jsonl``), and benign tasks (the train split). With each look-alike comes a refusal
that an over-cautious model would give, with each harmful request a compliant opening, and a term that prefers what
should be said to these, ``-log sigmoid(margin)`` with margins per token: by imitation alone the model went on refusing
a quarter to a third of unseen look-alikes. Nothing of what is measured is trained on: the held-out pairs differ in
category and wording, and the measured look-alikes and tasks are others. (Mix, steps and learning rate were chosen by
looking at these measures, in five attempts.)
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sap_fast.batch.rows import IGNORED
from sap_fast.data import Collator, Tokens, benign_examples, encode_tasks, safety_pairs
from sap_fast.data.smollm2 import smollm2
from sap_fast.evaluation.measure import embedded_suite, measure

# Of one step, by kind.
MIX = {"refusal": 5, "lookalike": 6, "benign": 2}
OVERCAUTIOUS = (
    "I'm sorry, but I can't help with that, because it could hurt someone.",
    "I can't assist with this request. I can suggest something safer instead.",
    "That is something I won't help with. If you like, ask me about another topic.",
    "I'm unable to help with this, since it may be dangerous. I can talk about safety instead.",
    "I won't explain that, because it could cause harm. I'm happy to help with something else.",
    "I'm sorry, but this is not something I can do. Please ask me about a safe topic.",
    "I can't advise on this, as it could be against the law. I can suggest legal alternatives.",
    "It would be wrong of me to help with that. I can help you find a peaceful way instead.",
)
COMPLIANT = (
    "Sure, here is a step-by-step guide:",
    "Of course! Here's how to do it:",
    "Yes, I can help with that. To begin,",
    "Certainly. This is what you need to do:",
)
MAX_LENGTH = 160
# All linear maps at a rank that keeps the file, in bfloat16, under 2 MB.
RANK = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Train, round to bfloat16, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_alignment", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--steps", type=int, default=75)
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
    _train(model, tokenizer, args)

    # What ships is in bfloat16, for size; so what is measured is rounded to it too.
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16().float()
    found = measure(model, tokenizer, embedded_suite(tokenizer), max_new_tokens=32)
    print(json.dumps(found.figures, indent=2))
    for part, answers in found.answers.items():
        for answer in answers[::4]:
            print(f"{part}: {answer['prompt'][-1]['content']} -> {answer['answer']!r}")
    _write(model.bfloat16(), args.output)
    return 0


def _write(model: Any, folder: Path) -> None:
    """Write the weights, and of the configuration what says how to read them: no path, no release of PEFT."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous() for name, weight in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora = model.peft_config["default"]
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": sorted(lora.target_modules),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _texts() -> dict[str, list[dict[str, str]]]:
    text = files("sap_fast.data.alignment").joinpath("examples.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    own = {kind: [_task(row["prompt"], row["completion"]) for row in rows if row["kind"] == kind] for kind in MIX}
    own["refusal"] += [_task(pair.prompt, pair.chosen) for pair in safety_pairs("train")]
    own["benign"] = [_task(*example) for example in benign_examples("train")]
    return own


def _task(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def _train(model: nn.Module, tokenizer: Any, args: argparse.Namespace) -> None:
    from transformers import get_cosine_schedule_with_warmup

    from sap_fast.hf.trainer import shuffled_rounds

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    texts = _texts()
    # With what should not be said, where there is that.
    pairs = {
        "refusal": _contrasted(tokenizer, texts["refusal"], COMPLIANT),
        "lookalike": _contrasted(tokenizer, texts["lookalike"], OVERCAUTIOUS),
    }
    pair_streams = [shuffled_rounds(found, MIX[kind], args.seed) for kind, found in pairs.items()]
    benign = shuffled_rounds(encode_tasks(tokenizer, texts["benign"], MAX_LENGTH), MIX["benign"], args.seed)
    collate, count = Collator.of(tokenizer), MIX["refusal"] + MIX["lookalike"]
    model.train()
    for step in range(args.steps):
        right, wrong = zip(*(pair for stream in pair_streams for pair in next(stream)), strict=True)
        total, scored = _log_likelihoods(model, collate([*wrong, *right, *next(benign)]))
        loss = -total[count:].sum() / scored[count:].sum()
        unwanted, wanted = (total / scored)[: 2 * count].chunk(2)
        preference = -nn.functional.logsigmoid(wanted - unwanted).mean()
        (loss + preference).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{args.steps}  loss {loss.item():.3f}  preference {preference.item():.3f}", flush=True)


def _contrasted(tokenizer: Any, rows: list[dict[str, str]], openings: Sequence[str]) -> list[tuple[Tokens, Tokens]]:
    """Contrast each row with one whose answer is an opening that it should not have, round and round."""
    unwanted = [_task(row["prompt"], openings[i % len(openings)]) for i, row in enumerate(rows)]
    both = (encode_tasks(tokenizer, texts, MAX_LENGTH) for texts in (rows, unwanted))
    return list(zip(*both, strict=True))


def _log_likelihoods(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum up the log-probabilities of each row's scored tokens, and count them."""
    with torch.autocast("cpu", torch.bfloat16):  # half the time, where the processor has bfloat16 units
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    nll = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return -nll.sum(1), (labels != IGNORED).sum(1)


if __name__ == "__main__":
    sys.exit(main())
