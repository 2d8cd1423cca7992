"""Measures what the options that save passes cost in quality: how far their numbers are from the exact step's.

    python -m benchmarks.options --json result.json [--model smollm2] [--steps 15] [--looks 8]

A model is trained for a few steps by the exact lagged step, and then for some more while it is looked at: at each
of these steps the adapters of every option's model are set to those of the exact one, and both take a step on the same
batch and pairs. So the weights never differ, only what an option carries over from earlier steps, or draws. Compared
are the things that act in a step, as the step before has left them, and what comes of them, by their cosines:

- ``direction``: the harmful directions along which the probes were found;
- ``probe_gradient``: the ``grad_V L_dot`` that they were found on;
- ``probe``: the probes themselves;
- ``update``: the gradients left in ``.grad``;
- ``effect``: the gradients less that of plain fine-tuning at the same weights: what the probe adds.

``direction_age`` and ``probe_age`` say how many steps older than the exact ones they are. What is drawn is drawn anew
in each step.

The exact step's own numbers change from step to step, because batch and pairs do. How much they change for that alone
is shown by a control, ``{"data": "other"}``: the exact step, whose probe was found at the same weights on another
batch and other pairs. A stale or estimated probe is as good as any if it is as near to the exact one as that.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import models, record
from benchmarks.common.record import Row
from benchmarks.published.parts import trained
from sap_fast import SAPConfig
from sap_fast.data import Example, Pair, collate, collate_pairs, safety_pairs
from sap_fast.method.flat import Flat
from sap_fast.step import SAP

Batch = Mapping[str, Tensor]

MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "smollm2": models.smollm2_base,
    "random": models.random_base,
    "tiny": models.tiny_base,
}
SEQUENCES, PAIRS, LEARNING_RATE, MAX_LENGTH = 4, 4, 1e-3, 256
EXACT = SAPConfig(schedule="lagged")
OPTIONS: tuple[Mapping[str, Any], ...] = (
    {"probe_every": 8},
    {"direction_every": 4},
    {"tangent_fraction": 0.5},
    {"tangent_fraction": 0.25},
    {"direction_every": 4, "tangent_fraction": 0.25},
    {"pairs_per_step": PAIRS // 2},
    {"delayed_direction": True},
    {"float8": "emulated"},
    {"delayed_direction": True, "float8": "emulated"},
)
# The exact step too, but for where its probe was found: on another batch and other pairs.
CONTROL: Mapping[str, Any] = {"data": "other"}
COSINES = ("direction", "probe_gradient", "probe", "update", "effect")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write it as JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--steps", type=int, default=15, help="of training before the first look")
    parser.add_argument("--looks", type=int, default=8, help="consecutive steps that are looked at")
    parser.add_argument("--data", type=Path, help="instructions and outputs as a JSON list")
    parser.add_argument("--smollm2", type=Path, help="a folder to take SmolLM2 from, as transformers saves it")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.looks < 1 or args.steps < 0:
        parser.error(f"--looks must be at least 1 and --steps at least 0, but they are {args.looks} and {args.steps}")

    torch.manual_seed(0)
    base, tokenizer = models.smollm2_base(args.smollm2) if args.model == "smollm2" else MODELS[args.model]()
    model = models.with_lora(base).to(args.device)
    given = Batches(tokenizer, models.examples(args.data), safety_pairs(), args.device)
    train(model, given, args.steps)
    rows = look(model, given, args.steps, args.looks)
    summary = summarised(rows)
    settings = {"model": args.model, "dtype": "float32", "steps": args.steps, "looks": args.looks}
    settings |= {"sequences": SEQUENCES, "pairs": PAIRS, "learning_rate": LEARNING_RATE}
    result = {"environment": record.environment(args.device), "settings": settings}
    record.write(args.json, result | {"summary": summary, "rows": rows})
    print("\n".join(lines(rows, summary)))
    return 0


class Batches:
    """What step number i is given: batch and pairs, going round the data."""

    def __init__(self, tokenizer: Any, examples: Sequence[Example], pairs: Sequence[Pair], device: str) -> None:
        self._tokenizer, self._examples, self._pairs, self._device = tokenizer, examples, pairs, device

    def __call__(self, step: int) -> tuple[Batch, Batch]:
        batch = collate(self._tokenizer, _turn(self._examples, SEQUENCES, step), MAX_LENGTH)
        pairs = collate_pairs(self._tokenizer, _turn(self._pairs, PAIRS, step), MAX_LENGTH)
        return self._placed(batch), self._placed(pairs)

    def _placed(self, batch: Batch) -> Batch:
        return {key: x.to(self._device) for key, x in batch.items()}


def _turn(rows: Sequence[Any], count: int, step: int) -> list[Any]:
    return [rows[(step * count + i) % len(rows)] for i in range(count)]


class Observer:
    """Takes the steps of a handle, and keeps what the last one worked with.

    Attributes:
        direction, gradient: what the probe was found along, and the ``grad_V L_dot [P, d]`` that it was found on.
        ages: steps since direction and probe were found.
    """

    def __init__(self, sap: SAP) -> None:
        self._sap = sap
        self.direction: Flat | None = None
        self.gradient: Tensor | None = None
        self.ages = {"direction_age": 0, "probe_age": 0}

    def observe(self, batch: Batch, pairs: Batch | None) -> Tensor:
        """Take a step; return the gradient that it leaves, as one vector."""
        weights, before, delayed = (
            self._sap.decoder.trained.values(),
            self._sap.state,
            self._sap.config.delayed_direction,
        )
        for p in weights:
            p.grad = None
        outcome = self._sap.compute(batch, pairs)
        self._sap.commit(outcome)
        report = outcome.report
        if report.found_probe:
            self.direction, self.gradient = outcome.u, outcome.probe_dot
        # One that is found beside the pass that uses the last one is not in use yet.
        found = report.found_direction and not (delayed and before.direction is not None)
        since = 0 if before.rhythm.age is None else before.rhythm.age
        self.ages = {
            "direction_age": 0 if found else since + 1,
            "probe_age": 0 if report.found_probe else self.ages["probe_age"] + 1,
        }
        return torch.cat([p.grad.flatten() for p in weights if p.grad is not None])

    def acting(self) -> dict[str, Tensor]:
        """The vectors that act in the next step."""
        assert self.gradient is not None and self.direction is not None  # a step was taken
        return {
            "direction": self.direction.vector,
            "probe_gradient": self.gradient.flatten(),
            "probe": self._sap.state.probe.vectors.flatten(),
        }


def train(model: nn.Module, given: Batches, steps: int) -> None:
    """Train by the exact step."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=LEARNING_RATE)
    with SAP(model, EXACT) as sap:
        for step in range(steps):
            sap.step(*given(step))
            optimizer.step()
            optimizer.zero_grad()


