"""Makes a profile of what was measured."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from sap_fast.config import SAPConfig
from sap_fast.profiling.advice import Parts, advise
from sap_fast.profiling.counting import Work
from sap_fast.profiling.inputs import Rounds
from sap_fast.profiling.notes import notes
from sap_fast.profiling.phases import PHASES
from sap_fast.profiling.result import Cost, Profile, Spread
from sap_fast.profiling.rounds import Measured
from sap_fast.profiling.steps import LABELS, PEFT, SAP_STEP, SFT, kinds


def assemble(
    found: Measured,
    rounds: Rounds,
    config: SAPConfig,
    settings: Mapping[str, Any],
    typical: tuple[int, int],
    device: torch.device,
) -> Profile:
    """The profile.

    Args:
        settings: of the run, as they are to be shown; with ``peak_flops`` and ``bandwidth``.
        typical: sequences and pairs of a typical round.
    """
    from sap_fast.environment import environment

    shares = {c.key: c.weight for c in found.contenders if c.of == SAP_STEP}
    totals = {c.key: found.totals[c.key] for c in found.contenders}
    totals[SAP_STEP] = [sum(w * totals[k][i] for k, w in shares.items()) for i in range(len(totals[SFT]))]
    ratios = {
        f"{a}/{b}": Spread.of([x / y for x, y in zip(totals[a], totals[b], strict=True)])
        for a, b in ((SAP_STEP, SFT), (SAP_STEP, PEFT), (SFT, PEFT))
        if b in totals
    }
    floor = settings["peak_flops"], settings["bandwidth"]
    phases = {c.key: _costs({c.key: 1.0}, found, floor) for c in found.contenders}
    phases[SAP_STEP] = _costs(shares, found, floor)
    whole = sum(cost.seconds.median for cost in phases[SAP_STEP])
    busy = sum(cost.busy_seconds or 0.0 for cost in phases[SAP_STEP])
    return Profile(
        labels={**{c.key: c.label for c in found.contenders}, SAP_STEP: LABELS[SAP_STEP]},
        weights=shares,
        totals={key: Spread.of(values) for key, values in totals.items()},
        ratios=ratios,
        phases=phases,
        memory={**found.memory, SAP_STEP: max((found.memory[key] for key in shares), key=lambda memory: memory.peak)},
        advice=advise(_parts(phases, config, typical), config, *typical, ratios["sap/sft"].median),
        tokens=rounds.tokens(),
        settings=settings,
        environment=environment(device),
        notes=notes(found, config, settings, device, whole / median(totals[SAP_STEP]), busy / whole),
        trace=found.trace,
    )


def _costs(weights: Mapping[str, float], found: Measured, floor: tuple[float | None, float | None]) -> list[Cost]:
    """The phases of a step, or of the average of several kinds of it.

    Args:
        weights: by contender's key.
    """
    rounds = range(len(found.phases[SFT]))
    present = [p.key for p in PHASES if any(p.key in run for key in weights for run in found.phases[key])]
    seconds = {}
    for phase in present:
        each = [sum(w * found.phases[key][i].get(phase, 0.0) for key, w in weights.items()) for i in rounds]
        seconds[phase] = Spread.of(each)
    whole = sum(spread.median for spread in seconds.values())
    costs = []
    for phase in present:
        work, count, busy = Work(), 0.0, 0.0
        for key, weight in weights.items():
            work.add(found.work[key].get(phase, Work()), weight)
            if found.kernels is not None and (ran := found.kernels.get(key, {}).get(phase)):
                count, busy = count + weight * ran.count, busy + weight * ran.seconds
        costs.append(
            Cost(
                phase=phase,
                seconds=seconds[phase],
                share=seconds[phase].median / whole,
                ops=work.ops,
                kernels=None if found.kernels is None else count,
                busy_seconds=None if found.kernels is None else busy,
                bytes=work.bytes,
                flops=work.flops,
                floor_seconds=_floor(work, *floor),
            )
        )
    return costs


def _floor(work: Work, peak_flops: float | None, bandwidth: float | None) -> float | None:
    bounds = [amount / rate for amount, rate in ((work.flops, peak_flops), (work.bytes, bandwidth)) if rate is not None]
    return max(bounds, default=None)


def _parts(phases: Mapping[str, Sequence[Cost]], config: SAPConfig, typical: tuple[int, int]) -> Parts:
    def seconds(key: str) -> dict[str, float]:
        return {cost.phase: cost.seconds.median for cost in phases[key]}

    several = kinds(config)
    keys = [SAP_STEP] if len(several) == 1 else [f"{SAP_STEP}-{i}" for i in range(1, len(several) + 1)]
    # A step without a direction and a probe: SAP's own where the settings have one.
    plain = next((key for key, kind in zip(keys, several, strict=True) if not kind.probes), SFT)
    return Parts.of(seconds(keys[0]), seconds(plain), config, *typical)
