"""The routing table: its order, and the count of its entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support import counting, msi

if TYPE_CHECKING:
    from backends import Backend, Guest


def test_pushed_entries_are_counted_with_the_pins_of_kvm(backend: Backend, guest: Guest) -> None:
    pins = 40 if backend.name == "kvm" else 0
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    with counting(guest.partition) as delta:
        first.set_msi(msi(0x41))
        second.set_msi(msi(0x42))
    assert (delta.stats.pushes, delta.stats.entries_pushed, delta.stats.failures) == (2, 2 * pins + 3, 0)
    first.close()
    second.close()


def test_the_table_is_sorted_by_gsi(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(20)]
    for route in reversed(routes):
        route.set_msi(msi(0x40 + route.gsi))
    table = guest.partition.routing_table()
    assert table == sorted(table)
    assert len(table) == 20
    for route in routes:
        route.close()
