"""One training step, from top to bottom: pairs, harmful direction, task passes, probe, guard, gradients.

``SAP`` is the handle that ``sap_fast.attach`` returns. A step computes everything first, looks at the numbers,
and only then writes ``.grad`` and takes the new probe, so that a refused or interrupted step changes nothing.
It never writes a weight.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor, nn

from sap_fast import passes
from sap_fast.attention_backends import with_attention
from sap_fast.batch import Rows
from sap_fast.config import SAPConfig
from sap_fast.convert import base_model, check_adapters, read_decoder
from sap_fast.decoder import Decoder
from sap_fast.direction import Direction, SafetyPass, harmful_direction
from sap_fast.errors import StepRefusedError
from sap_fast.flat import Flat
from sap_fast.float8 import check_unchanged, float8_weights
from sap_fast.guard import guarded
from sap_fast.integrity import Snapshot
from sap_fast.joint import divided_with_pairs, dual_with_pairs
from sap_fast.mark import mark, unmark
from sap_fast.packing import Packer
from sap_fast.passes import Gradients, Micro
from sap_fast.probe import Probe
from sap_fast.refusal import raise_if_refused
from sap_fast.report import StepReport
from sap_fast.rhythm import Rhythm
from sap_fast.shares import some_pairs, some_tangents

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class _State:
    """What one step hands to the next."""

    probe: Probe
    direction: Flat | None  # u, as last found
    rhythm: Rhythm


@dataclass(frozen=True)
class _Task:
    """What the task passes read: the batch, and pairs that are to be run with it.

    ``parts``: if only some of its sequences carry tangents, those and the others.
    """

    micros: list[Micro]
    parts: list[tuple[Micro, Micro]] | None = None
    pairs: Rows | None = None


@dataclass(frozen=True)
class _Outcome:
    """A step's results, before any of them is written."""

    theta: Flat  # what goes to .grad
    direction: Direction | None  # if one was found
    state: _State  # for the next step
    report: StepReport


@dataclass(frozen=True)
class _Deferred:
    """A step's numbers, to be looked at in the next one, and what to go back to if they are refused."""

    seen: Tensor
    state: _State


