"""`mshv-irqfd demo`: the life of a few routes, with the guest's interrupts checked after every step."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING

from mshv_irqfd import (
    HypervisorUnavailableError,
    IrqFdRoute,
    KvmPartition,
    MsiRoute,
    Partition,
    SimulatedPartition,
    open_partition,
)
from mshv_irqfd._guest import GuestError, GuestOfPartition

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction

ROUTES = 3
FIRST_VECTOR = 0x40
NEW_VECTOR = 0x80
FENCE_VECTOR = 0xF0
TIMEOUT = 10.0
"""Seconds after which an interrupt counts as lost."""


def add_parser(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Adds the subcommand and its options."""
    parser = subcommands.add_parser(
        "demo",
        help="bring routes up, signal, mask, move and close them, and check the guest's interrupts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backend",
        choices=["best", "mshv", "kvm", "simulated"],
        default="best",
        help="the kernel to use (default: the best one that this machine has: mshv, kvm, else simulated)",
    )
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Runs the demonstration; 0 if every step was as expected, 1 if one was not, 2 without a backend."""
    try:
        partition = _open(options.backend)
    except HypervisorUnavailableError as error:
        print(f"no partition: {error.strerror}", file=sys.stderr)
        return 2
    try:
        with partition, _run_guest(partition) or nullcontext() as guest:
            demonstration = Demonstration(partition, guest)
            demonstration.run()
    except GuestError as error:
        print(f"\nthe guest went wrong: {error}")
        return 1
    if demonstration.differences:
        print(f"\n{demonstration.differences} result(s) not as expected")
        return 1
    print("\nEvery expected interrupt arrived, and no other.")
    return 0


def _open(backend: str) -> Partition:
    """Opens a partition, and prints the reason for its backend."""
    if backend != "best":
        partition = open_partition(backend)
        print(f"{partition}\n  as requested")
        return partition
    reasons = []
    for name in ("mshv", "kvm"):
        try:
            partition = open_partition(name)
        except HypervisorUnavailableError as error:
            reasons.append(f"  not {name}: {error.strerror}")
        else:
            break
    else:
        partition = open_partition("simulated")
    print("\n".join([str(partition), *reasons]))
    return partition


def _run_guest(partition: Partition) -> GuestOfPartition | None:
    """Runs a guest on KVM if one can run, and prints who tells what arrived; None elsewhere."""
    if not isinstance(partition, KvmPartition):
        return None
    try:
        guest = GuestOfPartition(partition)
    except (GuestError, OSError) as error:
        print(f"  no guest runs here ({error})")
        print("  what arrives is read from the local APIC instead: it has the set of vectors that wait, and no counts")
        return None
    print("  a guest of some 200 bytes runs on VP 0, and counts the interrupts that it takes")
    return guest


class Demonstration:
    """The steps on one partition, each with the vectors that should arrive."""

    def __init__(self, partition: Partition, guest: GuestOfPartition | None) -> None:
        self.partition = partition
        self.guest = guest
        self.differences = 0
        self._fence: IrqFdRoute | None = None

    def run(self) -> None:
        """Runs all steps."""
        routes = [self.partition.new_irqfd_route() for _ in range(ROUTES)]
        self._step("create three routes", routes, [])

        with self.partition.batch() as batch:
            for number, route in enumerate(routes):
                batch.set_msi(route, MsiRoute.fixed(FIRST_VECTOR + number, 0))
        self._step("set their MSIs in one batch", routes, [])

        for route in routes:
            route.signal()
        self._step("signal each", routes, [FIRST_VECTOR + number for number in range(ROUTES)])

        routes[0].mask()
        for _ in range(3):
            routes[0].signal()
        self._step("mask the first and signal it three times", routes, [])

        routes[0].unmask()
        self._step("unmask it: one interrupt for all that was pending", routes, [FIRST_VECTOR])

        routes[1].set_msi(MsiRoute.fixed(NEW_VECTOR, 0))
        routes[1].signal()
        self._step("move the second to another vector and signal it", routes, [NEW_VECTOR])

        descriptor = routes[2].event
        routes[2].clear_msi()
        descriptor.signal()
        self._step("clear the MSI of the third and signal its eventfd", routes, [])
        self._check("  its signal is pending", routes[2].pending)

        pushes = self.partition.stats().pushes
        for route in routes:
            route.close()
        self._step("close all", routes, [])
        self._check("  without a push", self.partition.stats().pushes == pushes)

    def _step(self, text: str, routes: list[IrqFdRoute], expected: list[int]) -> None:
        print(f"\n{text}")
        for route in routes:
            print(f"  {route}")
        arrived = self._arrived(expected)
        if arrived is None:
            print(f"  the mshv driver does not report interrupts; expected: {_vectors(expected)}")
            return
        told = "the guest took" if self.guest else "arrived"
        self._check(f"  {told}: {_vectors(arrived)}; expected: {_vectors(expected)}", sorted(arrived) == expected)

    def _check(self, text: str, fine: bool) -> None:  # noqa: FBT001 -- a condition, not a mode
        print(f"{text} {'ok' if fine else 'DIFFERENT'}")
        self.differences += not fine

    def _arrived(self, expected: list[int]) -> list[int] | None:
        """The vectors that arrived, once every earlier signal is delivered; None if not observable."""
        if isinstance(self.partition, SimulatedPartition):
            self.partition.settle()
            return [interrupt.vector for interrupt in self.partition.take_interrupts()]
        if self.guest is not None:
            return self._taken(self.guest, expected)
        if isinstance(self.partition, KvmPartition):
            # KVM may still be delivering the interrupt of a route just armed, so this waits for the expected ones.
            # An unexpected one would arrive before the interrupt of a fence, which is signalled last.
            missing = set(expected)
            arrived: list[int] = []
            while missing and (batch := self.partition.take_interrupts(TIMEOUT)):
                arrived += [interrupt.vector for interrupt in batch]
                missing -= set(arrived)
            if self._fence is None:
                self._fence = self.partition.new_irqfd_route()
                self._fence.set_msi(MsiRoute.fixed(FENCE_VECTOR, 0))
            self._fence.signal()
            while FENCE_VECTOR not in arrived and (batch := self.partition.take_interrupts(TIMEOUT)):
                arrived += [interrupt.vector for interrupt in batch]
            return [vector for vector in arrived if vector != FENCE_VECTOR]
        return None

    def _taken(self, guest: GuestOfPartition, expected: list[int]) -> list[int]:
        """The vectors that the guest took, once it has taken the expected ones and all that waited with them."""
        taken, deadline = Counter[int](), time.monotonic() + TIMEOUT
        while not taken >= Counter(expected) and time.monotonic() < deadline:
            taken.update(vector for vector, _ in guest.take().elements())
            time.sleep(0)
        guest.fence()
        taken.update(vector for vector, _ in guest.take().elements())
        return sorted(taken.elements())


def _vectors(vectors: list[int]) -> str:
    return ", ".join(f"{vector:#04x}" for vector in sorted(vectors)) or "nothing"
