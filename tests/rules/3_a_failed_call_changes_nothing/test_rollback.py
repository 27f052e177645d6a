"""Rule 3: failed calls change nothing. Each call into the kernel fails in turn, and so does each call of a rollback."""

from __future__ import annotations

import errno
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, cycle, product
from typing import TYPE_CHECKING

import pytest
from faults import CALLS, Faults, tried
from modes import in_both_modes
from mshv_irqfd import (
    ClosedError,
    GsiState,
    IrqFdError,
    IrqFdRoute,
    MsiRoute,
    Partition,
    RouteBrokenError,
    RoutingError,
)
from mshv_irqfd.testing import SimulatedCall, until
from support import MANY, counting, msi, places, rare, unique

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Backend, Guest


Intents = list[tuple[GsiState, bool, MsiRoute | None, bool]]


@dataclass(frozen=True)
class Mode:
    """How a partition uses its spare GSIs, and whether its pushes are quiesced."""

    quiesce: bool | None = None
    """None: as the backend does by default."""
    spare: int = 0
    """The number of spare GSIs."""
    misses: bool = True
    """Whether the operations set messages that the kernel's table lacks."""


SOME = 32
MODES = {
    "quiesced": Mode(quiesce=True),
    "unquiesced": Mode(quiesce=False),
    "hit": Mode(spare=SOME, misses=False),
    "miss": Mode(spare=SOME),
    # One message gets the spare GSI. The others have their routes' own entries changed.
    "one-spare": Mode(spare=1),
}


def gsis(backend: Backend, spare: int) -> range:
    """The GSIs to hand out, so that a number of spare ones is left."""
    # 40 entries are pins of KVM, which hands out GSIs from 24 up as the others do here.
    most = 4096 - (40 if backend.name == "kvm" else 24)
    return range(24, 24 + most - spare) if spare else range(24, 48)


@dataclass
class Setting:
    """Two armed routes, one masked, one without an MSI; a signal is pending on each of the latter two."""

    guest: Guest
    faults: Faults
    mode: Mode
    routes: list[IrqFdRoute] = field(default_factory=list)
    asked: list[set[MsiRoute]] = field(default_factory=list)
    """The MSIs that the test ever sets on each route: it may raise no others."""
    waiting: list[bool] = field(default_factory=list)
    others: list[IrqFdRoute] = field(default_factory=list)
    """Routes that stay unrouted. With so many a partition of KVM loads and moves, although it pushes unquiesced."""

    def target(self, number: int) -> MsiRoute:
        """The message that an operation sets on a route: one that pushes have loaded, or one that they have not."""
        message = rare if self.mode.spare == SOME and self.mode.misses and number != 2 else msi
        return message(0x51 + number)

    @property
    def partition(self) -> Partition:
        return self.guest.partition

    def fail(self, call: SimulatedCall, number: int, *, after: int, times: int = 1) -> None:
        self.faults.fail(self.partition, call, number, after=after, times=times)

    def try_to(self, operation: Callable[[Setting], object]) -> RoutingError | IrqFdError | None:
        """Runs an operation with the faults in force, and returns its error, if any."""
        try:
            self.faults.run(lambda: operation(self))
        except (RoutingError, IrqFdError) as error:
            return error
        return None

    def close(self) -> None:
        # A fault that is left strikes here.
        with suppress(IrqFdError):
            self.partition.close()
        self.guest.stop()


@pytest.fixture
def setting(backend: Backend, faults: Faults) -> Callable[..., Setting]:
    return partial(set_up, backend, faults)


def set_up(backend: Backend, faults: Faults, mode: Mode) -> Setting:
    faults.clear()
    partition = backend.open(gsis=gsis(backend, mode.spare), quiesce=mode.quiesce, preload=mode.spare > 0)
    it = Setting(backend.guest(partition), faults, mode)
    it.routes = [partition.new_irqfd_route() for _ in range(4)]
    if mode.spare and not backend.loads(quiesce=mode.quiesce):
        it.others = [partition.new_irqfd_route() for _ in range(MANY)]
    it.routes[0].set_msi(msi(0x41))
    it.routes[1].set_msi(msi(0x42))
    it.routes[2].set_msi(msi(0x43))
    it.routes[2].mask()
    it.asked = [{msi(0x41 + number), it.target(number)} for number in range(4)]
    for route in it.routes[2:]:
        route.signal()
    it.waiting = [False, False, True, True]
    return it


