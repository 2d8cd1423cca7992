"""``sap-fast demo``: fine-tune an aligned model on benign data by three methods, and see what is left of its refusals.

SmolLM2-135M-Instruct, taught to refuse by a small adapter that ships with the package, is fine-tuned on the embedded
benign tasks from the same start and with the same seed: plainly (sft), by Safety-Aware Probing (sap), and by projection
(project), which takes from the task gradient its component toward harm. Everything is measured on held-out data.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sap_fast import atomic
from sap_fast.cli import output
from sap_fast.cli.arguments import parse
from sap_fast.cli.comparison import Point, Run, Settings, at_equal_loss, fine_tune, point
from sap_fast.cli.errors import CommandError
from sap_fast.cli.eval import table
from sap_fast.cli.figure import draw
from sap_fast.cli.main import INTERRUPTED
from sap_fast.cli.models import load_model, load_tokenizer, quiet
from sap_fast.cli.train import Data, describe, write_adapter
from sap_fast.config import SAPConfig
from sap_fast.data import benign_examples, encode_pairs, encode_tasks, safety_pairs
from sap_fast.environment import environment
from sap_fast.evaluation.measure import Suite, embedded_suite, measure

MAX_LENGTH = 256
_METHODS = ("sft", "sap", "project")


@dataclass
class DemoArguments:
    """Holds the demonstration's settings, which were found by ``benchmarks/demo_search.py``."""

    steps: int = field(default=12, metadata={"help": "of each method"})
    batch: int = field(default=4, metadata={"help": "benign tasks a step"})
    pairs: int = field(default=4, metadata={"help": "safety pairs a step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "AdamW's"})
    strength: float = field(default=0.003, metadata={"help": "of sap's probe, in units of each layer's RMS"})
    probe_layers: list[int] | None = field(default=None, metadata={"help": "counted from 0; else the middle third"})
    methods: list[str] = field(
        default_factory=lambda: list(_METHODS), metadata={"help": f"which of {_METHODS}, in this order"}
    )
    eval_every: int = field(default=4, metadata={"help": "measure on the way every so many steps"})
    max_new_tokens: int = field(default=0, metadata={"help": "of greedy answers, judged by keywords; 0 for none"})
    seed: int = field(default=0, metadata={"help": "of adapters, data order and pairs"})
    model: str | None = field(default=None, metadata={"help": "folder of another chat model to start from"})
    output_dir: str = field(default="runs/demo", metadata={"help": "report, figure and adapters go there"})

    def check(self) -> None:
        """Refuse settings that make no run.

        Raises:
            CommandError: naming the flag.
        """
        for name in ("steps", "batch", "pairs", "eval_every"):
            if getattr(self, name) < 1:
                raise CommandError(f"--{name} must be at least 1, but is {getattr(self, name)}")
        if unknown := [name for name in self.methods if name not in _METHODS]:
            raise CommandError(f"--methods knows {list(_METHODS)}, but not {unknown}")
        if not self.learning_rate > 0:
            raise CommandError(f"--learning_rate must be positive, but is {self.learning_rate}")

    def configs(self) -> dict[str, SAPConfig | None]:
        """The settings by method; None is plain fine-tuning."""
        layers: dict[str, Any] = {} if self.probe_layers is None else {"probe_layers": tuple(self.probe_layers)}
        try:
            known = {
                "sft": None,
                "sap": SAPConfig(strength=self.strength, **layers),
                "project": SAPConfig(guard="project"),
            }
        except ValueError as error:
            raise CommandError(str(error)) from None
        return {name: known[name] for name in self.methods}


def main(argv: Sequence[str]) -> int:
    """Measure the start, fine-tune by each method, print one table."""
    (args,) = parse("demo", (DemoArguments,), argv, __doc__ or "")
    args.check()
    configs, folder = args.configs(), Path(args.output_dir)
    written = {"report.json", "margin.png", *_METHODS}
    # It may be run again where only it has written, and replaces all of it in the end.
    again = folder.is_dir() and {path.name for path in folder.iterdir()} <= written
    output.claim(folder, overwrite=again)
    if find_spec("matplotlib") is None:
        raise CommandError("the demonstration draws a figure: pip install 'sap-fast[demo]'")

    base, name = _start(args.model)
    print(f"Base model: {name} ({base})", flush=True)
    tokenizer = load_tokenizer(str(base))
    suite = embedded_suite(tokenizer, MAX_LENGTH)
    data = Data(
        encode_tasks(tokenizer, [x._asdict() for x in benign_examples()], MAX_LENGTH),
        encode_pairs(tokenizer, [x._asdict() for x in safety_pairs()], MAX_LENGTH),
    )
    report: dict[str, Any] = {
        "base_model": name,
        "settings": {key: value for key, value in asdict(args).items() if key not in ("model", "output_dir")},
        "environment": environment(_device()),
        "measured": {},
    }
    measured: dict[str, dict[str, Any]] = report["measured"]
    ways: dict[str, list[Point]] = {}
    status = 0
    work = folder.with_name(f".{folder.name}.unfinished")
    atomic.discard(work if work.exists() else None)  # of a run that was killed
    start = load_model(str(base), dtype="float32", device=_device())
    _check_layers(configs, start)
    try:
        with quiet():
            measured["start"] = dict(measure(start, tokenizer, suite, args.max_new_tokens).figures)
        print(_line("start", measured["start"]), flush=True)
        first = point(0, measured["start"])
        for method, config in configs.items():
            model, run = _one(method, config, base, tokenizer, data, suite, args, first, work)
            write_adapter(model, tokenizer, work / method)
            ways[method] = run.way
            measured[method] = {**run.figures, "seconds_per_step": run.seconds_per_step}
            report |= {f"{method}_way": [asdict(p) for p in run.way], f"{method}_log": run.log}
            if config is not None:
                report[f"{method}_config"] = describe(config, model)
    except KeyboardInterrupt:
        print("\nInterrupted; keeping the methods that were finished.")
        status = INTERRUPTED

    verdict = _verdict(ways)
    atomic.write_json(work / "report.json", {**report, "verdict": verdict})
    if ways:
        draw(work / "margin.png", ways, f"{name}, benign fine-tuning")
    # An earlier run stays where this one did not finish.
    place = folder if status == 0 else folder.with_name(f"{folder.name}.interrupted")
    atomic.replace(work, place)
    print(f"\n{table(measured, {'seconds_per_step': 's / step'})}\n\n{verdict}")
    print(f"Report, figure and adapters (plain PEFT, no probe in them): {place}")
    return status


def _check_layers(configs: dict[str, SAPConfig | None], model: Any) -> None:
    """Refuse probe layers that the model does not have, before the first method is run."""
    for config in configs.values():
        try:
            if config is not None and config.uses_probe:
                config.layers_of(model.config.num_hidden_layers)
        except ValueError as error:
            raise CommandError(str(error)) from None


def _start(model: str | None) -> tuple[Path, str]:
    """Return the folder to start from, and what to call it."""
    from sap_fast.data.alignment import aligned_smollm2

    if model is not None:
        return Path(model), Path(model).name
    print("Preparing SmolLM2-135M-Instruct (the first time it is converted and aligned: a minute) ...", flush=True)
    try:
        with quiet():
            folder = aligned_smollm2()
    except FileNotFoundError as error:  # which says what to install
        raise CommandError(str(error)) from None
    return folder, folder.name


def _one(
    method: str,
    config: SAPConfig | None,
    base: Path,
    tokenizer: Any,
    data: Data,
    suite: Suite,
    args: DemoArguments,
    start: Point,
    folder: Path,
) -> tuple[nn.Module, Run]:
    settings = Settings(args.steps, args.batch, args.pairs, args.learning_rate, args.seed, args.eval_every)
    tell = _teller(method, args.steps)
    return fine_tune(base, tokenizer, data, suite, settings, config, start, folder / method, tell, args.max_new_tokens)


def _teller(method: str, steps: int) -> Callable[[Point], None]:
    def tell(point: Point) -> None:
        print(
            f"{method:8} step {point.step:3d}/{steps}  task loss {point.task_loss:.3f}  margin {point.margin:+.3f}",
            flush=True,
        )

    return tell


def _line(name: str, figures: dict[str, Any]) -> str:
    return (
        f"{name:8} prefers a refusal on {figures['prefers_refusal']:.0%} of unseen harmful requests, an answer on "
        f"{figures['look_alikes_answered']:.0%} of safe look-alikes"
    )


def _verdict(ways: dict[str, list[Point]]) -> str:
    """Say what the figures tell of SAP, whichever way they point."""
    if "sap" not in ways or len(ways) < 2:
        return "There is nothing to compare sap with."
    loss, margins = at_equal_loss(ways)
    lines = [f"At equal task loss ({loss:.3f}, the lowest that all reach), margin on unseen wording:"]
    lines += [f"  {name:8} {margin:+.3f}" for name, margin in margins.items()]
    for name, margin in margins.items():
        if name != "sap":
            ahead = margins["sap"] - margin
            lines.append(f"sap is {'ahead of' if ahead > 0 else 'NOT ahead of'} {name}: {ahead:+.3f} nats per token.")
    return "\n".join(lines)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
