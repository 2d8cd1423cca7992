"""Times contenders in turns: round after round, in both orders, on one device."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.common.ceiling import Ceiling
from benchmarks.common.device_timer import DeviceTimer
from benchmarks.step.run import Run

# Rounds that are not counted. On a CPU the check has warmed everything up.
WARM_UP = {"cpu": 0, "cuda": 3}
# Of the median of as many values as there are, at least.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rounds:
    """Times contenders in turns.

    Args:
        runs: contenders and their periods, by name.
        ceiling: visited in every round.
        deadline: by ``time.perf_counter``; from then on no round begins but the first.
        refuse: is told of who fails, and the others go on without; by default a failure is raised.

    Attributes:
        seconds: of each contender's mean step in every round; who has failed is not among them.
    """

    runs: Mapping[str, tuple[Run, int]]
    device: str
    ceiling: Ceiling | None = None
    deadline: float | None = None
    refuse: Callable[[str, Exception], None] | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def take(self, rounds: int) -> Iterator[int]:
        """Take so many rounds, the order another in every other; yields how many are done, after each."""
        timer, emptied = DeviceTimer(self.device), False
        self.seconds.update({name: [] for name in self.runs})
        for i in range(-WARM_UP[self.device], rounds):
            if i > 0 and self.deadline is not None and time.perf_counter() > self.deadline:
                break
            if self.ceiling is not None and i >= 0:
                self.ceiling.visit()
            for name in list(self.seconds)[:: 1 if i % 2 else -1]:
                run, period = self.runs[name]
                try:
                    if emptied and timer.is_cuda:
                        run_period(run, period)  # finds again the memory that the one before has given back
                    start = timer()
                    with timer.region():
                        run_period(run, period)
                    seconds = (timer() - start) / period
                except Exception as error:
                    if self.refuse is None:
                        raise
                    del self.seconds[name]
                    self.refuse(name, error)
                    continue
                if i >= 0:
                    self.seconds[name].append(seconds)
                emptied = run.empties_cache
            if i >= 0:
                yield i + 1

    def median(self, name: str) -> float:
        """Return the seconds of a contender's mean step."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float | None:
        """Return how many times another's median a contender's is; None if the other takes no part."""
        return self.median(name) / self.median(to) if to in self.seconds else None


def run_period(run: Run, period: int) -> None:
    """Take the steps of a period."""
    for _ in range(period):
        run.step()


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Compute a confidence interval of the median, whatever the distribution; None of fewer than six values.

    The median lies between the k-th smallest and the k-th largest of n values unless fewer than k lie on one side of
    it, which happens as seldom as fewer than k heads of n coins. k is the largest that leaves ``CONFIDENCE``.
    """
    n, ordered = len(values), sorted(values)
    k, outside = 0, 2 / 2**n
    while k < n // 2 and outside <= 1 - CONFIDENCE:
        k += 1
        outside += 2 * math.comb(n, k) / 2**n
    return (ordered[k - 1], ordered[n - k]) if k else None