def batch_of_all_kinds(it: Setting) -> None:
    with it.partition.batch() as batch:
        batch.set_msi(it.routes[0], it.target(0))
        batch.mask(it.routes[1])
        batch.unmask(it.routes[2])
        batch.set_msi(it.routes[3], it.target(3))


def batch_that_moves_all(it: Setting) -> None:
    with it.partition.batch() as batch:
        for number, route in enumerate(it.routes):
            batch.set_msi(route, it.target(number))
            batch.unmask(route)


def batch_that_silences_all(it: Setting) -> None:
    with it.partition.batch() as batch:
        batch.mask(it.routes[0])
        batch.clear_msi(it.routes[1])
        batch.clear_msi(it.routes[2])


def batch_that_clears_and_moves(it: Setting) -> None:
    with it.partition.batch() as batch:
        batch.clear_msi(it.routes[0])
        batch.set_msi(it.routes[1], it.target(1))
        batch.clear_msi(it.routes[2])


def batch_that_exchanges_events(it: Setting) -> None:
    with it.partition.batch() as batch:
        batch.set_event(it.routes[0], it.routes[1])
        batch.set_event(it.routes[1], it.routes[0])
        batch.set_msi(it.routes[3], it.target(3))


def batch_that_moves_an_event(it: Setting) -> None:
    with it.partition.batch() as batch:
        batch.set_event(it.routes[3], it.routes[0])
        batch.set_event(it.routes[0], None)
        batch.set_msi(it.routes[3], it.target(3))


OPERATIONS: dict[str, Callable[[Setting], object]] = {
    "set-a-new-msi": lambda it: it.routes[3].set_msi(it.target(3)),
    "retarget": lambda it: it.routes[0].set_msi(it.target(0)),
    "unmask": lambda it: it.routes[2].unmask(),
    "mask": lambda it: it.routes[0].mask(),
    "clear": lambda it: it.routes[1].clear_msi(),
    "batch-of-all-kinds": batch_of_all_kinds,
    "batch-that-moves-all": batch_that_moves_all,
    "batch-that-silences-all": batch_that_silences_all,
    "batch-that-clears-and-moves": batch_that_clears_and_moves,
    "set-event": lambda it: it.routes[0].set_event(None),
    "batch-that-exchanges-events": batch_that_exchanges_events,
    "batch-that-moves-an-event": batch_that_moves_an_event,
}
SETS_NO_MESSAGE = {"unmask", "mask", "clear", "batch-that-silences-all", "set-event"}

in_all_modes = pytest.mark.parametrize(
    ("mode", "operation"),
    [
        pytest.param(mode, OPERATIONS[name], id=f"{how}-{name}")
        for (how, mode), name in product(MODES.items(), OPERATIONS)
        # An operation that sets no message makes the same calls with spare GSIs, whatever the others would miss.
        if not (mode.spare and mode.misses and name in SETS_NO_MESSAGE)
    ],
)


def intents(it: Setting) -> Intents:
    return [(route.state, route.masked, route.msi, route.armed) for route in it.routes]


def places_of_the_armed(it: Setting) -> list[int | None]:
    return [route.armed_gsi for route in it.routes]


def check_that_armed_is_routed(it: Setting) -> None:
    assert places(it.partition, it.routes) == {route.gsi: route.msi for route in it.routes if route.armed}


def check_that_nothing_is_lost_or_bogus(it: Setting) -> None:
    """A pending signal is still pending, or has arrived once as an MSI that was set on its route."""
    arrived = Counter[int]()

    def accounted_for() -> bool:
        # KVM injects pending signals from a work item, and a broken irqfd can't be disarmed to flush it.
        arrived.update(interrupt.vector for interrupt in it.guest.arrived())
        told = zip(it.routes, it.asked, it.waiting, strict=True)
        return all(route.pending + sum(arrived[one.vector] for one in asked) >= count for route, asked, count in told)

    until(accounted_for, "each pending signal has arrived or is still pending")
    for route, asked, waiting in zip(it.routes, it.asked, it.waiting, strict=True):
        mine = sum(arrived.pop(one.vector, 0) for one in asked)
        assert mine + route.pending == waiting
    assert not arrived, "bogus interrupts arrived"
    it.waiting = [route.pending for route in it.routes]


