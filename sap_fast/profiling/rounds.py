"""Runs the steps: totals, phases, counts, and a trace, each from steps of its own."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from sap_fast.profiling import trace
from sap_fast.profiling.counting import Counter, Work
from sap_fast.profiling.inputs import Rounds
from sap_fast.profiling.meters import Clock, Memory, peak_of, seconds_of
from sap_fast.profiling.phases import Begin, ignored
from sap_fast.profiling.steps import PEFT, Batch, TimedStep
from sap_fast.profiling.trace import Kernels

Tell = Callable[[str], None]


@dataclass
class Measured:
    """Holds what was measured of each contender, by its key.

    Attributes:
        contenders: those that could be run.
        absent: why PEFT's pass could not be run; None if it could.
        memory: the most memory that was in use during a step.
        totals: seconds of a whole step in each round.
        phases: seconds by phase in each round.
        work: what a step did, by phase.
        kernels: what the GPU ran, by phase; None on a CPU.
        trace: a Chrome trace, as text; None if none was asked for.
    """

    contenders: list[TimedStep]
    absent: str | None = None
    memory: dict[str, Memory] = field(default_factory=dict)
    totals: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    work: dict[str, dict[str, Work]] = field(default_factory=dict)
    kernels: dict[str, dict[str, Kernels]] | None = None
    trace: str | None = None


def measure(
    contenders: Sequence[TimedStep],
    rounds: Rounds,
    warmup: int,
    steps: int,
    device: torch.device,
    *,
    traced: bool,
    tell: Tell,
) -> Measured:
    """Run and measure all steps: whole ones, their phases, what they do, and where it is wanted a trace.

    Args:
        contenders: the steps, each of which comes once in a round.
        rounds: the batches and pairs.
        warmup: how many rounds come before those that are measured.
        steps: how many rounds of whole steps are measured; as many are for phases, one after each of these.
        device: where the steps run.
        traced: whether a trace is wanted.
        tell: is told what comes next.
    """
    found = Measured(list(contenders))
    tell(f"warm-up, {_rounds(warmup)}")
    for i in range(warmup):
        for contender in list(found.contenders):
            _warm_up(found, contender, rounds[i], device, last=i == warmup - 1)
    tell(f"whole steps, and phases in rounds between them, {_rounds(steps)}")
    for i in range(warmup, warmup + steps):
        for contender in _turns(found.contenders, i):
            taken = seconds_of(device, partial(contender.run, *rounds[i], ignored))
            found.totals.setdefault(contender.key, []).append(taken)
        for contender in _turns(found.contenders, i):
            clock = Clock(device)
            contender.run(*rounds[i], clock.begin)
            found.phases.setdefault(contender.key, []).append(clock.seconds())
    typical = rounds[rounds.typical(range(warmup, warmup + steps))]
    tell("counts, one step each")
    for contender in found.contenders:
        with Counter() as counter:
            contender.run(*typical, counter.begin)
        found.work[contender.key] = counter.work
    if traced or device.type == "cuda":
        tell("a trace, one step each")
        _trace(found, typical, device, traced=traced)
    return found


def _warm_up(
    found: Measured, contender: TimedStep, given: tuple[Batch, Batch], device: torch.device, *, last: bool
) -> None:
    def step() -> None:
        contender.run(*given, ignored)

    try:
        if last:
            found.memory[contender.key] = peak_of(device, step)
        else:
            step()
    except Exception as error:
        # The model's own forward is not this library's: without it there is a peer less, and all else stands.
        if contender.key != PEFT:
            raise
        lines = str(error).strip().splitlines() or [""]
        found.absent = f"{type(error).__name__}: {lines[0]}"
        found.contenders.remove(contender)


def _trace(found: Measured, given: tuple[Batch, Batch], device: torch.device, *, traced: bool) -> None:
    def step(contender: TimedStep, begin: Begin) -> None:
        contender.run(*given, begin)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found_kernels = trace.record(path, device, {c.key: partial(step, c) for c in found.contenders})
        if device.type == "cuda":
            found.kernels = found_kernels
        if traced:
            found.trace = path.read_text(encoding="utf-8")


def _turns(contenders: Sequence[TimedStep], i: int) -> Sequence[TimedStep]:
    """Order the contenders forwards and backwards in turn, so that none always follows the same one."""
    return contenders[:: -1 if i % 2 else 1]


def _rounds(number: int) -> str:
    return f"{number} round{'s' if number > 1 else ''}"
