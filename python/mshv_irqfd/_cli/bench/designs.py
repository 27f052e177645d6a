"""The designs that the bench compares: the package, plain Python, and the Rust baselines (`_core.Baseline`).

Each runs the same workloads on a partition of its own with four VPs. Only the workloads are timed, not the steps
between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mshv_irqfd import _core
from mshv_irqfd._cli.bench.package import Package
from mshv_irqfd._cli.bench.plain_python import PlainPython

if TYPE_CHECKING:
    from collections.abc import Callable

BACKENDS = ("mshv", "kvm", "simulated", "null")


class Design(Protocol):
    """A way to manage the routes of one partition."""

    def run(self, workload: str, calls: int) -> int:
        """Runs a workload a number of times in a row, and returns the nanoseconds that they took together."""

    def close(self) -> None:
        """Closes the partition."""


MAKERS: dict[str, Callable[[str, int], Design]] = {
    "package": Package,
    "no preload": lambda backend, count: Package(backend, count, preload=False),
    "no preload unquiesced": lambda backend, count: Package(backend, count, preload=False, quiesce=False),
    "floor": lambda backend, count: _core.Baseline("floor", backend, count),
    "floor quiesced": lambda backend, count: _core.Baseline("floor-quiesced", backend, count),
    "floor moves": lambda backend, count: _core.Baseline("floor-move", backend, count),
    "rebuild": lambda backend, count: _core.Baseline("rebuild", backend, count),
    "plain Python": PlainPython,
}
OURS = ("package", "no preload", "no preload unquiesced")
"""The designs that are the package."""
MOVES = ("bring-up", "bring-up-made", "msix-retarget", "retarget", "retarget-storm", "retarget-all")
"""The workloads for which moves are another way."""


def of_backend(backend: str) -> list[str]:
    """The designs that can run on a backend."""
    names = list(MAKERS)
    if backend in ("kvm", "null"):
        names = [name for name in names if "quiesced" not in name]
    if backend == "simulated":
        # The simulated kernel has no ioctls.
        names.remove("plain Python")
    return names


def runs(design: str, workload: str) -> bool:
    """Whether a design runs a workload. Neither the package with preloading nor the floor with moves makes a `push`."""
    if design == "package":
        return workload != "push"
    return design != "floor moves" or workload in MOVES
