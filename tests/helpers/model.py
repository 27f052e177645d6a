"""What must hold of a partition and its routes, as a program: what is said of them, and of them alone, in plain Python.

It knows no ioctl and no order of calls. Where several outcomes are right (a signal that overlaps an arming, a failure
whose way back failed too) it says which, and takes over the one that came about.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mshv_irqfd import MsiRoute


@dataclass(eq=False)
class Event:
    """An eventfd. `pending` is None while it can't be known: a broken irqfd may or may not have taken the signal."""

    pending: bool | None = False
    full: bool = False
    """Whether its counter was filled to the brim, so that a plain write would wait."""

    def drained(self) -> None:
        self.pending = self.full = False


@dataclass(eq=False)
class Route:
    """A route that is open, or one whose irqfd could not be taken away when it was closed."""

    gsi: int
    event: Event
    masked: bool = False
    msi: MsiRoute | None = None
    lapsed: bool = False
    """Whether it should be armed and could not be armed again after a failure."""
    broken: bool = False
    asked: set[MsiRoute] = field(default_factory=set)
    """All MSIs that it was ever asked to have: a broken one may be on any of them."""

    @property
    def wanted(self) -> MsiRoute | None:
        """The MSI with which it should be armed."""
        return None if self.masked or self.broken else self.msi

    @property
    def armed(self) -> bool:
        return self.wanted is not None and not self.lapsed


class Change(NamedTuple):
    """What is asked of a route: the whole of what it should be afterwards."""

    route: Route
    masked: bool
    msi: MsiRoute | None

    @property
    def wanted(self) -> MsiRoute | None:
        return None if self.masked else self.msi

    @property
    def needed(self) -> bool:
        """Whether anything is to be done. What is set already is not, unless it should be armed and is not."""
        return (self.masked, self.msi) != (self.route.masked, self.route.msi) or self.route.lapsed


@dataclass
class Due:
    """The interrupts that one GSI is due: how many at least, how many at most, and of which MSIs."""

    least: int = 0
    most: int = 0
    msis: set[MsiRoute] = field(default_factory=set)
    or_pending: bool = False
    """Whether the signal must be in the eventfd if it did not become an interrupt."""

    def add(self, msi: MsiRoute | None, least: int, most: int) -> None:
        assert msi is not None
        self.least += least
        self.most += most
        self.msis.add(msi)


class Partition:
    """A partition as it should be."""

    def __init__(self, gsis: Iterable[int], vps: Iterable[int], keep: dict[int, MsiRoute], *, any_vp: bool) -> None:
        self.vps = set(vps)
        self.any_vp = any_vp
        """Whether nobody asks if there is a VP."""
        self.keep = keep
        self.free = set(gsis)
        self.broken: dict[int, set[MsiRoute]] = {}
        """The GSIs that are never handed out again, and what may come from them."""
        self.routes: dict[int, Route] = {}
        self.stuck: list[Route] = []
        """Closed routes whose irqfds may still be there."""
        self.entries: dict[int, MsiRoute] = {}
        """The table that the next push makes the kernel's."""
        self.table: dict[int, MsiRoute] = {}
        """The kernel's table."""
        self.pushes = 0
        self.due: defaultdict[int, Due] = defaultdict(Due)

    # What arrives

    def signal(self, event: Event) -> None:
        """A signal that overlaps nothing."""
        for route in (*self.routes.values(), *self.stuck):
            if route.event is event:
                self._signal(route)
                return
        event.pending = True

    def _signal(self, route: Route) -> None:
        if route.broken:
            for msi in route.asked:
                self.due[route.gsi].add(msi, 0, 1)
            route.event.pending = None
        elif route.armed:
            self.due[route.gsi].add(route.msi, 1, 1)
        else:
            route.event.pending = True

    def overlap(self, route: Route, before: MsiRoute | None, during: MsiRoute | None) -> None:
        """A signal at some moment of a change that is over by now: it comes once or twice, or it is pending."""
        due = self.due[route.gsi]
        due.msis |= {msi for msi in (before, during, route.msi) if msi is not None}
        due.most += 2
        if route.broken:
            due.msis |= route.asked
            route.event.pending = None
        elif route.armed:
            due.least = max(due.least, 1)
        elif not route.event.pending:
            route.event.pending, due.or_pending = None, True

    def _arm(self, route: Route) -> None:
        """One interrupt for all that is pending."""
        route.lapsed = False
        if route.event.pending is not False:
            self.due[route.gsi].add(route.msi, int(route.event.pending is True), 1)
        route.event.drained()

    # What is asked

    def lacks_vp(self, changes: list[Change]) -> bool:
        wanted = [change.wanted for change in changes if change.needed and change.wanted is not None]
        return not self.any_vp and any(not msi.logical and msi.destination not in self.vps for msi in wanted)

    def open_route(self, event: Event) -> Route:
        """The lowest GSI that is free."""
        gsi = min(self.free)
        self.free.remove(gsi)
        self.routes[gsi] = Route(gsi, event)
        return self.routes[gsi]

    def succeed(self, changes: list[Change], failures: int) -> None:
        """All changes are made, with one push at the most."""
        changes = [change for change in changes if change.needed]
        push = any(change.wanted and change.wanted != self.table.get(change.route.gsi) for change in changes)
        newly = [change.route for change in changes if change.wanted and not change.route.armed]
        for route, masked, msi in changes:
            route.masked, route.msi = masked, msi
            if route.wanted:
                self.entries[route.gsi] = route.wanted
            elif msi is None:
                self.entries.pop(route.gsi, None)
            if not route.wanted:
                route.lapsed = False
        if push:
            self.table = dict(self.entries)
            self.pushes += 1
            lapsed = [route for route in self.routes.values() if route.lapsed and route not in newly]
            # Not what was asked for, so a failure to arm these fails nothing.
            newly += [] if failures else lapsed
            for route in lapsed if failures else ():
                self._maybe_armed(route, route.msi)
        for route in newly:
            self._arm(route)

    def fail(self, changes: list[Change]) -> None:
        """Nothing has changed, but what was delivered on the way stands."""
        for change in changes:
            if change.needed and change.wanted and not change.route.armed:
                self._maybe_armed(change.route, change.wanted)

    def _maybe_armed(self, route: Route, msi: MsiRoute | None) -> None:
        if route.event.pending is not False:
            due = self.due[route.gsi]
            due.add(msi, 0, 1)
            due.or_pending = due.or_pending or route.event.pending is True
            route.event.pending = None

    def close(self, route: Route, *, failed: bool) -> None:
        """Disarmed, and its entry leaves with the next push. If it could not be disarmed, it may still be there."""
        del self.routes[route.gsi]
        if failed:
            self.give_up(route)
            self.stuck.append(route)
            return
        if route.gsi not in self.broken:
            self.free.add(route.gsi)
            self.entries.pop(route.gsi, None)

    def give_up(self, route: Route) -> None:
        """Its GSI is never handed out again."""
        route.broken = True
        self.broken[route.gsi] = route.asked
