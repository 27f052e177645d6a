"""Rule 4: the entries of the routing table after each step, and the steps that push it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
from backends import Backend, Guest
from modes import Mode, in_both_modes, modes, options, without_spare_gsis
from support import NOTHING, counting, msi, table_entry

Open = Callable[..., Guest]


@without_spare_gsis
def test_the_table_follows_each_step(guest: Guest) -> None:
    partition = guest.partition
    assert partition.routing_table() == []
    first, second = partition.new_irqfd_route(), partition.new_irqfd_route()
    assert partition.routing_table() == []
    second.set_msi(msi(0x42))
    assert partition.routing_table() == [table_entry(25, msi(0x42))]
    first.set_msi(msi(0x41))
    assert partition.routing_table() == [table_entry(24, msi(0x41)), table_entry(25, msi(0x42))]
    first.set_msi(msi(0x43))
    assert partition.routing_table() == [table_entry(24, msi(0x43)), table_entry(25, msi(0x42))]
    second.mask()
    assert partition.routing_table() == [table_entry(24, msi(0x43)), table_entry(25, msi(0x42))]
    second.close()
    assert partition.routing_table() == [table_entry(24, msi(0x43)), table_entry(25, msi(0x42))]
    first.set_msi(msi(0x44))
    assert partition.routing_table() == [table_entry(24, msi(0x44))]
    first.close()


@without_spare_gsis
def test_a_cleared_entry_leaves_the_table_with_the_next_push(guest: Guest) -> None:
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    first.set_msi(msi(0x41))
    with counting(guest.partition) as delta:
        first.clear_msi()
    assert (delta.stats.pushes, delta.stats.disarms) == (0, 1)
    assert guest.partition.routing_table() == [table_entry(24, msi(0x41))]
    second.set_msi(msi(0x42))
    assert guest.partition.routing_table() == [table_entry(25, msi(0x42))]
    first.close()
    second.close()


@in_both_modes
def test_enabling_is_one_push_and_one_arming(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    with counting(guest.partition) as delta:
        route.set_msi(msi(0x41))
    assert (delta.stats.pushes, delta.stats.arms, delta.stats.disarms) == (1, 1, 0)
    route.close()


@in_both_modes
def test_setting_the_same_msi_or_mask_again_does_nothing(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    with counting(guest.partition) as delta:
        route.set_msi(msi(0x41))
        route.set_msi(0xFEE00000, 0x41)
        route.unmask()
    assert delta.stats == NOTHING
    route.clear_msi()
    route.mask()
    with counting(guest.partition) as delta:
        route.clear_msi()
        route.mask()
    assert delta.stats == NOTHING
    route.close()


@in_both_modes
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


@without_spare_gsis
def test_an_msi_set_while_masked_is_pushed_when_it_is_unmasked(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    route.mask()
    with counting(guest.partition) as delta:
        route.set_msi(msi(0x42))
        route.set_msi(msi(0x43))
    assert (delta.stats.pushes, delta.stats.arms) == (0, 0)
    assert route.msi == msi(0x43)
    assert guest.partition.routing_table() == [table_entry(24, msi(0x41))]
    with counting(guest.partition) as delta:
        route.unmask()
    assert (delta.stats.pushes, delta.stats.arms) == (1, 1)
    assert guest.partition.routing_table() == [table_entry(24, msi(0x43))]
    route.signal()
    guest.receives(msi(0x43))
    route.close()


@in_both_modes
def test_an_msi_changed_and_restored_while_masked_needs_no_push(guest: Guest) -> None:
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


@in_both_modes
def test_setting_an_msi_that_the_kernel_still_holds_needs_no_push(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    route.clear_msi()
    with counting(guest.partition) as delta:
        route.set_msi(msi(0x41))
    assert (delta.stats.pushes, delta.stats.arms) == (0, 1)
    route.signal()
    guest.receives(msi(0x41))
    route.close()


@pytest.mark.parametrize("mode", modes)
def test_closing_2000_routes_costs_no_push(backend: Backend, open_guest: Open, mode: Mode) -> None:
    guest = open_guest(gsis=range(24, 2024), **options(backend, mode))
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
        with counting(guest.partition) as delta:
            route.set_msi(msi(0x21))
        if mode == "unloaded":
            assert guest.partition.routing_table() == [table_entry(24, msi(0x21))]
        else:
            assert delta.stats.pushes == 0


@in_both_modes
def test_a_batch_is_one_push(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(3)]
    with guest.partition.batch() as batch:
        for number, route in enumerate(routes):
            batch.set_msi(route, msi(0x41 + number))
        batch.set_msi(routes[2], 0xFEE00000, 0x51)
    stats = guest.partition.stats()
    assert (stats.pushes, stats.arms, stats.disarms) == (1, 3, 0)
    for route in routes:
        route.signal()
    guest.receives(msi(0x41), msi(0x42), msi(0x51))
    for route in routes:
        route.close()


@in_both_modes
def test_a_batch_that_masks_clears_or_changes_nothing_needs_no_push(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(3)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))
    pushes = guest.partition.stats().pushes
    with guest.partition.batch() as batch:
        batch.mask(routes[0])
        batch.clear_msi(routes[1])
        batch.set_msi(routes[2], msi(0x43))
    with guest.partition.batch() as batch:
        batch.unmask(routes[0])
    with guest.partition.batch():
        pass
    assert guest.partition.stats().pushes == pushes
    assert [route.armed for route in routes] == [True, False, True]
    for route in routes:
        route.close()