def check_that_armed_routes_deliver(it: Setting) -> None:
    for route in it.routes:
        if route.state is not GsiState.BROKEN:
            route.consume_pending()
        if route.armed:
            assert route.msi is not None
            route.signal()
            it.guest.receives(route.msi)
        elif route.state is GsiState.DISABLED:
            route.signal()
            it.guest.receives_nothing()
            assert route.consume_pending()


def undisturbed(operation: Callable[[Setting], object], it: Setting) -> tuple[dict[SimulatedCall, int], Intents]:
    """The number of calls of each kind that an operation makes without faults, and the state after it."""
    before = it.partition.stats()
    operation(it)
    after, wanted = it.partition.stats(), intents(it)
    it.close()
    return {
        "set_msi_routing": after.pushes - before.pushes,
        "assign_irqfd": after.arms - before.arms,
        "deassign_irqfd": after.disarms - before.disarms,
    }, wanted


@in_all_modes
@pytest.mark.parametrize("call", CALLS)
def test_if_any_call_fails_everything_is_as_before_and_works_afterwards(
    backend: Backend,
    setting: Callable[..., Setting],
    mode: Mode,
    operation: Callable[[Setting], object],
    call: SimulatedCall,
) -> None:
    calls, wanted = undisturbed(operation, setting(mode))
    for k in count():
        it = setting(mode)
        before, at = intents(it), places_of_the_armed(it)
        filenos = [route.fileno() for route in it.routes]
        it.fail(call, errno.ENOMEM, after=k)
        failed = it.try_to(operation)
        if failed is None:
            assert k == calls[call], "each call of this kind must fail once"
            it.close()
            return
        tried[backend.name, "one call fails"] += 1
        assert type(failed) is (RoutingError if call == "set_msi_routing" else IrqFdError)
        assert failed.errno == errno.ENOMEM
        assert it.partition.stats().failures == 1
        assert intents(it) == before
        assert places_of_the_armed(it) == at
        assert [route.fileno() for route in it.routes] == filenos
        check_that_armed_is_routed(it)
        check_that_nothing_is_lost_or_bogus(it)
        check_that_armed_routes_deliver(it)
        operation(it)
        assert intents(it) == wanted
        check_that_armed_is_routed(it)
        check_that_armed_routes_deliver(it)
        it.close()


MISSES = {
    "set-a-new-msi": (1, 3, 2),
    "retarget": (1, 2, 2),
    "unmask": (0, 1, 0),
    "mask": (0, 0, 1),
    "clear": (0, 0, 1),
    "batch-of-all-kinds": (1, 3, 2),
    "batch-that-moves-all": (1, 4, 2),
    "batch-that-silences-all": (0, 0, 2),
    "batch-that-clears-and-moves": (1, 1, 2),
    "set-event": (0, 1, 1),
    "batch-that-exchanges-events": (1, 3, 2),
    "batch-that-moves-an-event": (1, 3, 2),
}
"""The numbers of pushes, armings and disarmings of each operation, if pushes are quiesced."""

HITS = MISSES | {
    "set-a-new-msi": (0, 1, 0),
    "retarget": (0, 1, 1),
    "batch-of-all-kinds": (0, 3, 2),
    "batch-that-moves-all": (0, 4, 2),
    "batch-that-clears-and-moves": (0, 1, 2),
    "batch-that-exchanges-events": (0, 3, 2),
    "batch-that-moves-an-event": (0, 2, 1),
}


@pytest.mark.parametrize(
    ("mode", "expected"), [("quiesced", MISSES), ("hit", HITS), ("miss", MISSES), ("one-spare", MISSES)]
)
def test_the_operations_make_calls_of_each_kind(
    setting: Callable[..., Setting], mode: str, expected: dict[str, tuple[int, int, int]]
) -> None:
    counts = {
        name: tuple(undisturbed(operation, setting(replace(MODES[mode], quiesce=True)))[0].values())
        for name, operation in OPERATIONS.items()
    }
    assert counts == expected


