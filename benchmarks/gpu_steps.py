"""The parts of ``benchmarks.gpu`` that run whole steps: ``benchmarks.step`` model by model, and a profile."""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_session, step_targets
from benchmarks.gpu_session import Settings

Result = dict[str, Any]

# Each model's weight when the time is divided: those of 7B take longer to make, and to check.
WEIGHTS = {"llama-2-7b": 4, "smollm2": 2, "qwen2.5-7b": 3}
# Seconds between the end of what a run may begin and the end of the run: the last round, launches, and its start.
ENDING = 40.0
TARGETED = "llama-2-7b"
# Contenders of a tiny run.
TINY = ("tidy", "plain-sft", "own-sft", "lagged")


def step(settings: Settings) -> Result:
    """Every contender at the published shapes, in bfloat16, on rows of real lengths."""
    models, skipped = ["tiny"] if settings.tiny else list(WEIGHTS), []
    if settings.smollm2 is None and not settings.tiny:
        models.remove("smollm2")
        skipped.append({"contender": "all of smollm2", "reason": "no folder was given (--smollm2)"})
    end = time.time() + settings.limit
    result: Result = {"succeeded": True, "problem": None, "runs": [], "skipped": skipped, "refused": []}
    # The times of a tiny run meet no target and miss none.
    result |= {"targets": step_targets.verdicts([], "cuda", TARGETED), "ceilings": [], "rows": []}
    for i, name in enumerate(models):
        rest = sum(WEIGHTS.get(other, 1) for other in models[i:])
        share = (end - time.time()) * WEIGHTS.get(name, 1) / rest
        _add(result, name, settings, share)
    return result


def _add(result: Result, name: str, settings: Settings, share: float) -> None:
    """One model's run, within its share of the time."""
    path, log = settings.folder / f"step-{name}.json", settings.folder / f"step-{name}.txt"
    command = [sys.executable, "-m", "benchmarks.step", "--json", str(path), "--model", name, "--dtype", "bfloat16"]
    command += ["--limit", f"{max(1.0, share - ENDING):.0f}"]
    command += ["--rounds", "1", "--contenders", *TINY] if settings.tiny else ["--device", "cuda", "--published-shapes"]
    command += _paths(settings, smollm2=name == "smollm2")
    code = gpu_session.bounded(command, log, share, settings.environment)
    found = json.loads(path.read_text()) if path.exists() else None
    problem = None
    if code is None:
        problem = f"{name}: stopped, it took too long"
    elif code != 0:
        problem = f"{name}: benchmarks.step ended with code {code}"
    if problem is not None:
        gpu_session.print_end(log)
        result |= {"succeeded": False, "problem": "; ".join(filter(None, (result["problem"], problem)))}
    if found is None:
        return
    result["runs"].append({"model": name, "seconds": found["seconds"], "settings": found["settings"]})
    for key in ("skipped", "refused", "ceilings", "rows"):
        result[key] += [{"model": name, **row} for row in found[key]]
    if name == TARGETED:
        result["targets"] = found["targets"]


def step_lines(result: Result) -> list[str]:
    lines = [
        f"{row['model']:11} {row['contender']:24} {row['ms']:8.1f} ms  floor {row['floor_ms']:8.1f} ms  "
        f"{row['tflops_per_s']:6.1f} TFLOP/s ({row['share_of_ceiling']:4.0%})  {_ratio(row)}  "
        f"{row['peak_memory'] / 2**30:5.1f} GiB  {row['launches']:6.0f} launches  {row['rounds']} rounds"
        for row in result["rows"]
    ]
    for verdict in ("skipped", "refused"):
        lines += [f"{verdict}: {', '.join(map(str, entry.values()))}" for entry in result[verdict]]
    return [*lines, *step_targets.lines(result["targets"]), *_problems(result)]


def _ratio(row: Mapping[str, Any]) -> str:
    ratio = row["ratio_to_plain_sft"]
    return " " * 16 if ratio is None else f"{ratio:5.2f} x plain-sft"


def profile(settings: Settings) -> Result:
    """Phase by phase on the shape of Llama-2-7B; the page is kept beside the result, the trace is not."""
    folder, log = settings.folder / "profile", settings.folder / "log.txt"
    command = [sys.executable, "-m", "benchmarks.step_profile", "--out", str(folder)]
    command += ["--model", "tiny", "--small", "--steps", "1"] if settings.tiny else ["--device", "cuda"]
    command += [] if settings.tiny else ["--model", TARGETED]
    code = gpu_session.bounded([*command, *_paths(settings, smollm2=False)], log, settings.limit, settings.environment)
    path = folder / "profile.json"
    found, problem = json.loads(path.read_text()) if path.exists() else None, None
    if code != 0 or found is None:
        gpu_session.print_end(log)
        problem = "stopped: it took too long" if code is None else f"benchmarks.step_profile ended with code {code}"
    page = None
    if found is not None and settings.keep is not None:
        page = settings.keep.with_suffix(".html")
        page.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "profile.html", page)
    return {"succeeded": problem is None, "problem": problem, "page": page and page.name, "profile": found}


def profile_lines(result: Result) -> list[str]:
    lines = [f"page: {result['page']}"] if result["page"] else []
    if result["profile"] is not None:
        ratios = result["profile"]["ratios"]
        lines += [f"{name}: {ratio['median']:.2f} ({ratio['rounds']} rounds)" for name, ratio in ratios.items()]
        for cost in result["profile"]["phases"].get("sap", ()):
            lines.append(f"  {cost['phase']:20} {1e3 * cost['seconds']['median']:9.2f} ms {cost['share']:6.1%}")
    return [*lines, *_problems(result)]


def _problems(result: Result) -> Sequence[str]:
    return [str(result["problem"])] if result["problem"] else []


def _paths(settings: Settings, *, smollm2: bool) -> list[str]:
    given: list[tuple[str, Path | None]] = [("--data", settings.data), ("--smollm2", settings.smollm2)]
    return [word for flag, path in given[: 2 if smollm2 else 1] if path for word in (flag, str(path.absolute()))]