class SAP:
    """Safety-Aware Probing on one model. Made by :func:`attach`; a context manager that detaches at its end."""

    def __init__(self, model: nn.Module, config: SAPConfig) -> None:
        self.config = config
        decoder = with_attention(read_decoder(model), config.attention)
        if config.float8:
            decoder = replace(decoder, float8=float8_weights(decoder, emulated=config.float8 == "emulated"))
        # Given up at detach, so that the handle does not keep the model's weights alive.
        self._attached: tuple[Decoder, Snapshot] | None = (decoder, Snapshot.of(model))
        self._layers = config.layers_of(len(decoder.layers)) if config.uses_probe else ()
        dtype = torch.promote_types(decoder.embedding.weight.dtype, torch.float32)
        probe = Probe.zeros(self._layers, decoder.hidden_size, decoder.device, dtype)
        self._state = _State(probe, None, Rhythm.of(config))
        self._deferred: _Deferred | None = None
        base = base_model(model)
        mark(base)
        # Called by detach, or when a handle is dropped without it; runs once.
        self._release = weakref.finalize(self, unmark, weakref.ref(base))

    @property
    def probe(self) -> Mapping[int, Tensor]:
        """The probe that a lagged step would use next, by layer ``[d]``: copies."""
        probe = self._state.probe
        return {layer: v.clone() for layer, v in probe.by_layer(probe.vectors).items()}

    @property
    def probe_layers(self) -> tuple[int, ...]:
        """The probed layers, counted from 0; empty for a guard without a probe."""
        return self._layers

    def step(self, batch: Batch | Sequence[Batch], pairs: Batch | None = None) -> StepReport:
        """Compute one step's gradient and add it to ``.grad`` of the trained weights.

        As after ``backward()``, ``.grad`` is the sum over steps until it is zeroed; each step puts a new tensor there.

        Args:
            batch: a dict of ``input_ids``, ``attention_mask``, ``labels``, each ``[B, T]`` (``labels`` unshifted,
                -100 = not scored), or a sequence of such micro-batches: the loss is the mean over all their
                scored tokens, with one direction and one probe update.
            pairs: the same keys with ``[2P, T]``, all chosen rows first, then all rejected; labels on answer
                tokens only. None is plain fine-tuning: no direction, no probe. Steps that find no direction
                (``probe_every``, ``direction_every``) check them and do not read them.

        Returns:
            What was measured.

        Raises:
            BatchError: a malformed batch, before any work is done.
            StepRefusedError: numbers that are not finite, or no direction; nothing was written. With
                ``check="deferred"`` it is raised by the next step.
            UnsupportedModelError: the model was changed since ``attach``.
            RuntimeError: after ``detach``; inside an autocast region.
        """
        decoder = self._ready()
        batches = [batch] if isinstance(batch, Mapping) else list(batch)
        names = ["batch"] if isinstance(batch, Mapping) else [f"batch[{i}]" for i in range(len(batches))]
        if not batches:
            raise ValueError("batch is an empty sequence; give at least one micro-batch")
        rhythm, config = self._state.rhythm, self.config
        packer = Packer.of(decoder, config)
        rows = [packer.task(b, name) for b, name in zip(batches, names, strict=True)]
        pair_rows = None if pairs is None else packer.pairs(pairs)
        directs = pair_rows is not None and rhythm.directs(config)
        probes = pair_rows is not None and rhythm.probes(config)
        if pairs is not None and pair_rows is not None and directs and config.pairs_per_step is not None:
            pair_rows = some_pairs(pairs, pair_rows, config.pairs_per_step, packer)
        if pair_rows is not None and directs:
            pair_rows = packer.shared(pair_rows)
        micros = [Micro(r, self._draw_seed()) for r in rows]
        parts = None
        if probes and config.tangent_fraction < 1:
            parts = some_tangents(batches, micros, config.tangent_fraction, packer, self._draw_seed)

        with decoder.installed(), torch.enable_grad():
            direction = None
            # A delayed direction is known already, but in the first step.
            delayed = directs and config.delayed_direction and self._state.direction is not None
            if pair_rows is not None and directs and not delayed:
                decoder.enter("direction")
                direction = harmful_direction(decoder, pair_rows, self._acting(), config)
            task = _Task(micros, parts, pair_rows if delayed else None)
            outcome = self._compute(task, direction, plain=pair_rows is None, probes=probes)
        self._check(outcome)
        self._commit(outcome)
        return outcome.report

    def detach(self) -> None:
        """Let go of the model. It is then exactly what it was before ``attach``, its ``.grad`` aside.

        Raises:
            StepRefusedError: with ``check="deferred"``, if the last step's numbers are unusable.
        """
        self._release()
        self._attached = None
        self._settle()

    def __enter__(self) -> "SAP":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._deferred = None  # the error on its way is the one to see
        self.detach()

    def _settle(self) -> None:
        """Look at the numbers that the last step deferred; if they are refused, go back to the probe before it."""
        if self._deferred is None:
            return
        deferred, self._deferred = self._deferred, None
        try:
            raise_if_refused(deferred.seen.tolist(), "Its gradient was written: zero it before going on")
        except StepRefusedError:
            self._state = deferred.state
            raise

    @property
    def _decoder(self) -> Decoder:
        if self._attached is None:
            raise RuntimeError("step after detach: attach to the model again")
        return self._attached[0]

    def _ready(self) -> Decoder:
        decoder = self._decoder
        self._settle()
        if torch.is_autocast_enabled(decoder.device.type):
            raise RuntimeError(
                "step runs in the dtype of the model's weights: leave the autocast region, and for bfloat16 "
                "load the model with dtype=torch.bfloat16 (LoRA weights may stay float32)"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError("step takes gradients: leave torch.inference_mode()")
        if self._attached is not None:
            self._attached[1].check()
        check_adapters(decoder)
        check_unchanged(decoder)
        return decoder

    def _draw_seed(self) -> Tensor | None:
        decoder = self._decoder
        if not decoder.drops_out():
            return None
        return torch.randint(2**31, (), device=decoder.device)

    def _compute(self, task: _Task, direction: Direction | None, *, plain: bool, probes: bool) -> _Outcome:
        """Run the passes that the configuration asks for, then the guard.

        Args:
            direction: if this step found one to use; else the last one is used.
            plain: without pairs there is neither a direction nor a probe.
            probes: whether this step finds a probe.
        """
        config, decoder, state = self.config, self._decoder, self._state
        decoder.enter("task")
        probe = state.probe
        u = None if plain else direction.u if direction else state.direction
        if u is None or not config.uses_probe or not probes:
            acting = probe if u is not None and config.uses_probe else None
            gradients = passes.ordinary(decoder, task.micros, acting)
            used, found = acting or probe.at_zero(), probe
            if u is not None:
                gradients = replace(gradients, loss_dot=gradients.theta.dot(u))
        elif config.schedule == "lagged":
            # One pass is inner and outer at once: the gradient at the last step's probe, and the next probe.
            used = probe
            gradients, next_direction = self._inner_and_outer(task, used, u)
            direction = next_direction or direction
            found = self._climb(gradients)
        else:
            gradients, found = self._fresh(task, u)
            used = found

        decoder.enter("update")
        theta = gradients.theta if u is None else guarded(gradients.theta, u, config)
        report = self._report(gradients, direction, used, task.micros)
        rhythm = state.rhythm if plain else state.rhythm.after(directed=direction is not None)
        if direction is not None and state.direction is not None and config.direction_min_cosine is not None:
            rhythm = rhythm.adapted(float(report.direction_cosine), config)
        kept = direction.u if direction else state.direction
        return _Outcome(theta, direction, _State(found, kept, rhythm), report)

    def _inner_and_outer(self, task: _Task, probe: Probe, u: Flat) -> tuple[Gradients, Direction | None]:
        """... and the next direction, if the pairs are run with the task."""
        config, decoder = self.config, self._decoder
        if task.pairs is not None:
            safety = SafetyPass.start(decoder, task.pairs, self._acting(), config)
            if task.parts is not None:
                return divided_with_pairs(decoder, task.parts, probe, u, safety)
            return dual_with_pairs(decoder, task.micros, probe, u, safety)
        if config.gradient == "finite_difference":
            return passes.finite_difference(decoder, task.micros, probe, u, self._alpha()), None
        if task.parts is not None:
            return passes.divided(decoder, task.parts, probe, u), None
        return passes.dual(decoder, task.micros, probe, u), None

    def _acting(self) -> Mapping[int, Tensor]:
        """The probe that acts on the pairs."""
        return self._state.probe.singles() if self.config.probe_in_safety_pass else {}

    def _fresh(self, task: _Task, u: Flat) -> tuple[Gradients, Probe]:
        """Find the probe from zero, then take the gradient in its presence."""
        config, decoder, zero, micros = self.config, self._decoder, self._state.probe.at_zero(), task.micros
        if config.gradient == "finite_difference":
            inner = passes.finite_difference(decoder, micros, zero, u, self._alpha())
            found = self._climb(inner)
            outer = passes.ordinary(decoder, micros, found)
        elif task.parts is not None:
            scored = sum(micro.rows.scored for micro in micros)
            chosen = [part for part, _ in task.parts]
            inner, _ = passes.inner(decoder, chosen, zero, u, keep=False, scored=scored)
            found = self._climb(inner)
            outer = passes.ordinary(decoder, micros, found)
        else:
            keep = config.restart == "store" or (config.restart == "auto" and len(micros) == 1)
            inner, cuts = passes.inner(decoder, micros, zero, u, keep=keep)
            found = self._climb(inner)
            outer = passes.restarted(decoder, cuts, found) if keep else passes.ordinary(decoder, micros, found)
        return replace(inner, loss=outer.loss, theta=outer.theta, loss_dot=outer.theta.dot(u)), found

    def _climb(self, gradients: Gradients) -> Probe:
        self._decoder.enter("update")
        alpha = self._alpha() if self.config.probe_update == "adamw" else None
        return self._state.probe.climbed(gradients.probe_dot, gradients.rms, alpha, self.config)

    def _alpha(self) -> Tensor:
        """Length of the published perturbation: ``radius * |theta|`` over all trained weights."""
        return self.config.radius * Flat.of(self._decoder.trained).norm()

    def _report(
        self, gradients: Gradients, direction: Direction | None, used: Probe, micros: list[Micro]
    ) -> StepReport:
        zero = torch.zeros_like(gradients.loss)
        steering = probe_cosine = zero
        if gradients.probe_dot.numel():
            steering = (used.vectors * gradients.probe_dot).sum()
            probe_cosine = _cosine(steering, used.vectors.norm(), gradients.probe_dot.norm())
        cosine = zero
        if direction is not None and self._state.direction is not None:
            cosine = direction.u.dot(self._state.direction)
        return StepReport(
            loss=gradients.loss,
            loss_dot=gradients.loss_dot,
            safety_loss=direction.loss if direction else zero,
            safety_margin=direction.margin if direction else zero,
            saturated=direction.saturated if direction else zero,
            direction_norm=direction.norm if direction else zero,
            direction_cosine=cosine,
            steering=steering,
            probe_cosine=probe_cosine,
            probe_norm=used.by_layer(used.vectors.norm(dim=1)),
            tokens=sum(m.rows.tokens for m in micros),
            scored_tokens=sum(m.rows.scored for m in micros),
            safety_tokens=direction.tokens if direction else 0,
            found_direction=direction is not None,
            found_probe=bool(gradients.probe_dot.numel()),
        )

    def _check(self, outcome: _Outcome) -> None:
        """Refuse unusable numbers: at once, or, deferred, at the next step (the flag stays on the device)."""
        one = torch.ones_like(outcome.report.loss)
        numbers = [outcome.report.loss, outcome.theta.norm(), outcome.state.probe.vectors.norm()]
        direction = outcome.direction
        numbers += [direction.norm, direction.margin, direction.saturated] if direction else [one, one, 0 * one]
        seen = torch.stack(numbers).double()
        if self.config.check == "deferred":
            self._deferred = _Deferred(seen, self._state)
        else:
            raise_if_refused(seen.tolist(), "Nothing was written")

    def _commit(self, outcome: _Outcome) -> None:
        """Write ``.grad`` and take the new probe: all of it, or none if interrupted."""
        self._decoder.enter("write")
        trained = self._decoder.trained
        before = {name: p.grad for name, p in trained.items()}
        kept = self._state
        total = outcome.theta
        if any(old is not None for old in before.values()):
            total = total + Flat.of(total, [before[name] for name in total])
        # Not views, each of which would keep the memory of all, and be saved with it.
        after = total.copies(trained)
        try:
            for name, parameter in trained.items():
                parameter.grad = after[name]
            self._state = outcome.state
        except BaseException:
            for name, parameter in trained.items():
                parameter.grad = before[name]
            self._state = kept
            raise


def attach(model: nn.Module, config: SAPConfig | None = None) -> SAP:
    """Prepare Safety-Aware Probing on a model with LoRA adapters.

    Args:
        model: a transformers causal language model (Llama, Mistral, Qwen2, Qwen3, Gemma-3) with LoRA adapters, as
            ``peft.get_peft_model`` makes it.
        config: the method's settings; defaults if None.

    Returns:
        A handle with ``step``, ``detach`` and ``probe``.

    Raises:
        UnsupportedModelError: something in the model has no pair rule; the message names it. Nothing changed.
        ValueError: probe layers that the model does not have; an attention backend that cannot serve it here; float8
            without a device that has it.
        RuntimeError: the model is attached already.
    """
    return SAP(model, config or SAPConfig())


def _cosine(product: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a * b > 0, product / (a * b), torch.zeros_like(product))
