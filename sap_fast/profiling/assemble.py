"""Makes a profile of what was measured, with what a reader has to know of how it was made."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from sap_fast.config import SAPConfig
from sap_fast.environment import environment
from sap_fast.profiling.advice import Parts, advise
from sap_fast.profiling.counting import Work
from sap_fast.profiling.inputs import Rounds
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
    """Make the profile of what was measured.

    Args:
        found: the times, counts and kernels of every step.
        rounds: the batches and pairs that were run.
        config: the method's settings.
        settings: the run's settings as they are to be shown, with ``peak_flops`` and ``bandwidth``.
        typical: how many sequences and pairs a typical round has.
        device: where the steps ran.
    """
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
        notes=_notes(found, config, settings, device, whole / median(totals[SAP_STEP]), busy / whole),
        trace=found.trace,
    )


def _costs(weights: Mapping[str, float], found: Measured, floor: tuple[float | None, float | None]) -> list[Cost]:
    """Cost the phases of a step, or of the average of several kinds of it.

    Args:
        weights: the share of each contender in the average, by its key.
        found: what was measured.
        floor: the device's peak FLOP/s and bytes/s, each as far as it is known.
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
    """Take matrix products at the peak, then what is row-wise at the bandwidth, but no less than all bytes at that."""
    if peak_flops is None and bandwidth is None:
        return None
    products = 0.0 if peak_flops is None else work.flops / peak_flops
    rowwise, crossing = (0.0 if bandwidth is None else x / bandwidth for x in (work.rowwise_bytes, work.bytes))
    return max(products + rowwise, crossing)


def _parts(phases: Mapping[str, Sequence[Cost]], config: SAPConfig, typical: tuple[int, int]) -> Parts:
    def seconds(key: str) -> dict[str, float]:
        return {cost.phase: cost.seconds.median for cost in phases[key]}

    several = kinds(config)
    keys = [SAP_STEP] if len(several) == 1 else [f"{SAP_STEP}-{i}" for i in range(1, len(several) + 1)]
    # A step without a direction and a probe: SAP's own where the settings have one.
    plain = next((key for key, kind in zip(keys, several, strict=True) if not kind.finds_probe), SFT)
    return Parts.of(seconds(keys[0]), seconds(plain), config, *typical)


def _notes(
    found: Measured,
    config: SAPConfig,
    settings: Mapping[str, Any],
    device: torch.device,
    profiled: float,
    busy: float,
) -> list[str]:
    """Say in sentences what a reader has to know of how the profile was made.

    Args:
        found: what was measured.
        config: the method's settings.
        settings: the run's settings.
        device: where the steps ran.
        profiled: what the phases of SAP's step come to together, as a share of its total.
        busy: the share of the phases' time in which the GPU was busy with kernels.
    """
    on_gpu, steps = device.type == "cuda", settings["steps"]
    said = [
        f"Whole steps: {steps} rounds after {settings['warmup']} of warm-up, in which the steps took turns on the same "
        "batches; nothing took note of phases. Ratios are taken round by round.",
        f"Phases: {steps} further rounds, one after each of these, timed by "
        f"{'events on the stream' if on_gpu else 'the clock'}; medians, which for SAP come to {profiled:.2f}x its "
        "whole step.",
        "A step moves its batch to the device, checks and packs it, computes the gradient, and steps AdamW over copies "
        "of the trained weights. Loading and tokenizing are not in it.",
        "Ops, bytes and FLOPs were counted in one further step, on the batches of median length: calls of ops without "
        "views and allocations (each of the library's counts one), what these read and wrote by their shapes, and "
        "their matrix products.",
    ]
    if on_gpu:
        said.append(
            "Kernels, and how long the GPU was busy with them, are from one step under torch's profiler. Peak memory "
            "is torch's max_memory_allocated."
        )
        said.append(
            f"The GPU was busy with kernels for {busy:.0%} of SAP's time. The rest it waited for launches and for the "
            "host, and larger batches would fill it."
        )
    else:
        said.append(
            "Peak memory is the process's highest resident set after each step's last warm-up round, in the order of "
            "the table; it does not come down again, so that only a rise says something of a step."
        )
    if settings["peak_flops"] or settings["bandwidth"]:
        said.append(
            "Times floor: a phase's time over the least that its own ops would take: matrix products at the peak "
            "given, then what is row-wise at the bandwidth, but no less than all bytes at that. Fused ops would move "
            "fewer bytes than are counted here."
        )
    if found.absent is None:
        said.append("In the step of transformers and PEFT, head and loss are part of the forward and backward pass.")
    else:
        said.append(f"The step of transformers and PEFT did not run, and is left out ({found.absent}).")
    if config.direction_min_cosine is not None:
        said.append("With direction_min_cosine directions may come more often than the average here has them.")
    if config.delayed_direction:
        said.append("Pairs run with the task: their share is within the dual phases, and advice on pairs is left out.")
    if steps < 5:
        said.append(f"{steps} rounds are few: the spread says little.")
    return said
