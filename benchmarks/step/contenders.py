"""What takes part in the benchmark of a whole step, and how each is put to work on one batch.

Each contender is opened on its own twin of the model (``models.twin``) and leaves the task's gradient in ``.grad``
of the adapters; the optimizer is left out of all.

- ``released``, ``tidy``: the published step in its two forms (``published/step.py``). As released it prints (into
  nothing, here), draws dropout, pads to its fixed lengths, and runs under bfloat16 autocast; where the model is timed
  in float32, it runs in float32.
- ``plain-sft``: the task batch through the model's own forward and backward, as transformers' Trainer does it.
- ``trl-sft``: the same by trl's ``SFTTrainer.compute_loss``, with its defaults but no activation checkpointing.
- ``liger-sft``: the same with Liger's kernels put into the model.
- ``own-sft``: ``SAP.step`` without pairs.
- ``lagged``, ``fresh``: ``SAP.step`` by its two schedules; ``lagged-unshared``: with a row for each token, also of what
  sequences begin with in common; ``lagged-padded``: on rows whose padding counts as tokens, besides.
- ``direction-kept``: ``lagged`` with the direction of its first step: what an exact step does beside finding one.
- ``graph``: ``lagged``, captured and replayed as a CUDA graph, on rows padded to shipped sizes.
- the others: ``lagged`` with options that save passes or work; ``float8`` where the device and the model allow it.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sap_fast
from benchmarks.floor.step import Name
from benchmarks.ops.peers import AbsentError
from benchmarks.published.parts import pad_id, prompt_only, trained
from benchmarks.published.step import PublishedStep
from benchmarks.step import peers
from benchmarks.step.batches import Given, as_if_real, lengths
from benchmarks.step.run import Run, padded_lengths
from sap_fast import SAP, SAPConfig, UnsupportedModelError
from sap_fast.batch import buckets
from sap_fast.model.read import read_decoder

# Of the released code (``model.py``).
RELEASED_DROPOUT = 0.1


@dataclass(frozen=True)
class Contender:
    """Tells how to put a contender to work.

    Attributes:
        opened: puts it to work on a model that it may change; raises :class:`AbsentError`, with the reason, where it
            cannot be.
        method: how it computes, as the floor knows it (``floor/step.py``).
        options: what a result says of it.
        period: after how many steps what a step costs begins anew.
    """

    opened: Callable[[nn.Module, Given], AbstractContextManager[Run]]
    method: Name = "sft"
    options: Mapping[str, Any] = field(default_factory=dict)
    period: int = 1


# The published step


@contextmanager
def tidy(model: nn.Module, given: Given) -> Iterator[Run]:
    with PublishedStep(model, _layers(model)) as published:
        yield Run(
            lambda: published.step(given.batch, given.pairs),
            given.batch,
            padded_lengths(given.batch),
            padded_lengths(given.pairs),
            lowest_probe=min(_layers(model)),
            probe=lambda: {j: v.detach().clone() for j, v in published.probe.items()},
        )


@contextmanager
def released(model: nn.Module, given: Given) -> Iterator[Run]:
    shapes = given.shapes
    drops = _dropout(model)

    def settle() -> None:
        for drop in drops:
            drop.p = RELEASED_DROPOUT

    def step() -> Tensor:
        with redirect_stdout(io.StringIO()):
            return published.step(given.batch, given.pairs)

    with PublishedStep(
        model,
        _layers(model),
        as_released=True,
        autocast=_dtype(model) == torch.bfloat16,
        task_length=shapes.task_length,
        pair_length=shapes.pair_length,
    ) as published:
        yield Run(
            step,
            prompt_only(given.batch, shapes.task_length, pad_id(model)),
            [shapes.task_length] * shapes.tasks,
            [shapes.pair_length] * shapes.pairs,
            lowest_probe=min(_layers(model)),
            probe=lambda: {j: v.detach().clone() for j, v in published.probe.items()},
            settle=settle,
            empties_cache=True,
        )


def _dropout(model: nn.Module) -> list[nn.Dropout]:
    """Put dropout before every adapter, for now of nothing."""
    drops = []
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_dropout")]
    for layer in layers:
        for name in layer.lora_dropout:
            drops.append(nn.Dropout(0.0))
            layer.lora_dropout[name] = drops[-1]
    return drops


# Ours


def sap(
    config: SAPConfig, *, pairs: bool = True, padded: bool = False, direction: bool = True
) -> Callable[[nn.Module, Given], AbstractContextManager[Run]]:
    """Make what opens ``SAP.step`` by a configuration, whose ``pairs_per_step`` means half of the pairs.

    Args:
        pairs: whether it is given pairs.
        padded: whether padding counts as tokens.
        direction: whether steps find directions, the first aside.
    """

    @contextmanager
    def opened(model: nn.Module, given: Given) -> Iterator[Run]:
        if padded and given.kind == "full":
            raise AbsentError("full rows hold no padding: it is lagged")
        if config.graph and given.batch["input_ids"].device.type != "cuda":
            raise AbsentError("CUDA graphs need a GPU")
        settings = config
        # On the host, where a loader leaves them: from the device they would be waited for.
        batch, contrast = ({key: x.cpu() for key, x in each.items()} for each in (given.batch, given.pairs))
        if config.pairs_per_step is not None:
            if given.shapes.pairs < 2:
                raise AbsentError("half of one pair is none")
            settings = config.replace(pairs_per_step=given.shapes.pairs // 2)
        if padded:
            batch, contrast = as_if_real(batch), as_if_real(contrast)
        weights = list(trained(model).values())

        def step() -> Tensor:
            for p in weights:
                p.grad = None
            return handle.step(batch, contrast if pairs else None).loss

        with _nothing_blocked(), _attached(model, settings) as handle:
            packer = read_decoder(model).packer(share_prefixes=settings.share_prefixes)
            on_tasks, on_pairs = packer.task(packer.read(batch)), packer.pairs(packer.read_pairs(contrast))
            if settings.graph:
                on_tasks, on_pairs = buckets.padded(on_tasks), buckets.padded(on_pairs, pairs=True)
            yield Run(
                step,
                given.batch,
                lengths(batch),
                lengths(contrast) if pairs and direction else [],
                on_tasks.rows,
                on_pairs.rows if pairs and direction else None,
                head_on_scored=True,
                lowest_probe=min(handle.probe_layers) if pairs else None,
                probe=(lambda: handle.probe) if pairs else dict,
                fresh=config.schedule == "fresh",
            )

    return opened


def _attached(model: nn.Module, config: SAPConfig) -> SAP:
    try:
        return sap_fast.attach(model, config)
    except (ValueError, UnsupportedModelError) as error:
        if not config.float8:
            raise
        raise AbsentError(str(error)) from error


@contextmanager
def _nothing_blocked() -> Iterator[None]:
    """Refuse the contender where something blocks captured steps: it would be an eager step under their name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "graph=True")
        yield


