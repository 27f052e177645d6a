"""A storm: two threads signal steady routes without pause, while a third moves other routes among loaded messages.

It runs in rounds. In each, the moving routes come in pairs of the same messages, and one of each pair is signalled once
while it may be moving. At the end of a round all is at rest and every interrupt is accounted for: each steady route's
signals, and each moving route's at one of the messages that it had while it was signalled. Where the guest counts
interrupts, and a signal can't overlap another, each steady signal is one interrupt. Elsewhere some of the steady routes
are signalled once a round, so that no other signal can stand in for a lost one.

`MSHV_IRQFD_STORM` sets how many seconds it lasts.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import hvstub
import pytest
from backends import Guest, MshvGuest
from mshv_irqfd import DeliveryMode, Interrupt, IrqFdRoute, MsiRoute
from support import counting, msi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS: Final = float(os.environ.get("MSHV_IRQFD_STORM", "2"))
VPS: Final = 4
PAIRS: Final = 32
ROUND: Final = 0.25
"""Seconds after which a round ends, if it has not made all its moves before."""
MOVES: Final = 64
"""Moves in a round, or a few more."""
MOST: Final = 20_000
"""Signals of a steady thread in a round: the lab's stand-in keeps 131,072 interrupts, and on a busy machine the other
threads need a turn."""


@dataclass
class Steady:
    """A route that is never touched."""

    route: IrqFdRoute
    msi: MsiRoute
    once: bool
    """Whether it is signalled once a round."""
    signals: int = 0


@dataclass(eq=False)
class Moving:
    """A route that moves among the messages of its pair."""

    route: IrqFdRoute
    messages: list[MsiRoute]
    had: list[MsiRoute]
    """Its messages in this round, the one that it began with first."""
    reached: int = 0
    """The place of the latest in `had` that it has moved to."""
    twin: Moving | None = None

    def begin(self) -> None:
        del self.had[:-1]
        self.reached = 0


@dataclass
class Figures:
    rounds: int = 0
    steady: int = 0
    probes: int = 0
    overlapping: int = 0
    moves: int = 0
    shared: int = 0
    interrupts: int = 0
    lost: int = 0
    wrong: int = 0
    surplus: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, {self.steady + self.probes} signals ({self.steady} on steady routes, {self.probes} "
            f"on moving ones, {self.overlapping} of these during a move), {self.moves} moves ({self.shared} to the GSI "
            f"of another route), {self.interrupts} interrupts; {self.lost} lost, {self.wrong} wrong, {self.surplus} "
            "surplus"
        )


class Storm:
    """The routes of a storm, and the steps of a round."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.partition = guest.partition
        self.random = random.Random()
        self.figures = Figures()
        # The signals of a steady route are counted one by one only where a write delivers before it returns.
        self.exact = isinstance(guest, MshvGuest) and not guest.root
        vectors = iter(range(0x20, 0xF0))
        self.steady = [[self._steady(next(vectors), number) for number in range(24)] for _ in range(2)]
        self.pairs = [self._pair([next(vectors) for _ in range(5)]) for _ in range(PAIRS)]
        self.moving = [route for pair in self.pairs for route in pair]
        self.current = self.moving[0]
        """The route that is moving, or was the last to move."""
        self.over = threading.Event()
        with self.partition.batch() as batch:
            for steady in (*self.steady[0], *self.steady[1]):
                batch.set_msi(steady.route, steady.msi)
            for moving in self.moving:
                batch.set_msi(moving.route, moving.had[0])

    def _steady(self, vector: int, number: int) -> Steady:
        return Steady(self.partition.new_irqfd_route(), msi(vector, number % VPS), once=number >= 8)

    def _pair(self, vectors: list[int]) -> tuple[Moving, Moving]:
        messages = [msi(vector, vp) for vector in vectors for vp in range(VPS)]
        one, other = (Moving(self.partition.new_irqfd_route(), messages, [messages[0]]) for _ in range(2))
        one.twin, other.twin = other, one
        return one, other

    def close(self) -> None:
        for route in self.partition.routes:
            route.close()

    def loaded(self) -> bool:
        """Whether the kernel's table has every message."""
        table = {(entry.address, entry.data) for entry in self.partition.routing_table()}
        return table >= {(one.address, one.data) for moving in self.moving for one in moving.messages}

    def signal(self, steady: list[Steady]) -> None:
        """Signals steady routes until the round is over."""
        once = [one for one in steady if one.once]
        self.random.shuffle(once)
        often = [one for one in steady if not one.once]
        for _ in range(MOST // len(often)):
            for one in (*often, *(once and [once.pop()])):
                # Unlike `route.signal()`, this lets go of the interpreter, so that the other threads run meanwhile.
                os.eventfd_write(one.route.fileno(), 1)
                one.signals += 1
            if self.over.is_set() and not once:
                return

    def move(self) -> None:
        """Moves routes at random, most of them alone, some in a batch."""
        done, end = 0, time.monotonic() + ROUND
        while done < MOVES and time.monotonic() < end:
            chosen = self.random.sample(self.moving, 4 if self.random.random() < 1 / 16 else 1)
            for one in chosen:
                assert one.twin is not None
                # At times to where its twin is, so that two irqfds share a GSI.
                to_twin = self.random.random() < 1 / 4
                one.had.append(one.twin.had[-1] if to_twin else self.random.choice(one.messages))
            self.current = chosen[0]
            if len(chosen) == 1:
                chosen[0].route.set_msi(chosen[0].had[-1])
            else:
                with self.partition.batch() as batch:
                    for one in chosen:
                        batch.set_msi(one.route, one.had[-1])
            for one in chosen:
                assert one.twin is not None
                one.reached = len(one.had) - 1
                self.figures.moves += one.had[-1] != one.had[-2]
                self.figures.shared += one.route.armed_gsi == one.twin.route.armed_gsi
            done += len(chosen)

    def probe(self, moving: Callable[[], bool]) -> list[tuple[Moving, set[Interrupt]]]:
        """Signals one route of each pair once, if possible while it moves, and returns what interrupts may come."""
        left = dict.fromkeys(self.random.choice(pair) for pair in self.pairs)
        probed = []
        while left:
            one = self.current
            if one not in left:
                if moving():
                    time.sleep(0)
                    continue
                one = next(iter(left))
            del left[one]
            first = one.reached
            os.eventfd_write(one.route.fileno(), 1)
            while_signalled = one.had[first:]
            self.figures.overlapping += len(while_signalled) > 1
            probed.append((one, {self.seen(message) for message in while_signalled}))
        return probed

    def seen(self, message: MsiRoute) -> Interrupt:
        """The interrupt of a message, as the guest shows it."""
        (interrupt,) = self.guest.seen(message)
        return interrupt

    def arrived(self) -> Counter[Interrupt]:
        """Takes the interrupts, everything being at rest."""
        if not self.exact:
            return Counter(self.guest.told(self.guest.arrived()))
        # The same as `MshvGuest.arrived`, without an object for each of many equal interrupts.
        assert isinstance(self.guest, MshvGuest)
        records = Counter[tuple[int, ...]]()
        for data in self._records(self.guest.stub.fileno()):
            records.update(hvstub._RECORD.iter_unpack(data))
        told = Counter[Interrupt]()
        for (partition, destination, control, vector, _), number in records.items():
            if partition == self.guest.id:
                mode, logical, level = (
                    DeliveryMode(control & 0xFFFFFFFF),
                    bool(control >> 33 & 1),
                    bool(control >> 32 & 1),
                )
                told[Interrupt(vector, destination, mode, logical, level)] += number
        return told

    def _records(self, fd: int) -> Iterator[bytes]:
        """Reads the stand-in until it is empty. EOVERFLOW, which marks a gap, fails the test."""
        while True:
            try:
                yield os.read(fd, hvstub._READ_SIZE)
            except BlockingIOError:
                return

    def round(self, pool: ThreadPoolExecutor) -> None:
        """Runs a round, and accounts for its interrupts."""
        for moving in self.moving:
            moving.begin()
        for steady in (*self.steady[0], *self.steady[1]):
            steady.signals = 0
        self.over.clear()
        signalling = [pool.submit(self.signal, steady) for steady in self.steady]
        mover = pool.submit(self.move)
        try:
            probed = self.probe(lambda: not mover.done())
            mover.result()
        finally:
            self.over.set()
        for signaller in signalling:
            signaller.result()
        arrived = self.arrived()
        self.figures.rounds += 1
        self.figures.interrupts += arrived.total()
        for steady in (*self.steady[0], *self.steady[1]):
            self.figures.steady += steady.signals
            came = arrived.pop(self.seen(steady.msi), 0)
            fewest = steady.signals if self.exact else 1
            self._compare(steady.route, came, fewest, steady.signals)
        for one, may_raise in probed:
            self.figures.probes += 1
            came = sum(arrived.pop(interrupt, 0) for interrupt in may_raise)
            # A signal that overlaps an arming may be delivered twice.
            self._compare(one.route, came, 1, 1 + len(one.had))
        self.figures.wrong += arrived.total()
        if arrived:
            self.figures.problems.append(f"round {self.figures.rounds}: nobody asked for {dict(arrived)}")

    def _compare(self, route: IrqFdRoute, came: int, fewest: int, most: int) -> None:
        self.figures.lost += max(0, fewest - came)
        self.figures.surplus += max(0, came - most)
        if not fewest <= came <= most:
            problem = f"round {self.figures.rounds}: {came} interrupts instead of {fewest} to {most} of {route!r}"
            self.figures.problems.append(problem)


@pytest.mark.timeout(SECONDS + 300)
def test_routes_that_nobody_touches_lose_nothing_while_others_move(open_guest: Callable[..., Guest]) -> None:
    guest = open_guest(vps=VPS)
    with closing(Storm(guest)) as storm:
        assert storm.loaded()
        end = time.monotonic() + SECONDS
        with ThreadPoolExecutor(3) as pool, counting(guest.partition) as counted:
            while time.monotonic() < end and len(storm.figures.problems) < 10:
                storm.round(pool)
        sys.stdout.write(f"{storm.figures}; {counted.stats.pushes} pushes after the first\n")
        assert storm.figures.problems == []
        assert (counted.stats.pushes, counted.stats.misses, counted.stats.failures) == (0, 0, 0)
        assert storm.figures.moves > 0
