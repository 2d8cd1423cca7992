"""What a profile found, as data; ``text.py`` and ``page.py`` make it readable from its dict."""

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
    """Holds the median and the quartiles of a number that was measured in several rounds."""

    median: float
    lower: float
    upper: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Take the median and the quartiles of at least one value."""
        lower, _, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return cls(median(values), lower, upper, len(values))


@dataclass(frozen=True)
class Cost:
    """Holds what one phase of a step costs.

    Attributes:
        phase: the phase's key, one of those in ``phases.py``.
        seconds: how long it took, over the profiled rounds.
        share: its median as a share of all phases' medians together.
        ops: how many ops the dispatcher called.
        kernels: how many kernels the GPU ran, copies and fills included; None on a CPU.
        busy_seconds: how long these kernels ran; None on a CPU.
        bytes: what the ops read and wrote, by their shapes.
        flops: the floating-point operations of their matrix products, by their shapes.
        floor_seconds: the least that they would take, ``max(flops / peak + row-wise bytes / bandwidth, bytes /
            bandwidth)``, as far as peak and bandwidth were given; None where neither was.
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
        """The phase's time as a multiple of the floor, at which it is 1; None where the floor is not known."""
        return self.seconds.median / self.floor_seconds if self.floor_seconds else None


@dataclass(frozen=True)
class Advice:
    """Holds changes to the settings that are predicted to save time.

    Attributes:
        changes: the settings to be changed, and to what.
        predicted_ratio: how long SAP's step is predicted to take then, to plain SFT's.
        text: a sentence that says so.
    """

    changes: Mapping[str, Any]
    predicted_ratio: float
    text: str


@dataclass(frozen=True)
class Profile:
    """Holds where the time of plain fine-tuning and of SAP goes, as :func:`sap_fast.profile` found it.

    Steps are named ``"sft"`` (plain fine-tuning by the library's passes), ``"peft"`` (by transformers and PEFT, on
    padded rows) and ``"sap"``. Where the settings make steps of several kinds, those are ``"sap-1"``, ``"sap-2"``, ...,
    and ``"sap"`` is their average, weighted by how often each comes.

    Attributes:
        labels: what each step is called for people.
        weights: the share of each kind of SAP's steps in its average.
        totals: seconds of whole steps, measured without anything that takes note of phases.
        ratios: how long one step takes to another, taken round by round: ``"sap/sft"``, ``"sap/peft"``, ``"sft/peft"``.
        phases: what the phases of each step cost, in the order in which they come, from rounds of their own.
        memory: the most memory that was in use during each step.
        advice: what would cut SAP's time, and what it is predicted to give.
        tokens: the sizes of what was run, medians over the batches.
        settings: the settings of the run and of the method.
        environment: the device, its threads, and the versions of the packages.
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
        """Return the whole profile in short, as text for a terminal."""
        return summary(self.to_dict())

    def html(self) -> str:
        """Return the whole profile as an HTML page that needs no other file."""
        return page(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the whole profile as plain numbers and text, without the trace; ``profile.json`` holds the same."""
        found = {name: value for name, value in asdict(self).items() if name != "trace"}
        for name, costs in self.phases.items():
            for row, cost in zip(found["phases"][name], costs, strict=True):
                row["times_floor"] = cost.times_floor
        return found

    def write(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write ``profile.json``, ``profile.html`` and, if there is a trace, ``trace.json``: all of them, or none.

        Raises:
            FileExistsError: the folder holds something, and ``overwrite`` is not set; or it holds what no profile has
                written.
        """
        files.write(self.to_dict(), self.html(), self.trace, Path(folder), overwrite=overwrite)
