"""Rule 1: an armed irqfd has its entry in the kernel's table, and no push meets an armed irqfd on mshv."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from backends import Backend, Guest
from support import counting, msi, places, rare, table_entry

Open = Callable[..., Guest]


def test_an_armed_route_has_its_entry_in_the_table(unloaded: Guest) -> None:
    routes = [unloaded.partition.new_irqfd_route() for _ in range(3)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
        table = unloaded.partition.routing_table()
        assert all(table_entry(armed.gsi, armed.msi) in table for armed in routes if armed.armed and armed.msi)
    for route in routes:
        route.close()


def test_an_armed_route_has_its_message_in_the_table_where_it_is_armed(loaded: Guest) -> None:
    partition = loaded.partition
    routes = [partition.new_irqfd_route() for _ in range(3)]
    for number, route in enumerate(routes):
        for message in (msi(0x41 + number), rare(0x51 + number), msi(0x41)):
            route.set_msi(message)
            assert places(partition, routes) == {armed.gsi: armed.msi for armed in routes if armed.armed}
    routes[0].mask()
    assert routes[0].armed_gsi is None
    for route in routes:
        route.close()


def test_a_quiesced_push_meets_no_armed_irqfd(backend: Backend, open_guest: Open) -> None:
    guest = open_guest(preload=False)
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


def test_a_quiesced_push_meets_no_irqfd_armed_at_a_spare_gsi(loaded: Guest) -> None:
    routes = [loaded.partition.new_irqfd_route() for _ in range(4)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
    spare = [route for route in routes if route.armed_gsi != route.gsi]
    assert spare == routes[1:]
    with counting(loaded.partition) as delta:
        routes[0].set_msi(rare(0x51))
    assert (delta.stats.pushes, delta.stats.disarms, delta.stats.arms) == (1, 4, 4)
    for route in routes:
        route.signal()
    loaded.receives(rare(0x51), msi(0x42), msi(0x43), msi(0x44))
    for route in routes:
        route.close()


@pytest.mark.parametrize("quiesce", [True, False])
def test_quiescing_is_an_option(open_guest: Open, quiesce: bool) -> None:
    guest = open_guest(quiesce=quiesce, preload=False)
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


def test_a_cleared_route_forgets_its_msi_and_is_disarmed(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.clear_msi()
        assert (route.msi, route.armed, route.masked) == (None, False, False)
        route.signal()
        guest.receives_nothing()
        route.unmask()
        assert not route.armed
        assert route.consume_pending()


def test_a_batch_quiesces_once(backend: Backend, unloaded: Guest) -> None:
    guest = unloaded
    routes = [guest.partition.new_irqfd_route() for _ in range(3)]
    with guest.partition.batch() as batch:
        for number, route in enumerate(routes):
            batch.set_msi(route, msi(0x41 + number))
    before = guest.partition.stats()
    with guest.partition.batch() as batch:
        for number, route in enumerate(routes[:2]):
            batch.set_msi(route, msi(0x51 + number))
    after = guest.partition.stats()
    around = 3 if backend.quiesces else 0
    assert (after.pushes - before.pushes, after.disarms - before.disarms, after.arms - before.arms) == (
        1,
        around,
        around,
    )
    for route in routes:
        route.close()
