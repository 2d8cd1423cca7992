"""Does the exact probe steer? Exact probes against random ones of equal strength.

A probe V acts through the slope of the task loss along the harmful direction,
``L_dot = <grad_theta L(theta, V), u>``. Where it is negative, a training step drifts toward harm; to
first order V adds ``V . grad_V L_dot`` to it. This script

1. aligns a model: a few LoRA steps on refusals mixed with benign answers, merged into the base;
2. starts to fine-tune it on benign tasks, with fresh adapters;
3. computes there the exact ``grad_V L_dot``, and sets V to it, normalised, or to its signs, or to
   the signs of the published difference in bfloat16, or to random signs, which is what that
   difference's rounding noise should amount to;
4. measures the task loss and the change of the slope, and what the same V does on another task
   batch and another direction.

A sign probe's strength is in units of each layer's RMS (median over tokens), a normalised one's in
those of the hidden state. All in float32, but for the published difference.

    python -m benchmarks.steering --json result.json [--prompts harmful.csv]

Without ``--prompts`` the harmful requests are those of the embedded pairs.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import models, record, solved
from benchmarks.common.record import Row
from benchmarks.fidelity import agreement, in_bfloat16
from benchmarks.published.parts import finite_differences, margins, task_loss, trained
from sap_fast import SAPConfig
from sap_fast.batch.rows import Rows, pack, pack_pairs
from sap_fast.data import Example, Pair, collate, collate_pairs, safety_pairs
from sap_fast.method.flat import Flat
from sap_fast.method.passes import Micro
from sap_fast.method.probe import Probe
from sap_fast.method.reduce import Gradients
from sap_fast.model.decoder import Decoder
from sap_fast.model.read import read_decoder

NORMALISED = (0.3, 1.0)
SIGNS = (0.001, 0.003, 0.01, 0.03)
NOISE_SIGNS = (0.01, 0.03)
PUBLISHED_RADIUS = 2e-5
# Of an alignment step: refusals and benign answers; of a fine-tuning step and a measurement: tasks.
REFUSALS, BENIGN, TASKS, PAIRS = 6, 3, 6, 6
ALIGNMENT_RATE, LEARNING_RATE, TUNING_STEPS, MAX_LENGTH = 2e-3, 1e-3, 3, 256

REFUSAL_TEMPLATES = (
    "I'm sorry, but I can't help with that, because it could cause serious harm.",
    "I can't assist with this request. It could hurt people or break the law.",
    "That is something I won't help with. If you like, ask me about something safe instead.",
)
OPENING = "Sure, here is how to do that:"

Vectors = Mapping[int, Tensor]


@dataclass(frozen=True)
class Situation:
    """Holds a task batch, packed too, a unit direction, and what holds there without a probe.

    ``gradient``: the exact ``grad_V L_dot`` by layer ``[d]``; ``scale``: each layer's median RMS over tokens.
    """

    batch: Mapping[str, Tensor]
    rows: Rows
    u: Flat
    exact: Gradients
    gradient: Vectors
    scale: Vectors
    margin: float


def main(argv: Sequence[str] | None = None) -> int:
    """Align, fine-tune, measure; prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    parser.add_argument("--prompts", type=Path, help="harmful requests, a CSV of one column")
    parser.add_argument("--data", type=Path, help="instructions and outputs as a JSON list")
    parser.add_argument("--alignment-steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4, help="of the random signs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a model that takes no time, two steps")
    args = parser.parse_args(argv)

    base, tokenizer = models.tiny_base() if args.tiny else models.smollm2_base()
    steps = 2 if args.tiny else args.alignment_steps
    texts, pairs = models.examples(args.data), harmful_pairs(args.prompts)
    # The tasks measured on are neither in the alignment nor in the fine-tuning.
    held_out, texts = texts[: 2 * TASKS], texts[2 * TASKS :]

    base = base.to(args.device)
    before = margin(base, tokenizer, pairs[: 2 * PAIRS])
    base = align(base, tokenizer, pairs, texts, steps)
    aligned = margin(base, tokenizer, pairs[: 2 * PAIRS])
    model = models.with_lora(base).to(args.device)
    fine_tune(model, tokenizer, texts)
    decoder = read_decoder(model)
    layers = SAPConfig().layers_of(len(decoder.layers))
    here, there = (
        situation(decoder, tokenizer, held_out[i * TASKS :][:TASKS], pairs[i * PAIRS :][:PAIRS]) for i in range(2)
    )
    published = published_gradient(model, here, layers)
    rows = measure(decoder, here, there, published, args.seeds)
    slope, loss = float(here.exact.loss_dot), float(here.exact.loss)
    result = {
        "environment": record.environment(args.device),
        "settings": {
            "model": "tiny" if args.tiny else "smollm2",
            "alignment_steps": steps,
            "tuning_steps": TUNING_STEPS,
            "tasks": TASKS,
            "pairs": PAIRS,
            "harmful_requests": "embedded" if args.prompts is None else args.prompts.name,
            "layers": layers,
        },
        "without": {
            "task_loss": loss,
            "slope": slope,
            "slope_cosine": slope / float(here.exact.theta.norm()),
            "margin_as_shipped": before,
            "margin_aligned": aligned,
            "margin": (here.margin + there.margin) / 2,
            "other_slope": float(there.exact.loss_dot),
            "other_slope_cosine": float(there.exact.loss_dot / there.exact.theta.norm()),
            "cosine_of_directions": float(here.u.dot(there.u)),
            "published_cosine": agreement(published, here.gradient)["cosine"],
            "rms": {j: float(x) for j, x in here.scale.items()},
        },
        "rows": rows,
    }
    print(f"without a probe: {result['without']}")
    for row in rows:
        print(_line(row))
    record.write(args.json, result)
    if not args.tiny and not steers(rows):
        print("MISSED: exact signs of strength 0.01 do not stand out from random ones")
        return 1
    return 0


def steers(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether exact signs of strength 0.01 steer by more than random ones, by three standard deviations."""
    exact, random = (
        next(row for row in rows if (row["probe"], row["strength"]) == (f"{kind}, sign x RMS", 0.01))
        for kind in ("exact", "random")
    )
    return exact["slope_change"] > random["slope_change"] + 3 * random["slope_change_std"]


def harmful_pairs(prompts: Path | None) -> list[Pair]:
    """Read the embedded pairs, or pairs of a templated refusal and a compliant opening, by request."""
    if prompts is None:
        # By turns from each category, so that two batches do not differ in kind.
        pairs = safety_pairs()
        return [pair for turn in range(4) for pair in pairs[turn::4]]
    return [
        Pair("csv", prompt, REFUSAL_TEMPLATES[i % len(REFUSAL_TEMPLATES)], OPENING)
        for i, prompt in enumerate(models.prompts(prompts))
    ]


def align(base: nn.Module, tokenizer: Any, pairs: Sequence[Pair], texts: Sequence[Example], steps: int) -> nn.Module:
    """Teach the base to refuse by fine-tuning adapters, and merge them."""
    model: Any = models.with_lora(base, seed=1).to(next(base.parameters()).device)
    refusals = [Example(pair.prompt, pair.chosen) for pair in pairs]
    batches = [_turn(refusals, REFUSALS, step) + _turn(texts, BENIGN, step) for step in range(steps)]
    _train(model, tokenizer, batches, ALIGNMENT_RATE)
    merged: nn.Module = model.merge_and_unload()
    for p in merged.parameters():
        p.requires_grad_(False)
    return merged


def margin(base: nn.Module, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """Compute the mean of log p(chosen) - log p(rejected) per token, of a model without adapters; in nats."""
    batch = _to(collate_pairs(tokenizer, pairs, MAX_LENGTH), next(base.parameters()).device)
    with torch.no_grad():
        return float(margins(base, batch, per_token=True).mean())


def fine_tune(model: nn.Module, tokenizer: Any, texts: Sequence[Example]) -> None:
    """Run the benign fine-tuning that wears refusals away, without protection."""
    batches = [_turn(texts, TASKS, step) for step in range(TUNING_STEPS)]
    _train(model, tokenizer, batches, LEARNING_RATE)


def situation(decoder: Decoder, tokenizer: Any, tasks: Sequence[Example], pairs: Sequence[Pair]) -> Situation:
    """Pack tasks, find the direction of the pairs, and take the exact gradients at V = 0."""
    vocabulary, device = decoder.vocab_size, decoder.device
    batch = _to(collate(tokenizer, tasks, MAX_LENGTH), device)
    pair_batch = _to(collate_pairs(tokenizer, pairs, MAX_LENGTH), device)
    rows = pack(batch, vocab_size=vocabulary, device=device)
    pair_rows = pack_pairs(pair_batch, vocab_size=vocabulary, device=device)
    config = SAPConfig()
    layers = config.layers_of(len(decoder.layers))
    zero = Probe.zeros(layers, decoder.hidden_size, decoder.device, torch.float32)
    with decoder.installed():
        direction = solved.direction(decoder, pair_rows, {}, config)
        exact = solved.dual(decoder, [Micro(rows, None)], zero, direction.u)
    gradient, scale = zero.by_layer(exact.probe_dot), zero.by_layer(exact.rms.median(1).values)
    return Situation(batch, rows, direction.u, exact, gradient, scale, float(direction.margin))


def published_gradient(model: nn.Module, at: Situation, layers: Sequence[int]) -> dict[int, Tensor]:
    """Compute the published difference at V = 0 by layer ``[d]``: frozen weights in bfloat16, autocast."""
    zero = {j: torch.zeros_like(at.gradient[j]) for j in layers}
    found = finite_differences(in_bfloat16(model), at.batch, at.u, zero, [PUBLISHED_RADIUS], autocast=True)
    return found[PUBLISHED_RADIUS]


def measure(decoder: Decoder, here: Situation, there: Situation, published: Vectors, seeds: int) -> list[Row]:
    """Make the table: every probe found at ``here``, acting here and there."""
    gradient, scale = here.gradient, here.scale
    unit = 1 / here.exact.probe_dot.norm()
    generator = torch.Generator().manual_seed(0)

    def signs(strength: float, of: Vectors) -> Vectors:
        return {j: strength * scale[j] * g.sign() for j, g in of.items()}

    def noise() -> Vectors:
        return {j: torch.randn(g.shape, generator=generator).to(g) for j, g in gradient.items()}

    def seen(vectors: Vectors) -> Row:
        loss, slope = evaluate(decoder, here, vectors)
        _, other = evaluate(decoder, there, vectors)
        change = slope - float(here.exact.loss_dot)
        return {
            "task_loss": loss,
            "slope_change": change,
            "slope_change_percent": 100 * change / abs(float(here.exact.loss_dot)),
            "first_order": sum(float(v @ gradient[j]) for j, v in vectors.items()),
            "other_slope_change": other - float(there.exact.loss_dot),
        }

    rows: list[Row] = []
    for strength in NORMALISED:
        vectors = {j: strength * unit * g for j, g in gradient.items()}
        rows.append({"probe": "exact, normalised", "strength": strength, **seen(vectors)})
    for strength in SIGNS:
        rows.append({"probe": "exact, sign x RMS", "strength": strength, **seen(signs(strength, gradient))})
    for strength in NOISE_SIGNS:
        rows.append({"probe": "published, sign x RMS", "strength": strength, **seen(signs(strength, published))})
    for strength in NOISE_SIGNS:
        trials = [seen(signs(strength, noise())) for _ in range(seeds)]
        rows.append({"probe": "random, sign x RMS", "strength": strength, **_summary(trials)})
    return rows


def evaluate(decoder: Decoder, at: Situation, vectors: Vectors) -> tuple[float, float]:
    """Compute task loss and its slope along the direction, with a probe by layer ``[d]``; a dual forward."""
    probe = Probe.of(vectors).dual_leaves()
    with torch.no_grad(), decoder.installed():
        run = decoder.start(at.rows, None, theta_dot=at.u, probe=probe)
        nll, nll_dot = decoder.forward(run)
    assert nll_dot is not None  # it is a dual
    return float(nll.mean()), float(nll_dot.mean())


def _train(model: nn.Module, tokenizer: Any, batches: Sequence[Sequence[Example]], rate: float) -> None:
    """Run plain fine-tuning."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=rate)
    device = next(model.parameters()).device
    for batch in batches:
        task_loss(model, _to(collate(tokenizer, batch, MAX_LENGTH), device)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _summary(trials: list[Row]) -> Row:
    """Take the mean of each number over the trials, and under ``..._std`` its standard deviation."""
    row: Row = {key: mean(trial[key] for trial in trials) for key in trials[0]}
    if len(trials) > 1:
        row |= {f"{key}_std": stdev(trial[key] for trial in trials) for key in trials[0]}
    return row | {"seeds": len(trials)}


def _turn(texts: Sequence, count: int, step: int) -> list:
    """Take the ``count`` texts of a step, going round."""
    return [texts[(step * count + i) % len(texts)] for i in range(count)]


def _to(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


def _line(row: Row) -> str:
    def shown(key: str, form: str) -> str:
        spread = f" ± {row[f'{key}_std']:{form.lstrip('+')}}" if f"{key}_std" in row else ""
        return f"{row[key]:{form}}{spread}"

    return (
        f"{row['probe']:21} {row['strength']:<6g} task loss {shown('task_loss', '.3f')}  "
        f"slope {shown('slope_change', '+.3f')} ({shown('slope_change_percent', '+.0f')}%)  "
        f"other {shown('other_slope_change', '+.3f')}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