def _saving(period: int = 1, **options: Any) -> Contender:
    """Make a contender of the lagged step with options; ``pairs_per_step`` is half of them, however many there are."""
    said = options | ({"pairs_per_step": "half"} if "pairs_per_step" in options else {})
    return Contender(sap(SAPConfig(schedule="lagged", **options)), "lagged", {"schedule": "lagged", **said}, period)


# So many steps that no run takes them.
_NEVER = 10**9

CONTENDERS: dict[str, Contender] = {
    "released": Contender(released, "published", {"dropout": RELEASED_DROPOUT, "autocast": "in bfloat16"}),
    "tidy": Contender(tidy, "published"),
    "plain-sft": Contender(peers.plain),
    "trl-sft": Contender(peers.trl, options={"gradient_checkpointing": False}),
    "liger-sft": Contender(peers.liger),
    "own-sft": Contender(sap(SAPConfig(), pairs=False)),
    "lagged": _saving(),
    "lagged-unshared": _saving(share_prefixes=False),
    "lagged-padded": Contender(
        sap(SAPConfig(schedule="lagged", share_prefixes=False), padded=True),
        "lagged",
        {"schedule": "lagged", "share_prefixes": False},
    ),
    "fresh": Contender(sap(SAPConfig(schedule="fresh")), "fresh", {"schedule": "fresh"}),
    "direction-kept": Contender(
        sap(SAPConfig(schedule="lagged", direction_every=_NEVER), direction=False),
        "lagged",
        {"schedule": "lagged", "direction": "of the first step"},
    ),
    "graph": _saving(graph=True, check="deferred"),
    "direction-every": _saving(4, direction_every=4),
    "tangents": _saving(tangent_fraction=0.25),
    "direction-every+tangents": _saving(4, direction_every=4, tangent_fraction=0.25),
    "probe-every": _saving(8, probe_every=8),
    "pairs": _saving(pairs_per_step=1),
    "delayed": _saving(delayed_direction=True),
    "float8": _saving(float8=True),
    "delayed+float8": _saving(delayed_direction=True, float8=True),
}


def _layers(model: Any) -> tuple[int, ...]:
    """Return the probed layers: the published step gets those of ours."""
    return SAPConfig().layers_of(model.config.num_hidden_layers)


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that the frozen weights are stored in."""
    return next(p.dtype for p in model.parameters() if not p.requires_grad)
