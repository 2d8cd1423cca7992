"""The passes of one step, by the settings: which objectives are solved, and which of them together."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from torch import Tensor

from sap_fast.batch.rows import Count
from sap_fast.config import SAPConfig
from sap_fast.method.direction import Direction
from sap_fast.method.flat import Flat
from sap_fast.method.outcome import StepInputs
from sap_fast.method.passes import (
    Cut,
    Dual,
    Inner,
    Objective,
    Ordinary,
    Outer,
    Safety,
    finite_difference,
    scored_tokens,
    solve,
    split_sides,
)
from sap_fast.method.probe import Probe
from sap_fast.method.reduce import Gradients, Ranks, SafetySums, along, total
from sap_fast.model.decoder import Decoder


@dataclass(frozen=True)
class Passed:
    """Holds what the passes over the task batch come to.

    Attributes:
        gradients: closed over micro-batches and processes.
        acted: the probe in whose presence ``theta`` was taken.
        found: the probe for the next step.
        direction: if the pairs ran with the task, what they gave.
    """

    gradients: Gradients
    acted: Probe
    found: Probe
    direction: Direction | None = None


@dataclass(frozen=True)
class Schedule:
    """Runs the passes of one step. Nothing here waits for the device, or writes to the model.

    Attributes:
        decoder, config, ranks: of the handle that takes the step.
        inputs: what the step is given.
        scored: how many tokens the mean loss is over, in all processes.
    """

    decoder: Decoder
    config: SAPConfig
    ranks: Ranks
    inputs: StepInputs
    scored: Count

    @classmethod
    def of(cls, decoder: Decoder, config: SAPConfig, ranks: Ranks, inputs: StepInputs) -> "Schedule":
        """Make the schedule of a step, its count of tokens closed."""
        return cls(decoder, config, ranks, inputs, ranks.count(scored_tokens(inputs.micros)))

    def direction(self) -> Direction:
        """Find the direction by a pass of its own over the pairs."""
        [[sums]] = solve(self.decoder, [self._safety()])
        return Direction.of(sums.over(self.ranks))

    def passes(self, u: Flat | None) -> Passed:
        """Run the passes over the task batch.

        Args:
            u: the direction that the step uses; None is plain fine-tuning.
        """
        config, probe = self.config, self.inputs.state.probe
        if u is None or not config.uses_probe:
            gradients = self._ordinary(None)
            return Passed(gradients if u is None else along(gradients, u), probe.at_zero(), probe)
        if not self.inputs.finds_probe:
            return Passed(along(self._ordinary(probe), u), probe, probe)
        return self._fresh(u) if config.schedule == "fresh" else self._lagged(u)

    def _lagged(self, u: Flat) -> Passed:
        """Run one pass that is inner and outer at once: the gradient at the last step's probe, and the next probe."""
        probe, sums = self.inputs.state.probe, list[SafetySums]()
        if self.config.gradient == "finite_difference":
            gradients = self._difference(probe, u)
        else:
            solved = self._with_pairs(probe, u, sums) if self.inputs.delayed else self._duals(probe, u)
            gradients = total(solved, self.ranks)
        if self.config.tangent_fraction < 1:
            gradients = along(gradients, u)
        direction = Direction.of(sums[0].over(self.ranks)) if sums else None
        return Passed(gradients, probe, self._climbed(gradients, probe), direction)

    def _duals(self, probe: Probe, u: Flat) -> Iterator[list[Gradients]]:
        """Solve each micro-batch: sequences with tangents, and with them the others."""
        dual, ordinary = self._objectives(probe, u)
        for some, others in self.inputs.split or [(micro, None) for micro in self.inputs.micros]:
            # Begun last, the dual pass is what a profiler takes the time for.
            rest = [ordinary(others)] if others else []
            yield from solve(self.decoder, [*([dual(some)] if some else []), *rest])

    def _with_pairs(self, probe: Probe, u: Flat, sums: list[SafetySums]) -> Iterator[list[Gradients]]:
        """Solve the first micro-batch with the pairs, whose sums are put into ``sums``, and the others alone.

        The activations of the first are kept at the same time as those of the pairs.
        """
        dual, ordinary = self._objectives(probe, u)
        split, micros = self.inputs.split, self.inputs.micros
        (first, *rest), others = (micros, []) if split is None else split_sides(split)
        safety = self._safety()
        [[gradients, of_pairs]] = solve(self.decoder, [dual(first), safety])
        assert isinstance(gradients, Gradients) and isinstance(of_pairs, SafetySums)
        sums.append(of_pairs)
        yield [gradients]
        for objective in chain(map(dual, rest), map(ordinary, others)):
            yield from solve(self.decoder, [objective])

    def _objectives(self, probe: Probe, u: Flat) -> tuple[partial[Dual], partial[Ordinary]]:
        """Make the objectives of a micro-batch with tangents, and of one without, at one probe."""
        scored = self.scored
        dual = partial(Dual, self.decoder, scored=scored, probe=probe, u=u)
        return dual, partial(Ordinary, self.decoder, scored=scored, probe=probe)

    def _fresh(self, u: Flat) -> Passed:
        """Find the probe from zero, then take the gradient in its presence."""
        config, micros, zero, cuts = self.config, self.inputs.micros, self.inputs.state.probe.at_zero(), list[Cut]()
        if config.gradient == "finite_difference":
            inner = self._difference(zero, u)
        else:
            keep = config.restart == "store" or (config.restart == "auto" and len(micros) == 1)
            inner = total(self._inners(zero, u, cuts, keep=keep and self.inputs.split is None), self.ranks)
        found = self._climbed(inner, zero)
        outer = self._outer(cuts, found) if cuts else self._ordinary(found)
        gradients = along(replace(inner, loss=outer.loss, theta=outer.theta), u)
        return Passed(gradients, found, found)

    def _inners(self, zero: Probe, u: Flat, cuts: list[Cut], *, keep: bool) -> Iterator[list[Gradients]]:
        """Solve the inner problem of each micro-batch that carries tangents; what is kept is put into ``cuts``."""
        split, micros, scored = self.inputs.split, self.inputs.micros, self.scored
        for micro in micros if split is None else split_sides(split)[0]:
            inner = Inner(self.decoder, micro, scored, zero, u, keep=keep)
            yield from solve(self.decoder, [inner])
            if inner.cut is not None:
                cuts.append(inner.cut)
            del inner  # and with it its stream, while the next one runs what lies beneath

    def _outer(self, cuts: list[Cut], probe: Probe) -> Gradients:
        decoder, scored = self.decoder, self.scored
        return self._total(Outer(decoder, cut, scored, probe) for cut in cuts)

    def _ordinary(self, probe: Probe | None) -> Gradients:
        decoder, scored, micros = self.decoder, self.scored, self.inputs.micros
        return self._total(Ordinary(decoder, micro, scored, probe) for micro in micros)

    def _total(self, objectives: Iterable[Objective[Gradients]]) -> Gradients:
        """Solve objectives one after another, and sum up what they find."""
        return total((found for objective in objectives for found in solve(self.decoder, [objective])), self.ranks)

    def _difference(self, probe: Probe, u: Flat) -> Gradients:
        decoder, scored, radius = self.decoder, self.scored, self._alpha()
        ahead = (Flat.of(decoder.trained) + u * radius).copies(decoder.trained)
        micros = self.inputs.micros
        return total(([finite_difference(decoder, m, scored, probe, ahead, radius)] for m in micros), self.ranks)

    def _safety(self) -> Safety:
        """Begin the pass over the pairs."""
        rows, config = self.inputs.pairs, self.config
        assert rows is not None  # the step finds a direction
        acting = self.inputs.state.probe.leaves() if config.probe_in_safety_pass else {}
        return Safety(self.decoder, rows, self.ranks.count(rows.sequences // 2), acting, config)

    def _climbed(self, gradients: Gradients, probe: Probe) -> Probe:
        self.decoder.enter("update")
        alpha = self._alpha() if self.config.probe_update == "adamw" else None
        return probe.climbed(gradients.probe_dot, gradients.rms, alpha, self.config)

    def _alpha(self) -> Tensor:
        """Compute the length of the published perturbation: ``radius * |theta|`` over all trained weights."""
        return self.config.radius * Flat.of(self.decoder.trained).norm()
