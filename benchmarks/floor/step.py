"""The least time that one training step can take, method by method.

``work.py`` counts what a traversal of the decoder costs. Here traversals make up the steps of the methods, and

    floor = max(matrix FLOPs / peak + row-wise bytes / bandwidth, all bytes / bandwidth)

since a row-wise operation waits for the product before it. LoRA's time is the longer of its FLOPs and its bytes.
Launches are left out, and so are products whose shape does not fill the device: how far a step is above its floor says
what is left to gain. Bytes count as if no cache kept them from one operation to the next; where rows are so few that
one does, a step can be a little faster in its row-wise part.
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, get_args

from benchmarks.floor.work import Shape, Tokens, Work, check_positive, traversal

Name = Literal["sft", "published", "released", "literal", "lagged", "fresh"]


@dataclass(frozen=True)
class Device:
    """Describes what a device can do at best: ``peak`` in FLOP/s of matrix products, ``bandwidth`` in bytes/s."""

    name: str
    peak: float
    bandwidth: float

    def __post_init__(self) -> None:
        check_positive("a device", {"peak": self.peak, "bandwidth": self.bandwidth})


@dataclass(frozen=True)
class BatchShape:
    """Describes what a step is given: the task, and the pairs (chosen and rejected rows together).

    Without pairs the step goes on with a direction it has: what finding one costs is left out.

    Attributes:
        pair_count: how many pairs there are; only ``pairs_per_step`` asks for it.
    """

    task: Tokens
    pairs: Tokens | None = None
    pair_count: int | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """Tells how a step is computed.

    Attributes:
        name: ``"sft"``: plain fine-tuning, pairs unread. ``"published"``: three passes, of the pairs, of the task at
            moved weights (whose backward ends at the lowest probe) and of the task. ``"released"``: the same, with one
            forward for a pair's two answers, that is on half of the pairs' rows. ``"literal"``: the algorithm of the
            paper pass by pass, with a second one at the weights that were not moved. ``"lagged"`` and ``"fresh"``: the
            library's schedules.
        lowest_probe: the lowest probed layer, counted from 0; every name but ``"sft"`` needs it.
        probe_every, direction_every, tangent_fraction, pairs_per_step: as in ``sap_fast.SAPConfig``, of lagged and
            fresh steps; work is the mean over the steps of a period.
        float8: how many times faster FP8 runs the frozen maps on pairs and tangents, of lagged and fresh steps.

    Raises:
        ValueError: a setting out of its range, or one that the method does not have.
    """

    name: Name
    lowest_probe: int | None = None
    probe_every: int = 1
    direction_every: int = 1
    tangent_fraction: float = 1.0
    pairs_per_step: int | None = None
    float8: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise ValueError(f"name of a method must be one of {list(get_args(Name))}, but is {self.name!r}")
        counts = {"probe_every": self.probe_every, "direction_every": self.direction_every}
        if self.pairs_per_step is not None:
            counts["pairs_per_step"] = self.pairs_per_step
        check_positive("a method", counts, whole=True)
        check_positive("a method", {"tangent_fraction": self.tangent_fraction, "float8": self.float8})
        if self.tangent_fraction > 1 or self.float8 < 1:
            raise ValueError(
                "tangent_fraction must be at most 1 and float8 at least 1, but they are "
                f"{self.tangent_fraction} and {self.float8}"
            )
        options = ("probe_every", "direction_every", "tangent_fraction", "pairs_per_step", "float8")
        given = [f.name for f in fields(self) if f.name in options and getattr(self, f.name) != f.default]
        if given and self.name not in ("lagged", "fresh"):
            raise ValueError(f"{given} belong to the methods lagged and fresh, not to {self.name!r}")


@dataclass(frozen=True)
class Floor:
    """A step's work, and the least time that it takes on a device."""

    work: Work
    device: Device

    @property
    def flops(self) -> float:
        return self.work.flops

    @property
    def bytes(self) -> float:
        """Count all that has to cross the device's memory interface."""
        return self.work.bytes

    @property
    def matrix_ms(self) -> float:
        """The milliseconds of matrix products but LoRA's."""
        work = self.work
        return 1e3 * (work.linear + work.attention + work.head - work.spared) / self.device.peak

    @property
    def rowwise_ms(self) -> float:
        """The milliseconds of row-wise operations and LoRA."""
        lora = max(self.work.lora / self.device.peak, self.work.lora_bytes / self.device.bandwidth)
        return 1e3 * (self.work.rowwise / self.device.bandwidth + lora)

    @property
    def ms(self) -> float:
        return max(self.matrix_ms + self.rowwise_ms, 1e3 * self.bytes / self.device.bandwidth)


def step_floor(shape: Shape, device: Device, batch: BatchShape, method: Method) -> Floor:
    """Compute the floor of one step (of one on average, where steps differ).

    Raises:
        ValueError: ``lowest_probe`` is missing or not a layer; ``pairs_per_step`` without a count of pairs.
    """
    return Floor(_step_work(shape, batch, method), device)


def _step_work(shape: Shape, batch: BatchShape, method: Method) -> Work:
    task, everything = partial(traversal, shape, batch.task), range(shape.layers)
    plain = task(everything) + task(everything, backward=True)
    if method.name == "sft":
        return plain
    lowest = method.lowest_probe
    if lowest is None or not (0 <= lowest < shape.layers and lowest == int(lowest)):
        raise ValueError(
            f"lowest_probe of the method {method.name!r} must be one of layers 0 to {shape.layers - 1}, "
            f"counted from 0, but is {lowest}"
        )
    # A probe acts on a layer's output, so that its own layer lies beneath it.
    above, beneath = range(lowest + 1, shape.layers), range(lowest + 1)
    safety = _safety(shape, batch, method)
    if method.name in ("published", "released", "literal"):
        for_probe = task(everything) + task(above, backward=True)
        return safety + for_probe * (2 if method.name == "literal" else 1) + plain

    share, float8 = method.tangent_fraction, (1.0, method.float8)
    if method.name == "lagged":
        dual = partial(task, tangents=share, float8=float8)
        guarded = dual(everything) + dual(above, backward=True) + task(beneath, backward=True, head=False)
    else:
        inner = partial(traversal, shape, batch.task.share(share), tangents=1.0, float8=float8)
        guarded = inner(everything) + inner(above, backward=True)
        # Beneath the lowest probe nothing has changed, so that the inner pass's rows go on from there.
        guarded += task(above) + task(everything, backward=True)
        if share < 1:
            guarded += traversal(shape, batch.task.share(1 - share), beneath, head=False)
    # Directions are found in steps that find a probe.
    period = method.probe_every * math.ceil(method.direction_every / method.probe_every)
    return safety * (1 / period) + guarded * (1 / method.probe_every) + plain * (1 - 1 / method.probe_every)


def _safety(shape: Shape, batch: BatchShape, method: Method) -> Work:
    """Count the work of finding a direction."""
    pairs = batch.pairs
    if pairs is None:
        return Work()
    if method.name == "released":
        pairs = pairs.share(0.5)
    if method.pairs_per_step is not None:
        if batch.pair_count is None or batch.pair_count < 1:
            raise ValueError(f"pairs_per_step needs the batch's pair_count, at least 1, but it is {batch.pair_count}")
        pairs = pairs.share(min(1.0, method.pairs_per_step / batch.pair_count))
    run = partial(traversal, shape, pairs, range(shape.layers), float8=(method.float8, 1.0))
    return run() + run(backward=True)
