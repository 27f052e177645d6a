"""The routing table: its order, and the count of its entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support import counting, msi, spare_entries

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Backend, Guest

    Open = Callable[..., Guest]


def test_pushed_entries_are_counted_with_the_pins_of_kvm(backend: Backend, unloaded: Guest) -> None:
    pins = 40 if backend.name == "kvm" else 0
    first, second = unloaded.partition.new_irqfd_route(), unloaded.partition.new_irqfd_route()
    with counting(unloaded.partition) as delta:
        first.set_msi(msi(0x41))
        second.set_msi(msi(0x42))
    assert (delta.stats.pushes, delta.stats.entries_pushed, delta.stats.failures) == (2, 2 * pins + 3, 0)
    first.close()
    second.close()


def test_loaded_entries_are_counted_among_the_pushed_ones(backend: Backend, loaded: Guest) -> None:
    pins = 40 if backend.name == "kvm" else 0
    with loaded.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        stats = loaded.partition.stats()
        assert (stats.entries_pushed, stats.entries_loaded) == (pins + 1 + 240, 240)


@pytest.mark.parametrize(("preload", "spare"), [(False, 0), (True, 240)])
def test_the_table_is_sorted_by_gsi(backend: Backend, open_guest: Open, preload: bool, spare: int) -> None:
    guest = open_guest(preload=preload)
    routes = [guest.partition.new_irqfd_route() for _ in range(20)]
    for route in reversed(routes):
        route.set_msi(msi(0x40 + route.gsi))
    table = guest.partition.routing_table()
    assert table == sorted(table)
    if not preload:
        assert [entry.gsi for entry in table] == [route.gsi for route in routes]
    assert len(spare_entries(guest.partition)) == (spare if backend.loads() else 0)
    for route in routes:
        route.close()
