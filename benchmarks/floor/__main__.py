"""The floor: the least time that one training step can take, for any model, batch and device. Arithmetic alone.

    python -m benchmarks.floor [--model llama-2-7b] [--peak 790 --bandwidth 4300] [--json PATH]

The table's rows go from plain fine-tuning (A) and the published steps (B) to the exact step (F) and the options that
change it. ``--real``, ``--prompt`` and ``--labelled`` say what part of padded rows is worth computing on;
``step.py`` has the floor of one step, and ``work.py`` what is counted.

Columns: TFLOP of frozen maps, attention and head, and of LoRA; GB that have to cross the memory interface; ms of
matrix products, of row-wise operations, and of the floor; the floor over those of A and A'; those of B1 and B2 over it.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.floor.step import BatchShape, Device, Floor, Method, Name, step_floor
from benchmarks.floor.work import Shape, Tokens, check_positive

MODELS = {
    "llama-2-7b": Shape(hidden=4096, inner=11008, layers=32, vocab=32000, heads=32, kv_heads=32, head_dim=128),
    "qwen2.5-7b": Shape(hidden=3584, inner=18944, layers=28, vocab=152064, heads=28, kv_heads=4, head_dim=128),
    "smollm2-135m": Shape(hidden=576, inner=1536, layers=30, vocab=49152, heads=9, kv_heads=3, head_dim=64),
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Describes what the table's rows compute on.

    Attributes:
        task, pairs: ``(sequences, padded length)`` of the task, and of each of a pair's two answers with its prompt.
        real: share of padded rows that are tokens.
        prompt: share of a pair's tokens that are its prompt, the same for both answers.
        labelled: share of the task's tokens that are scored.
        lowest_probe, probe_every, direction_every, tangent_fraction, pairs_per_step, float8: of the rows with that
            option (see :class:`Method`).

    Raises:
        ValueError: a share that is not one.
    """

    task: tuple[int, int] = (10, 128)
    pairs: tuple[int, int] = (8, 256)
    real: float = 0.60
    prompt: float = 0.35
    labelled: float = 0.50
    lowest_probe: int = 11
    probe_every: int = 8
    direction_every: int = 4
    tangent_fraction: float = 0.25
    pairs_per_step: int = 2
    float8: float = 1.6

    def __post_init__(self) -> None:
        for name in ("task", "pairs"):
            check_positive(name, dict(zip(("sequences", "length"), getattr(self, name), strict=True)), whole=True)
        for name in ("real", "labelled"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be more than 0 and at most 1, but is {getattr(self, name)}")
        if not 0 <= self.prompt < 1:
            raise ValueError(f"prompt must be at least 0 and less than 1, but is {self.prompt}")


def table(shape: Shape, device: Device, scenario: Scenario) -> dict[str, tuple[str, Floor]]:
    """Compute by the row's letter what each row is, and its floor."""
    s = scenario
    padded, pairs = (Tokens(count * length, length) for count, length in (s.task, (2 * s.pairs[0], s.pairs[1])))
    real, real_pairs = (Tokens(s.real * tokens.rows, s.real * tokens.length) for tokens in (padded, pairs))
    # Each prompt once for its two answers.
    packed = replace(real_pairs, rows=real_pairs.rows * (1 - s.prompt / 2))
    labelled = replace(real, scored=s.labelled * real.rows)
    labelled_pairs = replace(packed, scored=(1 - s.prompt) * real_pairs.rows)

    def row(what: str, name: Name, task: Tokens, its_pairs: Tokens | None = None, **options: Any) -> tuple[str, Floor]:
        method = Method(name=name, lowest_probe=s.lowest_probe, **options)
        return what, step_floor(shape, device, BatchShape(task, its_pairs, s.pairs[0]), method)

    exact = partial(row, name="lagged", task=labelled, its_pairs=labelled_pairs)
    every: dict[str, Any] = {"direction_every": s.direction_every}
    share: dict[str, Any] = {"tangent_fraction": s.tangent_fraction}
    fast, wanted = s.float8, min(s.pairs_per_step, s.pairs[0])
    return {
        "A": row(f"SFT, padded ({padded.rows:.0f} rows)", "sft", padded),
        "A'": row(f"SFT, padding removed ({real.rows:.0f}), head on labelled", "sft", labelled),
        "B1": row(f"published, as released ({pairs.rows / 2:.0f} of pairs)", "released", padded, pairs),
        "B2": row(f"published, tidy ({pairs.rows:.0f} of pairs)", "published", padded, pairs),
        "B3": row("the paper's algorithm literally, 4 passes", "literal", padded, pairs),
        "C1": row(f"dual, padded ({pairs.rows / 2:.0f} of pairs)", "lagged", padded, pairs.share(0.5)),
        "C2": row(f"dual, padded ({pairs.rows:.0f} of pairs)", "lagged", padded, pairs),
        "C3": row("B3 by dual passes and a restart", "fresh", padded, pairs),
        "D": row(f"C2, padding removed ({real.rows:.0f} + {real_pairs.rows:.0f})", "lagged", real, real_pairs),
        "E": row(f"D, pairs share prompts ({packed.rows:.0f} of pairs)", "lagged", real, packed),
        "F": exact("E, head on labelled rows: EXACT"),
        "F'": row("C3 as F is: EXACT", "fresh", labelled, labelled_pairs),
        "G": exact(f"F, direction_every={s.direction_every}", **every),
        "H": exact(f"F, tangent_fraction={s.tangent_fraction:g}", **share),
        "I": exact("F, options of G and H", **every, **share),
        "J": exact("F, without pairs", its_pairs=None),
        "L": exact(f"F, FP8 at {fast:g}x for pairs and tangents", float8=fast),
        "M": exact(f"F, {wanted} of {s.pairs[0]} pairs", pairs_per_step=wanted),
        "N": exact("F, options of G and L", float8=fast, **every),
        "O": exact(f"F, probe_every={s.probe_every}", probe_every=s.probe_every),
    }


def as_rows(floors: dict[str, tuple[str, Floor]]) -> list[dict[str, Any]]:
    """Make the table as JSON has it; ``X_over`` is row X's time over this one's, ``over_X`` the other way."""
    ms = {letter: floor.ms for letter, (_, floor) in floors.items()}
    return [
        {"row": letter, "what": what, "tflop": (floor.flops - floor.work.lora) / 1e12}
        | {"lora_tflop": floor.work.lora / 1e12, "gb": floor.bytes / 1e9}
        | {"matrix_ms": floor.matrix_ms, "rowwise_ms": floor.rowwise_ms, "floor_ms": floor.ms}
        | {f"over_{base}": floor.ms / ms[base] for base in ("A", "A'")}
        | {f"{base}_over": ms[base] / floor.ms for base in ("B1", "B2")}
        for letter, (what, floor) in floors.items()
    ]


HEADINGS = ("TFLOP", "LoRA", "GB", "matrix", "row-wise", "ms", "/A", "/A'", "B1/", "B2/")


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Write the table as text: of each column four digits of its largest number, of ratios two decimals."""
    names = list(rows[0])[2:]
    lines = [f"{'row':50}" + "".join(f"{heading:>9}" for heading in HEADINGS)]
    most = {name: max(row[name] for row in rows) for name in names}
    decimals = {name: 2 if "over" in name else max(0, 3 - math.floor(math.log10(most[name]))) for name in names}
    for row in rows:
        numbers = "".join(f"{row[name]:9.{decimals[name]}f}" for name in names)
        lines.append(f"{row['row']:3}{row['what']:47}{numbers}")
    return "\n".join(lines)


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write it as JSON if asked to; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        shape = _shape(args)
        device = Device(args.device, args.peak * 1e12, args.bandwidth * 1e9)
        if args.lowest_probe is None:
            args.lowest_probe = round(11 / 32 * shape.layers)
        scenario = Scenario(**{f.name: getattr(args, f.name) for f in fields(Scenario)})
        rows = as_rows(table(shape, device, scenario))
    except ValueError as error:
        parser.error(str(error))
    print(f"{shape}\n{scenario}\n{device.name}: {args.peak:g} TFLOP/s, {args.bandwidth:g} GB/s\n\n{text(rows)}")
    if args.json is not None:
        result = {"shape": asdict(shape), "device": asdict(device), "scenario": asdict(scenario), "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


WIDTHS = ("hidden", "inner", "layers", "vocab", "heads", "kv_heads", "head_dim")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", choices=MODELS, help="default: llama-2-7b, unless widths are given")
    for name in WIDTHS:
        add(f"--{name.replace('_', '-')}", type=int, help="of another model" if name == "hidden" else None)
    default = Shape.__dataclass_fields__
    add("--rank", type=int, default=default["rank"].default, help="of LoRA")
    add("--targets", nargs="+", default=default["targets"].default, help="of LoRA: linear maps of a layer")
    add("--dtype-bytes", type=int, default=default["dtype_bytes"].default, help="of weights and activations")
    add("--device", default="H200", help="its name, which changes nothing")
    add("--peak", type=float, default=790.0, help="TFLOP/s of matrix products that the device reaches")
    add("--bandwidth", type=float, default=4300.0, help="GB/s of memory traffic that the device reaches")
    for name, what in (("task", "sequences"), ("pairs", "pairs")):
        add(f"--{name}", type=_sizes, default=getattr(Scenario, name), help=f"{what} x padded length, as in 10x128")
    add("--lowest-probe", type=int, help="a layer, counted from 0; default: layer 11 of 32, at the same share of depth")
    for name in ("real", "prompt", "labelled", "tangent_fraction", "float8"):
        add(f"--{name.replace('_', '-')}", type=float, default=getattr(Scenario, name))
    for name in ("probe_every", "direction_every", "pairs_per_step"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(Scenario, name))
    add("--json", type=Path, help="where to write the table")
    return parser


def _sizes(given: str) -> tuple[int, int]:
    """Read ``10x128`` as two numbers."""
    count, x, length = given.partition("x")
    if not (x and count.isdecimal() and length.isdecimal()):
        raise argparse.ArgumentTypeError(f"give sequences x length, as in 10x128, not {given!r}")
    return int(count), int(length)


def _shape(args: argparse.Namespace) -> Shape:
    """Return the shape of a model, or of the widths given.

    Raises:
        ValueError: both, or widths that are missing.
    """
    adapters = {"rank": args.rank, "targets": tuple(args.targets), "dtype_bytes": args.dtype_bytes}
    widths = {name: getattr(args, name) for name in WIDTHS if getattr(args, name) is not None}
    if not widths:
        return replace(MODELS[args.model or "llama-2-7b"], **adapters)
    missing = [name for name in ("hidden", "inner", "layers", "vocab", "heads") if name not in widths]
    if args.model is not None or missing:
        raise ValueError(f"give --model, or widths without it; of those, {missing} are missing")
    check_positive("a shape", {"heads": widths["heads"]}, whole=True)
    others = {"kv_heads": widths["heads"], "head_dim": widths["hidden"] // widths["heads"]}
    return Shape(**(others | widths), **adapters)


if __name__ == "__main__":
    raise SystemExit(main())
