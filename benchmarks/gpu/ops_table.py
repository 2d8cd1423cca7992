"""What the times of one run amount to: rows of contenders, and which targets they meet."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.common.record import Row
from benchmarks.gpu.results import Item
from benchmarks.gpu.subjects import ROW_WISE, Visit
from benchmarks.ops.contenders import PASSES
from sap_fast.ops._cases import MANY, REAL_MODELS

# A target: what is looked at, its bound, and whether that is a floor or a ceiling.
LEAST_BANDWIDTH = {"forward": 0.85, "backward": 0.80}
MOST_OF_FLASH = {128: 1.0, 256: 1.0, 2048: 2.0}
LEAST_OVER_LIGER, LEAST_OVER_EAGER = 2.0, 10.0
# A sequence twice as long may take a little more than twice the memory, never four times.
MOST_GROWTH = 2.2
LEAST_COSINE = 0.995
NORMS, ATTENTION_MODEL = ("rms_norm", "probe_rms_norm"), "llama-2-7b"


def copy_bandwidth(items: Iterable[Item]) -> float | None:
    """Return the bytes read and written a second, over both copies."""
    copies = [item.values for item in items if "::test_copy" in item.id and "seconds" in item.values]
    seconds = [s for values in copies for s in values["seconds"]]
    return copies[0]["bytes"] / statistics.median(seconds) if seconds else None


def rows(items: Sequence[Item]) -> list[Row]:
    """Make one row for each op, size and pass; in it every contender, with its median time or why it has none."""
    copied = copy_bandwidth(items)
    result: dict[tuple, Row] = {}
    seconds: dict[tuple, list[float]] = {}
    for item in items:
        if "::test_op[" not in item.id:
            continue
        visit = Visit.parse(parameter(item.id))
        subject, pass_, name, _ = visit
        what = {"op": subject.op, "model": subject.model, "shape": subject.shape, "rows": subject.rows}
        what |= {"length": subject.length, "pass": pass_, "bytes": None, "contenders": {}, "times_faster_than": {}}
        row = result.setdefault((subject, pass_), what)
        if "seconds" not in item.values:
            row["contenders"].setdefault(name, {"outcome": f"{item.outcome}: {item.reason}"})
            continue
        row["bytes"] = row["bytes"] or item.values["bytes"]
        pooled = seconds.setdefault((subject, pass_, name), [])
        pooled += item.values["seconds"]
        row["contenders"][name] = {"us": 1e6 * statistics.median(pooled), "rounds": len(pooled)}
    for row in result.values():
        _add_ratios(row, copied)
    return list(result.values())


def _add_ratios(row: Row, copied: float | None) -> None:
    contenders = row["contenders"]
    ours = contenders.get("ours", {})
    if "us" not in ours:
        return
    if row["bytes"]:
        rate = row["bytes"] / (1e-6 * ours["us"])
        ours |= {"GB/s": rate / 1e9, "of_copy": rate / copied if copied else None}
    row["times_faster_than"] = {
        name: entry["us"] / ours["us"] for name, entry in contenders.items() if name != "ours" and "us" in entry
    }


def memory(items: Sequence[Item]) -> list[Row]:
    """Return what attention allocated at each length, in bytes; None where it was not measured."""
    found = [item for item in items if "::test_memory[" in item.id]
    return [
        {"length": int(parameter(item.id)), "outcome": item.outcome, "reason": item.reason}
        | {pass_: item.values.get(pass_) for pass_ in PASSES}
        for item in found
    ]


def targets(table: Iterable[Row], memories: Sequence[Row]) -> list[Row]:
    """List every target with the value found, or with None where nothing was measured."""
    found = {(row["op"], row["model"], row["rows"], row["length"], row["pass"]): row for row in table}
    result = []

    def look(op: str, model: str, length: int, pass_: str) -> Row:
        return found.get((op, model, MANY, length, pass_), {"contenders": {}, "times_faster_than": {}})

    def add(text: str, value: float | None, bound: float, at_least: bool) -> None:
        met = None if value is None else (value >= bound if at_least else value <= bound)
        verdict = "not measured" if met is None else "met" if met else "missed"
        sign = ">=" if at_least else "<="
        result.append({"target": f"{text} {sign} {bound:g}", "value": value, "verdict": verdict})

    for pass_, bound in LEAST_BANDWIDTH.items():
        for model in REAL_MODELS:
            for op in ROW_WISE:
                ours = look(op, model, 0, pass_)["contenders"].get("ours", {})
                add(f"{op} {pass_}, {model}, {MANY} rows: of copy bandwidth", ours.get("of_copy"), bound, True)
    for op in NORMS:
        faster = look(op, "llama-2-7b", 0, "backward")["times_faster_than"]
        add(f"{op} backward, {MANY} rows: times faster than 2x Liger", faster.get("liger"), LEAST_OVER_LIGER, True)
    for length, bound in MOST_OF_FLASH.items():
        faster = look("attention", ATTENTION_MODEL, length, "forward")["times_faster_than"].get("flash")
        add(f"attention forward at {length}: of 2x flash", faster and 1 / faster, bound, False)
    faster = look("attention", ATTENTION_MODEL, 2048, "backward")["times_faster_than"]
    add("attention backward at 2048: times faster than eager", faster.get("eager"), LEAST_OVER_EAGER, True)
    for pass_ in PASSES:
        sizes = [row[pass_] for row in sorted(memories, key=lambda row: row["length"])]
        growth = max((b / a for a, b in itertools.pairwise(sizes) if a and b), default=None)
        growth = growth if sizes and all(sizes) else None
        add(f"attention {pass_}, memory when the length doubles: growth", growth, MOST_GROWTH, False)
    return result


def cosine_targets(fidelity_rows: Iterable[Row]) -> list[Row]:
    """Judge the dual pass in bfloat16 against the exact derivative, model by model."""
    result = []
    for row in fidelity_rows:
        if (row["gradient"], row["dtype"]) == ("dual", "bfloat16"):
            text = (
                f"{row['model']} {row['when']}, probe gradient in bfloat16 ({row['truth']}): cosine >= {LEAST_COSINE}"
            )
            verdict = "met" if row["cosine"] >= LEAST_COSINE else "missed"
            result.append({"target": text, "value": row["cosine"], "verdict": verdict})
    return result


OTHERS = {"eager": "eager", "compiled": "compile", "liger": "2x Liger", "flash": "2x flash"}


def lines(table: Iterable[Row]) -> list[str]:
    """Write the table as text. The last columns say how many times faster than another ours is."""
    heads = "".join(f"{head:>9}" for head in OTHERS.values())
    result = [f"{'op':21}{'model':13}{'shape':>9} {'pass':9}{'us':>9}{'GB/s':>7}{'copy':>6}{heads}"]
    reasons: Counter[tuple[str, str]] = Counter()
    for row in table:
        ours = row["contenders"].get("ours", {})
        cells = f"{row['op']:21}{row['model']:13}{row['shape']:>9} {row['pass']:9}"
        cells += f"{ours['us']:9.1f}" if "us" in ours else f"{'-':>9}"
        cells += f"{ours['GB/s']:7.0f}" if "GB/s" in ours else f"{'-':>7}"
        cells += f"{ours['of_copy']:6.0%}" if ours.get("of_copy") else f"{'-':>6}"
        for name in OTHERS:
            faster = row["times_faster_than"].get(name)
            cells += f"{'-' if faster is None else format(faster, '.2f'):>9}"
        result.append(cells)
        reasons.update((name, e["outcome"]) for name, e in row["contenders"].items() if "outcome" in e)
    result += [f"{name}: {reason} ({count} rows)" for (name, reason), count in sorted(reasons.items())]
    return result


def verdicts(targets: Iterable[Row]) -> list[str]:
    """Write a line for each target."""
    return [
        f"{row['verdict']:13} {row['target']}" + ("" if row["value"] is None else f": {row['value']:.3g}")
        for row in targets
    ]


def parameter(id: str) -> str:
    """Return what is in the brackets of a test's id."""
    return id.partition("[")[2].removesuffix("]")
