"""The training steps that are compared: plain fine-tuning by PEFT's own passes and by the library's, and SAP.

A step of each is all that a training loop does with a batch: to the device (the library's own steps do that
themselves), the passes, the optimizer. The optimizer steps over copies of the trained weights, so that the model's are
never written. While phases are timed, a :class:`PhaseDecoder` takes the place of the handle's decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn

from sap_fast.batch.rows import Rows
from sap_fast.config import SAPConfig
from sap_fast.method.outcome import State
from sap_fast.method.rhythm import Rhythm
from sap_fast.model.decoder import Decoder
from sap_fast.model.layer import Stream, Traversal, Weights
from sap_fast.profiling.phases import Begin, ignored
from sap_fast.step import SAP

Batch = Mapping[str, Tensor]

SFT, PEFT, SAP_STEP = "sft", "peft", "sap"
LABELS = {SFT: "plain SFT, sap_fast's passes", PEFT: "plain SFT, transformers and PEFT, padded", SAP_STEP: "SAP"}


@dataclass(frozen=True)
class Kind:
    """Describes one kind of SAP's steps, and how often it comes.

    Attributes:
        finds_direction: whether a harmful direction is found in it.
        finds_probe: whether a probe is found in it.
        weight: its share of all steps.
        rhythm: where a handle stands before such a step.
    """

    finds_direction: bool
    finds_probe: bool
    weight: float
    rhythm: Rhythm

    def label(self, config: SAPConfig) -> str:
        """Say what tells steps of this kind from the others under ``config``."""
        if self.finds_direction:
            return "a step with a direction and a probe" if config.uses_probe else "a step with a direction"
        if not config.uses_probe or self.finds_probe:
            return "a step with the last direction"
        return "an ordinary pass at the last probe"


def kinds(config: SAPConfig) -> list[Kind]:
    """Find the kinds of steps that a whole period of a configuration's rhythm has, the dearest first.

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
class TimedStep:
    """Describes a training step that is timed.

    Attributes:
        key: what results name it by.
        label: what people are told.
        of: the key of what it is a share of: itself, or SAP's average step.
        weight: how large that share is.
        run: runs the step on a batch and pairs, and calls its last argument where a phase begins.
    """

    key: str
    label: str
    of: str
    weight: float
    run: Callable[[Batch, Batch, Begin], None]


class Optimizer:
    """Steps AdamW over copies of the trained weights, with the gradients of the model's own."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        self._trained = trained
        self._copies = [nn.Parameter(p.detach().clone()) for p in trained]
        self._adamw = torch.optim.AdamW(self._copies, lr=1e-4, fused=True)

    def step(self) -> None:
        """Take the gradients over from the model's weights, step, and let go of them."""
        for p, copy in zip(self._trained, self._copies, strict=True):
            p.grad, copy.grad = None, p.grad
        self._adamw.step()
        self._adamw.zero_grad()


@dataclass
class _Place:
    """Holds where a step is at present."""

    directing: bool = False
    restarted: bool = False  # an ordinary pass that began above the lowest probe
    together: bool = False  # several passes, the first of them the task's


