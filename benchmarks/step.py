"""A whole training step against the published one, on the same tokens.

    python -m benchmarks.step --json result.json [--model smollm2] [--dtype float32 bfloat16]

Two contenders take turns in one process, each on its own copy of one model with LoRA adapters: the published step in
its tidy form (``published_step.py``), and the library's lagged step. Both leave the task's gradient in ``.grad``; the
optimizer is left out. They are timed on rows of two kinds: ``full``, all of one length, so that there is no padding
and both compute on the same tokens, and ``real``, of the lengths that examples have, which the published step pads.

Before anything is timed, the first step's loss and gradient of each, at V = 0, are compared with those of plain
autograd on a float64 copy of the model.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sap_fast
from benchmarks import models
from benchmarks.published_parts import gradients, task_loss, trained
from benchmarks.published_step import PublishedStep
from sap_fast import SAPConfig
from sap_fast.data import Example, Pair, collate, collate_pairs, safety_pairs

Batch = Mapping[str, Tensor]
Step = Callable[[Batch, Batch], Tensor]
Row = dict[str, Any]

BASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "smollm2": models.smollm2_base,
    "random": models.random_base,
    "tiny": models.tiny_base,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of the norm of the whole gradient: roundings add up over the layers of a model.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
# Sequences of a task batch and their length; pairs, and the length of each answer with its prompt.
TASKS, TASK_LENGTH = 4, 64
PAIRS, PAIR_LENGTH = 4, 96
WARM_UP = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write it as JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    parser.add_argument("--model", choices=BASES, default="smollm2")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=9, help="of each contender; at least 7 make a result")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    base, tokenizer = BASES[args.model]()
    model = models.with_lora(base, seed=0)
    wake(model)
    rows: list[Row] = []
    for padding, (batch, pairs) in batches(tokenizer).items():
        for name in args.dtype:
            rows += measure(model, name, batch, pairs, padding, args.rounds)
            for row in rows[-2:]:
                print(line(row), flush=True)
    settings = {"model": args.model, "rounds": args.rounds, "lora": "r = 8 on q_proj and v_proj", "optimizer": "none"}
    models.write(args.json, {"environment": models.environment(), "settings": settings, "rows": rows})
    return 0


def wake(model: nn.Module) -> None:
    """Move B away from zero, where A would have no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in trained(model).items():
            if "lora_B" in name:
                p.add_(1e-2 * torch.randn(p.shape, generator=generator))


# The data


def batches(tokenizer: Any) -> dict[str, tuple[Batch, Batch]]:
    """Task batch and pairs by the kind of their rows."""
    tasks, pairs = models.examples(), safety_pairs()
    real = collate(tokenizer, tasks[:TASKS], TASK_LENGTH), collate_pairs(tokenizer, pairs[:PAIRS], PAIR_LENGTH)
    full_tasks = [joined(tasks[i::TASKS]) for i in range(TASKS)]
    full_pairs = [joined(pairs[i::PAIRS]) for i in range(PAIRS)]
    full = (
        collate(tokenizer, full_tasks, TASK_LENGTH),
        collate_pairs(tokenizer, full_pairs, PAIR_LENGTH),
    )
    for rows, length in zip(full, (TASK_LENGTH, PAIR_LENGTH), strict=True):
        assert rows["attention_mask"].all() and rows["input_ids"].shape[1] == length, "a row is not full"
    return {"full": full, "real": real}


def joined(examples: Sequence[Any]) -> Any:
    """The first one's prompt, with all their answers as its answer: long enough to be cut to any length."""
    if isinstance(examples[0], Example):
        return Example(examples[0].prompt, " ".join(example.completion for example in examples))
    chosen, rejected = (" ".join(getattr(pair, side) for pair in examples) for side in ("chosen", "rejected"))
    return Pair(examples[0].category, examples[0].prompt, chosen, rejected)


# The contenders


@contextmanager
def published(model: nn.Module) -> Iterator[Step]:
    layers = SAPConfig().layers_of(model.config.num_hidden_layers)
    with PublishedStep(model, layers) as step:
        yield step.step


@contextmanager
def lagged(model: nn.Module) -> Iterator[Step]:
    with sap_fast.attach(model, SAPConfig(schedule="lagged")) as sap:

        def step(batch: Batch, pairs: Batch) -> Tensor:
            for p in model.parameters():
                p.grad = None
            return torch.as_tensor(sap.step(batch, pairs).loss)

        yield step


CONTENDERS = {"published": published, "lagged": lagged}


def measure(model: nn.Module, dtype: str, batch: Batch, pairs: Batch, padding: str, rounds: int) -> list[Row]:
    """Time both, in turns."""
    expected = truth(model, batch)
    with ExitStack() as stack:
        steps: dict[str, Step] = {}
        for name, contender in CONTENDERS.items():
            own = stored_in(copy.deepcopy(model), DTYPES[dtype])
            steps[name] = stack.enter_context(contender(own))
            loss = steps[name](batch, pairs)
            compare(name, loss, {n: p.grad for n, p in trained(own).items()}, expected, TOLERANCE[dtype])
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(-WARM_UP, rounds):
            for name in list(steps)[:: 1 if i % 2 else -1]:
                start = time.perf_counter()
                steps[name](batch, pairs)
                if i >= 0:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    tokens = int(batch["attention_mask"].sum()), int(pairs["attention_mask"].sum())
    shapes = list(batch["input_ids"].shape), list(pairs["input_ids"].shape)
    return [
        {"contender": name, "device": "cpu", "dtype": dtype, "padding": padding, "options": {}}
        | {"ms": 1e3 * median, "ms_least": 1e3 * min(seconds[name]), "ms_most": 1e3 * max(seconds[name])}
        | {"ratio_to_published_tidy": median / medians["published"], "rounds": len(seconds[name])}
        | {"task_shape": shapes[0], "task_tokens": tokens[0], "pair_shape": shapes[1], "pair_tokens": tokens[1]}
        for name, median in medians.items()
    ]


def stored_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Frozen weights in a dtype; adapters stay in float32, as people train."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)
    return model


def truth(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The task's loss and gradient, by plain autograd in float64."""
    exact = copy.deepcopy(model).double().eval()
    loss = task_loss(exact, batch)
    return loss.detach(), gradients(loss, trained(exact))


def compare(
    name: str, loss: Tensor, found: Mapping[str, Any], expected: tuple[Tensor, Mapping[str, Tensor]], tolerance: float
) -> None:
    """See that a contender's loss and gradient are right.

    Raises:
        AssertionError: they are not.
    """
    off = abs(float(loss) / float(expected[0]) - 1)
    assert off <= tolerance, f"{name}: the loss is off by {off:.2g} of itself"
    assert found.keys() == expected[1].keys()
    pairs = [(found[n].double(), x) for n, x in expected[1].items()]
    error, scale = (
        sum(float(x.square().sum()) for x in xs) ** 0.5 for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    assert error <= tolerance * scale, f"{name}: the gradient is off by {error / scale:.2g} of its norm"


def line(row: Row) -> str:
    """A row as text."""
    what = f"{row['padding']:5} {row['dtype']:9} {row['contender']:10}"
    times = f"{row['ms']:8.0f} ms ({row['ms_least']:.0f} to {row['ms_most']:.0f})"
    return f"{what}{times}  {row['ratio_to_published_tidy']:.2f}x published"


if __name__ == "__main__":
    raise SystemExit(main())