def look(
    model: nn.Module,
    given: Batches,
    start: int,
    looks: int,
    options: Sequence[Mapping[str, Any]] = OPTIONS,
) -> list[Row]:
    """Make the rows of every option at every look.

    Args:
        model: is trained on, by the exact step.
        start: number of the first step, in which nothing acts yet: the looks are at those after it.
    """
    rows: list[Row] = []
    optimizer = torch.optim.AdamW(trained(model).values(), lr=LEARNING_RATE)
    with ExitStack() as stack:
        opened = [(option, None) for option in options] + [(CONTROL, parity) for parity in (0, 1)]
        plain, *others = (Follower(model, stack, o, parity) for o, parity in [({}, None), *opened])
        exact = Observer(stack.enter_context(SAP(model, EXACT)))
        for i in range(looks + 1):
            data = given(start + i)
            at_exact = exact.acting() if i else {}
            gradient = exact.observe(*data)
            without = plain.at(model).observe(data[0], None)
            for other in others:
                acting, ages = other.sap.acting() if i else {}, other.sap.ages
                # Steps after those that are looked at, so other data.
                elsewhere = i % 2 == other.parity
                own = other.at(model).observe(*(given(start + looks + 1 + i) if elsewhere else data))
                if i == 0 or elsewhere:
                    continue
                both = {name: (acting[name], at_exact[name]) for name in at_exact}
                both |= {"update": (own, gradient), "effect": (own - without, gradient - without)}
                cosines = {name: cosine(*pair) for name, pair in both.items()}
                rows.append({"options": dict(other.options), "look": i, **ages, **cosines})
            optimizer.step()
    return rows


class Follower:
    """Holds an option's handle, on a twin of the model.

    Attributes:
        parity: of a control's steps on other data; in those between, it is looked at. None of an option.
    """

    def __init__(self, model: nn.Module, stack: ExitStack, options: Mapping[str, Any], parity: int | None) -> None:
        self.options, self.parity = options, parity
        self._twin = models.twin(model)
        changes = {} if options is CONTROL else options
        self.sap = Observer(stack.enter_context(SAP(self._twin, EXACT.replace(**changes))))

    def at(self, model: nn.Module) -> Observer:
        """The handle, with the twin's adapters set to the model's."""
        with torch.no_grad():
            for p, q in zip(trained(self._twin).values(), trained(model).values(), strict=True):
                p.copy_(q)
        return self.sap


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of two vectors; 0 where one is zero."""
    a, b = a.double(), b.double()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else 0.0


def summarised(rows: Sequence[Row]) -> list[Row]:
    """Summarise each option by the mean and the least cosine over its looks."""
    summary = []
    for option in _options(rows):
        own = [row for row in rows if row["options"] == option]
        columns = {name: [row[name] for row in own] for name in COSINES}
        entry = {name: {"mean": mean(column), "least": min(column)} for name, column in columns.items()}
        summary.append({"options": option, "looks": len(own), **entry})
    return summary


def _options(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for row in rows:
        if row["options"] not in found:
            found.append(row["options"])
    return found


def lines(rows: Sequence[Row], summary: Sequence[Row]) -> list[str]:
    """Write a table: mean (least) over the looks of each option; and by age, of what grows old."""
    head = f"{'cosine to the exact step, mean (least)':44}" + "".join(f"{name:>18}" for name in COSINES)
    table = [head]
    for entry in summary:
        cells = [f"{entry[name]['mean']:+.3f} ({entry[name]['least']:+.3f})" for name in COSINES]
        table.append(f"{said(entry['options']):44}" + "".join(f"{cell:>18}" for cell in cells))
        own = [row for row in rows if row["options"] == entry["options"]]
        ages = sorted({row["direction_age"] for row in own})
        for age in ages if len(ages) > 1 else []:
            there = [row for row in own if row["direction_age"] == age]
            cells = [f"{mean(row[name] for row in there):+.3f}" for name in COSINES]
            table.append(f"{f'  {age} steps older':44}" + "".join(f"{cell:>18}" for cell in cells))
    return table


def said(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


if __name__ == "__main__":
    raise SystemExit(main())
