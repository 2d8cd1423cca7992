"""Which bits every setting of the method gives: what a change that must change no number is held to.

    python -m benchmarks.digest --json before.json
    python -m benchmarks.digest --against before.json     # exit code 1 where a setting gives other bits

Each row is SHA-256 over the gradients of all adapters, the probe and what the report says, after each of ten steps of a
random model of four layers with adapters on all its linear maps, with one step of gradient descent after each. Bits
differ between devices, numbers of threads and releases of torch, so both runs are to be one machine's.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sap_fast
from benchmarks.common import models, record
from benchmarks.published.parts import trained
from sap_fast import SAP, SAPConfig

STEPS = 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCAB = 199

Batch = dict[str, Tensor]
COMMON: dict[str, Any] = {"probe_layers": (1, 2), "strength": 0.05}
FRESH = {"schedule": "fresh"}
# Beside these, each alone: a task batch of two micro-batches, of unequal size, and steps under dropout.
SETTINGS: dict[str, dict[str, Any]] = {
    "lagged": {},
    "fresh": FRESH,
    "fresh, stored": {**FRESH, "restart": "store"},
    "fresh, recomputed": {**FRESH, "restart": "recompute"},
    "difference": {"gradient": "finite_difference", "radius": 1e-3},
    "fresh, difference": {**FRESH, "gradient": "finite_difference", "radius": 1e-3},
    "project": {"guard": "project"},
    "counter": {"guard": "counter", "counter": 0.2},
    "probe+project": {"guard": "probe+project"},
    "fresh, probe+project": {**FRESH, "guard": "probe+project"},
    "normalised": {"probe_update": "normalised"},
    "adamw": {"probe_update": "adamw"},
    "fresh, adamw": {**FRESH, "probe_update": "adamw"},
    "absolute": {"strength_unit": "absolute"},
    "normalised, absolute": {"probe_update": "normalised", "strength_unit": "absolute"},
    "logsigmoid": {"safety_loss": "logsigmoid", "temperature": 2.0},
    "summed": {"per_token": False},
    "probe in safety pass": {"probe_in_safety_pass": True},
    "last layer": {"probe_layers": (3,)},
    "every layer": {"probe_layers": (0, 1, 2, 3)},
    "fresh, every layer": {**FRESH, "probe_layers": (0, 1, 2, 3)},
    "probe every 3": {"probe_every": 3},
    "direction every 3": {"direction_every": 3},
    "direction every 4, cosine 0.9": {"direction_every": 4, "direction_min_cosine": 0.9},
    "tangents of half": {"tangent_fraction": 0.5},
    "fresh, tangents of half": {**FRESH, "tangent_fraction": 0.5},
    "two pairs": {"pairs_per_step": 2},
    "no shared prefixes": {"share_prefixes": False},
    "own attention": {"attention": "own"},
    "sdpa": {"attention": "sdpa"},
    "delayed": {"delayed_direction": True},
    "delayed, tangents of half": {"delayed_direction": True, "tangent_fraction": 0.5},
    "float8": {"float8": "emulated"},
    "float8, delayed": {"float8": "emulated", "delayed_direction": True},
    "float8, tangents of half": {"float8": "emulated", "tangent_fraction": 0.5},
    "float8, fresh": {**FRESH, "float8": "emulated"},
    "deferred": {"check": "deferred"},
    "graph": {"check": "deferred", "graph": True},
}
# What each run of a setting varies beside it.
VARIANTS = {"": 1, "micro-batches": 2, "dropout": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Take the steps, print and compare their digests; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digest", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], metavar="NAME")
    parser.add_argument("--json", type=Path, help="where to write the digests to")
    parser.add_argument("--against", type=Path, help="an earlier run's file")
    args = parser.parse_args(argv)
    start, rows = time.perf_counter(), []
    for name in args.settings:
        for dtype in args.dtypes:
            for variant in VARIANTS:
                row = {"setting": name, "variant": variant, "dtype": dtype}
                rows.append(row | digest(SETTINGS[name], dtype, variant, args.device))
                print(" ".join(f"{row[key]:<30}" for key in row), rows[-1]["digest"] or rows[-1]["problem"], flush=True)
    if args.json:
        seconds = round(time.perf_counter() - start, 1)
        result = {"environment": record.environment(args.device), "steps": STEPS, "seconds": seconds, "rows": rows}
        record.write(args.json, result)
    if not args.against:
        return 0
    changed = compared(json.loads(args.against.read_text(encoding="utf-8"))["rows"], rows)
    print(f"{len(rows)} digests, {len(changed)} of them other than in {args.against.name}", *changed, sep="\n  ")
    return 1 if changed else 0


def compared(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the rows of ``after`` that have another digest, or none, in ``before``."""

    def key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return row["setting"], row["variant"], row["dtype"]

    known = {key(row): row["digest"] for row in before}
    return [", ".join(filter(None, key(row))) for row in after if known.get(key(row), "") != row["digest"]]


def digest(settings: Mapping[str, Any], dtype: str, variant: str, device: str) -> dict[str, str | None]:
    """Take ten steps from one start: return their ``digest``, or the ``problem`` with which they were refused."""
    seen = hashlib.sha256()
    model = _model(DTYPES[dtype], dropout=0.1 if variant == "dropout" else 0.0).to(device)
    torch.manual_seed(1)
    try:
        with sap_fast.attach(model, SAPConfig(**(COMMON | dict(settings)))) as sap:
            for step in range(STEPS):
                batches = [_batch(3 + i, 17 - step % 2 - 4 * i, device) for i in range(VARIANTS[variant])]
                model.zero_grad()
                report = sap.step(batches if len(batches) > 1 else batches[0], _batch(6, 11, device))
                fold(seen, model, sap)
                seen.update(repr(report.to_dict()).encode())
                _descend(model)
    except (ValueError, RuntimeError) as error:
        return {"digest": None, "problem": " ".join(str(error).split())}
    return {"digest": seen.hexdigest()}


def fold(seen: Any, model: nn.Module, sap: SAP) -> None:
    """Add the gradients of all adapters and the probe, in float64, which holds every narrower number, to a digest."""
    for x in (*(p.grad for p in trained(model).values()), *sap.probe.values()):
        assert x is not None
        seen.update(x.detach().double().cpu().contiguous().numpy().tobytes())


def _model(dtype: torch.dtype, dropout: float) -> nn.Module:
    """Make a model in ``dtype``, its adapters of rank 4 in float32, or in float64 where it is; B is not zero."""
    base, _ = models.random_base(layers=4, width=32)
    model = models.with_lora(base.to(dtype), rank=4, dropout=dropout, targets=TARGETS).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trained(model).values():
            p.data = p.data.to(torch.promote_types(dtype, torch.float32))
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def _batch(sequences: int, length: int, device: str) -> Batch:
    """Draw random tokens, rows of unlike lengths that begin with the same three tokens, scored in the second half."""
    ids = torch.randint(3, VOCAB, (sequences, length))
    ids[:, :3] = torch.tensor([5, 6, 7])
    mask = torch.arange(length) < length - torch.arange(sequences)[:, None] % 4
    scored = mask & (torch.arange(length) >= length // 2)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~scored, -100)}
    return {key: x.to(device) for key, x in batch.items()}


@torch.no_grad()
def _descend(model: nn.Module) -> None:
    for p in trained(model).values():
        p.sub_(0.05 * p.grad)


if __name__ == "__main__":
    sys.exit(main())
