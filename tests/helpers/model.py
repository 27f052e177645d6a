"""The model of a partition and its routes: their documented behaviour in plain Python.

It knows no ioctl and no order of calls. Where several outcomes are right (a signal that overlaps an arming, a rollback
that fails too) it lists them, and continues from the one that the partition shows.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from mshv_irqfd import MsiRoute


@dataclass(eq=False)
class Event:
    """An eventfd. `pending` is None while it is unknown: a broken irqfd may or may not have taken the signal."""

    pending: bool | None = False
    full: bool = False
    """Whether its counter is full, so that a plain write would block."""

    def drained(self) -> None:
        self.pending = self.full = False


@dataclass(eq=False)
class Route:
    """An open route, or a closed one whose irqfd could not be disarmed."""

    gsi: int
    event: Event
    masked: bool = False
    msi: MsiRoute | None = None
    waits_to_be_rearmed: bool = False
    """Whether it is waiting to be re-armed."""
    broken: bool = False
    asked: set[MsiRoute] = field(default_factory=set)
    """All MSIs that were ever set: a broken route may raise any of them."""
    place: int = 0
    """The GSI where it is armed, or was armed last: its own or a spare one. Its entry there stays meanwhile."""

    def __post_init__(self) -> None:
        self.place = self.gsi

    @property
    def wanted(self) -> MsiRoute | None:
        """The MSI with which it should be armed."""
        return None if self.masked or self.broken else self.msi

    @property
    def armed(self) -> bool:
        return self.wanted is not None and not self.waits_to_be_rearmed


class Change(NamedTuple):
    """The mask, the MSI and the eventfd that a call gives a route."""

    route: Route
    masked: bool
    msi: MsiRoute | None
    event: Event | None = None
    """The eventfd, if the call names one."""

    @property
    def swaps(self) -> bool:
        """Whether the route gets another eventfd."""
        return self.event is not None and self.event is not self.route.event

    @property
    def wanted(self) -> MsiRoute | None:
        return None if self.masked else self.msi

    @property
    def needed(self) -> bool:
        """Whether the change does anything: it alters the route, or arms one that is waiting to be re-armed."""
        altered = (self.masked, self.msi) != (self.route.masked, self.route.msi)
        return altered or self.swaps or self.route.waits_to_be_rearmed


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


class Shown(NamedTuple):
    """What a partition shows after a call that succeeded, as far as several outcomes are right."""

    pushes: int
    """The number of pushes that the call made."""
    table: dict[int, MsiRoute]
    places: dict[Route, int | None]
    hits: int
    misses: int
    loaded: int


class Spares(NamedTuple):
    """How a partition may use spare GSIs."""

    gsis: Container[int] = ()
    in_place: bool = False
    """Whether a push may change the entries of armed routes in place of moves that would need none."""
    brings_home: bool = False
    """Whether a push may bring routes home."""
    loads_after: float = 0
    """The number of pushes after which they may load messages; infinite if they never do."""
    fit: bool = True
    """Whether all messages fit that are likely next."""


class Partition:
    """The expected state of a partition."""

    def __init__(
        self, gsis: Iterable[int], vps: Iterable[int], keep: dict[int, MsiRoute], spares: Spares, *, any_vp: bool
    ) -> None:
        self.vps = set(vps)
        self.any_vp = any_vp
        """Whether destinations go unchecked."""
        self.keep = keep
        self.spares = spares
        self.asked: set[MsiRoute] = set()
        """All MSIs that were ever set on any route."""
        self.refused = False
        """Whether the kernel refused the latest push."""
        self.free = set(gsis)
        self.broken: dict[int, set[MsiRoute]] = {}
        """The quarantined GSIs, and the MSIs that they may still raise."""
        self.routes: dict[int, Route] = {}
        self.stuck: list[Route] = []
        """Closed routes whose irqfds may still be registered."""
        self.entries: dict[int, MsiRoute] = {}
        """The table that the next push gives the kernel."""
        self.table: dict[int, MsiRoute] = {}
        """The kernel's table."""
        self.pushes = 0
        self.due: defaultdict[int, Due] = defaultdict(Due)

    # Interrupts

    def signal(self, event: Event) -> None:
        """A signal that overlaps no call."""
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
        """A signal that overlapped a change: it is delivered once or twice, or it is pending."""
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
        """Delivers one interrupt for all that is pending."""
        route.waits_to_be_rearmed = False
        if route.event.pending is not False:
            self.due[route.gsi].add(route.msi, int(route.event.pending is True), 1)
        route.event.drained()

    def _swap(self, changes: list[Change]) -> list[tuple[Route, Event]]:
        """Gives routes their new eventfds, and returns the old ones that go to no other route."""
        swaps = [(change.route, change.route.event, change.event) for change in changes if change.swaps]
        moved = {id(new) for _, _, new in swaps}
        for route, _, new in swaps:
            assert new is not None
            route.event = new
        return [(route, old) for route, old, _ in swaps if id(old) not in moved]

    def _carry(self, route: Route, old: Event) -> None:
        """Carries what the old eventfd of a route holds over to the new one."""
        new = route.event
        if old.pending is False:
            return
        if route.armed:
            self.due[route.gsi].add(route.msi, int(old.pending is True), 1)
        elif old.pending:
            new.full = new.full or (old.full and new.pending is False)
            new.pending = True
        elif not new.pending:
            new.pending = None
        old.drained()

    # Changes

    def lacks_vp(self, changes: list[Change]) -> bool:
        wanted = [change.wanted for change in changes if change.needed and change.wanted is not None]
        return not self.any_vp and any(not msi.logical and msi.destination not in self.vps for msi in wanted)

    def open_route(self, event: Event) -> Route:
        """The lowest GSI that is free."""
        gsi = min(self.free)
        self.free.remove(gsi)
        self.routes[gsi] = Route(gsi, event)
        return self.routes[gsi]

    def loaded(self) -> dict[int, MsiRoute]:
        """The spare entries of the kernel's table."""
        return {gsi: msi for gsi, msi in self.table.items() if gsi in self.spares.gsis}

    def succeed(self, changes: list[Change], failures: int, shown: Shown) -> None:
        """Makes all changes, with one push if the kernel's table lacks one of their messages."""
        changes = [change for change in changes if change.needed]
        loaded = self.loaded()
        needy = [one for one in changes if one.wanted and one.wanted != self.table.get(one.route.place)]
        missing = [
            one for one in needy if one.wanted != self.table.get(one.route.gsi) and one.wanted not in loaded.values()
        ]
        at_home = [one for one in needy if one.route.place == one.route.gsi or self.spares.loads_after]
        moves = [one for one in at_home if one.route.armed and one not in missing]
        assert shown.pushes in ({1} if missing else {0, 1} if moves and self.spares.in_place else {0})
        assert (shown.hits, shown.misses) == (len(needy) - len(missing), len(missing))
        newly = [one.route for one in changes if one.wanted and (one.swaps or not one.route.armed)]
        carried = self._swap(changes)
        for route, masked, msi, _ in changes:
            route.masked, route.msi = masked, msi
            if route.wanted:
                place = shown.places[route]
                assert place == route.gsi or place in self.spares.gsis, f"{route} is armed at GSI {place}"
                route.place = place or 0
                if place == route.gsi:
                    self.entries[route.gsi] = route.wanted
            elif msi is None:
                self.entries.pop(route.gsi, None)
                route.place = route.gsi
            if not route.wanted:
                route.waits_to_be_rearmed = False
        if shown.pushes:
            self.bring_home({one.route for one in changes}, shown)
            self._push(shown, [one.route for one in missing])
            waiting = [route for route in self.routes.values() if route.waits_to_be_rearmed and route not in newly]
            # The call did not ask to arm these, so a failure to arm them does not fail the call.
            newly += [] if failures else waiting
            for route in waiting if failures else ():
                self._maybe_armed(route, route.msi)
        for route in newly:
            self._arm(route)
        for route, old in carried:
            self._carry(route, old)

    def bring_home(self, changed: set[Route], shown: Shown) -> None:
        """A quiesced push may give all routes at spare GSIs places at their own, but those that are changed."""
        away = [
            route
            for route in self.routes.values()
            if route.place != route.gsi and route not in changed and not route.broken
        ]
        home = [(route, self.table[route.place]) for route in away]
        # The place of a route that is not armed shows in its own entry alone.
        if self.spares.brings_home and any(
            shown.places[route] == route.gsi
            if route.armed
            else shown.table.get(route.gsi) == msi != self.entries.get(route.gsi)
            for route, msi in home
        ):
            for route, msi in home:
                self.entries[route.gsi], route.place = msi, route.gsi

    def _push(self, shown: Shown, missed: list[Route]) -> None:
        """Takes over the spare entries that a push has brought. The others are known."""
        before, seen = self.loaded(), {gsi: msi for gsi, msi in shown.table.items() if gsi in self.spares.gsis}
        self.check_spare_entries(seen)
        new = {gsi for gsi, msi in seen.items() if before.get(gsi) != msi}
        placed = {route.place for route in missed} & seen.keys()
        assert shown.loaded == len(new - placed)
        assert shown.loaded == 0 or (self.pushes >= self.spares.loads_after and not self.refused)
        if self.spares.loads_after == 0 and self.spares.fit and not self.refused and not self.any_vp:
            for msi in (route.msi for route in missed if route.msi and not route.msi.logical):
                likely = {
                    type(msi)(msi.address & ~0xFF000 | vp << 12, msi.data & ~0xFF | vector)
                    for vp in self.vps
                    for vector in range(16, 256)
                }
                assert likely <= set(seen.values()), f"a push for {msi} left out messages that are likely next"
        self.table = self.entries | seen
        self.pushes += 1
        self.refused = False

    def check_spare_entries(self, seen: dict[int, MsiRoute]) -> None:
        """Each spare entry is for a VP, or for a destination that a route has asked for, and none is there twice."""
        asked = {(msi.logical, msi.destination) for msi in self.asked}
        for gsi, msi in seen.items():
            has_vp = not msi.logical and msi.destination in self.vps
            assert has_vp or (msi.logical, msi.destination) in asked, f"GSI {gsi} has {msi}, for no VP"
            assert msi in self.asked or has_vp or msi.logical or self.any_vp, f"GSI {gsi} has {msi}, for no VP"
        assert len(set(seen.values())) == len(seen), "a message is at two spare GSIs"

    def fail(self, changes: list[Change]) -> None:
        """Changes nothing; interrupts delivered before the failure stand."""
        for change in changes:
            if change.swaps and change.event and change.wanted:
                # It may have become an interrupt of this route, whosever eventfd it is.
                if change.event.pending is not False:
                    self.due[change.route.gsi].add(change.wanted, 0, 1)
                    change.event.pending = None
            elif change.needed and change.wanted and not change.route.armed:
                self._maybe_armed(change.route, change.wanted)

    def _maybe_armed(self, route: Route, msi: MsiRoute | None) -> None:
        if route.event.pending is not False:
            due = self.due[route.gsi]
            due.add(msi, 0, 1)
            due.or_pending = due.or_pending or route.event.pending is True
            route.event.pending = None

    def close(self, route: Route, *, failed: bool) -> None:
        """Closes a route. If it could not be disarmed, its irqfd may stay registered."""
        del self.routes[route.gsi]
        if failed:
            self.give_up(route)
            self.stuck.append(route)
            return
        if route.gsi not in self.broken:
            self.free.add(route.gsi)
            self.entries.pop(route.gsi, None)

    def give_up(self, route: Route) -> None:
        """Breaks a route, whose GSI is quarantined."""
        route.broken = True
        self.broken[route.gsi] = route.asked
