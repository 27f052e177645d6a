"""Rule 4: no push unless a message is not in the kernel's table. Pushes load the messages that are likely next."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from backends import Backend, Guest, SimulatedGuest
from driver import ENABLE, FUNCTION_MASK, Driver
from mshv_irqfd import ClosedError, ForkedError, IrqFdRoute, MissingVpError, MsiRoute, Partition, RoutingError
from support import (
    MANY,
    counting,
    in_child,
    messages,
    msi,
    places,
    rare,
    refusal,
    spare_entries,
    table_entry,
    unique,
)

if TYPE_CHECKING:
    from faults import Faults
    from raw_kvm import KvmVm

Open = Callable[..., Guest]

VECTORS = 240
"""The vectors of one VP: 16 to 255."""


def some(guest: Guest, number: int) -> list[IrqFdRoute]:
    return [guest.partition.new_irqfd_route() for _ in range(number)]


def armed(guest: Guest, number: int = 3) -> list[IrqFdRoute]:
    """Routes on vectors 0x41, 0x42, ..."""
    routes = some(guest, number)
    for vector, route in enumerate(routes, 0x41):
        route.set_msi(msi(vector))
    return routes


def close(*routes: IrqFdRoute) -> None:
    for route in routes:
        route.close()


# What a push takes along


def test_the_first_push_loads_every_vector_of_every_vp(open_guest: Open, backend: Backend) -> None:
    guest = open_guest(vps=[0, 3], quiesce=None if backend.loads() else True)
    with guest.partition.new_irqfd_route() as route:
        with counting(guest.partition) as delta:
            route.set_msi(msi(0x41))
        assert (delta.stats.pushes, delta.stats.arms, delta.stats.misses) == (1, 1, 1)
        assert delta.stats.entries_loaded == 2 * VECTORS
        expected = {msi(vector, vp) for vector in range(16, 256) for vp in (0, 3)}
        loaded = spare_entries(guest.partition)
        assert set(loaded.values()) == expected
        assert len(loaded) == len(expected), "no message is loaded twice"
        assert route.armed_gsi == route.gsi


def test_without_preload_there_are_no_spare_entries(unloaded: Guest) -> None:
    routes = armed(unloaded)
    for vector, route in enumerate(routes, 0x51):
        with counting(unloaded.partition) as delta:
            route.set_msi(msi(vector))
        assert (delta.stats.pushes, delta.stats.hits, delta.stats.misses, delta.stats.entries_loaded) == (1, 0, 1, 0)
        assert route.armed_gsi == route.gsi
    assert messages(unloaded.partition) == {route.gsi: route.msi for route in routes}
    close(*routes)


def test_no_entry_is_for_a_destination_without_a_vp(open_guest: Open, backend: Backend) -> None:
    guest = open_guest(vps=[0, 2], quiesce=None if backend.loads() else True)
    first, second = some(guest, 2)
    first.set_msi(msi(0x41, 2))
    second.set_msi(rare(0x41))
    with pytest.raises(MissingVpError):
        second.set_msi(msi(0x41, 1))
    assert {message.destination for message in messages(guest.partition).values()} == {0, 2}
    close(first, second)


def test_a_logical_destination_loads_its_vectors_and_says_nothing_about_vps(loaded: Guest) -> None:
    with loaded.partition.new_irqfd_route() as route:
        route.set_msi(0xFEE03004, 0x41)
        table = messages(loaded.partition).values()
        assert {(message.logical, message.destination) for message in table} == {(True, 3)}
        assert len(spare_entries(loaded.partition)) == VECTORS


def test_a_vp_created_later_is_taken_along_with_the_next_push(loaded: Guest) -> None:
    first, second = armed(loaded, 2)
    loaded.partition.create_vp(1)
    assert {message.destination for message in messages(loaded.partition).values()} == {0}
    with counting(loaded.partition) as delta:
        first.set_msi(msi(0x51, 1))
    assert (delta.stats.pushes, delta.stats.misses, delta.stats.entries_loaded) == (1, 1, VECTORS - 1)
    with counting(loaded.partition) as delta:
        second.set_msi(msi(0x52, 1))
    assert (delta.stats.pushes, delta.stats.hits) == (0, 1)
    first.signal()
    second.signal()
    loaded.receives(msi(0x51, 1), msi(0x52, 1))
    close(first, second)


def test_a_message_without_a_vector_to_vary_loads_nothing(loaded: Guest) -> None:
    with loaded.partition.new_irqfd_route() as route:
        route.set_msi(unique(0))
        assert loaded.partition.routing_table() == [table_entry(24, unique(0))]
        assert loaded.partition.stats().entries_loaded == 0


def test_a_table_of_one_spare_gsi_keeps_the_messages_in_use(open_guest: Open, backend: Backend) -> None:
    gsis = range(24, 24 + 4095 - (40 if backend.name == "kvm" else 24))
    guest = open_guest(gsis=gsis, quiesce=None if backend.loads() else True)
    routes = armed(guest)
    for turn in range(4):
        for vector, route in enumerate(routes, 0x51 + 16 * turn):
            route.set_msi(msi(vector))
            assert places(guest.partition, routes) == {one.gsi: one.msi for one in routes}
            route.signal()
            guest.receives(msi(vector))
    assert len(spare_entries(guest.partition)) == 1
    close(*routes)


def test_where_most_spare_gsis_are_taken_a_quiesced_push_brings_the_routes_home(
    open_guest: Open, backend: Backend
) -> None:
    gsis = range(24, 24 + 4096 - (40 if backend.name == "kvm" else 24) - 6)
    guest = open_guest(gsis=gsis, quiesce=None if backend.loads() else True)
    routes = armed(guest, 6)
    for vector, route in enumerate(routes[:4], 0x91):
        route.set_msi(msi(vector))
    assert all(route.armed_gsi != route.gsi for route in routes[:4])
    routes[0].mask()
    routes[0].signal()
    with counting(guest.partition) as delta:
        routes[4].set_msi(msi(0xA1))
    assert (delta.stats.pushes, delta.stats.disarms, delta.stats.arms) == (1, 5, 5)
    assert delta.stats.entries_loaded > 0
    assert all(route.armed_gsi == route.gsi for route in routes[1:4])
    assert places(guest.partition, routes) == {route.gsi: route.msi for route in routes[1:]}
    # It has changed the place of the masked route too, whose signal waits still.
    with counting(guest.partition) as delta:
        routes[0].unmask()
    assert (delta.stats.pushes, routes[0].armed_gsi) == (0, routes[0].gsi)
    guest.receives(msi(0x91))
    for route in routes:
        route.signal()
    guest.receives(*(route.msi for route in routes if route.msi))
    close(*routes)


def test_a_failed_push_is_followed_by_one_that_loads_nothing(loaded: Guest, faults: Faults) -> None:
    with loaded.partition.new_irqfd_route() as route:
        faults.fail(loaded.partition, "set_msi_routing", errno.ENOMEM)
        with pytest.raises(RoutingError):
            faults.run(partial(route.set_msi, msi(0x41)))
        assert loaded.partition.routing_table() == []
        assert loaded.partition.stats().entries_loaded == 0
        # A table of that size may be what the kernel had no memory for.
        route.set_msi(msi(0x41))
        assert loaded.partition.routing_table() == [table_entry(24, msi(0x41))]
        assert loaded.partition.stats().entries_loaded == 0
        route.set_msi(msi(0x42))
        assert loaded.partition.stats().entries_loaded == VECTORS - 1
        route.signal()
        loaded.receives(msi(0x42))


# Hits


def test_a_retarget_to_a_loaded_message_moves_that_route_alone(loaded: Guest) -> None:
    routes = armed(loaded, 8)
    at = [route.armed_gsi for route in routes]
    table = loaded.partition.routing_table()
    with counting(loaded.partition) as delta:
        routes[3].set_msi(msi(0x99))
    stats = delta.stats
    assert (stats.pushes, stats.disarms, stats.arms, stats.hits, stats.misses) == (0, 1, 1, 1, 0)
    assert stats.pushes_skipped == 1
    assert routes[3].armed_gsi not in {None, *loaded.partition.gsis}
    assert [route.armed_gsi for route in routes if route is not routes[3]] == at[:3] + at[4:]
    assert loaded.partition.routing_table() == table
    for route in routes:
        route.signal()
    loaded.receives(*(route.msi for route in routes if route.msi))
    close(*routes)


def test_a_route_goes_back_to_the_message_at_its_own_gsi(loaded: Guest) -> None:
    with loaded.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        for _ in range(3):
            route.set_msi(msi(0x51))
            assert route.armed_gsi != route.gsi
            route.set_msi(msi(0x41))
            assert route.armed_gsi in {route.gsi, *spare_entries(loaded.partition)}
            assert places(loaded.partition, [route]) == {route.gsi: msi(0x41)}
        assert loaded.partition.stats().pushes == 1
        route.signal()
        loaded.receives(msi(0x41))


def test_interrupts_have_the_right_vector_after_moves_masks_and_unmasks(open_guest: Open, backend: Backend) -> None:
    guest = open_guest(vps=2, quiesce=None if backend.loads() else True)
    first, second = armed(guest, 2)
    for turn in range(0, 48, 3):
        one, other = msi(0x50 + turn, turn % 2), msi(0x51 + turn, (turn + 1) % 2)
        first.set_msi(one)
        second.mask()
        second.set_msi(other)
        first.signal()
        second.signal()
        guest.receives(one)
        second.unmask()
        guest.receives(other)
        first.set_msi(other)
        first.signal()
        second.signal()
        guest.receives(other, other)
    assert guest.partition.stats().pushes == 1
    close(first, second)


def test_routes_that_share_a_message_share_its_spare_gsi_and_all_deliver(loaded: Guest) -> None:
    routes = armed(loaded)
    with counting(loaded.partition) as delta, loaded.partition.batch() as batch:
        for route in routes:
            batch.set_msi(route, msi(0x77))
    assert (delta.stats.pushes, delta.stats.hits) == (0, 3)
    assert len({route.armed_gsi for route in routes}) == 1
    for route in routes:
        route.signal()
        loaded.receives(msi(0x77))
    routes[0].close()
    routes[1].mask()
    routes[2].signal()
    loaded.receives(msi(0x77))
    routes[1].signal()
    loaded.receives_nothing()
    routes[1].unmask()
    loaded.receives(msi(0x77))
    close(*routes)


def test_routes_can_trade_loaded_messages_without_a_push(loaded: Guest) -> None:
    first, second = armed(loaded, 2)
    with counting(loaded.partition) as delta, loaded.partition.batch() as batch:
        batch.set_msi(first, msi(0x42))
        batch.set_msi(second, msi(0x41))
    assert delta.stats.pushes == 0
    first.signal()
    loaded.receives(msi(0x42))
    second.signal()
    loaded.receives(msi(0x41))
    close(first, second)


@pytest.mark.parametrize("signals", [1, 5])
def test_signals_that_are_pending_across_a_move_are_delivered_once(loaded: Guest, signals: int) -> None:
    with loaded.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.mask()
        for _ in range(signals):
            route.signal()
        route.set_msi(msi(0x51))
        assert route.pending
        loaded.receives_nothing()
        with counting(loaded.partition) as delta:
            route.unmask()
        assert (delta.stats.pushes, delta.stats.hits) == (0, 1)
        loaded.receives(msi(0x51))
        assert not route.pending
        # Neither another move nor another arming repeats it.
        route.set_msi(msi(0x52))
        route.mask()
        route.unmask()
        loaded.receives_nothing()


def test_a_masked_route_keeps_its_place_so_that_unmasking_makes_no_push(loaded: Guest) -> None:
    route, other = armed(loaded, 2)
    route.set_msi(msi(0x61))
    place = route.armed_gsi
    route.mask()
    assert (route.armed, route.armed_gsi) == (False, None)
    # Each of these replaces entries that no route has its place at, once all spare GSIs are in use.
    for number in range(8):
        other.set_msi(0xFEE00004 | number << 12, 0x41)
    with counting(loaded.partition) as delta:
        route.unmask()
    assert (delta.stats.pushes, route.armed_gsi) == (0, place)
    route.signal()
    loaded.receives(msi(0x61))
    close(route, other)


def test_closing_a_route_at_a_spare_gsi_leaves_the_loaded_entry_to_others(loaded: Guest) -> None:
    first, second = armed(loaded, 2)
    first.set_msi(msi(0x61))
    place = first.armed_gsi
    first.close()
    with counting(loaded.partition) as delta:
        second.set_msi(msi(0x61))
    assert (delta.stats.pushes, second.armed_gsi) == (0, place)
    second.signal()
    loaded.receives(msi(0x61))
    second.close()


# Misses


def test_a_message_that_is_not_loaded_is_one_push_and_the_old_one_stays(loaded: Guest) -> None:
    with loaded.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        with counting(loaded.partition) as delta:
            route.set_msi(rare(0x41))
        assert (delta.stats.pushes, delta.stats.misses, delta.stats.hits) == (1, 1, 0)
        assert messages(loaded.partition)[route.gsi] == msi(0x41)
        with counting(loaded.partition) as delta:
            route.set_msi(msi(0x41))
            route.set_msi(rare(0x99))
        assert (delta.stats.pushes, delta.stats.misses, delta.stats.hits) == (0, 0, 2)
        route.signal()
        loaded.receives(rare(0x99))


def test_a_batch_with_one_message_that_is_not_loaded_is_one_push(loaded: Guest) -> None:
    routes = armed(loaded)
    with counting(loaded.partition) as delta, loaded.partition.batch() as batch:
        batch.set_msi(routes[0], msi(0x51))
        batch.set_msi(routes[1], rare(0x52))
        batch.set_msi(routes[2], msi(0x53))
    assert (delta.stats.pushes, delta.stats.hits, delta.stats.misses) == (1, 2, 1)
    for route in routes:
        route.signal()
    loaded.receives(msi(0x51), rare(0x52), msi(0x53))
    close(*routes)


def test_the_counts_tell_hits_from_misses(loaded: Guest) -> None:
    first, second = some(loaded, 2)
    steps: list[tuple[Callable[[], object], tuple[int, int]]] = [
        (lambda: first.set_msi(msi(0x41)), (0, 1)),
        (lambda: second.set_msi(msi(0x42)), (1, 0)),
        (lambda: first.set_msi(msi(0x41)), (0, 0)),
        (lambda: first.set_msi(rare(0x41)), (0, 1)),
        (first.mask, (0, 0)),
        (first.unmask, (0, 0)),
        (first.mask, (0, 0)),
        (lambda: first.set_msi(msi(0x43)), (0, 0)),
        (first.unmask, (1, 0)),
        (second.clear_msi, (0, 0)),
    ]
    for step, expected in steps:
        with counting(loaded.partition) as delta:
            step()
        assert (delta.stats.hits, delta.stats.misses) == expected
        assert delta.stats.pushes == expected[1]
    close(first, second)


# Bringing up many


@pytest.mark.parametrize("number", [200, 1000])
def test_routes_brought_up_one_by_one_cost_at_most_two_pushes(open_guest: Open, number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < number + 100:
        pytest.skip(f"needs {number + 100} file descriptors, and RLIMIT_NOFILE allows {hard}: raise it (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number + 100), hard))
    guest = open_guest(vps=4)
    routes = some(guest, number)
    with counting(guest.partition) as delta:
        for turn, route in enumerate(routes):
            route.set_msi(msi(0x30 + turn // 4 % 0xC0, turn % 4))
    assert delta.stats.pushes <= 2
    assert all(route.armed for route in routes)
    assert places(guest.partition, routes) == {route.gsi: route.msi for route in routes}
    for route in (routes[0], routes[-1]):
        route.signal()
    guest.receives(*(route.msi for route in (routes[0], routes[-1]) if route.msi))
    close(*routes)


# KVM, where pushing a small table is cheaper than moving an irqfd


def test_a_small_table_of_kvm_stays_small_and_changes_in_place(kvm: Guest) -> None:
    routes = armed(kvm)
    for vector, route in enumerate(routes, 0x51):
        with counting(kvm.partition) as delta:
            route.set_msi(msi(vector))
        assert (delta.stats.pushes, delta.stats.disarms, delta.stats.arms) == (1, 0, 0)
    assert messages(kvm.partition) == {route.gsi: route.msi for route in routes}
    assert kvm.partition.stats().entries_loaded == 0
    for route in routes:
        route.signal()
    kvm.receives(msi(0x51), msi(0x52), msi(0x53))
    close(*routes)


def test_with_more_routes_kvm_moves_and_with_fewer_again_it_pushes_in_place(kvm: Guest) -> None:
    first, second, *others = armed(kvm, MANY)
    with counting(kvm.partition) as delta:
        first.set_msi(msi(0xA1))
        second.set_msi(msi(0xA2))
    assert (delta.stats.pushes, delta.stats.hits) == (0, 2)
    first.signal()
    second.signal()
    kvm.receives(msi(0xA1), msi(0xA2))
    close(*others)
    # The next message that is missing shrinks the table.
    first.set_msi(rare(0x41))
    assert set(spare_entries(kvm.partition).values()) <= {msi(0xA1), msi(0xA2), rare(0x41)}
    with counting(kvm.partition) as delta:
        first.set_msi(msi(0x99))
    assert delta.stats.pushes == 1
    first.signal()
    second.signal()
    kvm.receives(msi(0x99), msi(0xA2))
    close(first, second)


def masked_retarget(guest: Guest, route: IrqFdRoute, message: MsiRoute) -> tuple[int, int]:
    """Retargets a route as a guest does that masks it meanwhile. Returns the pushes and the entries loaded."""
    with counting(guest.partition) as delta:
        route.mask()
        route.set_msi(message)
        route.unmask()
    assert (delta.stats.disarms, delta.stats.arms) == (1, 1)
    return delta.stats.pushes, delta.stats.entries_loaded


LONG = 64
"""Masked retargets after which few routes of KVM have a loaded table: twice as many as it takes, and no more count."""


def test_masked_retargets_of_few_routes_end_up_without_pushes(open_guest: Open) -> None:
    guest = open_guest(vps=4)
    first, second = armed(guest, 2)
    for turn in range(LONG):
        masked_retarget(guest, first, msi(0x50 + turn % 8, turn % 4))
    for turn in range(32):
        route, message = (first, second)[turn % 2], msi(0x60 + turn, turn % 4)
        with counting(guest.partition) as delta:
            route.mask()
            route.signal()
            route.set_msi(message)
            guest.receives_nothing()
            route.unmask()
        assert (delta.stats.pushes, delta.stats.disarms, delta.stats.arms, delta.stats.hits) == (0, 1, 1, 1)
        guest.receives(message)
    close(first, second)


def test_the_pushes_of_masked_retargets_on_kvm_stay_small_until_they_have_cost_as_much_as_a_load(kvm: Guest) -> None:
    route, other = armed(kvm, 2)
    seen = [masked_retarget(kvm, route, msi(0x51 + turn % 2)) for turn in range(LONG)]
    small = seen.index((1, VECTORS))
    # The spare GSIs by the entries whose push takes as long as a move.
    assert small == 2008 // 64 - 1
    assert set(seen[:small]) == {(1, 0)}
    assert set(seen[small + 1 :]) == {(0, 0)}
    other.signal()
    kvm.receives(msi(0x42))
    close(route, other)


def test_armed_retargets_of_few_routes_of_kvm_make_its_table_small_again(kvm: Guest) -> None:
    route, other = armed(kvm, 2)
    for turn in range(LONG):
        masked_retarget(kvm, route, msi(0x51 + turn % 2))
    for turn in range(LONG):
        route.set_msi(msi(0x60 + turn))
    assert messages(kvm.partition).keys() == {route.gsi, other.gsi}
    for turn in range(8):
        with counting(kvm.partition) as delta:
            route.set_msi(msi(0x50 + turn))
        assert (delta.stats.pushes, delta.stats.disarms, delta.stats.arms) == (1, 0, 0)
        route.signal()
        other.signal()
        kvm.receives(msi(0x50 + turn), msi(0x42))
    close(route, other)


def test_bringing_up_few_vectors_of_kvm_again_and_again_loads_nothing(kvm: Guest) -> None:
    for turn in range(48):
        with counting(kvm.partition) as delta:
            first, second = some(kvm, 2)
            first.set_msi(msi(0x41 + turn))
            second.set_msi(msi(0x42 + turn))
            first.clear_msi()
            first.set_msi(msi(0x43 + turn))
            close(first, second)
        assert (delta.stats.pushes, delta.stats.entries_loaded) == (3, 0)


def test_a_vector_that_a_guest_retargets_as_linux_does_ends_up_without_pushes(open_guest: Open) -> None:
    guest = open_guest(vps=2)
    with Driver(guest, 4) as driver:
        driver.control(ENABLE | FUNCTION_MASK)
        for vector in range(4):
            driver.mask(vector)
            driver.program(vector, msi(0x41 + vector))
        with counting(guest.partition) as delta:
            driver.control(ENABLE)
        assert delta.stats.pushes == 1
        for turn in range(LONG):
            driver.retarget(turn % 4, msi(0x50 + turn % 64, turn % 2))
        for turn in range(16):
            message = msi(0x98 + turn, turn % 2)
            with counting(guest.partition) as delta:
                driver.retarget(turn % 4, message)
            assert (delta.stats.pushes, delta.stats.disarms, delta.stats.arms) == (0, 1, 1)
            driver[turn % 4].signal()
            guest.receives(message)


# Adopted partitions


def test_an_adopted_vm_without_spare_gsis_loads_nothing(vm: KvmVm) -> None:
    with Partition.from_fd(vm, "kvm", quiesce=True) as partition, partition.new_irqfd_route() as route:
        for vector in (0x41, 0x42):
            route.set_msi(msi(vector))
        assert partition.routing_table() == [table_entry(24, msi(0x42))]
        assert (partition.stats().pushes, partition.stats().entries_loaded) == (2, 0)


def test_an_adopted_vm_loads_the_spare_gsis_that_it_is_given_and_no_others(vm: KvmVm) -> None:
    kept, spare = table_entry(400, msi(0x44)), range(100, 300)
    vm.route(kept)
    with Partition.from_fd(vm, "kvm", gsis=range(24, 64), keep=[kept], spare=spare, vps=1, quiesce=True) as partition:
        first, second = partition.new_irqfd_route(), partition.new_irqfd_route()
        first.set_msi(msi(0x41))
        table = messages(partition)
        assert table.pop(400) == msi(0x44)
        assert table.pop(24) == msi(0x41)
        # Not every vector fits, so they begin at the lowest free one.
        assert set(table) <= {*spare}
        assert set(table.values()) == {msi(vector) for vector in range(0x42, 0x100)}
        with counting(partition) as delta:
            first.set_msi(msi(0x51))
            second.set_msi(msi(0x52))
        assert (delta.stats.pushes, delta.stats.hits) == (0, 2)
        assert {first.armed_gsi, second.armed_gsi} <= {*spare}
        first.signal()
        second.signal()
        assert vm.vectors() == {0x51, 0x52}
        close(first, second)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        pytest.param({"spare": range(60, 70)}, ValueError, r"range\(60, 70\) overlaps gsis range\(24, 64\)", id="gsis"),
        pytest.param({"spare": range(90, 110)}, ValueError, r"range\(90, 110\) has GSI 100.* in keep", id="kept"),
        pytest.param({"spare": range(4090, 4097)}, ValueError, r"range\(4090, 4097\) goes outside 0-4095", id="beyond"),
        pytest.param({"spare": range(20, 24)}, ValueError, r"spare range\(20, 24\) goes outside 24-4095", id="pins"),
        pytest.param(
            {"gsis": range(24, 64), "spare": range(101, 4096), "keep": [(n, 0xFEE00000, 0x41) for n in range(64, 101)]},
            ValueError,
            "3995 spare GSIs and 40 of gsis exceed the 4019 entries",
            id="too-many",
        ),
        pytest.param({"spare": range(200, 300, 2)}, ValueError, "spare.*step", id="stepped"),
        pytest.param({"spare": [200, 201]}, TypeError, "spare.*range", id="list"),
        pytest.param({"spare": 200}, TypeError, "spare.*range", id="int"),
        pytest.param({"spare": range(-5, 5)}, ValueError, r"spare range\(-5, 5\)", id="negative"),
    ],
)  # fmt: skip
def test_invalid_spare_gsis_are_refused_at_adopting(
    vm: KvmVm, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Partition.from_fd(vm, "kvm", **{"gsis": range(24, 64), "keep": [(100, 0xFEE00000, 0x44)], **options})
    # The refused call left the VM free to be adopted.
    Partition.from_fd(vm, "kvm", spare=range(3000, 3010)).close()


@pytest.mark.parametrize("spare", [None, range(200, 200)], ids=["none", "empty"])
def test_an_adopted_vm_may_have_no_spare_gsis(vm: KvmVm, spare: range | None) -> None:
    with Partition.from_fd(vm, "kvm", spare=spare, quiesce=True) as partition, partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        assert partition.routing_table() == [table_entry(24, msi(0x41))]


# What a person sees


def test_the_repr_of_a_route_tells_where_it_is_armed_if_not_at_its_own_gsi(simulated: SimulatedGuest) -> None:
    with simulated.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        assert repr(route) == "<IrqFdRoute gsi=24 ENABLED 0xfee00000/0x0041 (vector 0x41 to APIC 0)>"
        route.set_msi(msi(0x42))
        place = route.armed_gsi
        assert repr(route) == f"<IrqFdRoute gsi=24 ENABLED at GSI {place} 0xfee00000/0x0042 (vector 0x42 to APIC 0)>"
        route.mask()
        assert repr(route) == "<IrqFdRoute gsi=24 DISABLED masked 0xfee00000/0x0042 (vector 0x42 to APIC 0)>"


def test_a_route_tells_its_own_gsi_and_the_one_where_it_is_armed(loaded: Guest) -> None:
    route = loaded.partition.new_irqfd_route()
    assert route.armed_gsi is None
    route.set_msi(msi(0x41))
    assert route.armed_gsi == route.gsi == 24
    route.set_msi(msi(0x42))
    assert route.gsi == 24
    assert route.armed_gsi in spare_entries(loaded.partition)
    route.clear_msi()
    assert route.armed_gsi is None
    route.close()
    with pytest.raises(ClosedError, match="24"):
        assert route.armed_gsi


def test_the_gsi_of_a_route_is_its_parents_alone(loaded: Guest) -> None:
    with loaded.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.set_msi(msi(0x42))
        place = route.armed_gsi
        assert in_child(lambda: refusal(lambda: route.armed_gsi)) == ForkedError.__name__
        assert in_child(lambda: refusal(lambda: route.set_msi(msi(0x43)))) == ForkedError.__name__
        in_child(route.signal)
        loaded.receives(msi(0x42))
        assert route.armed_gsi == place


def test_a_callers_eventfd_moves_as_the_packages_own_do(loaded: Guest, theirs: int) -> None:
    with loaded.partition.new_irqfd_route(event=theirs) as route:
        for message in (msi(0x41), msi(0x51), rare(0x52), msi(0x41)):
            route.set_msi(message)
            os.eventfd_write(theirs, 1)
            loaded.receives(MsiRoute(message.address, message.data))