@in_all_modes
@pytest.mark.parametrize("times", [1, 9], ids=["once-more", "for-long"])
def test_if_the_rollback_fails_too_only_broken_routes_are_lost(
    backend: Backend,
    setting: Callable[..., Setting],
    mode: Mode,
    operation: Callable[[Setting], object],
    times: int,
) -> None:
    calls, _ = undisturbed(operation, setting(mode))
    for first, second in product(CALLS, CALLS):
        for k in range(calls[first]):
            for j in count():
                it = setting(mode)
                it.fail(first, errno.ENOMEM, after=k)
                it.fail(second, errno.EIO, after=j, times=times)
                failed = it.try_to(operation)
                assert failed is not None
                struck = it.partition.stats().failures
                check_that_nothing_but_broken_routes_is_lost(it)
                if failed.errno == errno.ENOMEM and struck == 1:
                    # The rollback has no further call of the second kind: each has failed once.
                    break
                tried[backend.name, "the rollback fails too"] += struck > 1


def check_that_nothing_but_broken_routes_is_lost(it: Setting) -> None:
    check_that_armed_is_routed(it)
    check_that_nothing_is_lost_or_bogus(it)
    broken = [route for route in it.routes if route.state is GsiState.BROKEN]
    check_that_the_broken_refuse(broken)
    gone = {route.gsi for route in broken} | let_all_faults_strike(it)
    assert [route for route in it.routes if route.state is GsiState.BROKEN] == broken
    for route in it.routes:
        if route not in broken:
            # Arms a route that is waiting to be re-armed, as the error's message says.
            arm_again(route, broken)
            assert route.armed == (route.msi is not None)
    check_that_armed_is_routed(it)
    check_that_nothing_is_lost_or_bogus(it)
    check_that_armed_routes_deliver(it)
    for route in it.routes:
        route.close()
    check_that_all_but(gone, it)
    it.close()


def arm_again(route: IrqFdRoute, broken: list[IrqFdRoute]) -> None:
    """Unmasks a route, which gets a new eventfd if a broken route that its own was to move to keeps that armed."""
    if broken and route.msi and not route.armed and not route.masked:
        with suppress(IrqFdError):
            route.unmask()
        if not route.armed:
            route.set_event(None)
    route.unmask()


def check_that_the_broken_refuse(broken: list[IrqFdRoute]) -> None:
    for route in broken:
        assert not route.armed
        for use in (
            route.mask,
            route.unmask,
            route.clear_msi,
            partial(route.set_msi, msi(0x61)),
            partial(route.set_event, None),
        ):
            with pytest.raises(RouteBrokenError, match=str(route.gsi)):
                use()


def let_all_faults_strike(it: Setting) -> set[int]:
    """Uses up the faults that are left, on new routes and messages. Returns the GSIs of the routes that it broke."""
    broken: set[int] = set()
    clean = 0
    numbers = cycle(range(0x100))
    # A fault lets a few calls through at most, and each clean round makes one of each kind.
    while clean < 6:
        route = it.partition.new_irqfd_route()
        uses = (partial(route.set_msi, unique(next(numbers))), route.mask, route.unmask, route.close)
        clean += 1
        for use in uses:
            try:
                it.faults.run(use)
            except (RoutingError, IrqFdError, RouteBrokenError):
                clean = 0
        if it.partition.gsi_state(route.gsi) is GsiState.BROKEN:
            broken.add(route.gsi)
    return broken


def check_that_all_but(gone: set[int], it: Setting) -> None:
    """All GSIs but the quarantined ones are handed out, lowest first, and work."""
    taken = gone | {route.gsi for route in it.others}
    gsis = [gsi for gsi in it.partition.gsis if gsi not in taken][: len(gone) + 3]
    routes = [it.partition.new_irqfd_route() for _ in gsis]
    assert [route.gsi for route in routes] == gsis
    assert all(it.partition.gsi_state(gsi) is GsiState.BROKEN for gsi in gone)
    for route in (routes[0], routes[-1]):
        route.set_msi(msi(0x21))
        route.signal()
        it.guest.receives(msi(0x21))
    for route in routes:
        route.close()


