"""The training steps that are compared: plain fine-tuning by PEFT's own passes and by the library's, and SAP.

A step of each is all that a training loop does with a batch: to the device (the library's own steps do that
themselves), the passes, the optimizer. The optimizer steps over copies of the trained weights, so that the model's are
never written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sap_fast.config import SAPConfig
from sap_fast.method.rhythm import Rhythm
from sap_fast.model.attachment import Snapshot
from sap_fast.profiling.observed import Observed
from sap_fast.profiling.phases import Begin, ignored
from sap_fast.step import SAP

Batch = Mapping[str, Tensor]

SFT, PEFT, SAP_STEP = "sft", "peft", "sap"
LABELS = {SFT: "plain SFT, sap_fast's passes", PEFT: "plain SFT, transformers and PEFT, padded", SAP_STEP: "SAP"}


@dataclass(frozen=True)
class Kind:
    """One kind of a guarded step, and how often it comes.

    Attributes:
        directs, probes: whether a direction, and a probe, are found in it.
        weight: its share of all steps.
        rhythm: where a handle stands before such a step.
    """

    directs: bool
    probes: bool
    weight: float
    rhythm: Rhythm

    def label(self, config: SAPConfig) -> str:
        """What tells it from the other kinds."""
        if self.directs:
            return "a step with a direction and a probe" if config.uses_probe else "a step with a direction"
        if not config.uses_probe or self.probes:
            return "a step with the last direction"
        return "an ordinary pass at the last probe"


def kinds(config: SAPConfig) -> list[Kind]:
    """The kinds of steps that a configuration has, the dearest first; over a whole period of its rhythm.

    With ``direction_min_cosine`` the rhythm is the slowest, at ``direction_every``.
    """
    period = config.probe_every * -(-config.direction_every // config.probe_every)
    counts: dict[tuple[bool, bool], int] = {}
    before: dict[tuple[bool, bool], Rhythm] = {}
    rhythm = Rhythm.of(config)
    for _ in range(period):
        kind = rhythm.finds_direction(config), rhythm.finds_probe(config)
        counts[kind] = counts.get(kind, 0) + 1
        before.setdefault(kind, rhythm)
        rhythm = rhythm.after(directed=kind[0])
    return [Kind(*kind, count / period, before[kind]) for kind, count in counts.items()]


@dataclass(frozen=True)
class Contender:
    """A training step that is timed.

    Attributes:
        key: by which results name it.
        label: for people.
        of: what it is a share of: itself, or SAP's average step.
        weight: that share.
        run: takes a batch, pairs and what is told of its phases.
    """

    key: str
    label: str
    of: str
    weight: float
    run: Callable[[Batch, Batch, Begin], None]


class Optimizer:
    """AdamW over copies of the trained weights, which takes its gradients from the model's."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        self._trained = trained
        self._copies = [nn.Parameter(p.detach().clone()) for p in trained]
        self._adamw = torch.optim.AdamW(self._copies, lr=1e-4, fused=True)

    def step(self) -> None:
        """Take the gradients over, step, and let go of them."""
        for p, copy in zip(self._trained, self._copies, strict=True):
            p.grad, copy.grad = None, p.grad
        self._adamw.step()
        self._adamw.zero_grad()


class Steps:
    """Steps on one attached model.

    Args:
        model: as a training loop has it.
        sap: attached to it.
    """

    def __init__(self, model: nn.Module, sap: SAP) -> None:
        assert sap._attached is not None
        self._model, self._sap = model, sap
        self._decoder, self._snapshot = sap._attached
        self._optimizer = Optimizer(list(self._decoder.trained.values()))
        self._cut = min(sap.probe_layers, default=None)

    def contenders(self) -> list[Contender]:
        """PEFT's passes, the library's, and each kind of SAP's steps."""
        config = self._sap.config
        found = [
            Contender(SFT, LABELS[SFT], SFT, 1.0, lambda batch, _, begin: self._own(batch, None, begin)),
            Contender(PEFT, LABELS[PEFT], PEFT, 1.0, self._peft),
        ]
        for i, kind in enumerate(kinds(config)):
            key = SAP_STEP if kind.weight == 1 else f"{SAP_STEP}-{i + 1}"
            label = LABELS[SAP_STEP] if kind.weight == 1 else f"{LABELS[SAP_STEP]}, {kind.label(config)}"
            found.append(Contender(key, label, SAP_STEP, kind.weight, self._guarded(kind.rhythm)))
        return found

    def _guarded(self, rhythm: Rhythm) -> Callable[[Batch, Batch, Begin], None]:
        def run(batch: Batch, pairs: Batch, begin: Begin) -> None:
            # Every round has one step of each kind, whatever came before it.
            self._sap._state = replace(self._sap._state, rhythm=rhythm)
            self._own(batch, pairs, begin)

        return run

    def _own(self, batch: Batch, pairs: Batch | None, begin: Begin) -> None:
        begin("data")
        self._listen(begin)
        self._sap.step(batch, pairs)
        begin("optimizer")
        self._optimizer.step()

    def _peft(self, batch: Batch, _: Batch, begin: Begin) -> None:
        begin("data")
        batch = on_device(batch, self._decoder.device)
        begin("forward")
        with torch.enable_grad():
            loss = self._model(**batch, use_cache=False).loss
            begin("backward")
            loss.backward()
        begin("optimizer")
        self._optimizer.step()

    def _listen(self, begin: Begin) -> None:
        """Let the handle's decoder say where phases begin; without a listener it is the decoder itself."""
        decoder = self._decoder if begin is ignored else Observed.of(self._decoder, begin, self._cut)
        attached: tuple[Any, Snapshot] = decoder, self._snapshot
        self._sap._attached = attached


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch there."""
    return {key: x.to(device) for key, x in batch.items()}
