"""Every interrupt is accounted for: a thread retargets, masks and batches while another signals and counts what comes.

Each signal becomes one interrupt, at a message that its route had between the signal and the interrupt. A second one is
explained only if the signal overlapped a change of its route. A signal that waited before the change that arms its
route overlaps none. `MSHV_IRQFD_TAKEN` sets how many interrupts are taken.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import pytest
from modes import Mode, modes
from mshv_irqfd.testing import until
from support import MANY, counting, msi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from backends import Backend, Guest
    from mshv_irqfd import Batch, Interrupt, IrqFdRoute, MsiRoute

TAKEN: Final = int(os.environ.get("MSHV_IRQFD_TAKEN", "2000"))
ROUTES: Final = 8
VPS: Final = 2
VECTORS: Final = 8
"""The number of vectors of a route. No two routes share one."""
FIRST_VECTOR: Final = 0x20
FEWEST: Final = 20
"""The fewest changes of each kind, and signals that overlap one: a busy machine may make the changing thread wait."""
MASKED: Final = 3
"""The most routes that are masked at a time."""


@dataclass(eq=False)
class Signalled:
    """A route, what the changing thread does to it, and what the counting thread is due."""

    number: int
    route: IrqFdRoute
    had: list[MsiRoute]
    """Its messages, in order. The changing thread adds one before it sets it."""
    reached: int = 0
    """The place in `had` of the latest that is set for certain."""
    begun: int = 0
    """The changes that have begun, masking among them."""
    ended: int = 0
    since: int = 0
    """`reached` before the latest signal: the interrupt is at that message or a later one."""
    quiet: int = 0
    """`ended` before the latest signal."""
    masked: bool = False
    """Whether it is masked, or was and the change that unmasks it has not begun."""
    due: bool = False
    waited: bool = False
    """Whether the latest signal waited before any change that could arm the route had begun."""
    repeated: bool = False

    def signal(self) -> None:
        self.since, self.quiet, self.due, self.repeated = self.reached, self.ended, True, False
        # Unlike `route.signal()`, this lets go of the interpreter, so that the other thread runs meanwhile.
        os.eventfd_write(self.route.fileno(), 1)
        self.waited = self.masked and self.begun == self.quiet

    @property
    def may_repeat(self) -> bool:
        """Whether a second interrupt of the latest signal is explained."""
        return self.begun != self.quiet and not self.waited and not self.repeated


@dataclass
class Figures:
    signals: int = 0
    interrupts: int = 0
    repeated: int = 0
    retargets: int = 0
    masks: int = 0
    batches: int = 0
    overlapped: int = 0
    waited: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.signals} signals, {self.interrupts} interrupts; {self.waited} signals waited, {self.overlapped} "
            f"overlapped a change of their route, {self.repeated} of them came twice; {self.retargets} retargets, "
            f"{self.masks} masks, {self.batches} batches meanwhile; {len(self.problems)} unexplained"
        )


class Scene:
    """The routes, and the two threads' work on them."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.figures = Figures()
        self.changes, self.signals = random.Random(1), random.Random(2)
        self.masked: deque[Signalled] = deque()
        self.routes: list[Signalled] = []
        for number in range(ROUTES):
            message = msi(FIRST_VECTOR + number * VECTORS)
            self.routes.append(Signalled(number, guest.partition.new_irqfd_route(), [message]))
            self.routes[-1].route.set_msi(message)

    def close(self) -> None:
        for one in self.routes:
            one.route.close()

    def change(self) -> None:
        """Makes one change: a route's message, a mask, or several in a batch."""
        kind = self.changes.randrange(20)
        if kind < 12:
            one = self.changes.choice(self.routes)
            self._change([one], lambda: one.route.set_msi(self._next_message(one)))
            self.figures.retargets += 1
        elif kind < 16 and len(self.masked) < MASKED:
            one = self.changes.choice(self.routes)
            self._change([one], one.route.mask)
            self.masked.append(one)
            one.masked = True
            self.figures.masks += 1
        else:
            some = self.changes.sample(self.routes, self.changes.randrange(1, ROUTES))
            unmasked = [self.masked.popleft() for _ in range(len(self.masked))]
            self._change(some, lambda: self._batch(some, unmasked), unmasked)
            self.figures.batches += 1

    def _batch(self, some: list[Signalled], unmasked: list[Signalled]) -> None:
        batch: Batch
        with self.guest.partition.batch() as batch:
            for one in some:
                batch.set_msi(one.route, self._next_message(one))
            for one in unmasked:
                batch.unmask(one.route)

    def _next_message(self, one: Signalled) -> MsiRoute:
        vector = FIRST_VECTOR + one.number * VECTORS + self.changes.randrange(VECTORS)
        one.had.append(msi(vector, self.changes.randrange(VPS)))
        return one.had[-1]

    def _change(
        self, changed: list[Signalled], change: Callable[[], object], unmasked: Iterable[Signalled] = ()
    ) -> None:
        changed = list(dict.fromkeys([*changed, *unmasked]))
        for one in changed:
            one.begun += 1
        for one in unmasked:
            one.masked = False
        change()
        for one in changed:
            one.reached = len(one.had) - 1
            one.ended = one.begun

    def unmask_all(self) -> None:
        unmasked = list(self.masked)
        self.masked.clear()
        self._change([], lambda: self._batch([], unmasked), unmasked)

    def round(self) -> None:
        """Signals some routes, the masked ones among them, and waits until each has raised an interrupt."""
        some = self.signals.sample(self.routes, self.signals.randrange(1, ROUTES + 1))
        some += [one for one in self.routes if one.masked and one not in some]
        for one in some:
            one.signal()
        self.figures.signals += len(some)

        def all_came() -> bool:
            self.account(self.guest.take_interrupts())
            return not any(one.due for one in some)

        until(all_came, f"every signal arrives: {self.figures}")
        for one in some:
            self.figures.waited += one.waited
            self.figures.overlapped += one.begun != one.quiet and not one.waited

    def account(self, arrived: list[Interrupt]) -> None:
        self.figures.interrupts += len(arrived)
        for interrupt in arrived:
            number = (interrupt.vector - FIRST_VECTOR) // VECTORS
            if not 0 <= number < ROUTES:
                self.figures.problems.append(f"nobody's vector: {interrupt}")
                continue
            one = self.routes[number]
            if interrupt not in [seen for message in one.had[one.since :] for seen in self.guest.seen(message)]:
                self.figures.problems.append(f"{interrupt} is not at any of {one.had[one.since :]}, of {one.route}")
            if one.due:
                one.due = False
            elif one.may_repeat:
                one.repeated = True
                self.figures.repeated += 1
            else:
                self.figures.problems.append(f"{interrupt} came once more than {one.route} was signalled")


