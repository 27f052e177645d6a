"""The routes of a partition, saved and restored: GSIs, masks, MSIs and pending signals, with one push at most."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from backends import Backend, Guest
from modes import in_both_modes
from mshv_irqfd import (
    ClosedError,
    EventFd,
    ForkedError,
    GsiState,
    IoEventFd,
    IrqFdError,
    MissingVpError,
    MsiRoute,
    MsixTable,
    RouteBrokenError,
)
from needs import need
from states import State, gsis, kept, new_route, restored
from support import counting, in_child, msi, rare, refusal, still_works, unique

if TYPE_CHECKING:
    from faults import Faults
    from mshv_irqfd.testing import SimulatedCall

Open = Callable[..., Guest]


def state_of(*routes: State) -> State:
    """A state of these routes, which may leave out what is usual."""
    usual: State = {"masked": False, "msi": None, "pending": False}
    return {"kind": "mshv_irqfd.Partition", "version": 1, "routes": [usual | route for route in routes]}


def as_message(route: MsiRoute) -> State:
    return {"address": route.address, "data": route.data}


def message(vector: int, apic_id: int = 0) -> State:
    return as_message(msi(vector, apic_id))


def test_a_state_is_what_its_page_says(guest: Guest) -> None:
    armed, masked, bare = (new_route(guest) for _ in range(3))
    armed.set_msi(msi(0x41))
    masked.mask()
    masked.set_msi(msi(0x42))
    masked.signal()
    assert guest.partition.save() == state_of(
        {"gsi": armed.gsi, "msi": message(0x41)},
        {"gsi": masked.gsi, "masked": True, "msi": message(0x42), "pending": True},
        {"gsi": bare.gsi},
    )


def test_routes_come_back_with_their_gsis_masks_msis_and_pending_signals(open_guest: Open) -> None:
    old, new = open_guest(vps=2), open_guest(vps=2)
    gap, armed, masked, bare = (new_route(old) for _ in range(4))
    armed.set_msi(msi(0x41, 1))
    masked.set_msi(msi(0x42))
    masked.mask()
    for route in (masked, bare):
        os.eventfd_write(route.fileno(), 3)
    gap.close()
    state = old.partition.save()

    routes = restored(new, state)
    assert list(routes) == [armed.gsi, masked.gsi, bare.gsi]
    assert new.partition.routes == list(routes.values())
    assert [routes[gsi].gsi for gsi in routes] == list(routes)
    for route in (armed, masked, bare):
        again = routes[route.gsi]
        assert (again.masked, again.msi, again.armed, again.pending) == (
            route.masked,
            route.msi,
            route.armed,
            route.pending,
        )
    new.receives_nothing()
    routes[armed.gsi].signal()
    new.receives(msi(0x41, 1))
    routes[masked.gsi].unmask()
    new.receives(msi(0x42))
    routes[bare.gsi].set_msi(msi(0x43))
    new.receives(msi(0x43))
    assert new_route(new).gsi == gap.gsi


def test_saving_takes_nothing_away(guest: Guest) -> None:
    armed, masked = new_route(guest), new_route(guest)
    for vector, route in ((0x41, armed), (0x42, masked)):
        route.set_msi(msi(vector))
    masked.mask()
    masked.signal()
    table = guest.partition.routing_table()
    with counting(guest.partition) as made:
        assert guest.partition.save() == guest.partition.save()
    guest.receives_nothing()
    assert (made.stats.pushes, made.stats.arms) == (0, made.stats.disarms)
    assert (armed.armed, masked.pending, guest.partition.routing_table()) == (True, True, table)
    armed.signal()
    guest.receives(msi(0x41))
    masked.unmask()
    guest.receives(msi(0x42))


def test_each_signal_before_saving_is_with_the_guest_or_in_the_state(backend: Backend) -> None:
    with backend.open() as partition, partition.new_irqfd_route() as route:
        # Without the fence that the helpers make: saving must be one.
        taken = getattr(partition, "take_interrupts", None) or backend.guest(partition).arrived
        route.set_msi(msi(0x41))
        for _ in range(200):
            route.signal()
            [saved] = partition.save()["routes"]
            assert bool(taken()) != saved["pending"]


@in_both_modes
@pytest.mark.parametrize("masked", [False, True])
def test_restoring_many_routes_is_one_push_at_most(guest: Guest, *, masked: bool) -> None:
    state = state_of(
        *({"gsi": gsi, "masked": masked, "msi": message(gsi)} for gsi in range(0x30, 0x90)),
    )
    with counting(guest.partition) as made:
        routes = restored(guest, state)
    assert (made.stats.pushes, made.stats.arms) == ((0, 0) if masked else (1, 0x60))
    assert [route.armed for route in routes.values()] == [not masked] * 0x60
    routes[0x33].signal()
    guest.receives(*[] if masked else [msi(0x33)])


@in_both_modes
def test_no_push_is_made_for_messages_that_the_kernels_table_has(guest: Guest) -> None:
    routes = [new_route(guest) for _ in range(4)]
    for number, route in enumerate(routes):
        route.set_msi(unique(number))
    state = guest.partition.save()
    for route in routes:
        route.close()
    with counting(guest.partition) as made:
        restored(guest, state)
    assert made.stats.pushes == 0
    assert made.stats.arms == 4


def test_a_pending_signal_is_delivered_exactly_once(guest: Guest) -> None:
    routes = restored(guest, state_of({"gsi": 30, "msi": message(0x41), "pending": True}))
    assert not routes[30].pending
    guest.receives(msi(0x41))
    routes[30].mask()
    routes[30].unmask()
    guest.receives_nothing()


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("waiting", [0, 1, 5])
def test_what_waits_in_a_callers_eventfd_is_delivered_and_with_a_pending_signal_it_is_one(
    guest: Guest, theirs: int, waiting: int, *, pending: bool
) -> None:
    if waiting:
        os.eventfd_write(theirs, waiting)
    state = state_of({"gsi": 30, "msi": message(0x41), "pending": pending})
    restored(guest, state, events={30: theirs})
    guest.receives(*[msi(0x41)] if waiting or pending else [])
    os.eventfd_write(theirs, 1)
    guest.receives(msi(0x41))


def test_nothing_is_lost_while_an_eventfd_goes_from_one_partition_to_the_next(open_guest: Open, theirs: int) -> None:
    old, new = open_guest(), open_guest()
    route = new_route(old, event=theirs)
    route.set_msi(msi(0x41))
    os.eventfd_write(theirs, 1)
    state = old.partition.save()
    old.receives(msi(0x41))
    os.eventfd_write(theirs, 1)
    old.receives(msi(0x41))
    route.close()
    os.eventfd_write(theirs, 1)
    restored(new, state, events={route.gsi: theirs})
    new.receives(msi(0x41))


def test_the_routes_of_devices_are_in_the_states_of_the_devices(guest: Guest, theirs: int) -> None:
    route = new_route(guest)
    with MsixTable(guest.partition, 4, events={1: theirs}) as table:
        assert table.vectors[2].event
        assert [saved["gsi"] for saved in guest.partition.save()["routes"]] == [route.gsi]
        state = table.save()
        assert [saved["gsi"] for saved in state["vectors"]] == [route.gsi + 1, route.gsi + 2]
        table.close()
        with MsixTable.restore(guest.partition, state):
            assert [saved["gsi"] for saved in guest.partition.save()["routes"]] == [route.gsi]
    again = new_route(guest)
    assert [saved["gsi"] for saved in guest.partition.save()["routes"]] == [route.gsi, again.gsi]


@pytest.mark.parametrize("there", ["simulated", "kvm", "mshv"])
def test_a_state_can_be_restored_on_another_backend(open_guest: Open, there: str) -> None:
    need(there)
    old = open_guest()
    routes = [new_route(old) for _ in range(2)]
    routes[0].set_msi(msi(0x41))
    routes[1].signal()
    other = Backend(there)
    new = other.guest(other.open())
    again = restored(new, old.partition.save())
    again[routes[0].gsi].signal()
    new.receives(msi(0x41))
    again[routes[1].gsi].set_msi(msi(0x42))
    new.receives(msi(0x42))
    assert new.partition.save() == old.partition.save() | {"routes": new.partition.save()["routes"]}
    new.close()


def test_restored_routes_save_to_the_same_state(open_guest: Open) -> None:
    state = state_of(
        {"gsi": 24, "msi": message(0x41)},
        {"gsi": 30, "masked": True, "msi": message(0x42), "pending": True},
        {"gsi": 31, "pending": True},
        {"gsi": 40, "masked": True},
    )
    first, second = open_guest(), open_guest()
    restored(first, state)
    assert first.partition.save() == state
    restored(second, first.partition.save())
    assert second.partition.save() == state


def test_an_empty_state_restores_nothing(guest: Guest) -> None:
    state = guest.partition.save()
    with counting(guest.partition) as made:
        assert restored(guest, state) == {}
    assert not any(made.stats)


# Doorbells


def test_the_open_doorbells_are_listed_by_address(guest: Guest) -> None:
    def bell(address: int, **options: int) -> IoEventFd:
        return kept(guest, guest.partition.ioeventfd(address, 4, **options))  # type: ignore[arg-type]

    high, low, lower = bell(0xD0001000), bell(0xD0000000, datamatch=2), bell(0xD0000000, datamatch=1)
    gone = bell(0xD0002000)
    assert guest.partition.ioeventfds == [lower, low, high, gone]
    gone.close()
    assert guest.partition.ioeventfds == [lower, low, high]
    guest.partition.close()
    with pytest.raises(ClosedError):
        _ = guest.partition.ioeventfds


@pytest.mark.parametrize("asked", [False, True])
def test_doorbells_are_rung_if_asked_but_for_those_on_a_routes_eventfd(
    guest: Guest, theirs: int, *, asked: bool
) -> None:
    one, other = (kept(guest, guest.partition.ioeventfd(address, 4)) for address in (0xD0000000, 0xD0000008))
    direct = kept(guest, guest.partition.ioeventfd(0xD0000010, 4, event=theirs))
    state = state_of({"gsi": 30, "msi": message(0x41)})
    restored(guest, state, events={30: theirs}, ring_doorbells=asked)
    assert [one.consume(), other.consume()] == [int(asked)] * 2
    guest.receives_nothing()
    direct.signal()
    guest.receives(msi(0x41))


@pytest.mark.parametrize("masked", [False, True])
def test_a_doorbell_on_the_eventfd_of_another_partitions_route_is_not_rung(
    open_guest: Callable[..., Guest], *, masked: bool
) -> None:
    here, there = open_guest(), open_guest()
    route = new_route(there)
    route.set_msi(msi(0x41))
    if masked:
        route.mask()
    kept(here, here.partition.ioeventfd(0xD0000000, 4, event=route))
    own = kept(here, here.partition.ioeventfd(0xD0000008, 4))
    restored(here, state_of(), ring_doorbells=True)
    assert own.consume() == 1
    assert not route.pending
    there.receives_nothing()
    assert here.writes(0xD0000000, bytes(4))
    assert route.pending == masked
    there.receives(*[] if masked else [msi(0x41)])


# What is refused


def test_a_broken_route_can_not_be_saved_until_it_is_closed(guest: Guest, faults: Faults) -> None:
    route, other = new_route(guest), new_route(guest)
    state = state_of({"gsi": other.gsi, "masked": True, "msi": message(0x42)})
    other.mask()
    other.set_msi(msi(0x42))

    def arm_both() -> None:
        with guest.partition.batch() as batch:
            batch.set_msi(route, msi(0x41))
            batch.unmask(other)

    # The second cannot be armed, and the first not be disarmed then.
    faults.fail(guest.partition, "assign_irqfd", errno.ENOMEM, after=1)
    faults.fail(guest.partition, "deassign_irqfd", errno.ENOMEM)
    with pytest.raises(IrqFdError):
        faults.run(arm_both)
    assert route.state is GsiState.BROKEN
    with pytest.raises(RouteBrokenError, match=f"GSI {route.gsi} is broken"):
        guest.partition.save()
    route.close()
    assert guest.partition.save() == state
    with pytest.raises(ValueError, match=f"GSI {route.gsi} is quarantined"):
        restored(guest, state_of({"gsi": route.gsi}))


def test_a_closed_partition_neither_saves_nor_restores(guest: Guest) -> None:
    state = guest.partition.save()
    guest.partition.close()
    for use in (guest.partition.save, partial(guest.partition.restore, state)):
        with pytest.raises(ClosedError):
            use()


def test_a_forked_child_neither_saves_nor_restores(guest: Guest) -> None:
    route = new_route(guest)
    route.set_msi(msi(0x41))
    state = guest.partition.save()
    route.close()

    def child() -> list[str]:
        return [refusal(guest.partition.save), refusal(partial(guest.partition.restore, state))]

    assert in_child(child) == [ForkedError.__name__] * 2
    still_works(guest)


def test_a_gsi_that_is_taken_or_not_the_partitions_is_named(open_guest: Open) -> None:
    guest = open_guest(gsis=range(24, 32))
    route = new_route(guest)
    for gsi, words in [
        (route.gsi, "routes\\[1\\].gsi: GSI 24 is another route's"),
        (32, "routes\\[1\\].gsi: GSI 32 is outside gsis range\\(24, 32\\)"),
        (30, "routes\\[1\\].gsi: GSI 30 is that of routes\\[0\\] too"),
    ]:
        with pytest.raises(ValueError, match=words):
            restored(guest, state_of({"gsi": 30, "msi": message(0x41)}, {"gsi": gsi, "msi": message(0x42)}))
        assert gsis(guest.partition) == {24: GsiState.DISABLED}


def test_a_missing_vp_is_named_unless_the_route_is_masked(open_guest: Open) -> None:
    guest = open_guest()
    state = state_of({"gsi": 30, "msi": message(0x41, 3)})
    with pytest.raises(MissingVpError, match=r"routes\[0\].msi: GSI 30: no VP has APIC id 3"):
        restored(guest, state)
    assert gsis(guest.partition) == {}
    state["routes"][0]["masked"] = True
    [route] = restored(guest, state).values()
    assert not route.armed
    guest.partition.create_vp(3)
    route.unmask()
    route.signal()
    guest.receives(msi(0x41, 3))


@pytest.mark.thread_unsafe(reason="a closed number goes to whichever thread opens the next descriptor")
def test_eventfds_that_no_route_can_have_are_refused(guest: Guest, theirs: int) -> None:
    state = state_of({"gsi": 30, "msi": message(0x41)}, {"gsi": 31})
    route = new_route(guest)
    os.eventfd_write(theirs, 1)
    with Path("/dev/null").open("rb") as file:
        with EventFd() as closed:
            number = closed.fileno()
        cases: list[tuple[object, type[Exception], str]] = [
            ({32: theirs}, ValueError, "events has an eventfd for GSI 32"),
            ({30: theirs, 31: theirs}, ValueError, "are of one eventfd"),
            ({30: route.event}, ValueError, f"is the eventfd of the route of GSI {route.gsi}"),
            ({30: theirs, 31: file}, ValueError, "/dev/null, not an eventfd"),
            ({30: number, 31: theirs}, IrqFdError, "not open"),
            ({30: "x"}, TypeError, "file descriptor"),
            ({"x": theirs}, TypeError, "GSI must be an int"),
            ([theirs], TypeError, "events must be a mapping from GSIs to eventfds"),
        ]
        for events, error, words in cases:
            with counting(guest.partition) as made, pytest.raises(error, match=words):
                restored(guest, state, events=events)
            assert (gsis(guest.partition), any(made.stats)) == ({route.gsi: GsiState.DISABLED}, False)
    assert os.eventfd_read(theirs) == 1


# Kernels that refuse


def test_if_saving_fails_the_routes_are_armed_as_before(guest: Guest, faults: Faults) -> None:
    routes = [new_route(guest) for _ in range(3)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
    faults.fail(guest.partition, "deassign_irqfd", errno.ENOMEM, after=1)
    with pytest.raises(IrqFdError) as refused:
        faults.run(guest.partition.save)
    assert (refused.value.errno, refused.value.gsi) == (errno.ENOMEM, routes[1].gsi)
    assert [route.armed for route in routes] == [True] * 3
    for number, route in enumerate(routes):
        route.signal()
        guest.receives(msi(0x41 + number))
    assert len(guest.partition.save()["routes"]) == 3


def test_a_route_that_saving_could_not_arm_again_waits_for_that_and_is_told(guest: Guest, faults: Faults) -> None:
    routes = [new_route(guest) for _ in range(3)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
    faults.fail(guest.partition, "assign_irqfd", errno.ENOMEM, after=1)
    with pytest.raises(IrqFdError, match=f"waiting to be re-armed .*GSI {routes[1].gsi}"):
        faults.run(guest.partition.save)
    assert [route.armed for route in routes] == [True, False, True]
    routes[1].signal()
    guest.receives_nothing()
    saved = guest.partition.save()["routes"][1]
    assert (saved["masked"], saved["msi"], saved["pending"]) == (False, message(0x42), True)
    routes[1].unmask()
    guest.receives(msi(0x42))


@in_both_modes
@pytest.mark.parametrize("call", ["set_msi_routing", "assign_irqfd", "deassign_irqfd"])
def test_if_any_call_fails_no_gsi_is_taken_and_a_second_try_succeeds(
    guest: Guest, faults: Faults, call: SimulatedCall
) -> None:
    partition = guest.partition
    old = new_route(guest)
    old.set_msi(msi(0xE9))
    fds = [os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(4)]
    state = state_of(
        *({"gsi": 30 + at, "msi": as_message(rare(0x41 + at)), "pending": at == 1} for at in range(4)),
        {"gsi": 40, "masked": True, "pending": True},
    )
    restore = partial(restored, guest, state, events=dict(enumerate(fds, 30)), ring_doorbells=True)
    failed = 0
    for after in range(8):
        before, failures = gsis(partition), partition.stats().failures
        faults.fail(partition, call, errno.ENOMEM, after=after)
        outcome = refusal(partial(faults.run, restore))
        if partition.stats().failures == failures:
            assert outcome == "none"
            break
        failed += 1
        assert outcome in ("RoutingError", "IrqFdError"), outcome
        assert (gsis(partition), partition.routes) == (before, [old])
        guest.arrived()
        old.signal()
        guest.receives(msi(0xE9))
    # The first failed arming leaves the entries in the kernel's table. Later tries push nothing, and so disarm nothing.
    assert failed == {"set_msi_routing": 1, "assign_irqfd": 4, "deassign_irqfd": int(partition.quiesce)}[call]
    guest.arrived()
    use_up(guest, faults)
    for gsi in range(30, 34):
        os.eventfd_write(fds[gsi - 30], 1)
        guest.receives(rare(0x41 + gsi - 30))
    for fd in fds:
        os.close(fd)


def use_up(guest: Guest, faults: Faults) -> None:
    """Lets the faults strike that are left."""
    faults.clear()
    with guest.partition.new_irqfd_route() as route:
        for number in range(1, 9):
            for use in (partial(route.set_msi, unique(number)), route.mask, route.unmask):
                refusal(use)
        assert route.state is not GsiState.BROKEN


@pytest.mark.parametrize("quiesce", [False, True])
def test_a_gsi_whose_route_could_not_be_disarmed_again_is_quarantined(
    open_guest: Open, faults: Faults, *, quiesce: bool
) -> None:
    guest = open_guest(quiesce=quiesce)
    state = state_of(*({"gsi": 30 + at, "msi": message(0x41 + at)} for at in range(3)))
    faults.fail(guest.partition, "assign_irqfd", errno.ENOMEM, after=1)
    faults.fail(guest.partition, "deassign_irqfd", errno.ENOMEM)
    with pytest.raises(IrqFdError, match="left broken: GSI 30"):
        faults.run(partial(restored, guest, state))
    assert gsis(guest.partition) == {30: GsiState.BROKEN}
    assert guest.partition.save()["routes"] == []
    with pytest.raises(ValueError, match="GSI 30 is quarantined"):
        restored(guest, state)
    del state["routes"][0]
    restored(guest, state)[31].signal()
    guest.receives(msi(0x42))
    still_works(guest)
