"""Writes what a run has found, as text to mend from: a short ``table.txt`` to be read whole, and ``tracebacks.txt``."""

import enum
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import ops_table, results
from benchmarks.gpu.cases import DTYPES, MODES
from benchmarks.gpu.results import DIED, FAILED, HUNG, PASSED, SKIPPED, WRONG, Item
from benchmarks.step import targets
from sap_fast.ops._cases import every_op

NAME, TRACEBACKS = "table.txt", "tracebacks.txt"
# Characters of the table, at the most.
MOST = 9900
# Failures told of one by one; of the same error, and in all.
_ALIKE, _TOLD = 4, 24

Lines = Sequence[Mapping[str, Any]]


def write(out: Path, repeat: str) -> str:
    """Write table and tracebacks of what a run's folder holds; returns the table.

    Args:
        repeat: options of the command that repeats one item, beside its part and the item's id.
    """
    lines = results.read(out / results.NAME)
    text = table(lines, repeat)
    (out / NAME).write_text(text + "\n", encoding="utf-8")
    (out / TRACEBACKS).write_text(tracebacks(lines), encoding="utf-8")
    return text


class Verdict(enum.Enum):
    """Holds what a run amounts to, and its exit code."""

    RIGHT = "ALL WAS TRIED AND RIGHT", 0
    WRONG = "SOMETHING IS WRONG", 1
    NOTHING = "NOTHING WAS TRIED", 2
    LATE = "NOTHING WRONG WAS FOUND; NOT ALL WAS TRIED", 3

    @property
    def code(self) -> int:
        return self.value[1]


def verdict(lines: Lines) -> Verdict:
    """Judge what this run has found; what an earlier one found right or wrong counts as well."""
    stages = [line for line in lines if line["kind"] == "stage" and not line.get("earlier")]
    if results.wrong(lines) or any(line["problem"] and not line["late"] for line in stages):
        return Verdict.WRONG
    if any(line["problem"] or line["left"] for line in stages):
        return Verdict.LATE
    tried = any(line["kind"] in ("result", "row") for line in lines)
    return Verdict.RIGHT if tried else Verdict.NOTHING


class Problem(NamedTuple):
    """Tells where an item of an op failed, as its id says it; empty strings where it says nothing."""

    op: str
    mode: str
    dtype: str
    shape: str

    @classmethod
    def of(cls, id: str) -> "Problem":
        words = id.partition("[")[2].removesuffix("]").split("-")
        ops = [word for word in words if word in {op.name for op in every_op()}]
        modes, dtypes = ([word for word in words if word in known] for known in (MODES, DTYPES))
        told = {*ops[:1], *modes[:1], *dtypes[:1], "cuda", "cpu"}
        shape = "-".join(word for word in words if word not in told)
        return cls(*((found or [""])[0] for found in (ops, modes, dtypes)), shape)


def over_allowed(item: Item) -> float | None:
    """Return the largest error of an item's results in parts of what is allowed; NaN if one is no number."""
    found = [error / allowed if allowed else float("inf") for error, allowed in item.values.get("off", {}).values()]
    return None if not found else next((x for x in found if x != x), max(found))


def kind_of_error(item: Item) -> str:
    """Return what errors that are one and the same have in common: what was raised, and where."""
    reason = re.sub(r"[\d.]+(e[-+]?\d+)?", "N", item.reason.partition(":")[0] + item.reason[:120])
    where = [line for line in item.traceback.splitlines() if re.match(r"\S+\.py:\d+:", line)]
    return f"{item.outcome} {reason} {where[-1] if where else ''}"


