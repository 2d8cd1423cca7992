"""What a whole step is aimed at, and whether a run of ``benchmarks.step`` meets it.

All targets are for rows of real lengths, of which the published step and plain fine-tuning get the padding too, and
are judged for the model and the device that they name alone, on a GPU at the published shapes, and of medians of as
many rounds as a result takes. A target that is missed says by how much of its bound.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.step_rows import PUBLISHED

Row = dict[str, Any]

# What a result's medians are of, at the least.
LEAST_ROUNDS = {"cpu": 7, "H200": 30}
KIND = "real"


@dataclass(frozen=True)
class Target:
    """A bound on one contender's number, or on its ratio to another's.

    Attributes:
        contender, over: whose number; over whose, if over another's.
        column: of the rows.
        bound: the most that it may be; the least, where ``least``.
        faster: whether the ratio is turned round: how many times faster the contender is.
    """

    contender: str
    over: str | None
    bound: float
    column: str = "ms"
    least: bool = False
    faster: bool = False

    def value(self, rows: Iterable[Row]) -> float | None:
        """What the rows of one dtype say; None where they lack a contender."""
        found = {row["contender"]: row[self.column] for row in rows}
        mine, other = found.get(self.contender), 1.0 if self.over is None else found.get(self.over)
        if mine is None or other is None:
            return None
        return other / mine if self.faster else mine / other

    def __str__(self) -> str:
        sign = ">=" if self.least else "<="
        what = f"{self.contender}, {self.column}"
        if self.over is not None:
            what += f": times faster than {self.over}" if self.faster else f" over {self.over}'s"
        return f"{what} {sign} {self.bound:g}"


def _at_most(contender: str, over: str, bound: float, column: str = "ms") -> Target:
    return Target(contender, over, bound, column)


def _faster(contender: str, over: str, bound: float) -> Target:
    return Target(contender, over, bound, least=True, faster=True)


SAVING = "direction-every+tangents"
# By the device, as its name begins or what it holds, the model, and the dtypes, all if none.
CPU = ("cpu", "smollm2", ())
GPU = ("H200", "llama-2-7b", ("bfloat16",))
TARGETS: dict[tuple[str, str, tuple[str, ...]], tuple[Target, ...]] = {
    CPU: (
        _at_most("lagged", "tidy", 0.75),
        _at_most("lagged", "released", 0.5),
        _at_most(SAVING, "plain-sft", 1.2),
        _at_most("probe-every", "plain-sft", 1.0),
    ),
    GPU: (
        _faster("lagged", "tidy", 2.5),
        _faster("lagged", "released", 1.7),
        _at_most("lagged", "plain-sft", 2.0),
        _at_most("direction-kept", "own-sft", 1.95),
        _at_most("direction-every", "plain-sft", 1.15),
        _at_most(SAVING, "plain-sft", 0.95),
        _at_most("probe-every", "plain-sft", 0.9),
        Target("lagged", None, 600, "tflops_per_s", least=True),
        _at_most("lagged", "tidy", 1.0, "peak_memory"),
        Target("lagged", None, 2000, "launches"),
    ),
}


def verdicts(rows: Sequence[Row], device: str, model: str) -> list[Row]:
    """A row for each target of the kind of device, and each dtype: ``met``, ``missed`` or ``not measured``.

    Args:
        rows: of one run.
        device: its name; targets of another device or model are not measured.
        model: by its name in ``benchmarks.step``.
    """
    key = CPU if device == "cpu" else GPU
    least = LEAST_ROUNDS[key[0]]
    where, of_model, wanted = key
    result = []
    for dtype in sorted(wanted or {row["dtype"] for row in rows}):
        of_kind = [row for row in rows if (row["dtype"], row["padding"]) == (dtype, KIND) and row["rounds"] >= least]
        chosen = [row for row in of_kind if key is CPU or row["task_shape"][0] == PUBLISHED.tasks]
        for target in TARGETS[key]:
            value = target.value(chosen) if where in device and model == of_model else None
            off = None if value is None else (target.bound - value if target.least else value - target.bound)
            verdict = "not measured" if off is None else "missed" if off > 0 else "met"
            missed_by = off / target.bound if off is not None and off > 0 else None
            result.append({"target": f"{of_model} on {where}, {dtype}: {target}", "value": value, "verdict": verdict})
            result[-1]["missed_by"] = missed_by
    return result


def lines(targets: Iterable[Row]) -> list[str]:
    """A line for each target."""
    result = []
    for row in targets:
        verdict = row["verdict"] if row["missed_by"] is None else f"missed by {row['missed_by']:.1%}"
        result.append(f"{verdict:16} {row['target']}" + ("" if row["value"] is None else f": {row['value']:.3g}"))
    return result
