"""Random walks over all operations on routes, while other threads signal.

`MSHV_IRQFD_WALK` sets the number of operations of a walk.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from support import msi, places, rare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends import Backend, Guest
    from mshv_irqfd import Interrupt, IrqFdRoute, MsiRoute

OPERATIONS = int(os.environ.get("MSHV_IRQFD_WALK", "400"))
EPOCH = 50
ROUTES = 12
BURST = 40
"""The number of signals during one operation: no more than a slow machine can check."""
VECTORS = 8
"""The number of vectors of a route. No two routes share one."""


def vectors(number: int) -> range:
    """The vectors of one of the routes."""
    return range(0x20 + number * VECTORS, 0x20 + (number + 1) * VECTORS)


class Walk:
    """Routes, and random changes to them."""

    def __init__(self, guest: Guest, seed: int) -> None:
        self.guest = guest
        self.random = random.Random(seed)
        self.routes = [guest.partition.new_irqfd_route() for _ in range(ROUTES)]

    def some_msi(self, number: int) -> MsiRoute:
        message = rare if self.random.randrange(4) == 0 else msi
        return message(self.random.choice(vectors(number)))

    def step(self) -> None:  # noqa: C901 -- a list of choices
        """Changes a route, changes several in a batch, or closes one and makes another in its place."""
        number = self.random.randrange(ROUTES)
        route = self.routes[number]
        match self.random.randrange(12):
            case 0 | 1 | 2:
                route.set_msi(self.some_msi(number))
            case 3:
                route.clear_msi()
            case 4 | 5:
                route.mask()
            case 6 | 7:
                route.unmask()
            case 8:
                self.replace(number)
            case 9:
                route.set_event(None)
            case _:
                with self.guest.partition.batch() as batch:
                    for number, route in enumerate(self.routes):
                        match self.random.randrange(6):
                            case 0:
                                batch.set_msi(route, self.some_msi(number))
                            case 1:
                                batch.mask(route)
                            case 2:
                                batch.unmask(route)
                            case 3:
                                batch.clear_msi(route)

    def replace(self, number: int) -> None:
        """Closes a route and makes another."""
        self.routes[number].close()
        self.routes[number] = self.guest.partition.new_irqfd_route()

    def close(self) -> None:
        """Closes the routes."""
        for route in self.routes:
            route.close()

    def arm_all(self) -> None:
        """Leaves every route armed, on any of its vectors."""
        with self.guest.partition.batch() as batch:
            for number, route in enumerate(self.routes):
                batch.unmask(route)
                batch.set_msi(route, self.some_msi(number))
        assert all(route.armed for route in self.routes)


TORN = -1


def numbers(interrupts: list[Interrupt], guest: Guest, *, may_tear: bool = False) -> Counter[int]:
    """Counts the interrupts of each route. Fails on a bogus one, unless torn ones are allowed."""
    found: Counter[int] = Counter()
    for interrupt in interrupts:
        if may_tear and interrupt.vector == 0:
            found[TORN] += 1
            continue
        number = (interrupt.vector - 0x20) // VECTORS
        assert 0 <= number < ROUTES, f"bogus {interrupt}"
        if guest.counted:
            assert [interrupt] == guest.seen(msi(interrupt.vector))
        found[number] += 1
    return found


class Signals(Counter[int]):
    """The number of signals of each route, and the budget for more."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = threading.Semaphore(0)
        self.room = threading.Semaphore(2 * BURST)

    def more(self) -> None:
        """Allows more signals, which overlap the next operation. Waits if the signalling threads are far behind."""
        for _ in range(BURST):
            self.room.acquire()
            self.budget.release()