def alike(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Group items that went wrong by their error, in the order in which they did."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if item.outcome in WRONG:
            groups[kind_of_error(item)].append(item)
    return dict(groups)


def tracebacks(lines: Lines) -> str:
    """Write one traceback for each distinct error, numbered as in the table."""
    parts = []
    for number, items in enumerate(alike(results.items(lines)).values(), 1):
        ids = "\n".join(item.id for item in items)
        parts.append(f"[{number}] {items[0].reason}\n{ids}\n\n{items[0].traceback or 'no traceback'}\n")
    return ("\n" + "=" * 100 + "\n\n").join(parts)


def table(lines: Lines, repeat: str) -> str:
    """Write the whole table, in fewer characters than ``MOST``."""
    items = results.items(lines)
    part = next((line["part"] for line in lines if line["kind"] == "run"), None)
    wanted = [
        _head(lines),
        _stages(lines, items),
        _failures(items, repeat),
        _errors([item for item in items if not (item.earlier and part == "time")]),
        _steps(lines),
        _fidelity(lines),
        _ops(items),
        _others(lines),
    ]
    text, hidden = "", 0
    for section in wanted:
        for line in section:
            line = line[:200]
            if len(text) + len(line) > MOST - 100:
                hidden += 1
                continue
            text += line + "\n"
    return text + (f"... {hidden} more lines: {results.NAME} has all of it" if hidden else "").rstrip()


def _head(lines: Lines) -> list[str]:
    run = next((line for line in lines if line["kind"] == "run"), None)
    if run is None:
        return ["nothing was found"]
    e = run["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "triton", "transformers", "peft"))
    used = sum(line["seconds"] for line in lines if line["kind"] == "stage" and not line.get("earlier"))
    head = [f"{run['part']} on {e['device']}: {verdict(lines).value[0]} ({used:.0f} s of {run['limit']:.0f})"]
    head += [f"{versions}, python {e['python']}, commit {e['commit']}"]
    return head + (["tiny: this shows that the command runs; nothing was measured"] if run["tiny"] else [])


def _stages(lines: Lines, items: Sequence[Item]) -> list[str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        counts[item.stage][item.outcome] += 1
    text = []
    # Of a stage that this run has gone on with, what this run says.
    for line in {line["stage"]: line for line in lines if line["kind"] == "stage"}.values():
        found = counts[line["stage"]]
        told = [f"{found[o]} {o}" for o in (PASSED, FAILED, DIED, HUNG, SKIPPED) if found[o]]
        told += [f"{line['left']} left out for want of time"] if line["left"] else []
        told += [f"PROBLEM: {line['problem']}"] if line["problem"] and not line["late"] else []
        told += [line["problem"]] if line["problem"] and line["late"] else []
        told += ["in an earlier run"] if line.get("earlier") else []
        text.append(f"{line['stage']:10} {line['seconds']:6.1f} s  {', '.join(told)}")
    skipped = Counter(item.reason for item in items if item.outcome == SKIPPED and not item.earlier)
    text += [f"  skipped {count}: {reason}" for reason, count in skipped.most_common(4)]
    return text


def _failures(items: Sequence[Item], repeat: str) -> list[str]:
    text: list[str] = []
    told = 0
    for number, group in enumerate(alike(items).values(), 1):
        first = group[0]
        text.append(f"[{number}] {len(group)} x {first.outcome}: {first.reason[:160]}")
        for item in group[:_ALIKE] if told < _TOLD else []:
            p, over = Problem.of(item.id), over_allowed(item)
            ratio = "" if over is None else f"{over:8.3g} x allowed"
            name = item.id.rpartition("/")[2].partition("[")[0]
            text.append(f"    {p.op:21}{p.mode:7}{p.dtype:9}{p.shape:22.22}{ratio:19} {name}")
            told += 1
        if len(group) > _ALIKE:
            text.append(f"    ... and {len(group) - _ALIKE} more: {TRACEBACKS} has their ids")
        part = "time" if first.stage == "ops" else "check"
        text.append(f"    python -m benchmarks.gpu --part {part} {repeat} --only {shlex.quote(first.id)}")
    return text


def _errors(items: Sequence[Item]) -> list[str]:
    """Find for each op and dtype the largest error that the smoke has seen, right or wrong."""
    worst: dict[tuple[str, str], tuple[float, float, str]] = {}
    for item in items:
        problem = Problem.of(item.id)
        for name, (error, allowed) in item.values.get("off", {}).items():
            key = problem.op or item.id.rpartition("::")[2].partition("[")[0], problem.dtype
            found = error / allowed if allowed else float("inf")
            if key not in worst or not found <= worst[key][0]:
                worst[key] = found, error, f"{name} {problem.mode} {problem.shape}"
    if not worst:
        return []
    text = ["largest errors in parts of what is allowed; in bfloat16 that is 1.6e-2 of a result's norm, the goal 0.64:"]
    return text + [
        f"    {op:21}{dtype:9}{found:9.3g}  {error:9.3g}  {what}" for (op, dtype), (found, error, what) in worst.items()
    ]


def _steps(lines: Lines) -> list[str]:
    """Write whole steps: of each contender and kind of rows what most rounds know, and of those the last word."""
    run = next((line for line in lines if line["kind"] == "run"), None)
    facts = [fact for stage in ("step", "options", "float8", "small") for fact in results.rows(lines, stage)]
    found: dict[tuple, Mapping[str, Any]] = {}
    for row in facts:
        key = tuple(row.get(name) for name in ("stage", "dtype", "padding", "contender"))
        if "ms" in row and not (key in found and found[key]["rounds"] > row["rounds"]):
            found[key] = row
    text = [
        f"{row['stage']:7}{row['padding']:6}{row['contender']:25}{row['ms']:9.1f} ms  floor {row['floor_ms']:7.1f}  "
        f"{row['tflops_per_s']:6.1f} TFLOP/s{_times(row)}  {row['peak_memory'] / 2**30:5.1f} GiB  "
        f"{_count(row)}  {row['rounds']} rounds"
        for row in found.values()
    ]
    timed = {(row["stage"], row["contender"]) for row in found.values()}
    for row in facts:
        if "reason" in row and (row["stage"], row["contender"]) not in timed:
            text.append(f"{row['stage']}: {row['contender']}: {row['reason']}")
    digests = [row["digest"] for row in facts if "digest" in row]
    if run is not None and found:
        device = run["environment"]["device"]
        model = next((row["model"] for row in facts if "model" in row), "")
        # From the rows, so that a run that was cut off has its verdicts too. Ratios are those within one stage.
        by_stage = [
            targets.verdicts([dict(row) for row in found.values() if row["stage"] == stage], digests, device, model)
            for stage in ("step", "options")
        ]
        judged: dict[str, Any] = {}
        for verdict in (verdict for verdicts in by_stage for verdict in verdicts):
            if verdict["target"] not in judged or verdict["value"] is not None:
                judged[verdict["target"]] = verdict
        text += _measured(targets.lines([*judged.values()]))
    return [*dict.fromkeys(text), *_digests(digests)]


def _digests(digests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say whether the bits of the same steps are the same in all runs that are told of here."""
    text = []
    for dtype, layers in dict.fromkeys((digest["dtype"], digest["layers"]) for digest in digests):
        alike = [d for d in digests if (d["dtype"], d["layers"]) == (dtype, layers)]
        seen = dict.fromkeys(value for digest in alike for value in (digest["first"], digest["again"]))
        said = "the same" if len(seen) == 1 else "DIFFERENT"
        text.append(f"digest {dtype}, {layers} layers: {said} in {len(alike)} runs: {', '.join(x[:16] for x in seen)}")
    return text


def _measured(verdicts: Sequence[str]) -> list[str]:
    """Write the targets that were looked at; of the others how many there are."""
    found = [verdict for verdict in verdicts if not verdict.startswith("not measured  ")]
    left = len(verdicts) - len(found)
    return found + ([f"not measured: {left} targets"] if left else [])


def _times(row: Mapping[str, Any]) -> str:
    ratio = row.get("ratio_to_plain_sft")
    return " " * 14 if ratio is None else f"  {ratio:5.2f} x plain"


def _count(row: Mapping[str, Any]) -> str:
    return "" if row.get("launches") is None else f"{row['launches']:6.0f} launches"


def _fidelity(lines: Lines) -> list[str]:
    rows = results.rows(lines, "fidelity")
    told = [
        f"fidelity {row['model']:8} {row['when']:18} dual {row['dtype']:9} cosine {row['cosine']:.6f} ({row['truth']})"
        for row in rows
        if row["gradient"] == "dual"
    ]
    return told + _measured(ops_table.verdicts(ops_table.cosine_targets(rows)))


def _ops(items: Sequence[Item]) -> list[str]:
    found = [item for item in items if item.stage == "ops"]
    if not found:
        return []
    rows, memory = ops_table.rows(found), ops_table.memory(found)
    return [*_measured(ops_table.verdicts(ops_table.targets(rows, memory))), *ops_table.lines(rows)]


def _others(lines: Lines) -> list[str]:
    text = [
        f"ceiling {row['dtype']:9} {row['tflops_per_s']:7.1f} TFLOP/s  {row['gb_per_s']:7.0f} GB/s"
        for row in results.rows(lines, "ceilings")
    ]
    for row in results.rows(lines, "profile"):
        profile = row["profile"]
        text += [f"profile {name}: {ratio['median']:.2f}" for name, ratio in profile["ratios"].items()]
        text += [
            f"profile {cost['phase']:20} {1e3 * cost['seconds']['median']:9.2f} ms {cost['share']:6.1%}"
            for cost in profile["phases"].get("sap", ())
        ]
    return text
