"""What would cut a SAP step's time, and by how much: predicted from the measured times of its phases alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sap_fast.config import SAPConfig
from sap_fast.profiling.phases import DIRECTION, PASSES
from sap_fast.profiling.result import Advice
from sap_fast.profiling.steps import kinds

# A smaller share of the time is not worth a word, since every change alters the algorithm.
_LEAST = 0.02


@dataclass(frozen=True)
class Parts:
    """Holds the seconds of a training step's parts, from which the time under other settings is predicted.

    Attributes:
        direction: what finding a harmful direction takes, in a step that finds one.
        passes: what the passes over the task batch take, in a step that finds a probe.
        ordinary: what an ordinary pass over the task batch takes.
        rest: what everything else takes, in a step that finds both.
        ordinary_rest: what everything else takes, in a step without a direction and a probe.
        tangents: the share of the batch's sequences that carry tangents.
        pairs: how many pairs a direction was found from.
    """

    direction: float
    passes: float
    ordinary: float
    rest: float
    ordinary_rest: float
    tangents: float
    pairs: int

    @classmethod
    def of(
        cls, full: Mapping[str, float], plain: Mapping[str, float], config: SAPConfig, batch: int, pairs: int
    ) -> "Parts":
        """Add up the measured times of phases to those of a step's parts.

        Args:
            full: seconds by phase of a step that finds a direction and, where the settings use one, a probe.
            plain: seconds by phase of a step that finds neither: SAP's own, or else plain fine-tuning's.
            config: the settings under which both were measured.
            batch: how many sequences a batch has.
            pairs: how many pairs are given to a step.
        """
        direction = sum(full.get(phase, 0.0) for phase in DIRECTION)
        passes = sum(full.get(phase, 0.0) for phase in PASSES)
        ordinary = sum(plain.get(phase, 0.0) for phase in PASSES)
        # Pairs are checked and packed in every step.
        packing = max(0.0, full.get("data", 0.0) - plain.get("data", 0.0))
        return cls(
            direction=direction,
            passes=passes,
            ordinary=ordinary if config.uses_probe else passes,
            rest=sum(full.values()) - direction - passes,
            ordinary_rest=sum(plain.values()) - ordinary + packing,
            tangents=_tangents(config, batch),
            pairs=min(config.pairs_per_step or pairs, pairs),
        )

    def seconds(self, config: SAPConfig, batch: int, pairs: int) -> float:
        """Predict how many seconds an average step takes under ``config``.

        Args:
            config: the settings, which may be others than those that were measured.
            batch: how many sequences a batch has.
            pairs: how many pairs are given to a step.
        """
        direction = self.direction * min(config.pairs_per_step or pairs, pairs) / self.pairs
        passes = self.passes
        if _carries_tangents(config):
            extra = max(0.0, self.passes - self.ordinary) / self.tangents
            passes = self.ordinary + extra * _tangents(config, batch)
        total = 0.0
        for kind in kinds(config):
            step = passes + self.rest if kind.finds_probe else self.ordinary + self.ordinary_rest
            total += kind.weight * (step + (direction if kind.finds_direction else 0.0))
        return total


def advise(parts: Parts, config: SAPConfig, batch: int, pairs: int, ratio: float) -> list[Advice]:
    """Find changes to the settings that are predicted to save time, the largest gain first.

    Args:
        parts: the seconds of a step's parts, as measured under ``config``.
        config: the settings to be changed.
        batch: how many sequences a batch has.
        pairs: how many pairs are given to a step.
        ratio: how long SAP's step takes to plain SFT's, as measured.
    """
    now = parts.seconds(config, batch, pairs)
    found = []
    for changes in _candidates(config, batch, parts.pairs):
        then = parts.seconds(config.replace(**changes), batch, pairs)
        if then < (1 - _LEAST) * now:
            predicted = ratio * then / now
            said = ", ".join(f"{name}={value}" for name, value in changes.items())
            reason = _reason(parts, config, changes, now)
            text = f"{said} predicts {predicted:.2f}x plain SFT, now {ratio:.2f}x ({reason})"
            found.append(Advice(changes, predicted, text))
    return sorted(found, key=lambda advice: advice.predicted_ratio)


def _candidates(config: SAPConfig, batch: int, pairs: int) -> list[dict[str, Any]]:
    rarer: dict[str, Any] = {"direction_every": 4} if config.direction_every < 4 else {}
    fewer: dict[str, Any] = {}
    if _carries_tangents(config) and _tangents(config.replace(tangent_fraction=0.25), batch) < _tangents(config, batch):
        fewer = {"tangent_fraction": 0.25}
    found = [{"probe_every": every} for every in (4, 8) if config.uses_probe and config.probe_every < every]
    if config.delayed_direction:
        # Pairs run in the phases of the task, whose times do not say what is theirs.
        return found
    found += [rarer, fewer, rarer | fewer if rarer and fewer else {}]
    found += [{"pairs_per_step": pairs // 4}] if pairs >= 4 else []
    return [changes for changes in found if changes]


def _reason(parts: Parts, config: SAPConfig, changes: Mapping[str, Any], now: float) -> str:
    several = kinds(config)
    direction = sum(kind.weight for kind in several if kind.finds_direction) * parts.direction / now
    probe = sum(kind.weight for kind in several if kind.finds_probe) * max(0.0, parts.passes - parts.ordinary) / now
    extra = "tangents" if "tangent_fraction" in changes else "finding the probe"
    held = []
    if changes.keys() - {"tangent_fraction"}:
        held.append(f"the pairs hold {direction:.0%}")
    if changes.keys() & {"tangent_fraction", "probe_every"} and config.uses_probe:
        held.append(f"{extra} {probe:.0%}" if held else f"{extra} add {probe:.0%}")
    return f"of the time {' and '.join(held)}"


def _carries_tangents(config: SAPConfig) -> bool:
    """Tell whether the passes' extra cost goes by the number of tangents; under ``fresh`` a part of it does not."""
    return config.uses_probe and config.gradient == "dual" and config.schedule == "lagged"


def _tangents(config: SAPConfig, batch: int) -> float:
    return max(1, round(config.tangent_fraction * batch)) / batch