@pytest.mark.timeout(TAKEN // 500 + 120)
@pytest.mark.parametrize("mode", modes)
def test_each_signal_is_taken_as_one_interrupt_while_routes_change(
    backend: Backend, open_guest: Callable[..., Guest], mode: Mode
) -> None:
    guest = open_guest(vps=VPS, preload=mode == "loaded")
    if not guest.counted:
        pytest.skip("the root scheduler may show several interrupts as one: run the core scheduler")
    # With so many routes a partition of KVM moves them, although it does not quiesce its pushes.
    others = [guest.partition.new_irqfd_route() for _ in range(MANY if mode == "loaded" else 0)]
    scene = Scene(guest)
    stop, errors = threading.Event(), list[BaseException]()

    def change() -> None:
        try:
            while not stop.is_set():
                scene.change()
            scene.unmask_all()
        except BaseException as error:
            errors.append(error)

    changer = threading.Thread(target=change)
    figures = scene.figures

    def enough() -> bool:
        least = min(figures.retargets, figures.masks, figures.batches, figures.overlapped)
        return figures.interrupts >= TAKEN and least >= FEWEST

    with counting(guest.partition) as counted:
        changer.start()
        try:
            while not (enough() or figures.problems or errors):
                scene.round()
        finally:
            stop.set()
            changer.join()
    scene.account(guest.arrived())
    sys.stdout.write(f"{backend}: {figures}; {counted.stats.pushes} pushes, {counted.stats.hits} hits\n")
    assert errors == []
    assert figures.problems == []
    assert (counted.stats.hits > 0) == (mode == "loaded")
    assert figures.interrupts == figures.signals + figures.repeated
    # At rest each signal is one interrupt.
    for one in scene.routes:
        one.signal()
    guest.receives(*(one.had[-1] for one in scene.routes))
    scene.close()
    for other in others:
        other.close()
