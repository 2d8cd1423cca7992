"""A Chrome trace of one step of each contender, with a track of its phases, and what it says of kernels."""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from sap_fast.profiling.phases import BY_KEY, Begin

_MARK, _END = "sap_fast", "end"
_PROCESS = 1 << 30  # the track is a process of its own, so its number is one that no process of the machine has
_LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime", "hip_driver")
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Kernels:
    """Holds what a phase launched on a GPU.

    Attributes:
        count: how many kernels, copies and fills.
        seconds: how long these ran.
    """

    count: int = 0
    seconds: float = 0.0


def record(
    path: Path, device: torch.device, steps: Mapping[str, Callable[[Begin], None]]
) -> dict[str, dict[str, Kernels]]:
    """Run ``steps`` under torch's profiler, write what it saw, and return the kernels by contender and phase.

    Args:
        path: where the trace is written, for chrome://tracing or Perfetto.
        device: where the steps run.
        steps: the steps by contender's key; each calls its argument where a phase begins.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        for contender, step in steps.items():
            step(lambda phase, contender=contender: _mark(contender, phase))  # type: ignore[misc]
            _mark(contender, _END)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))
    trace = json.loads(path.read_text(encoding="utf-8"))
    found = kernels(trace["traceEvents"])
    trace["traceEvents"] += _track(_marks(trace["traceEvents"]))
    path.write_text(json.dumps(trace, separators=(",", ":")), encoding="utf-8")
    return found


def kernels(events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Kernels]]:
    """Count kernels by contender and phase; each belongs to the phase in which it was launched.

    Args:
        events: the ``traceEvents`` of a trace.
    """
    marks = _marks(events)
    starts = [at for at, _, _ in marks]
    launched = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    found: dict[str, dict[str, Kernels]] = {}
    for event in events:
        if event.get("cat") not in _ON_GPU:
            continue
        at = launched.get(event.get("args", {}).get("correlation"))
        index = -1 if at is None else bisect_right(starts, at) - 1
        if index < 0 or marks[index][2] == _END:
            continue
        _, contender, phase = marks[index]
        kernel = found.setdefault(contender, {}).setdefault(phase, Kernels())
        kernel.count += 1
        kernel.seconds += 1e-6 * float(event["dur"])
    return found


def _mark(contender: str, phase: str) -> None:
    """Mark a point in the trace. A span will not do: a backward pass on a GPU enters its phases on another thread."""
    with record_function(f"{_MARK}:{contender}:{phase}"):
        pass


def _marks(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, str, str]]:
    """List (microseconds, contender, phase) of all marks, in time's order."""
    found = []
    for event in events:
        if event.get("cat") == "user_annotation" and str(event.get("name")).startswith(f"{_MARK}:"):
            _, contender, phase = event["name"].split(":")
            found.append((float(event["ts"]), contender, phase))
    return sorted(found)


def _track(marks: Sequence[tuple[float, str, str]]) -> list[dict[str, Any]]:
    """Make spans from each mark to the next, a line for each contender, as a process of their own above the others."""
    lines = {contender: i for i, contender in enumerate(dict.fromkeys(contender for _, contender, _ in marks))}
    place: dict[str, Any] = {"pid": _PROCESS, "tid": 0}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", **place, "args": {"name": "phases"}},
        {"ph": "M", "name": "process_sort_index", **place, "args": {"sort_index": -1}},
    ]
    for contender, line in lines.items():
        events.append({"ph": "M", "name": "thread_name", **place, "tid": line, "args": {"name": contender}})
    for (at, contender, phase), (end, _, _) in pairwise(marks):
        if phase != _END:
            span = {"ph": "X", "cat": _MARK, "name": BY_KEY[phase].label, "ts": at, "dur": end - at}
            events.append({**span, **place, "tid": lines[contender], "args": {"phase": phase}})
    return events
