"""One training step, from top to bottom: pack, direction, passes, guard, check, commit.

``SAP`` is the handle that ``sap_fast.attach`` returns. A step computes everything first (:meth:`SAP.compute`), looks at
the numbers, and only then writes ``.grad`` and takes the new probe (:meth:`SAP.commit`), so that a refused or
interrupted step changes nothing. It never writes a weight.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor, nn

from sap_fast.config import SAPConfig
from sap_fast.errors import StepRefusedError
from sap_fast.graph import Graphs
from sap_fast.method.flat import Flat
from sap_fast.method.guard import guarded
from sap_fast.method.outcome import Deferred, Outcome, State, StepInputs, Vitals, report_of
from sap_fast.method.passes import Micro
from sap_fast.method.probe import Probe
from sap_fast.method.reduce import ALONE, Ranks
from sap_fast.method.rhythm import Rhythm
from sap_fast.method.sampling import some_pairs, some_tangents
from sap_fast.method.schedule import Schedule
from sap_fast.model.attachment import Snapshot, mark, unmark
from sap_fast.model.attention_backends import with_attention
from sap_fast.model.decoder import Decoder
from sap_fast.model.float8 import check_unchanged, float8_weights
from sap_fast.model.read import base_model, check_adapters, read_decoder
from sap_fast.report import StepReport

Batch = Mapping[str, Tensor]


class SAP:
    """Runs Safety-Aware Probing on one model. Made by :func:`attach`; a context manager that detaches at its end.

    :meth:`step` is ``commit(compute(batch, pairs))``, for those who want to look at what a step has found before it is
    written.

    Args:
        model, config: as for :func:`attach`.
        ranks: the processes that take each step together, with rows of their own.
    """

    def __init__(self, model: nn.Module, config: SAPConfig, ranks: Ranks = ALONE) -> None:
        self.config, self._ranks = config, ranks
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
        self._captures = True  # not while steps run on another decoder, which no graph has recorded
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

    @property
    def state(self) -> State:
        """What the last step has handed on: probe, direction, rhythm. Immutable."""
        return self._state

    @property
    def decoder(self) -> Decoder:
        """What the steps run on: the model as the library reads it.

        Raises:
            RuntimeError: after ``detach``.
        """
        if self._attached is None:
            raise RuntimeError("step after detach: attach to the model again")
        return self._attached[0]

    @contextmanager
    def running_on(self, decoder: Decoder) -> Iterator[None]:
        """Let steps run on another reading of the same model meanwhile, such as one that a profiler watches.

        They run eagerly then, on rows of their own sizes.

        Raises:
            RuntimeError: after ``detach``.
        """
        own, captures = self.decoder, self._captures

        def run_on(what: Decoder) -> None:
            if self._attached is not None:  # it may be detached meanwhile
                self._attached = what, self._attached[1]

        run_on(decoder)
        self._captures = False
        try:
            yield
        finally:
            run_on(own)
            self._captures = captures

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
        outcome = self.compute(batch, pairs)
        self.commit(outcome)
        return outcome.report

    def compute(
        self,
        batch: Batch | Sequence[Batch],
        pairs: Batch | None = None,
        *,
        direction: Flat | None = None,
        state: State | None = None,
    ) -> Outcome:
        """Compute a step, and write nothing; :meth:`commit` takes what comes of it.

        Numbers that the last step has deferred are looked at before: see :meth:`settle`.

        Args:
            batch, pairs: as for :meth:`step`.
            direction: u to use instead of finding one, a unit vector over all trained weights in float32 (float64 for
                a float64 model); ``pairs`` are then checked and not read, and may be None. It counts as found: steps
                that find none go on with it.
            state: what to start from instead of what the last step has handed on.

        Returns:
            Loss, slope, gradients, direction and the next state, all on the device, and not looked at yet.

        Raises:
            BatchError, StepRefusedError, UnsupportedModelError, RuntimeError: as :meth:`step`.
            ValueError: a direction over other weights, in another dtype or on another device.
        """
        inputs, rhythm = self._pack(batch, pairs, direction, self._state if state is None else state)
        captures = self._graphs is not None and self._graphs.active and self._captures
        sent = (inputs.padded() if captures else inputs).sent(self.decoder.device)
        # Only now, with all of this step's on its way: the device has been busy with the last one until here.
        self.settle()
        if captures:
            assert self._graphs is not None
            outcome = self._graphs.run(self._solved, sent)
            outcome = replace(outcome, report=inputs.counted(outcome.report))
        else:
            outcome = self._solved(sent)
        return self._in_rhythm(outcome, inputs, rhythm)

    def commit(self, outcome: Outcome) -> None:
        """Look at a step's numbers, add its gradient to ``.grad``, and take its state: all of it, or nothing.

        With ``check="deferred"`` its numbers stay on the device, and :meth:`settle` looks at them.

        Raises:
            StepRefusedError: numbers that are not finite, or no direction; nothing was written.
            RuntimeError: after ``detach``.
        """
        self.settle()  # of a step that was committed after this one was computed
        if self.config.check == "deferred":
            self._deferred = Deferred(outcome.vitals, self._state)
        else:
            Vitals.read(outcome.vitals).check("Nothing was written")
        self._write(outcome)

    def settle(self) -> None:
        """Look at the numbers that the last step deferred, if it did; where they are refused, go back to its probe.

        Raises:
            StepRefusedError: with ``check="deferred"``, if the last step's numbers are unusable.
        """
        if self._deferred is None:
            return
        deferred, self._deferred = self._deferred, None
        try:
            Vitals.read(deferred.vitals).check("Its gradient was written: zero it before going on")
        except StepRefusedError:
            self._state = deferred.state
            raise

    def detach(self) -> None:
        """Let go of the model. It is then exactly what it was before ``attach``, its ``.grad`` aside.

        Raises:
            StepRefusedError: as :meth:`settle`.
        """
        self._release()
        self._attached = self._graphs = None
        self.settle()

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

    # Pack

    def _pack(
        self, batch: Batch | Sequence[Batch], pairs: Batch | None, direction: Flat | None, state: State
    ) -> tuple[StepInputs, Rhythm]:
        """Check what a step is given and pack it, on the host; with the rhythm that it is taken in."""
        decoder, config, rhythm = self._ready(), self.config, state.rhythm
        batches = [batch] if isinstance(batch, Mapping) else list(batch)
        names = ["batch"] if isinstance(batch, Mapping) else [f"batch[{i}]" for i in range(len(batches))]
        if not batches:
            raise ValueError("batch is an empty sequence; give at least one micro-batch")
        packer = decoder.packer(share_prefixes=config.share_prefixes)
        *batches, pairs = packer.fetched([*batches, pairs])
        read = [packer.read(b, name) for b, name in zip(batches, names, strict=True)]
        read_pairs = None if pairs is None else packer.read_pairs(pairs)
        if direction is not None:
            direction.check_fits(Flat.of(decoder.trained), "direction")
        guards = read_pairs is not None or direction is not None
        finds_probe = guards and rhythm.finds_probe(config)
        pair_rows = None
        if read_pairs is not None and direction is None and rhythm.finds_direction(config):
            wanted = config.pairs_per_step
            pair_rows = packer.pairs(read_pairs if wanted is None else some_pairs(read_pairs, wanted))
        micros = [Micro(packer.task(b), self._draw_seed()) for b in read]
        split = None
        if finds_probe and config.tangent_fraction < 1:
            split = some_tangents(read, micros, config.tangent_fraction, packer, self._draw_seed)
        # A delayed direction is known already, but in the first step.
        delayed = config.delayed_direction and pair_rows is not None and state.direction is not None
        # The host counts; what a step hands on stays as it is here, or the look at its numbers refuses both.
        state = replace(state, rhythm=Rhythm())
        inputs = StepInputs(
            micros, split, pair_rows, direction, state, finds_probe=finds_probe, plain=not guards, delayed=delayed
        )
        return inputs, rhythm

    def _ready(self) -> Decoder:
        decoder = self.decoder
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
        decoder = self.decoder
        if not decoder.drops_out():
            return None
        return torch.randint(2**31, (), device=decoder.device)

    # Direction, passes, guard: nothing here waits for the device, or writes what stays

    def _solved(self, inputs: StepInputs) -> Outcome:
        decoder, before = self.decoder, inputs.state.direction
        schedule = Schedule.of(decoder, self.config, self._ranks, inputs)
        with decoder.installed(), torch.enable_grad():
            direction = None
            if inputs.pairs is not None and not inputs.delayed:
                decoder.enter("direction")
                direction = schedule.direction()
            decoder.enter("task")
            u = None if inputs.plain else before
            if inputs.direction is not None:
                u = inputs.direction
            elif direction is not None:
                u = direction.u
            passed = schedule.passes(u)
        direction = direction or passed.direction
        # A direction that was found beside the passes is for the next step.
        last = direction.u if direction is not None else inputs.direction or before
        decoder.enter("update")
        gradients = passed.gradients
        theta = gradients.theta if u is None else guarded(gradients.theta, u, self.config)
        return Outcome(
            loss=gradients.loss,
            loss_dot=gradients.loss_dot,
            theta=theta,
            probe_dot=gradients.probe_dot,
            probe=gradients.probe,
            u=u,
            direction=direction,
            state=State(passed.found, last, inputs.state.rhythm),
            report=report_of(gradients, direction, before, passed.acted, inputs.micros),
            vitals=Vitals.packed(gradients.loss, theta, passed.found, direction),
        )

    def _in_rhythm(self, outcome: Outcome, inputs: StepInputs, rhythm: Rhythm) -> Outcome:
        """Count a step in the rhythm that it was taken in."""
        config, found = self.config, outcome.direction
        if not inputs.plain:
            rhythm = rhythm.after(directed=found is not None or inputs.direction is not None)
        if found is not None and inputs.state.direction is not None and config.direction_min_cosine is not None:
            rhythm = rhythm.adapted(float(outcome.report.direction_cosine), config)
        return replace(outcome, state=replace(outcome.state, rhythm=rhythm))

    # Commit

    def _write(self, outcome: Outcome) -> None:
        """Write ``.grad`` and take the new state: all of it, or none if interrupted."""
        self.decoder.enter("write")
        trained = self.decoder.trained
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
        UnsupportedModelError: something in the model has no dual rule; the message names it. Nothing changed.
        ValueError: probe layers that the model does not have; an attention backend that cannot serve it here; float8
            without a device that has it.
        RuntimeError: the model is attached already.
    """
    return SAP(model, config or SAPConfig())