@dataclass(frozen=True)
class PhaseDecoder(Decoder):
    """Calls ``begin`` where a phase of a step begins, and computes what the decoder that it is made of computes.

    In a backward pass ``begin`` is called by hooks on the stream: where the cotangents leave the head, and where they
    pass the cut beneath the lowest probe. The hooks go with the step's graph.

    Attributes:
        begin: is called with the key of each phase.
        cut: the lowest probed layer; None without a probe.
        place: where the step is at present.
    """

    begin: Begin
    cut: int | None
    place: _Place

    @classmethod
    def of(cls, decoder: Decoder, begin: Begin, cut: int | None) -> "PhaseDecoder":
        """Make a decoder that computes what ``decoder`` does, and calls ``begin`` where phases begin."""
        return cls(**{f.name: getattr(decoder, f.name) for f in fields(Decoder)}, begin=begin, cut=cut, place=_Place())

    def enter(self, part: Literal["direction", "task", "update", "write"]) -> None:
        """Take note of the part that a step enters; a pass begins its own phases."""
        if part in ("update", "write"):
            self.begin(part)
        else:
            self.place.directing = part == "direction"

    def start(
        self,
        rows: Rows,
        seed: Tensor | None,
        *,
        theta: Weights | None = None,
        theta_dot: Weights | None = None,
        probe: Mapping[int, Tensor] | None = None,
    ) -> Traversal:
        """Begin the forward phase, and start a pass as :meth:`Decoder.start` does."""
        self.begin(self._phase("forward", pair=theta_dot is not None))
        return super().start(rows, seed, theta=theta, theta_dot=theta_dot, probe=probe)

    def run_together(
        self, traversals: Sequence[Traversal], streams: Sequence[Stream], start: int, stop: int
    ) -> list[Stream]:
        """Run layers as :meth:`Decoder.run_together` does, with a hook where the stream leaves the lowest probe."""
        first = traversals[0]
        self.place.restarted = start > 0 and not first.is_dual
        self.place.together = len(traversals) > 1
        above = None if self.cut is None else self.cut + 1
        if above is None or not start <= above < stop or not (first.is_dual or self.place.restarted):
            return super().run_together(traversals, streams, start, stop)
        if start < above:
            streams = super().run_together(traversals, streams, start, above)
        self._when_passed(streams[0], "backward_beneath")
        return super().run_together(traversals, streams, above, stop)

    def score(self, traversal: Traversal, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """Begin the head's phase, and score as :meth:`Decoder.score` does, with a hook on the stream that enters it."""
        if self.place.together and not traversal.is_dual:
            return super().score(traversal, stream)  # in the phases of the pass that it is run with
        divided = traversal.is_dual or self.place.restarted
        if not divided:
            beneath_head = self._phase("backward", pair=False)
        elif self.cut == len(self.layers) - 1:
            beneath_head = "backward_beneath"  # a probe on the last layer's output alone: no layer lies above it
        else:
            beneath_head = "backward_above"
        self._when_passed(stream, beneath_head)
        self.begin(self._phase("head", pair=traversal.is_dual))
        return super().score(traversal, stream)

    def _phase(self, what: str, *, pair: bool) -> str:
        if pair:
            return f"dual_{what}"
        return f"direction_{what}" if self.place.directing else what

    def _when_passed(self, stream: Stream, phase: str) -> None:
        """Begin ``phase`` when the backward pass has come down to ``stream``."""
        residual, residual_dot, update, update_dot = stream
        # The update's is reached first: the layer that made it runs its backward from its end.
        begin = self.begin
        first = next(
            (x for x in (update_dot, update, residual_dot, residual) if x is not None and x.requires_grad), None
        )
        if first is not None:
            first.register_hook(lambda _: begin(phase))


class Steps:
    """Makes the training steps that are timed, on one attached model.

    Args:
        model: the model as a training loop has it.
        sap: the handle that is attached to it.
    """

    def __init__(self, model: nn.Module, sap: SAP) -> None:
        self._model, self._sap, self._decoder = model, sap, sap.decoder
        self._optimizer = Optimizer(list(self._decoder.trained.values()))
        self._cut = min(sap.probe_layers, default=None)

    def contenders(self) -> list[TimedStep]:
        """List all steps: plain fine-tuning by the library's passes and by PEFT's, and each kind of SAP's steps."""
        config = self._sap.config
        found = [
            TimedStep(SFT, LABELS[SFT], SFT, 1.0, lambda batch, _, begin: self._own(batch, None, begin)),
            TimedStep(PEFT, LABELS[PEFT], PEFT, 1.0, self._peft),
        ]
        for i, kind in enumerate(kinds(config)):
            key = SAP_STEP if kind.weight == 1 else f"{SAP_STEP}-{i + 1}"
            label = LABELS[SAP_STEP] if kind.weight == 1 else f"{LABELS[SAP_STEP]}, {kind.label(config)}"
            found.append(TimedStep(key, label, SAP_STEP, kind.weight, self._guarded(kind.rhythm)))
        return found

    def _guarded(self, rhythm: Rhythm) -> Callable[[Batch, Batch, Begin], None]:
        def run(batch: Batch, pairs: Batch, begin: Begin) -> None:
            # Every round has one step of each kind, whatever came before it.
            self._own(batch, pairs, begin, replace(self._sap.state, rhythm=rhythm))

        return run

    def _own(self, batch: Batch, pairs: Batch | None, begin: Begin, state: State | None = None) -> None:
        begin("data")
        told = self._decoder if begin is ignored else PhaseDecoder.of(self._decoder, begin, self._cut)
        with self._sap.running_on(told):
            self._sap.commit(self._sap.compute(batch, pairs, state=state))
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


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Move a batch to a device."""
    return {key: x.to(device) for key, x in batch.items()}
