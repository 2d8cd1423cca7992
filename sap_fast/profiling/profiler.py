"""``sap_fast.profile`` runs plain fine-tuning and SAP side by side on a model, and says where their time goes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sap_fast.config import SAPConfig
from sap_fast.profiling.assemble import assemble
from sap_fast.profiling.inputs import Rounds, check_settings
from sap_fast.profiling.result import Profile
from sap_fast.profiling.rounds import Tell, measure
from sap_fast.profiling.steps import Batch, Steps
from sap_fast.step import SAP, attach


def profile(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    pairs: Batch | Iterable[Batch],
    config: SAPConfig | None = None,
    *,
    steps: int = 10,
    warmup: int = 2,
    output_dir: Path | str | None = None,
    overwrite: bool = False,
    peak_flops: float | None = None,
    bandwidth: float | None = None,
    tell: Tell | None = None,
) -> Profile:
    """Measure where the time of plain fine-tuning and of SAP goes, on a model, data and settings.

    Three steps take turns on the same batches: plain fine-tuning by transformers and PEFT on padded rows (where the
    model's own forward runs), plain fine-tuning by the library, and SAP. Whole steps are timed with nothing that
    takes note of phases; phases in as many rounds again, between those; then one step of each is counted and, for a
    trace, recorded by torch's profiler. Steps run in training mode, and AdamW steps over copies of the trained
    weights: the model is left as it was, also after an error or an interrupt (its ``.grad``, training flags, and
    torch's generators on the CPU and on its device included). On a GPU, torch's count of peak memory begins anew.

    Args:
        model: a model that :func:`sap_fast.attach` takes, and that is not attached.
        batches: one or several batches that :meth:`SAP.step` takes, best on the host; each round takes the next. At
            most ``warmup + steps`` are drawn.
        pairs: one or several batches of pairs, in the same way.
        config: the method's settings; defaults if None. ``graph`` is taken as False: a replay has no phases.
        steps: how many rounds are measured.
        warmup: how many rounds are run before these.
        output_dir: where to write ``profile.json``, ``profile.html`` and ``trace.json``; None for nowhere.
        overwrite: whether an earlier profile there may be replaced.
        peak_flops: the device's FLOP/s in the model's dtype, for the distance to the floor.
        bandwidth: the device's bytes/s, for the same.
        tell: is called with a line before each part of the work.

    Returns:
        What was found; its ``summary()`` is the text for a terminal.

    Raises:
        ValueError, BatchError: settings or batches that cannot be used, before any work.
        FileExistsError: the output folder is taken, before any work.
        UnsupportedModelError, RuntimeError: :func:`sap_fast.attach` refuses the model.
        StepRefusedError: :meth:`SAP.step` refuses a step.
    """
    folder = None if output_dir is None else Path(output_dir)
    check_settings(steps, warmup, peak_flops, bandwidth, folder, overwrite)
    config = (config or SAPConfig()).replace(graph=False)
    with attach(model, config) as sap:
        decoder = sap.decoder
        with preserve_model(model, decoder.device):
            rounds = Rounds.of(decoder, config, batches, pairs, warmup + steps)
            contenders = Steps(model, sap).contenders()
            found = measure(
                contenders,
                rounds,
                warmup,
                steps,
                decoder.device,
                traced=folder is not None,
                tell=tell or (lambda line: None),
            )
        settings = _settings(model, sap, steps, warmup, peak_flops, bandwidth)
        typical = rounds.sizes(rounds.typical(range(warmup, warmup + steps)))
        result = assemble(found, rounds, config, settings, typical, decoder.device)
    if folder is not None:
        result.write(folder, overwrite=overwrite)
    return result


@contextmanager
def preserve_model(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the model in training mode without gradients, and restore afterwards what was there before.

    Whatever has happened within, these are restored: ``.grad`` (the very tensors), every module's ``training``, and
    torch's generators on the CPU and on ``device``. Nothing here, and no step within, writes a weight.
    """
    gradients = [(p, p.grad) for p in model.parameters()]
    flags = [(module, module.training) for module in model.modules()]
    state = torch.get_rng_state()
    state_there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        for p, _ in gradients:
            p.grad = None
        model.train()
        yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        for module, flag in flags:
            module.training = flag
        torch.set_rng_state(state)
        if state_there is not None:
            torch.cuda.set_rng_state(state_there, device)


def _settings(
    model: nn.Module, sap: SAP, steps: int, warmup: int, peak_flops: float | None, bandwidth: float | None
) -> dict[str, Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    base = sap.decoder.embedding.weight.dtype
    settings: dict[str, Any] = {
        "model": type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__,  # type: ignore[operator]
        "dtype": str(base).removeprefix("torch."),
        "trained_weights": sum(p.numel() for p in trained),
        "checkpointing": any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
        "steps": steps,
        "warmup": warmup,
        "peak_flops": peak_flops,
        "bandwidth": bandwidth,
    }
    method = {name: value for name, value in asdict(sap.config).items() if name != "probe_layers"}
    return {**settings, **method, "probe_layers": list(sap.probe_layers)}
