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

from sap_fast import atomic
from sap_fast.cli import output
from sap_fast.cli.arguments import parse
from sap_fast.cli.errors import CommandError
from sap_fast.cli.models import base_of, is_adapter, is_folder, load_tokenizer, load_with_adapter, quiet
from sap_fast.environment import environment
from sap_fast.evaluation.measure import Measured, Suite, measure, suite_from

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
    """Holds what is measured, and on what."""

    models: list[str] = field(metadata={"help": "folders of models or adapters, or names on the Hugging Face hub"})
    base: str | None = field(default=None, metadata={"help": "of the adapters, if not the folder they name"})
    pairs: str | None = field(default=None, metadata={"help": "held-out pairs: rows of prompt, chosen, rejected"})
    look_alikes: str | None = field(default=None, metadata={"help": "rows of prompt, completion, refusal"})
    data: str | None = field(default=None, metadata={"help": "task data for the task loss"})
    output_dir: str = field(default="runs/eval", metadata={"help": "where eval.json and the answers go"})
    overwrite: bool = field(default=False, metadata={"help": "write to a folder that holds other things"})
    max_new_tokens: int = field(default=48, metadata={"help": "of each greedy answer; 0 writes none"})
    max_length: int = field(default=1024, metadata={"help": "longer rows are cut at their end (tokens)"})
    chat_template: str | None = field(default=None, metadata={"help": "a Jinja file, for a model without one"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "of the models"})
    device: str | None = field(default=None, metadata={"help": "cuda where there is one, else cpu"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a model"})


@dataclass(frozen=True)
class _Subject:
    """Holds a model to measure, with what it is measured on."""

    name: str
    tokenizer: Any
    suite: Suite


def main(argv: Sequence[str]) -> int:
    """Check everything, measure every model, print one table."""
    (args,) = parse("eval", (EvalArguments,), argv, __doc__ or "")
    folder, device = Path(args.output_dir), _device(args.device)
    if len(set(args.models)) < len(args.models):
        raise CommandError(f"--models names a model twice: {args.models}")
    if args.max_new_tokens < 0:
        raise CommandError(f"--max_new_tokens must not be negative, but is {args.max_new_tokens}")
    output.claim(folder, overwrite=args.overwrite)
    subjects = [_subject(spec, args) for spec in args.models]

    results: dict[str, Measured] = {}
    for subject in subjects:
        print(f"Measuring {subject.name} ...", flush=True)
        if subject.suite.cut:
            print(f"  {subject.suite.cut} rows cut at {args.max_length} tokens")
        options = {"dtype": args.dtype, "device": device, "trust_remote_code": args.trust_remote_code}
        model = load_with_adapter(subject.name, args.base, **options)
        with quiet():
            results[subject.name] = measure(model, subject.tokenizer, subject.suite, args.max_new_tokens)

    atomic.write_json(
        folder / "eval.json",
        {
            "models": {name: found.figures for name, found in results.items()},
            "pairs": args.pairs or "embedded, held-out half",
            "look_alikes": args.look_alikes or "embedded",
            "data": args.data or "embedded, held-out",
            "environment": environment(device),
        },
    )
    if args.max_new_tokens:
        atomic.write_folder(folder / "answers", lambda scratch: _write_answers(scratch, results))
    print(table({name: found.figures for name, found in results.items()}))
    print(f"Figures and answers: {folder}")
    return 0


def _subject(spec: str, args: EvalArguments) -> _Subject:
    """Read and check everything of a model but its weights.

    Raises:
        CommandError, DataError: what is wrong with it.
    """
    base = base_of(spec, args.base) if is_adapter(spec) else spec
    is_folder(base)
    # An adapter may come without a tokenizer: then its base's is right.
    own = is_adapter(spec) and (Path(spec) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        spec if own else base, chat_template=args.chat_template, trust_remote_code=args.trust_remote_code
    )
    return _Subject(spec, tokenizer, suite_from(tokenizer, args.pairs, args.look_alikes, args.data, args.max_length))


def _device(name: str | None) -> torch.device:
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(chosen)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {chosen} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def table(rows: dict[str, dict[str, Any]], more: dict[str, str] | None = None) -> str:
    """Write figures by name as a plain table, one line a model; a figure that a model lacks is a dash."""
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


def _write_answers(folder: Path, results: dict[str, Measured]) -> None:
    """Write every greedy answer as text, under its prompt: a file for each model, by its place in the table."""
    for number, (name, found) in enumerate(results.items(), 1):
        lines = [f"Greedy answers of {name}", ""]
        for part, answers in found.answers.items():
            lines.append(f"== {part.replace('_', ' ')}")
            for answer in answers:
                said = "\n".join(f"[{m['role']}] {m['content']}" for m in answer["prompt"])
                judged = "refusal" if answer["refuses"] else "no refusal"
                lines += ["", said, f"[answer, {judged} by its keywords] {answer['answer']}"]
            lines.append("")
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
