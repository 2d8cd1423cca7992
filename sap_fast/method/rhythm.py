"""Tells when a direction and a probe are found anew, where the settings let a step go on with earlier ones."""

from dataclasses import dataclass, replace

from sap_fast.config import SAPConfig


@dataclass(frozen=True)
class Rhythm:
    """Counts guarded steps. Immutable: :meth:`after` gives the next one, so that a refused step counts for nothing.

    Attributes:
        steps: how many were taken.
        age: steps since the direction was found; None before the first.
        interval: steps from one direction to the next, at present.
    """

    steps: int = 0
    age: int | None = None
    interval: int = 1

    @classmethod
    def of(cls, config: SAPConfig) -> "Rhythm":
        return cls(interval=config.direction_every)

    def finds_probe(self, config: SAPConfig) -> bool:
        """Tell whether this step finds a probe; always so of a guard without one, which has nothing to wait for."""
        return not config.uses_probe or self.steps % config.probe_every == 0

    def finds_direction(self, config: SAPConfig) -> bool:
        """Tell whether this step finds a direction."""
        return self.age is None or (self.finds_probe(config) and self.age + 1 >= self.interval)

    def after(self, *, directed: bool) -> "Rhythm":
        """Count a step, which found a direction or did not."""
        assert directed or self.age is not None
        return replace(self, steps=self.steps + 1, age=0 if directed else (self.age or 0) + 1)

    def adapted(self, cosine: float, config: SAPConfig) -> "Rhythm":
        """Find directions twice as often after one that turned too far, else half as often, within the settings.

        Args:
            cosine: of the direction just found with the one before it.
        """
        if config.direction_min_cosine is None:
            return self
        turned = cosine < config.direction_min_cosine
        interval = max(1, self.interval // 2) if turned else min(config.direction_every, 2 * self.interval)
        return replace(self, interval=interval)
