"""Sampling, and the statistics of samples."""

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
"""The least duration of a sample, in nanoseconds. A shorter call is repeated, and the sample is the mean."""
MOST_CALLS = 2000
LEAST_ROUNDS = 6
MOST_ROUNDS = 2000
NOTHING = 1e-3
"""The least denominator of a ratio, in nanoseconds: on the null kernel the floor's calls take no time."""
GROWS = {"create": 1, "msix-retarget": 1, "retarget": 1, "retarget-storm": 1, "mask-unmask": 1, "push": 1, "signal": 0}
"""The power of the number of routes with which a call grows at worst: 1 for one push and the arming around it; 2 for
the others, where some design makes such a push for every route."""
MOST_SPREAD = 0.25
"""The widest interval, to either side and as a share of the ratio, of a ratio that is shown."""


@dataclass(frozen=True)
class Plan:
    """The workloads to measure, and for how long."""

    backend: str
    workloads: list[str]
    routes: list[int]
    seconds: float
    """Seconds for a workload at one number of routes, for all designs together."""
    longest: float
    """The longest expected call, in seconds; a design does not run a workload beyond that."""
    rounds: int = LEAST_ROUNDS
    """The least number of rounds."""
    designs: list[str] = field(default_factory=lambda: list(designs.MAKERS))
    """The designs to run, if the backend has them."""


@dataclass(frozen=True)
class Ratio:
    """The time of one design divided by another's: the median over the rounds, and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """The distance to the farther end of the interval, as a share of the value."""
        return max(self.high - self.value, self.value - self.low) / self.value

    @property
    def is_meaningful(self) -> bool:
        """Whether the interval is narrow enough to show the value."""
        return self.spread <= MOST_SPREAD


def interval(values: list[float]) -> Ratio:
    """The median, and its 95 % confidence interval (the whole range, if there are few values)."""
    ordered = sorted(values)
    # Order statistics: the number of values below the true median is binomial, like heads in n throws of a coin.
    reach = 1.96 * math.sqrt(len(ordered)) / 2
    low = max(0, math.floor(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))
    return Ratio(median(ordered), ordered[low], ordered[high])


@dataclass
class Cell:
    """One workload at one number of routes, with samples of each design."""

    workload: str
    routes: int
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Nanoseconds per call, by design; the n-th samples of all designs are from the same round."""
    calls: dict[str, int] = field(default_factory=dict)
    """Calls per sample, by design."""
    left_out: str | None = None
    """The designs without samples, and the reason."""

    def ratio(self, design: str, baseline: str) -> Ratio | None:
        """The ratio of a design to a baseline, from pairs of the same round; None if either has no samples."""
        if not (self.samples.get(design) and self.samples.get(baseline)):
            return None
        pairs = zip(self.samples[design], self.samples[baseline], strict=True)
        return interval([ours / max(theirs, NOTHING) for ours, theirs in pairs])

    def percentile_99(self, design: str) -> float:
        """The 99th percentile of the samples."""
        samples = self.samples[design]
        return quantiles(samples, n=100, method="inclusive")[98] if len(samples) > 1 else samples[0]


class Measurement:
    """The measurement of all cells of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.designs = [name for name in designs.of_backend(plan.backend) if name in plan.designs]
        self._took: dict[tuple[str, str], tuple[int, float]] = {}

    def cells(self, progress: Callable[[float, str], None]) -> Iterator[Cell]:
        """Measures; calls `progress` with the completed share of the whole and the name of the current cell."""
        total = len(self.plan.routes) * len(self.plan.workloads)
        for at, routes in enumerate(self.plan.routes if self.plan.workloads else ()):
            with ExitStack() as stack:
                made = {}
                for name in self.designs:
                    made[name] = designs.MAKERS[name](self.plan.backend, routes)
                    stack.callback(made[name].close)
                for done, workload in enumerate(self.plan.workloads, at * len(self.plan.workloads)):
                    text = f"{workload}, {routes} routes"
                    yield self._measure(made, workload, routes, lambda part: progress((done + part) / total, text))  # noqa: B023 -- called before the next iteration
        progress(1.0, "done")

    def _measure(
        self, made: dict[str, designs.Design], workload: str, routes: int, progress: Callable[[float], None]
    ) -> Cell:
        cell = Cell(workload, routes)
        made = {name: design for name, design in made.items() if designs.runs(name, workload)}
        expected = {name: self._expected(workload, routes, name) for name in made}
        too_long = {name: seconds for name, seconds in expected.items() if seconds > self.plan.longest}
        if too_long:
            names = ", ".join(f"{name} (about {seconds:.1f} s)" for name, seconds in too_long.items())
            cell.left_out = f"{names}: a call would take longer than --longest"
            made = {name: design for name, design in made.items() if name not in too_long}
        if not made:
            return cell
        progress(0.0)
        enabled = gc.isenabled()
        gc.disable()
        try:
            # Warms up, and finds the number of calls that makes a sample long compared with reading the clock.
            for name, design in made.items():
                took = max(1, design.run(workload, 1))
                cell.calls[name] = 1
                if took < SAMPLE:
                    took = max(1, design.run(workload, 10) // 10)
                    cell.calls[name] = min(MOST_CALLS, max(1, SAMPLE // took))
            self._rounds(cell, made, progress)
        finally:
            if enabled:
                gc.enable()
        return cell

    def _rounds(self, cell: Cell, made: dict[str, designs.Design], progress: Callable[[float], None]) -> None:
        """Fills a cell with samples."""
        cell.samples = {name: [] for name in made}
        names = list(made)
        begun = perf_counter_ns()
        for done in range(MOST_ROUNDS):
            elapsed = (perf_counter_ns() - begun) / 1e9
            if done >= self.plan.rounds and elapsed > self.plan.seconds:
                break
            progress(min(1.0, max(elapsed / self.plan.seconds if self.plan.seconds else 1.0, 0.0)))
            # Each design runs first, second, ... equally often.
            first = done % len(names)
            for name in names[first:] + names[:first]:
                calls = cell.calls[name]
                if is_repeatable(cell.workload):
                    # Untimed: the caches hold the data of the previous design, which is always the same one.
                    made[name].run(cell.workload, 1)
                cell.samples[name].append(made[name].run(cell.workload, calls) / calls)
        for name, samples in cell.samples.items():
            self._took[cell.workload, name] = cell.routes, min(samples) / 1e9

    def _expected(self, workload: str, routes: int, design: str) -> float:
        """The longest duration of a call, in seconds, estimated from the last number of routes."""
        before, took = self._took.get((workload, design), (routes, 0.0))
        return took * (routes / before) ** GROWS.get(workload, 2)
