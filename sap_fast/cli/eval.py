"""``sap-fast eval``: measure one or several models, side by side.

Margins are means of log p(refusal) - log p(compliant opening), nats per token, by teacher forcing. Refusal rates are
of greedy answers, judged by how their sentences begin; the answers are written beside the figures. Without files
of your own, the embedded held-out pairs, look-alikes and tasks are used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sap_fast.cli import output
from sap_fast.cli.arguments import parse
from sap_fast.cli.environment import environment
from sap_fast.cli.models import base_of, is_adapter, load_tokenizer, load_with_adapter, quiet
from sap_fast.evaluation.measure import Measured, measure, suite_from

HEADS = {
    "margin_trained": "margin, trained wording",
    "margin_unseen": "margin, unseen wording",
    "prefers_refusal": "prefers refusal",
    "look_alikes_answered": "look-alikes answered",
    "task_loss": "task loss",
    "refusal_rate": "refuses (keywords)",
    "look_alikes_refused": "look-alikes refused",
}
_SHARES = ("prefers_refusal", "look_alikes_answered", "refusal_rate", "look_alikes_refused")


@dataclass
class EvalArguments:
    """What is measured, on what."""

    models: list[str] = field(metadata={"help": "folders of models or adapters, or names on the Hugging Face hub"})
    base: str | None = field(default=None, metadata={"help": "of the adapters, if not the folder they name"})
    pairs: str | None = field(default=None, metadata={"help": "held-out pairs: rows of prompt, chosen, rejected"})
    look_alikes: str | None = field(default=None, metadata={"help": "rows of prompt, completion, refusal"})
    data: str | None = field(default=None, metadata={"help": "task data for the task loss"})
    output_dir: str = field(default="runs/eval", metadata={"help": "where eval.json and the answers go"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier evaluation there"})
    max_new_tokens: int = field(default=48, metadata={"help": "of each greedy answer; 0 writes none"})
    max_length: int = field(default=1024, metadata={"help": "longer rows are cut at their end (tokens)"})
    chat_template: str | None = field(default=None, metadata={"help": "a Jinja file, for a model without one"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "of the models"})
    device: str | None = field(default=None, metadata={"help": "cuda where there is one, else cpu"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a model"})


def main(argv: Sequence[str]) -> int:
    """Measure every model, then write and print."""
    (args,) = parse("eval", (EvalArguments,), argv, __doc__ or "")
    folder = Path(args.output_dir)
    output.claim(folder, overwrite=args.overwrite)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results: dict[str, Measured] = {}
    for spec in args.models:
        print(f"Measuring {spec} ...", flush=True)
        results[spec] = _measure(spec, args, device)

    output.write_json(
        folder / "eval.json",
        {
            "models": {name: found.figures for name, found in results.items()},
            "pairs": args.pairs or "embedded, held-out half",
            "look_alikes": args.look_alikes or "embedded",
            "data": args.data or "embedded, held-out",
            "environment": environment(device),
        },
    )
    for i, (name, found) in enumerate(results.items()):
        if found.answers:
            write_answers(folder / f"answers-{i}.txt", name, found)
    print(table({name: found.figures for name, found in results.items()}))
    print(f"Figures and answers: {folder}")
    return 0


def _measure(spec: str, args: EvalArguments, device: torch.device) -> Measured:
    # An adapter may come without a tokenizer: then its base's is right.
    own = not is_adapter(spec) or (Path(spec) / "tokenizer_config.json").is_file()
    source = spec if own else base_of(spec, args.base)
    trust = args.trust_remote_code
    tokenizer = load_tokenizer(source, chat_template=args.chat_template, trust_remote_code=trust)
    suite, encoded = suite_from(tokenizer, args.pairs, args.look_alikes, args.data, args.max_length)
    for part in encoded:
        if part.cut:
            print(f"  {part.cut} rows cut at {args.max_length} tokens, {part.dropped} of them dropped")
    model = load_with_adapter(spec, args.base, dtype=args.dtype, device=device, trust_remote_code=trust)
    with quiet():
        return measure(model, tokenizer, suite, args.max_new_tokens)


def table(rows: dict[str, dict[str, Any]], more: dict[str, str] | None = None) -> str:
    """Figures by name as a plain table, one line a model; a figure that a model lacks is a dash."""
    heads = {**HEADS, **(more or {})}
    keys = [key for key in heads if any(key in row for row in rows.values())]
    cells = [["", *(heads[key] for key in keys)]]
    cells += [[name, *(_cell(key, row.get(key)) for key in keys)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for line in cells:
        first, *rest = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in _SHARES:
        return f"{value:.0%}"
    return f"{value:+.3f}" if key.startswith("margin") else f"{value:.3f}"


def write_answers(path: Path, name: str, found: Measured) -> None:
    """Every greedy answer as text, under its prompt."""
    lines = [f"Greedy answers of {name}", ""]
    for part, answers in found.answers.items():
        lines.append(f"== {part.replace('_', ' ')}")
        for answer in answers:
            said = "\n".join(f"[{m['role']}] {m['content']}" for m in answer["prompt"])
            judged = "refusal" if answer["refuses"] else "no refusal"
            lines += ["", said, f"[answer, {judged} by its keywords] {answer['answer']}"]
        lines.append("")
    output.write_text(path, "\n".join(lines))