@pytest.mark.parametrize("preload", [False, True])
def test_a_route_that_a_rollback_can_not_disarm_is_broken(
    open_guest: Callable[..., Guest], faults: Faults, preload: bool
) -> None:
    guest = open_guest(quiesce=False, preload=preload)
    first, second, other = (guest.partition.new_irqfd_route() for _ in range(3))
    other.set_msi(msi(0x43))
    faults.fail(guest.partition, "assign_irqfd", errno.EMFILE, after=1)
    faults.fail(guest.partition, "deassign_irqfd", errno.EIO)
    batch = guest.partition.batch()
    batch.set_msi(first, msi(0x41))
    batch.set_msi(second, msi(0x42))
    with pytest.raises(IrqFdError, match="left broken: GSI 24"):
        faults.run(batch.commit)
    assert first.state is guest.partition.gsi_state(24) is GsiState.BROKEN
    assert (second.state, second.msi) == (GsiState.DISABLED, None)
    check_that_the_broken_refuse([first])
    second.set_msi(msi(0x44))
    second.signal()
    other.signal()
    guest.receives(msi(0x44), msi(0x43))
    disarms = guest.partition.stats().disarms
    first.close()
    assert guest.partition.stats().disarms == disarms + 1, "close() must retry the disarming"
    assert guest.partition.gsi_state(24) is GsiState.BROKEN
    with guest.partition.new_irqfd_route() as new:
        assert new.gsi == 27
    second.close()
    other.close()


def test_a_route_left_armed_on_a_stale_entry_is_broken_and_disarmed(
    open_guest: Callable[..., Guest], faults: Faults
) -> None:
    guest = open_guest(quiesce=False, preload=False)
    moved, new = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    moved.set_msi(msi(0x41))
    faults.fail(guest.partition, "assign_irqfd", errno.ENOMEM)
    faults.fail(guest.partition, "set_msi_routing", errno.ENOMEM, after=1)
    batch = guest.partition.batch()
    batch.set_msi(moved, msi(0x51))
    batch.set_msi(new, msi(0x52))
    with pytest.raises(IrqFdError, match="left broken: GSI 24"):
        faults.run(batch.commit)
    assert moved.state is GsiState.BROKEN
    moved.signal()
    guest.receives_nothing()
    new.set_msi(msi(0x53))
    new.signal()
    guest.receives(msi(0x53))
    moved.close()
    new.close()


