"""The routing table: what it holds after each step, and which steps push it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from backends import Backend, Guest
from mshv_irqfd import MsiRoute, Partition, PartitionStats, RoutingEntry
from support import msi

Open = Callable[..., Guest]


def entry(gsi: int, route: MsiRoute) -> RoutingEntry:
    return RoutingEntry(gsi, route.address, route.data)


class Delta:
    """What a block added to the counts of a partition."""

    stats: PartitionStats


@contextmanager
def counting(partition: Partition) -> Iterator[Delta]:
    before, delta = partition.stats(), Delta()
    yield delta
    delta.stats = PartitionStats(*(new - old for new, old in zip(partition.stats(), before, strict=True)))


def test_the_table_follows_each_step(guest: Guest) -> None:
    partition = guest.partition
    assert partition.routing_table() == []
    first, second = partition.new_irqfd_route(), partition.new_irqfd_route()
    assert partition.routing_table() == []
    second.set_msi(msi(0x42))
    assert partition.routing_table() == [entry(25, msi(0x42))]
    first.set_msi(msi(0x41))
    assert partition.routing_table() == [entry(24, msi(0x41)), entry(25, msi(0x42))]
    first.set_msi(msi(0x43))
    assert partition.routing_table() == [entry(24, msi(0x43)), entry(25, msi(0x42))]
    second.mask()
    assert partition.routing_table() == [entry(24, msi(0x43)), entry(25, msi(0x42))]
    second.close()
    assert partition.routing_table() == [entry(24, msi(0x43)), entry(25, msi(0x42))]
    first.set_msi(msi(0x44))
    assert partition.routing_table() == [entry(24, msi(0x44))]
    first.close()


def test_a_cleared_entry_leaves_with_the_next_push_that_is_needed_anyway(guest: Guest) -> None:
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    first.set_msi(msi(0x41))
    with counting(guest.partition) as delta:
        first.clear_msi()
    assert (delta.stats.pushes, delta.stats.disarms) == (0, 1)
    assert guest.partition.routing_table() == [entry(24, msi(0x41))]
    second.set_msi(msi(0x42))
    assert guest.partition.routing_table() == [entry(25, msi(0x42))]
    first.close()
    second.close()


def test_an_armed_route_has_its_entry_in_the_table(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(3)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
        table = guest.partition.routing_table()
        assert all(entry(armed.gsi, armed.msi) in table for armed in routes if armed.armed and armed.msi)
    for route in routes:
        route.close()


def test_enabling_is_one_push_and_one_arming(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    with counting(guest.partition) as delta:
        route.set_msi(msi(0x41))
    assert (delta.stats.pushes, delta.stats.arms, delta.stats.disarms) == (1, 1, 0)
    route.close()


def test_setting_what_is_set_does_nothing(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    with counting(guest.partition) as delta:
        route.set_msi(msi(0x41))
        route.set_msi(0xFEE00000, 0x41)
        route.unmask()
    assert delta.stats == (0, 0, 0, 0, 0, 0)
    route.clear_msi()
    route.mask()
    with counting(guest.partition) as delta:
        route.clear_msi()
        route.mask()
    assert delta.stats == (0, 0, 0, 0, 0, 0)
    route.close()


def test_masking_and_unmasking_never_push(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    with counting(guest.partition) as delta:
        for _ in range(3):
            route.mask()
            route.unmask()
    assert (delta.stats.pushes, delta.stats.arms, delta.stats.disarms) == (0, 3, 3)
    assert delta.stats.pushes_skipped == 6
    route.close()


def test_an_msi_set_while_masked_is_pushed_when_it_is_unmasked(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    route.mask()
    with counting(guest.partition) as delta:
        route.set_msi(msi(0x42))
        route.set_msi(msi(0x43))
    assert (delta.stats.pushes, delta.stats.arms) == (0, 0)
    assert route.msi == msi(0x43)
    assert guest.partition.routing_table() == [entry(24, msi(0x41))]
    with counting(guest.partition) as delta:
        route.unmask()
    assert (delta.stats.pushes, delta.stats.arms) == (1, 1)
    assert guest.partition.routing_table() == [entry(24, msi(0x43))]
    route.signal()
    guest.receives(msi(0x43))
    route.close()


def test_an_msi_that_comes_back_while_masked_needs_no_push(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    route.mask()
    route.set_msi(msi(0x42))
    route.set_msi(msi(0x41))
    with counting(guest.partition) as delta:
        route.unmask()
    assert delta.stats.pushes == 0
    route.signal()
    guest.receives(msi(0x41))
    route.close()


def test_setting_what_the_kernel_still_holds_needs_no_push(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    route.clear_msi()
    with counting(guest.partition) as delta:
        route.set_msi(msi(0x41))
    assert (delta.stats.pushes, delta.stats.arms) == (0, 1)
    route.signal()
    guest.receives(msi(0x41))
    route.close()


def test_closing_2000_routes_costs_no_push(open_guest: Open) -> None:
    guest = open_guest(gsis=range(24, 2024))
    with ExitStack() as stack:
        routes = [stack.enter_context(guest.partition.new_irqfd_route()) for _ in range(2000)]
        with counting(guest.partition) as delta, guest.partition.batch() as batch:
            for route in routes:
                batch.set_msi(route, msi(0x30 + route.gsi % 0x80))
        assert (delta.stats.pushes, delta.stats.arms) == (1, 2000)
        with counting(guest.partition) as delta:
            for route in routes:
                route.close()
        assert (delta.stats.pushes, delta.stats.disarms, delta.stats.pushes_skipped) == (0, 2000, 2000)
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x21))
        assert guest.partition.routing_table() == [entry(24, msi(0x21))]


def test_a_push_meets_no_armed_irqfd_where_it_must_not(backend: Backend, open_guest: Open) -> None:
    guest = open_guest()
    assert guest.partition.quiesce is backend.quiesces
    routes = [guest.partition.new_irqfd_route() for _ in range(4)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
    with counting(guest.partition) as delta:
        routes[0].set_msi(msi(0x51))
    around = 4 if backend.quiesces else 0
    assert (delta.stats.pushes, delta.stats.disarms, delta.stats.arms) == (1, around, around)
    for route in routes:
        route.signal()
    guest.receives(msi(0x51), msi(0x42), msi(0x43), msi(0x44))
    for route in routes:
        route.close()


@pytest.mark.parametrize("quiesce", [True, False])
def test_quiescing_is_an_option(open_guest: Open, quiesce: bool) -> None:
    guest = open_guest(quiesce=quiesce)
    assert guest.partition.quiesce is quiesce
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    first.set_msi(msi(0x41))
    with counting(guest.partition) as delta:
        second.set_msi(msi(0x42))
    assert (delta.stats.disarms, delta.stats.arms) == ((1, 2) if quiesce else (0, 1))
    first.signal()
    second.signal()
    guest.receives(msi(0x41), msi(0x42))
    first.close()
    second.close()


def test_what_was_pushed_is_counted_with_the_pins_of_kvm(backend: Backend, guest: Guest) -> None:
    pins = 40 if backend.name == "kvm" else 0
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    with counting(guest.partition) as delta:
        first.set_msi(msi(0x41))
        second.set_msi(msi(0x42))
    assert (delta.stats.pushes, delta.stats.entries_pushed, delta.stats.failures) == (2, 2 * pins + 3, 0)
    first.close()
    second.close()


def test_the_table_is_by_gsi(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(20)]
    for route in reversed(routes):
        route.set_msi(msi(0x40 + route.gsi))
    table = guest.partition.routing_table()
    assert table == sorted(table)
    assert len(table) == 20
    for route in routes:
        route.close()
