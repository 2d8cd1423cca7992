"""A decoder that says where the phases of a step begin. What it computes is what the decoder itself computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor

from sap_fast.batch.rows import Rows
from sap_fast.model.decoder import Decoder, Stream, Traversal, Weights
from sap_fast.profiling.phases import Begin


@dataclass
class _Place:
    """Where a step is at present."""

    directing: bool = False
    restarted: bool = False  # an ordinary pass that began above the lowest probe
    together: bool = False  # several passes, the first of them the task's


@dataclass(frozen=True)
class Observed(Decoder):
    """Calls ``begin`` with the phase that begins.

    In a backward pass it is called by hooks on the stream: where the cotangents leave the head, and where they pass
    the cut beneath the lowest probe. The hooks go with the step's graph.

    Attributes:
        begin: called with the key of each phase.
        cut: the lowest probed layer; None without a probe.
    """

    begin: Begin
    cut: int | None
    place: _Place

    @classmethod
    def of(cls, decoder: Decoder, begin: Begin, cut: int | None) -> "Observed":
        """``decoder``, observed."""
        return cls(**{f.name: getattr(decoder, f.name) for f in fields(Decoder)}, begin=begin, cut=cut, place=_Place())

    def enter(self, part: Literal["direction", "task", "update", "write"]) -> None:
        """Take note of the step's part; a pass begins its own phases."""
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
        """As :meth:`Decoder.start`."""
        self.begin(self._phase("forward", pair=theta_dot is not None))
        return super().start(rows, seed, theta=theta, theta_dot=theta_dot, probe=probe)

    def run_together(self, runs: Sequence[Traversal], streams: Sequence[Stream], start: int, stop: int) -> list[Stream]:
        """As :meth:`Decoder.run_together`, with a hook on the stream that leaves the lowest probed layer."""
        run = runs[0]
        self.place.restarted = start > 0 and not run.is_pair
        self.place.together = len(runs) > 1
        above = None if self.cut is None else self.cut + 1
        if above is None or not start <= above < stop or not (run.is_pair or self.place.restarted):
            return super().run_together(runs, streams, start, stop)
        if start < above:
            streams = super().run_together(runs, streams, start, above)
        self._when_passed(streams[0], "backward_beneath")
        return super().run_together(runs, streams, above, stop)

    def score(self, run: Traversal, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """As :meth:`Decoder.score`, with a hook on the stream that enters it."""
        if self.place.together and not run.is_pair:
            return super().score(run, stream)  # in the phases of the pass that it is run with
        divided = run.is_pair or self.place.restarted
        if not divided:
            beneath_head = self._phase("backward", pair=False)
        elif self.cut == len(self.layers) - 1:
            beneath_head = "backward_beneath"  # a probe on the last layer's output alone: no layer lies above it
        else:
            beneath_head = "backward_above"
        self._when_passed(stream, beneath_head)
        self.begin(self._phase("head", pair=run.is_pair))
        return super().score(run, stream)

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