def test_a_move_that_fails_ends_where_it_began(loaded: Guest, faults: Faults) -> None:
    routes = [loaded.partition.new_irqfd_route() for _ in range(3)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
    for route, vector in zip(routes, (0x51, 0x52, 0x53), strict=True):
        before, table = (route.armed_gsi, route.msi), loaded.partition.routing_table()
        faults.fail(loaded.partition, "assign_irqfd", errno.ENOMEM)
        with counting(loaded.partition) as delta, pytest.raises(IrqFdError) as failed:
            faults.run(partial(route.set_msi, msi(vector)))
        assert (failed.value.errno, failed.value.gsi) == (errno.ENOMEM, route.gsi)
        assert (route.armed_gsi, route.msi) == before
        assert loaded.partition.routing_table() == table
        assert (delta.stats.pushes, delta.stats.disarms, delta.stats.arms) == (0, 1, 1)
        assert delta.stats.hits == 0
        route.signal()
        assert route.msi is not None
        loaded.receives(route.msi)
        route.close()


def test_a_move_that_can_not_disarm_changes_nothing(loaded: Guest, faults: Faults) -> None:
    with loaded.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        faults.fail(loaded.partition, "deassign_irqfd", errno.EIO)
        with pytest.raises(IrqFdError):
            faults.run(partial(route.set_msi, msi(0x51)))
        assert (route.armed_gsi, route.msi) == (route.gsi, msi(0x41))
        route.signal()
        loaded.receives(msi(0x41))


def test_a_route_whose_move_can_not_be_undone_waits_to_be_rearmed_where_it_was(loaded: Guest, faults: Faults) -> None:
    route, other = loaded.partition.new_irqfd_route(), loaded.partition.new_irqfd_route()
    other.set_msi(msi(0x41))
    route.set_msi(msi(0x42))
    place = route.armed_gsi
    assert place != route.gsi
    faults.fail(loaded.partition, "assign_irqfd", errno.ENOMEM, times=2)
    with pytest.raises(IrqFdError, match=f"waiting to be re-armed.*GSI {route.gsi}"):
        faults.run(partial(route.set_msi, msi(0x52)))
    assert (route.armed, route.armed_gsi, route.msi) == (False, None, msi(0x42))
    route.signal()
    loaded.receives_nothing()
    # A move of another route makes no push, and so does not try again.
    other.set_msi(msi(0x53))
    assert not route.armed
    with counting(loaded.partition) as delta:
        route.unmask()
    assert (route.armed_gsi, delta.stats.pushes) == (place, 0)
    loaded.receives(msi(0x42))
    route.close()
    other.close()


@pytest.mark.parametrize("k", range(4))
def test_unmask_arms_a_route_that_is_waiting_to_be_rearmed(
    open_guest: Callable[..., Guest], faults: Faults, k: int
) -> None:
    guest = open_guest(quiesce=True, preload=False)
    routes = [guest.partition.new_irqfd_route() for _ in range(4)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
    faults.fail(guest.partition, "set_msi_routing", errno.ENOMEM)
    faults.fail(guest.partition, "assign_irqfd", errno.ENOMEM, after=k)
    with pytest.raises(RoutingError, match="waiting to be re-armed") as failed:
        faults.run(partial(routes[0].set_msi, msi(0x51)))
    [waiting] = [route for route in routes if not route.armed]
    assert str(waiting.gsi) in str(failed.value)
    assert (waiting.state, waiting.masked, waiting.msi) == (GsiState.DISABLED, False, msi(0x41 + waiting.gsi - 24))
    waiting.signal()
    guest.receives_nothing()
    waiting.unmask()
    guest.receives(msi(0x41 + waiting.gsi - 24))
    for route in routes:
        route.close()


@pytest.mark.parametrize("preload", [False, True])
def test_the_next_push_arms_a_route_that_is_waiting_to_be_rearmed(
    open_guest: Callable[..., Guest], faults: Faults, preload: bool
) -> None:
    guest = open_guest(quiesce=True, preload=preload)
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    first.set_msi(msi(0x41))
    faults.fail(guest.partition, "set_msi_routing", errno.ENOMEM)
    faults.fail(guest.partition, "assign_irqfd", errno.ENOMEM)
    with pytest.raises(RoutingError):
        faults.run(partial(second.set_msi, rare(0x42)))
    assert not first.armed
    first.signal()
    second.set_msi(rare(0x42))
    assert first.armed
    guest.receives(msi(0x41))
    first.close()
    second.close()


@in_both_modes
def test_a_failed_push_leaves_the_old_msi_armed(guest: Guest, faults: Faults) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        table = guest.partition.routing_table()
        faults.fail(guest.partition, "set_msi_routing", errno.ENOMEM)
        with pytest.raises(RoutingError):
            faults.run(partial(route.set_msi, rare(0x42)))
        assert (route.msi, route.armed, guest.partition.routing_table()) == (msi(0x41), True, table)
        assert route.armed_gsi == route.gsi
        route.signal()
        guest.receives(msi(0x41))


@in_both_modes
def test_a_failed_mask_leaves_the_route_armed_and_unmasked(guest: Guest, faults: Faults) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        faults.fail(guest.partition, "deassign_irqfd", errno.EIO)
        with pytest.raises(IrqFdError):
            faults.run(route.mask)
        assert (route.armed, route.masked) == (True, False)
        route.signal()
        guest.receives(msi(0x41))


@in_both_modes
def test_a_failed_unmask_leaves_the_signal_pending(guest: Guest, faults: Faults) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.mask()
        route.signal()
        faults.fail(guest.partition, "assign_irqfd", errno.ENOMEM)
        with pytest.raises(IrqFdError):
            faults.run(route.unmask)
        assert (route.armed, route.masked, route.pending) == (False, True, True)
        guest.receives_nothing()
        route.unmask()
        guest.receives(msi(0x41))


@in_both_modes
def test_a_failed_batch_disarms_the_routes_that_it_armed(guest: Guest, faults: Faults) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(2)]
    faults.fail(guest.partition, "assign_irqfd", errno.EIO, after=1)
    batch = guest.partition.batch()
    for route in routes:
        batch.set_msi(route, msi(0x41))
    with pytest.raises(IrqFdError):
        faults.run(batch.commit)
    for route in routes:
        assert route.state is GsiState.DISABLED
        route.signal()
        assert route.pending
    guest.receives_nothing()
    for route in routes:
        route.close()


@in_both_modes
def test_a_failed_batch_forgets_its_changes(guest: Guest, faults: Faults) -> None:
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    faults.fail(guest.partition, "set_msi_routing", errno.ENOMEM)
    batch = guest.partition.batch()
    batch.set_msi(first, msi(0x41))
    batch.mask(second)
    with pytest.raises(RoutingError):
        faults.run(batch.commit)
    assert (first.msi, second.masked) == (None, False)
    with pytest.raises(ClosedError):
        batch.commit()
    first.close()
    second.close()


@in_both_modes
def test_a_route_that_can_not_be_disarmed_still_closes_and_its_gsi_is_quarantined(guest: Guest, faults: Faults) -> None:
    route, other = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    other.set_msi(msi(0x42))
    faults.fail(guest.partition, "deassign_irqfd", errno.EIO)
    with pytest.raises(IrqFdError) as failed:
        faults.run(route.close)
    assert (failed.value.errno, failed.value.gsi) == (errno.EIO, 24)
    assert route.closed
    with pytest.raises(ClosedError):
        route.unmask()
    route.close()
    assert guest.partition.gsi_state(24) is GsiState.BROKEN
    with guest.partition.new_irqfd_route() as new:
        assert new.gsi == 26
        new.set_msi(msi(0x43))
        new.signal()
        other.signal()
        guest.receives(msi(0x42), msi(0x43))
    other.close()


@pytest.mark.parametrize("k", range(4))
def test_closing_a_partition_continues_past_errors_and_raises_at_the_end(
    backend: Backend, faults: Faults, k: int
) -> None:
    partition = backend.open()
    routes = [partition.new_irqfd_route() for _ in range(4)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
    disarms = partition.stats().disarms
    faults.fail(partition, "deassign_irqfd", errno.EIO, after=k)
    with pytest.raises(IrqFdError) as failed:
        faults.run(partition.close)
    assert failed.value.gsi == 24 + k
    assert partition.closed
    assert all(route.closed for route in routes)
    # close() retries the failed one at the end.
    assert partition.stats().disarms == disarms + 4
    partition.close()


def test_closing_a_partition_reports_every_failure(backend: Backend, faults: Faults) -> None:
    partition = backend.open()
    routes = [partition.new_irqfd_route() for _ in range(3)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
    faults.fail(partition, "deassign_irqfd", errno.EIO, times=100)
    with pytest.raises(IrqFdError) as failed:
        faults.run(partition.close)
    assert all(f"GSI {gsi}" in str(failed.value) for gsi in (24, 25, 26))
    assert partition.closed


def test_closing_a_partition_retries_a_disarm_that_failed_when_a_route_closed(backend: Backend, faults: Faults) -> None:
    partition = backend.open()
    route = partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    faults.fail(partition, "deassign_irqfd", errno.EIO)
    with pytest.raises(IrqFdError):
        faults.run(route.close)
    partition.close()
    assert (partition.stats().disarms, partition.stats().failures) == (1, 1)


@in_both_modes
def test_closing_never_pushes_or_arms_even_if_calls_fail(guest: Guest, faults: Faults) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(3)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
    before = guest.partition.stats()
    faults.fail(guest.partition, "deassign_irqfd", errno.EIO, after=1)
    for route in routes:
        with suppress(IrqFdError):
            faults.run(route.close)
    after = guest.partition.stats()
    assert (after.pushes, after.arms) == (before.pushes, before.arms)
    assert (after.disarms, after.failures) == (before.disarms + 2, 1)
