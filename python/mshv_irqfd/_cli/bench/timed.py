"""A design written in Python: the timing of its steps, and the order of calls around them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import perf_counter_ns
from typing import TYPE_CHECKING

from mshv_irqfd._cli.bench.workloads import BEGINS, ENDS, Standing, is_repeatable

if TYPE_CHECKING:
    from collections.abc import Callable


class Timed(ABC):
    """A design in Python, with one step for each workload."""

    def __init__(self) -> None:
        self.standing = Standing.NOTHING
        self.turn = False
        self.steps: dict[str, Callable[[], object]] = {}

    @abstractmethod
    def _arrange(self, standing: Standing) -> None:
        """Brings the routes from their standing to another, untimed."""

    @abstractmethod
    def _prepare_steps(self) -> None:
        """Prepares the steps on a single route, which may have changed since the last run."""

    def run(self, workload: str, calls: int) -> int:
        """Runs a workload a number of times in a row, and returns the nanoseconds that they took together."""
        begins, ends = (table.get(workload, Standing.ARMED) for table in (BEGINS, ENDS))
        repeatable = is_repeatable(workload)
        total = 0
        for _ in range(1 if repeatable else calls):
            if self.standing != begins:
                self._arrange(begins)
            self._prepare_steps()
            step = self.steps[workload]
            repeat = range(calls if repeatable else 1)
            start = perf_counter_ns()
            for _ in repeat:
                step()
            total += perf_counter_ns() - start
            self.standing = ends
        return total
