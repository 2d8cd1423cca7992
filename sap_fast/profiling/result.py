"""What a profile found."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from sap_fast.profiling import files
from sap_fast.profiling.meters import Memory
from sap_fast.profiling.page import page
from sap_fast.profiling.text import summary


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    lower: float
    upper: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        lower, _, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return cls(median(values), lower, upper, len(values))


@dataclass(frozen=True)
class Cost:
    """A phase of a step.

    Attributes:
        phase: its key; see ``phases.py``.
        seconds: over the profiled rounds.
        share: of all phases' medians together.
        ops: calls of ops by the dispatcher.
        kernels: that the GPU ran, copies and fills included; None on a CPU.
        busy_seconds: that these ran; None on a CPU.
        bytes, flops: that the ops read and wrote, and of their matrix products, by their shapes.
        floor_seconds: the greater of FLOPs over the peak and bytes over the bandwidth, as far as these were given;
            None where neither was.
    """

    phase: str
    seconds: Spread
    share: float
    ops: float
    kernels: float | None
    busy_seconds: float | None
    bytes: float
    flops: float
    floor_seconds: float | None

    @property
    def times_floor(self) -> float | None:
        """The distance to the floor: 1 is at it."""
        return self.seconds.median / self.floor_seconds if self.floor_seconds else None


@dataclass(frozen=True)
class Advice:
    """``changes`` to the settings, the ratio to plain SFT that they are predicted to give, and a sentence."""

    changes: Mapping[str, Any]
    predicted_ratio: float
    text: str


@dataclass(frozen=True)
class Profile:
    """Where the time of plain fine-tuning and of SAP goes. Made by :func:`sap_fast.profile`.

    Steps are named ``"sft"`` (plain fine-tuning by the library's passes), ``"peft"`` (by transformers and PEFT, on
    padded rows) and ``"sap"``. Where the settings make steps of several kinds, those are ``"sap-1"``, ``"sap-2"``, ...,
    and ``"sap"`` is their average, weighted by how often each comes.

    Attributes:
        labels: of the steps, for people.
        weights: of each kind of SAP's steps in its average.
        totals: seconds of whole steps, measured without anything that takes note of phases.
        ratios: ``"sap/sft"``, ``"sap/peft"``, ``"sft/peft"``, taken round by round.
        phases: by step, in the order in which they come, from rounds of their own.
        memory: the most that each step held.
        advice: what would cut SAP's time, and what it is predicted to give.
        tokens: sizes of what was run, medians over the batches.
        settings, environment: of the run.
        notes: what a reader has to know.
        trace: a Chrome trace, as text; None if none was asked for.
    """

    labels: Mapping[str, str]
    weights: Mapping[str, float]
    totals: Mapping[str, Spread]
    ratios: Mapping[str, Spread]
    phases: Mapping[str, Sequence[Cost]]
    memory: Mapping[str, Memory]
    advice: Sequence[Advice]
    tokens: Mapping[str, float]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    notes: Sequence[str]
    trace: str | None = field(default=None, repr=False)

    def summary(self) -> str:
        """Everything in short, as text."""
        return summary(self.to_dict())

    def html(self) -> str:
        """Everything, as a page that needs nothing else."""
        return page(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, without the trace."""
        found = {name: value for name, value in asdict(self).items() if name != "trace"}
        for name, costs in self.phases.items():
            for row, cost in zip(found["phases"][name], costs, strict=True):
                row["times_floor"] = cost.times_floor
        return found

    def write(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write ``profile.json``, ``profile.html`` and, if there is a trace, ``trace.json``: all of them, or none.

        Raises:
            FileExistsError: the folder holds something, and ``overwrite`` is not set; or what no profile has written.
        """
        files.write(self.to_dict(), self.html(), self.trace, Path(folder), overwrite=overwrite)
