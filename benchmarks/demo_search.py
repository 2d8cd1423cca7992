"""The search for the demonstration's settings: few runs, all of them recorded, the misses too.

    python -m benchmarks.demo_search --json benchmarks/results/demo-search.json [--only NAME ...]

Every run fine-tunes the aligned SmolLM2 for 25 steps, with another seed than the demonstration's, and is measured on
the held-out data on its way. What the demonstration then shows on that data was chosen on it, with another seed: read
its figures so. A run that is in the file already is not repeated, so an interrupted search goes on where it was.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sap_fast.atomic import write_json
from sap_fast.cli.comparison import Point, Settings, at_equal_loss, fine_tune, point
from sap_fast.cli.demo import MAX_LENGTH
from sap_fast.cli.models import load_model, load_tokenizer, quiet
from sap_fast.cli.train import Data
from sap_fast.config import SAPConfig
from sap_fast.data import benign_examples, encode_pairs, encode_tasks, safety_pairs
from sap_fast.data.alignment import aligned_smollm2
from sap_fast.environment import environment
from sap_fast.evaluation.measure import embedded_suite, measure

STEPS, SEED, EVERY, BATCH, PAIRS = 25, 1, 5, 4, 4
MOST_RUNS = 16

# By name: learning rate, and the method's settings (None is plain fine-tuning). At most MOST_RUNS.
RUNS: dict[str, tuple[float, SAPConfig | None]] = {
    "sft, 1e-3": (1e-3, None),
    "sft, 2e-3": (2e-3, None),
    "sft, 5e-3": (5e-3, None),
    "project, 2e-3": (2e-3, SAPConfig(guard="project")),
    "sap 0.003, 2e-3": (2e-3, SAPConfig(strength=0.003)),
    "sap 0.01, 2e-3": (2e-3, SAPConfig(strength=0.01)),
    "sap 0.01, 5e-3": (5e-3, SAPConfig(strength=0.01)),
    "sap 0.003, 5e-3": (5e-3, SAPConfig(strength=0.003)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not recorded yet, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, required=True, help="the record, written after each run")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="these runs alone")
    args = parser.parse_args(argv)
    if len(RUNS) > MOST_RUNS:
        raise SystemExit(f"the search is bounded: {len(RUNS)} runs are listed, {MOST_RUNS} are allowed")

    with quiet():
        base = aligned_smollm2()
    tokenizer = load_tokenizer(str(base))
    suite = embedded_suite(tokenizer, MAX_LENGTH)
    data = Data(
        encode_tasks(tokenizer, [x._asdict() for x in benign_examples()], MAX_LENGTH),
        encode_pairs(tokenizer, [x._asdict() for x in safety_pairs()], MAX_LENGTH),
    )
    record = json.loads(args.json.read_text()) if args.json.exists() else {"base": base.name, "runs": {}}
    if record["base"] != base.name:
        raise SystemExit(f"{args.json} records runs from {record['base']}, but the base is now {base.name}")
    shared = {"steps": STEPS, "batch": BATCH, "pairs": PAIRS, "seed": SEED, "eval_every": EVERY}
    record |= {"shared": shared, "environment": environment(torch.device("cpu"))}
    if "start" not in record:
        record["start"] = measure(load_model(str(base), dtype="float32"), tokenizer, suite).figures
    start = point(0, record["start"])
    for name in args.only or RUNS:
        if name in record["runs"]:
            continue
        rate, config = RUNS[name]
        with tempfile.TemporaryDirectory() as scratch:
            settings = Settings(learning_rate=rate, **shared)
            model, run = fine_tune(
                base, tokenizer, data, suite, settings, config, start, Path(scratch), partial(print, name)
            )
        record["runs"][name] = {
            "learning_rate": rate,
            "method": "sft" if config is None else config.guard,
            "strength": config.strength if config and config.uses_probe else None,
            "probe_layers": list(config.layers_of(model.config.num_hidden_layers))
            if config and config.uses_probe
            else None,
            "way": [asdict(point) for point in run.way],
            **run.figures,
            "seconds_per_step": run.seconds_per_step,
            "steering": [entry.get("sap/steering") for entry in run.log],
        }
        write_json(args.json, record)
    _print(record["runs"])
    return 0


def _print(runs: dict[str, Any]) -> None:
    """Print each run, and its margin against plain fine-tuning's at the same learning rate and equal task loss."""
    plain = {run["learning_rate"]: [Point(**p) for p in run["way"]] for run in runs.values() if run["method"] == "sft"}
    for name, run in runs.items():
        line = f"{name:32} margin {run['margin_unseen']:+.3f}  task loss {run['task_loss']:.3f}"
        line += f"  refusal {run['prefers_refusal']:.0%}  look-alikes {run['look_alikes_answered']:.0%}"
        if run["method"] != "sft" and run["learning_rate"] in plain:
            way = [Point(**p) for p in run["way"]]
            loss, margins = at_equal_loss({"it": way, "sft": plain[run["learning_rate"]]})
            line += f"  at task loss {loss:.3f}: {margins['it']:+.3f}, sft {margins['sft']:+.3f}"
        print(line)


if __name__ == "__main__":
    sys.exit(main())
