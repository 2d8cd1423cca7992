"""What a whole step is aimed at, and whether a run of ``benchmarks.step`` meets it.

Targets are judged on the model and the devices that they name alone, on a GPU at the published shapes, and of medians
of as many rounds as a verdict takes. A ratio of times is the median of those of the rounds, and comes with an interval
that holds it (``rounds.py``).

They are ratios, which an H100 and an H200 share, but for the rate: that one is judged on the
rows that the floor is computed for, the others on rows of real lengths, of which the published step and plain
fine-tuning get the padding too. Liger's fine-tuning gets padding as well: of it without there is no contender, and no
target. A target that is missed says by how much of its bound.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.record import Row
from benchmarks.step.batches import PUBLISHED
from benchmarks.step.rounds import interval

# What a verdict's medians are of, at the least.
LEAST_ROUNDS = 7


@dataclass(frozen=True)
class Target:
    """Describes a bound on one contender's number, or on its ratio to another's.

    Attributes:
        contender, over: whose number; over whose, if over another's.
        column: of the rows.
        bound: the most that it may be; the least, where ``least``.
        faster: whether the ratio is turned round: how many times faster the contender is.
        kind: of the rows that it is judged on.
    """

    contender: str
    over: str | None
    bound: float
    column: str = "ms"
    least: bool = False
    faster: bool = False
    kind: str = "real"

    def value(self, rows: Mapping[str, Row]) -> float | None:
        """Read the number from the rows, by contender; None where they lack one, or its number."""
        if ratios := self._ratios(rows):
            return statistics.median(ratios)
        mine, other = self._numbers(rows, self.column)
        if mine is None or other is None:
            return None
        return other / mine if self.faster else mine / other

    def interval(self, rows: Mapping[str, Row]) -> tuple[float, float] | None:
        """Return what the median of a ratio of times lies in; None of others, and of too few rounds."""
        return interval(self._ratios(rows))

    def rounds(self, rows: Mapping[str, Row]) -> int:
        """Count the rounds of the contender with the fewest; 0 if one is missing."""
        found = [rows[name]["rounds"] if name in rows else 0 for name in (self.contender, self.over) if name]
        return min(found)

    def _ratios(self, rows: Mapping[str, Row]) -> list[float]:
        """Return times' ratios in each round: what slows a whole round down is not in them. Of other columns none."""
        mine, other = self._numbers(rows, "round_ms")
        if self.column != "ms" or self.over is None or mine is None or other is None:
            return []
        return [b / a if self.faster else a / b for a, b in zip(mine, other, strict=False)]

    def _numbers(self, rows: Mapping[str, Row], column: str) -> tuple[Any, Any]:
        mine = rows.get(self.contender, {}).get(column)
        return mine, 1.0 if self.over is None else rows.get(self.over, {}).get(column)

    def __str__(self) -> str:
        sign = ">=" if self.least else "<="
        what = f"{self.contender}, {self.column}" + (f" on {self.kind} rows" if self.kind != "real" else "")
        if self.over is not None:
            what += f": times faster than {self.over}" if self.faster else f" over {self.over}'s"
        return f"{what} {sign} {self.bound:g}"


def _at_most(contender: str, over: str, bound: float, column: str = "ms") -> Target:
    return Target(contender, over, bound, column)


def _faster(contender: str, over: str, bound: float) -> Target:
    return Target(contender, over, bound, least=True, faster=True)


SAVING = "direction-every+tangents"
# A step as it is, and the same captured as a graph: what the host costs is the difference.
EXACT = ("lagged", "graph")
# By the device, as its name begins or what it holds, the model, and the dtypes, all if none.
CPU = (("cpu",), "smollm2", ())
GPU = (("H100", "H200"), "llama-2-7b", ("bfloat16",))
TARGETS: dict[tuple[tuple[str, ...], str, tuple[str, ...]], tuple[Target, ...]] = {
    CPU: (
        _at_most("lagged", "tidy", 0.75),
        _at_most("lagged", "released", 0.5),
        _at_most(SAVING, "plain-sft", 1.2),
        _at_most("probe-every", "plain-sft", 1.0),
    ),
    GPU: (
        *(_faster(name, "tidy", 2.5) for name in EXACT),
        *(_faster(name, "released", 1.7) for name in EXACT),
        _faster("lagged-padded", "tidy", 1.4),
        *(_at_most(name, "plain-sft", 2.0) for name in EXACT),
        *(_at_most(name, "liger-sft", 2.3) for name in EXACT),
        _at_most("direction-kept", "own-sft", 1.95),
        _at_most("direction-every", "plain-sft", 1.15),
        _at_most(SAVING, "plain-sft", 0.95),
        _at_most("probe-every", "plain-sft", 0.9),
        _faster("own-sft", "liger-sft", 1.3),
        *(Target(name, None, 600, "tflops_per_s", least=True, kind="floor") for name in EXACT),
        *(_at_most("lagged", other, 1.0, "peak_memory") for other in ("tidy", "released")),
        Target("lagged", None, 2000, "launches"),
    ),
}
BITS = "the same steps taken twice: identical in every bit"


def verdicts(rows: Sequence[Row], digests: Sequence[Row], device: str, model: str) -> list[Row]:
    """Make a row for each target of the kind of device, and each dtype: ``met``, ``missed`` or ``not measured``.

    Args:
        rows: of one run.
        digests: of the same run, one for each dtype (``digest.py``).
        device: its name; targets of another device or model are not measured.
        model: by its name in ``benchmarks.step``.
    """
    key = CPU if device == "cpu" else GPU
    devices, of_model, wanted = key
    is_here = any(name in device for name in devices) and model == of_model
    result: list[Row] = []
    for dtype in sorted(wanted or {row["dtype"] for row in rows}):
        where = f"{of_model} on {' or '.join(devices)}, {dtype}"
        for target in TARGETS[key]:
            found = {row["contender"]: row for row in rows if (row["dtype"], row["padding"]) == (dtype, target.kind)}
            if key is GPU:
                found = {name: row for name, row in found.items() if row["task_shape"][0] == PUBLISHED.tasks}
            result.append({"target": f"{where}: {target}", **_judged(target, found if is_here else {})})
        same = [digest["identical"] for digest in digests if digest["dtype"] == dtype]
        verdict = "not measured" if not same else "met" if all(same) else "missed"
        result.append({"target": f"{model} on {device}, {dtype}: {BITS}", "value": None, "verdict": verdict})
        result[-1] |= {"missed_by": None, "interval": None}
    return result


def _judged(target: Target, rows: Mapping[str, Row]) -> Row:
    value, rounds = target.value(rows), target.rounds(rows)
    off = None if value is None else (target.bound - value if target.least else value - target.bound)
    judged: Row = {"value": value, "missed_by": None, "interval": target.interval(rows)}
    if off is None:
        return judged | {"verdict": "not measured"}
    if rounds < LEAST_ROUNDS:
        return judged | {"verdict": f"not measured ({rounds} rounds)"}
    if off > 0:
        return judged | {"verdict": "missed", "missed_by": off / target.bound}
    return judged | {"verdict": "met"}


def lines(targets: Iterable[Row]) -> list[str]:
    """Write a line for each target."""
    result = []
    for row in targets:
        verdict = row["verdict"] if row["missed_by"] is None else f"missed by {row['missed_by']:.1%}"
        text = f"{verdict:16} {row['target']}"
        text += "" if row["value"] is None else f": {row['value']:.3g}"
        text += "" if row["interval"] is None else " ({:.3g} to {:.3g})".format(*row["interval"])
        result.append(text)
    return result