@contextmanager
def signalling(walk: Walk) -> Iterator[Signals]:
    """Runs two threads that signal routes at random; counts their signals when they have ended."""
    stop = threading.Event()
    signals = Signals()
    lock = threading.Lock()
    failures: list[BaseException] = []

    def signal(seed: int) -> None:
        chance = random.Random(seed)
        mine: Counter[int] = Counter()
        try:
            while not stop.is_set():
                signals.budget.acquire()
                signals.room.release()
                number = chance.randrange(ROUTES)
                route = walk.routes[number]
                try:
                    route.signal()
                except ValueError:
                    assert route.closed
                else:
                    mine[number] += 1
        except BaseException as error:
            failures.append(error)
            # Nothing may wait for this thread.
            signals.room.release(OPERATIONS * BURST)
        with lock:
            signals.update(mine)

    threads = [threading.Thread(target=signal, args=(walk.random.random(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield signals
    finally:
        stop.set()
        signals.budget.release(len(threads))
        for thread in threads:
            thread.join()
    assert failures == []


def few_spare_gsis(backend: Backend) -> range:
    """The GSIs to hand out, so that 40 spare ones are left: fewer than a walk has messages."""
    return range(24, 24 + 4096 - (40 if backend.name == "kvm" else 24) - 40)


def check_the_pushes(walk: Walk, *, preload: bool) -> None:
    """A push needs a miss, and only a partition with spare GSIs has hits. All routes must be armed."""
    stats = walk.guest.partition.stats()
    assert places(walk.guest.partition, walk.routes) == {route.gsi: route.msi for route in walk.routes}
    assert stats.hits > 0 if preload else stats.hits == 0
    assert stats.pushes <= stats.misses


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("quiesce", "preload"), [(None, False), (False, False), (None, True)], ids=["pushes", "unquiesced", "moves"]
)
def test_a_walk_under_signals_raises_no_bogus_interrupt(
    backend: Backend,
    open_guest: Callable[..., Guest],
    quiesce: bool | None,
    preload: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if quiesce is False and not backend.quiesces:
        pytest.skip(f"{backend.name} never quiesces by default")
    # Without quiescing the mshv driver may tear a signal during a push. The number is random: printed, not asserted.
    may_tear = quiesce is False and backend.name == "mshv"
    if preload and not backend.loads():
        quiesce = True
    guest = open_guest(quiesce=quiesce, preload=preload, gsis=few_spare_gsis(backend))
    walk = Walk(guest, seed=1)
    received: Counter[int] = Counter()
    with signalling(walk) as signals:
        for _ in range(OPERATIONS):
            signals.more()
            walk.step()
            if guest.counted:
                received += numbers(guest.take_interrupts(), guest, may_tear=may_tear)
    walk.arm_all()
    received += numbers(guest.arrived(), guest, may_tear=may_tear)
    torn = received.pop(TORN, 0)
    stats = guest.partition.stats()
    if may_tear:
        with capsys.disabled():
            print(f"\nnot quiesced: {torn} of {signals.total()} signals torn in {stats.pushes} pushes")  # noqa: T201
    if guest.counted:
        # A signal that overlaps an arming may come twice.
        assert received.total() <= signals.total() + stats.arms
    assert signals.total() > 0
    assert set(received) == set(range(ROUTES))
    check_the_pushes(walk, preload=preload)
    # At rest each signal is one interrupt.
    for route in walk.routes:
        route.signal()
    guest.receives(*(route.msi for route in walk.routes if route.msi))
    walk.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("seed", "preload"), [(0, False), (1, False), (0, True), (1, True)])
def test_one_signal_during_a_walk_arrives_once_or_twice(
    backend: Backend, open_guest: Callable[..., Guest], seed: int, preload: bool
) -> None:
    quiesce = True if preload and not backend.loads() else None
    guest = open_guest(quiesce=quiesce, preload=preload, gsis=few_spare_gsis(backend))
    walk = Walk(guest, seed)
    # A closed route takes its pending signal with it, so this walk closes none.
    walk.replace = lambda number: walk.routes[number].unmask()  # type: ignore[method-assign]
    for _ in range(max(OPERATIONS // EPOCH, 1)):
        walk.arm_all()
        order = random.Random(walk.random.random()).sample(range(ROUTES), ROUTES)

        def signal_each(routes: list[IrqFdRoute], order: list[int]) -> None:
            for number in order:
                routes[number].signal()

        thread = threading.Thread(target=signal_each, args=(walk.routes, order))
        thread.start()
        for _ in range(EPOCH):
            walk.step()
        thread.join()
        walk.arm_all()
        received = numbers(guest.arrived(), guest)
        assert set(received) == set(range(ROUTES)), "a signal was lost"
        if guest.counted:
            assert max(received.values()) <= 2, "a signal came more than twice"
        assert not any(route.pending for route in walk.routes)
        check_the_pushes(walk, preload=preload)
    walk.close()
