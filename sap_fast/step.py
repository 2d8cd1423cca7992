"""One training step, from top to bottom: pairs, harmful direction, task passes, probe, guard, gradients.

``SAP`` is the handle that ``sap_fast.attach`` returns. A step computes everything first, looks at the numbers,
and only then writes ``.grad`` and takes the new probe, so that a refused or interrupted step changes nothing.
It never writes a weight.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor, nn

from sap_fast.batch.packer import Packer
from sap_fast.config import SAPConfig
from sap_fast.errors import StepRefusedError
from sap_fast.graph import Graphs
from sap_fast.method import passes
from sap_fast.method.direction import Direction, SafetyPass, harmful_direction
from sap_fast.method.flat import Flat
from sap_fast.method.guard import guarded
from sap_fast.method.joint import divided_with_pairs, dual_with_pairs
from sap_fast.method.outcome import Deferred, Given, Outcome, State, Task, report_of, seen
from sap_fast.method.passes import Gradients, Micro
from sap_fast.method.probe import Probe
from sap_fast.method.refusal import raise_if_refused
from sap_fast.method.rhythm import Rhythm
from sap_fast.method.sampling import some_pairs, some_tangents
from sap_fast.model.attachment import Snapshot
from sap_fast.model.attention_backends import with_attention
from sap_fast.model.decoder import Decoder
from sap_fast.model.float8 import check_unchanged, float8_weights
from sap_fast.model.mark import mark, unmark
from sap_fast.model.read import base_model, check_adapters, read_decoder
from sap_fast.report import StepReport

Batch = Mapping[str, Tensor]


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
        self._graphs = Graphs.of(decoder) if config.graph else None
        if config.graph:
            probe = replace(probe, steps=torch.zeros((), dtype=torch.float64, device=decoder.device))
        self._state = State(probe, None, Rhythm.of(config))
        self._deferred: Deferred | None = None
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

        Leave batches on the host (CPU tensors), whatever the model's device: they are packed there and sent by a copy
        that nothing waits for. Batches on the model's device cost one wait for it, all of them together, since they
        have to be read first. Beside that, a step waits for the device once: for its numbers, before ``.grad`` is
        written; with ``check="deferred"`` for those of the last step, once this one's batch is packed; and with
        ``direction_min_cosine`` for each new direction.

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
            BatchError: a malformed batch, before any work is done; one on another device than the host and the model's.
            StepRefusedError: numbers that are not finite, or no direction; nothing was written. With
                ``check="deferred"`` it is raised by the next step, if its batch is well-formed.
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
        *batches, pairs = packer.fetched([*batches, pairs])
        read = [packer.read(b, name) for b, name in zip(batches, names, strict=True)]
        read_pairs = None if pairs is None else packer.read_pairs(pairs)
        # What a step hands on to the next one stays as it is here, or the look at its numbers refuses both.
        directs = read_pairs is not None and rhythm.directs(config)
        probes = read_pairs is not None and rhythm.probes(config)
        pair_rows = None
        if read_pairs is not None and directs:
            wanted = config.pairs_per_step
            pair_rows = packer.pairs(read_pairs if wanted is None else some_pairs(read_pairs, wanted))
        micros = [Micro(packer.task(b), self._draw_seed()) for b in read]
        parts = None
        if probes and config.tangent_fraction < 1:
            parts = some_tangents(read, micros, config.tangent_fraction, packer, self._draw_seed)

        # A delayed direction is known already, but in the first step.
        delayed = config.delayed_direction and directs and self._state.direction is not None
        state = replace(self._state, rhythm=Rhythm())
        given = Given(Task(micros, parts), pair_rows, state, plain=read_pairs is None, probes=probes, delayed=delayed)
        captures = self._graphs is not None and self._graphs.active
        sent = (given.padded() if captures else given).sent(decoder.device)
        # Only now, with all of this step's on its way: the device has been busy with the last one until here.
        self._settle()
        outcome = self._outcome(sent)
        self._check(outcome)
        self._commit(outcome)
        return given.counted(outcome.report) if captures else outcome.report

    def detach(self) -> None:
        """Let go of the model. It is then exactly what it was before ``attach``, its ``.grad`` aside.

        Raises:
            StepRefusedError: with ``check="deferred"``, if the last step's numbers are unusable.
        """
        self._release()
        self._attached = self._graphs = None
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

    def _outcome(self, given: Given) -> Outcome:
        """Compute a step, by a replay where there is one, and count it."""
        if self._graphs is None or not self._graphs.active:
            outcome = self._compute(given)
        else:
            outcome = self._graphs.run(self._compute, given)
        rhythm, config, before = self._state.rhythm, self.config, self._state.direction
        if not given.plain:
            rhythm = rhythm.after(directed=outcome.direction is not None)
        if outcome.direction is not None and before is not None and config.direction_min_cosine is not None:
            rhythm = rhythm.adapted(float(outcome.report.direction_cosine), config)
        return replace(outcome, state=replace(outcome.state, rhythm=rhythm))

    def _compute(self, given: Given) -> Outcome:
        """All of a step, the direction first, if it finds one. Waits for no device, and writes nothing that stays."""
        decoder, state = self._decoder, given.state
        with decoder.installed(), torch.enable_grad():
            direction = None
            if given.pairs is not None and not given.delayed:
                decoder.enter("direction")
                direction = harmful_direction(decoder, given.pairs, self._acting(state), self.config)
            return self._run_task(given, direction)

    def _run_task(self, given: Given, direction: Direction | None) -> Outcome:
        """Run the passes that the configuration asks for, then the guard.

        Args:
            direction: if this step found one to use; else the last one is used.
        """
        config, decoder, task, state = self.config, self._decoder, given.task, given.state
        decoder.enter("task")
        probe = state.probe
        u = None if given.plain else direction.u if direction else state.direction
        if u is None or not config.uses_probe or not given.probes:
            acting = probe if u is not None and config.uses_probe else None
            gradients = passes.ordinary(decoder, task.micros, acting)
            used, found = acting or probe.at_zero(), probe
            if u is not None:
                gradients = replace(gradients, loss_dot=gradients.theta.dot(u))
        elif config.schedule == "lagged":
            # One pass is inner and outer at once: the gradient at the last step's probe, and the next probe.
            used = probe
            gradients, next_direction = self._inner_and_outer(given, used, u)
            direction = next_direction or direction
            found = self._climb(gradients, probe)
        else:
            gradients, found = self._fresh(task, probe.at_zero(), u)
            used = found

        decoder.enter("update")
        theta = gradients.theta if u is None else guarded(gradients.theta, u, config)
        report = report_of(gradients, direction, state.direction, used, task.micros)
        after = State(found, direction.u if direction else state.direction, state.rhythm)
        return Outcome(theta, direction, after, report, seen(report.loss, theta, found, direction))

    def _inner_and_outer(self, given: Given, probe: Probe, u: Flat) -> tuple[Gradients, Direction | None]:
        """... and the next direction, if the pairs are run with the task."""
        config, decoder, task = self.config, self._decoder, given.task
        if given.delayed and given.pairs is not None:
            safety = SafetyPass.start(decoder, given.pairs, self._acting(given.state), config)
            if task.parts is not None:
                return divided_with_pairs(decoder, task.parts, probe, u, safety)
            return dual_with_pairs(decoder, task.micros, probe, u, safety)
        if config.gradient == "finite_difference":
            return passes.finite_difference(decoder, task.micros, probe, u, self._alpha()), None
        if task.parts is not None:
            return passes.divided(decoder, task.parts, probe, u), None
        return passes.dual(decoder, task.micros, probe, u), None

    def _acting(self, state: State) -> Mapping[int, Tensor]:
        """The probe that acts on the pairs."""
        return state.probe.singles() if self.config.probe_in_safety_pass else {}

    def _fresh(self, task: Task, zero: Probe, u: Flat) -> tuple[Gradients, Probe]:
        """Find the probe from zero, then take the gradient in its presence."""
        config, decoder, micros = self.config, self._decoder, task.micros
        if config.gradient == "finite_difference":
            inner = passes.finite_difference(decoder, micros, zero, u, self._alpha())
            found = self._climb(inner, zero)
            outer = passes.ordinary(decoder, micros, found)
        elif task.parts is not None:
            chosen, _, scored = passes.sides(task.parts)
            inner, _ = passes.inner(decoder, chosen, zero, u, keep=False, scored=scored)
            found = self._climb(inner, zero)
            outer = passes.ordinary(decoder, micros, found)
        else:
            keep = config.restart == "store" or (config.restart == "auto" and len(micros) == 1)
            inner, cuts = passes.inner(decoder, micros, zero, u, keep=keep)
            found = self._climb(inner, zero)
            outer = passes.restarted(decoder, cuts, found) if keep else passes.ordinary(decoder, micros, found)
        return replace(inner, loss=outer.loss, theta=outer.theta, loss_dot=outer.theta.dot(u)), found

    def _climb(self, gradients: Gradients, probe: Probe) -> Probe:
        self._decoder.enter("update")
        alpha = self._alpha() if self.config.probe_update == "adamw" else None
        return probe.climbed(gradients.probe_dot, gradients.rms, alpha, self.config)

    def _alpha(self) -> Tensor:
        """Length of the published perturbation: ``radius * |theta|`` over all trained weights."""
        return self.config.radius * Flat.of(self._decoder.trained).norm()

    def _check(self, outcome: Outcome) -> None:
        """Refuse unusable numbers: at once, or, deferred, at the next step (the flag stays on the device)."""
        if self.config.check == "deferred":
            self._deferred = Deferred(outcome.seen, self._state)
        else:
            raise_if_refused(outcome.seen.tolist(), "Nothing was written")

    def _commit(self, outcome: Outcome) -> None:
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
