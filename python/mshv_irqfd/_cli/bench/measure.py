"""How samples are taken and what is made of them."""

from __future__ import annotations

import gc
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter_ns
from typing import TYPE_CHECKING

from mshv_irqfd._cli.bench import designs
from mshv_irqfd._cli.bench.workloads import is_repeatable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLE = 20_000
"""Nanoseconds that a sample lasts at least: a call that is shorter is repeated, and a sample is then a mean."""
MOST_CALLS = 2000
LEAST_ROUNDS = 6
MOST_ROUNDS = 2000
NOTHING = 1e-3
"""Nanoseconds below which a call took no time: the kernel that does nothing has such a floor."""
GROWS = {"create": 1, "retarget": 1, "mask-unmask": 1, "push": 1, "signal": 0}
"""With which power of the number of routes a round grows at worst: the first for one push, and the arming around it;
the second, for what is not named here, where some design makes such a push for every route."""
MOST_SPREAD = 0.25
"""A ratio whose interval reaches further than this to either side says nothing, and is not said."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long."""

    backend: str
    workloads: list[str]
    routes: list[int]
    seconds: float
    """How long a workload is measured at one number of routes, all designs together."""
    longest: float
    """How many seconds a round of all designs may be expected to take; longer ones are left out."""
    rounds: int = LEAST_ROUNDS
    """The least number of rounds."""


@dataclass(frozen=True)
class Ratio:
    """How much longer one design takes than another: the median over the rounds, and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """The further end of the interval, as a share of the value."""
        return max(self.high - self.value, self.value - self.low) / self.value

    @property
    def is_meaningful(self) -> bool:
        """Whether the interval is narrow enough for the value to be said."""
        return self.spread <= MOST_SPREAD


def interval(values: list[float]) -> Ratio:
    """The median, and an interval that has it with 95 % certainty (all values, if there are few)."""
    ordered = sorted(values)
    # Order statistics: as many of n values lie below the true median as heads fall in n throws of a coin.
    reach = 1.96 * math.sqrt(len(ordered)) / 2
    low = max(0, math.floor(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))
    return Ratio(median(ordered), ordered[low], ordered[high])


@dataclass
class Cell:
    """One workload at one number of routes: samples of each design, a round of all after the other."""

    workload: str
    routes: int
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Nanoseconds a call, by design; the n-th of each are of the same round."""
    calls: dict[str, int] = field(default_factory=dict)
    """How many calls a sample is the mean of."""
    left_out: str | None = None
    """Why there are no samples."""

    def ratio(self, design: str, baseline: str) -> Ratio | None:
        """How a design compares with a baseline, round by round; None if either has no samples."""
        if not (self.samples.get(design) and self.samples.get(baseline)):
            return None
        pairs = zip(self.samples[design], self.samples[baseline], strict=True)
        return interval([ours / max(theirs, NOTHING) for ours, theirs in pairs])

    def percentile_99(self, design: str) -> float:
        """The 99th percentile of the samples."""
        samples = self.samples[design]
        return quantiles(samples, n=100, method="inclusive")[98] if len(samples) > 1 else samples[0]


class Measurement:
    """All cells of a plan, measured one after the other."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.designs = designs.of_backend(plan.backend)
        self._round_took: dict[str, tuple[int, float]] = {}

    def cells(self, progress: Callable[[float, str], None]) -> Iterator[Cell]:
        """Measures; `progress` is told how much of the whole is done, and what is measured now."""
        total = len(self.plan.routes) * len(self.plan.workloads)
        for at, routes in enumerate(self.plan.routes):
            with ExitStack() as stack:
                made = {}
                for name in self.designs:
                    made[name] = designs.MAKERS[name](self.plan.backend, routes)
                    stack.callback(made[name].close)
                for done, workload in enumerate(self.plan.workloads, at * len(self.plan.workloads)):
                    text = f"{workload}, {routes} routes"
                    yield self._measure(made, workload, routes, lambda part: progress((done + part) / total, text))  # noqa: B023 -- called before the next turn
        progress(1.0, "done")

    def _measure(
        self, made: dict[str, designs.Design], workload: str, routes: int, progress: Callable[[float], None]
    ) -> Cell:
        cell = Cell(workload, routes)
        expected = self._expected(workload, routes)
        if expected > self.plan.longest:
            cell.left_out = f"a round would take about {expected:.0f} s (see --longest)"
            return cell
        progress(0.0)
        enabled = gc.isenabled()
        gc.disable()
        try:
            # Warms up, and tells how often a call must be repeated to be longer than the clock's own doing.
            for name, design in made.items():
                took = max(1, design.run(workload, 1))
                cell.calls[name] = 1
                if took < SAMPLE:
                    took = max(1, design.run(workload, 10) // 10)
                    cell.calls[name] = min(MOST_CALLS, max(1, SAMPLE // took))
            self._round_took[workload] = routes, self._rounds(cell, made, progress)
        finally:
            if enabled:
                gc.enable()
        return cell

    def _rounds(self, cell: Cell, made: dict[str, designs.Design], progress: Callable[[float], None]) -> float:
        """Fills a cell with samples, and returns the seconds that the quickest round took."""
        quickest = math.inf
        cell.samples = {name: [] for name in made}
        names = list(made)
        begun = perf_counter_ns()
        for done in range(MOST_ROUNDS):
            elapsed = (perf_counter_ns() - begun) / 1e9
            if done >= self.plan.rounds and elapsed > self.plan.seconds:
                break
            progress(min(1.0, max(elapsed / self.plan.seconds if self.plan.seconds else 1.0, 0.0)))
            # Each design comes first, second, ... equally often.
            first = done % len(names)
            for name in names[first:] + names[:first]:
                calls = cell.calls[name]
                if is_repeatable(cell.workload):
                    # The design before it may have left the caches full or empty, and it is always the same one.
                    made[name].run(cell.workload, 1)
                cell.samples[name].append(made[name].run(cell.workload, calls) / calls)
            quickest = min(quickest, (perf_counter_ns() - begun) / 1e9 - elapsed)
        return quickest

    def _expected(self, workload: str, routes: int) -> float:
        """Seconds that a round will take at worst, from those at the last number of routes."""
        before, took = self._round_took.get(workload, (routes, 0.0))
        return took * (routes / before) ** GROWS.get(workload, 2)
