"""The floor of a contender of ``benchmarks.step``: of the rows that it computes on, by its own method.

A contender that computes on padding is held to the padded rows, one that shares rows to those that are left, one whose
head runs on scored rows to those: a floor is of its own computation, and the ratio to it says what time is lost beside
that. What a contender computes twice (the logits, where they are not stored) is not needed, and not counted.
Attention over shared rows counts once a row, at the mean length.
"""

from typing import Any

from torch import nn

from benchmarks.floor.step import BatchShape, Device, Floor, Method, step_floor
from benchmarks.floor.work import Shape, Tokens
from benchmarks.step.batches import Given, scored
from benchmarks.step.contenders import Contender
from benchmarks.step.run import Run


def shape_of(model: Any) -> Shape:
    """Read the shape of a model with adapters, in the dtype that its frozen weights are stored in."""
    adapter = next(iter(model.peft_config.values()))
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    targets = tuple(sorted(adapter.target_modules))
    return Shape.of(model.config, rank=adapter.r, targets=targets, dtype_bytes=frozen.element_size())


def contender_floor(contender: Contender, run: Run, given: Given, model: nn.Module, device: Device) -> Floor:
    """Compute the floor of a contender's mean step.

    Args:
        model: with its adapters; only its shape is read.
        device: what the device reaches.
    """
    batch = BatchShape(
        _tokens(run.task_lengths, run.task_rows, scored(given.batch) if run.head_on_scored else None),
        _tokens(run.pair_lengths, run.pair_rows, scored(given.pairs) if run.head_on_scored else None)
        if run.pair_lengths
        else None,
        given.shapes.pairs,
    )
    return step_floor(shape_of(model), device, batch, _method(contender, run, given))


def _tokens(lengths: list[int], rows: int | None, head: int | None) -> Tokens:
    tokens = Tokens.of(lengths, head)
    return tokens if rows is None else Tokens(rows, tokens.length, None if head is None else min(head, rows))


def _method(contender: Contender, run: Run, given: Given) -> Method:
    said = contender.options
    options: dict[str, Any] = {key: said[key] for key in ("probe_every", "direction_every") if key in said}
    if "tangent_fraction" in said:
        # Of whole sequences, as the library draws them.
        count = len(run.task_lengths)
        options["tangent_fraction"] = max(1, round(said["tangent_fraction"] * count)) / count
    if "pairs_per_step" in said:
        options["pairs_per_step"] = given.shapes.pairs // 2
    if said.get("float8"):
        options["float8"] = 2.0  # of tensor cores, at their peak
    return Method(name=contender.method, lowest_probe=run.lowest_probe, **options)
