"""GSIs: allocated lowest first, freed when their route is closed, and refused outside the kernel's range."""

from __future__ import annotations

import resource
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from backends import Backend, Guest
from mshv_irqfd import ClosedError, GsiExhaustedError, GsiState
from support import msi, still_works

Open = Callable[..., Guest]


def test_gsis_are_2048_from_24_up_by_default(guest: Guest) -> None:
    assert guest.partition.gsis == range(24, 2072)


def test_gsis_are_handed_out_lowest_first(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(5)]
    assert [route.gsi for route in routes] == [24, 25, 26, 27, 28]
    for route in routes:
        route.close()


def test_a_closed_route_gives_its_gsi_back_and_the_lowest_goes_first(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(5)]
    for index in (3, 1, 4):
        routes[index].close()
    again = [guest.partition.new_irqfd_route() for _ in range(4)]
    assert [route.gsi for route in again] == [25, 27, 28, 29]
    for route in routes + again:
        route.close()


def test_running_out_of_gsis_is_an_error_until_a_route_is_closed(open_guest: Open) -> None:
    guest = open_guest(gsis=range(100, 103))
    routes = [guest.partition.new_irqfd_route() for _ in range(3)]
    with pytest.raises(GsiExhaustedError, match=r"3 GSIs \(100-102\)"):
        guest.partition.new_irqfd_route()
    routes[1].close()
    routes[1] = guest.partition.new_irqfd_route()
    assert routes[1].gsi == 101
    for route in routes:
        route.close()
    still_works(guest)


def test_a_gsi_is_unallocated_then_disabled_then_enabled_and_back(guest: Guest) -> None:
    partition = guest.partition
    seen: list[GsiState] = [partition.gsi_state(24)]
    with partition.new_irqfd_route() as route:
        steps: list[Callable[[], object]] = [
            lambda: route.set_msi(msi(0x41)),
            route.mask,
            route.unmask,
            route.clear_msi,
        ]
        seen.append(route.state)
        for step in steps:
            step()
            seen.append(partition.gsi_state(24))
            assert seen[-1] is route.state
    seen.append(partition.gsi_state(24))
    no, off, on = GsiState.UNALLOCATED, GsiState.DISABLED, GsiState.ENABLED
    assert seen == [no, off, on, off, on, off, no]


@pytest.mark.parametrize(
    ("gsi", "error", "words"),
    [
        (23, ValueError, "23"),
        (2072, ValueError, "2072"),
        (-1, OverflowError, "-1"),
        (1 << 32, OverflowError, "4294967296"),
        ("24", TypeError, "'24'"),
        (24.0, TypeError, "24.0"),
    ],
)
def test_the_state_of_another_gsi_is_refused_with_the_range(
    guest: Guest, gsi: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"{words}.*24"):
        guest.partition.gsi_state(gsi)
    still_works(guest)


def test_no_route_can_be_set_for_a_gsi_that_is_unallocated(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    route.close()
    before = guest.partition.stats()
    with pytest.raises(ClosedError, match=r"24.*unallocated"):
        route.set_msi(msi(0x42))
    assert guest.partition.stats() == before
    assert guest.partition.gsi_state(24) is GsiState.UNALLOCATED
    still_works(guest)


def test_a_closed_route_does_not_act_on_the_next_route_with_its_gsi(guest: Guest) -> None:
    old = guest.partition.new_irqfd_route()
    old.close()
    with guest.partition.new_irqfd_route() as new:
        assert new.gsi == old.gsi
        new.set_msi(msi(0x41))
        for call in (old.mask, old.clear_msi, old.unmask, old.signal):
            with pytest.raises(ClosedError):
                call()
        old.close()
        assert new.armed
        new.signal()
        guest.receives(msi(0x41))


BAD_RANGES = [
    pytest.param(range(24, 24), ValueError, "empty", id="empty"),
    pytest.param(range(30, 24), ValueError, "empty", id="backwards"),
    pytest.param(range(-1, 24), ValueError, "range\\(-1, 24\\)", id="negative"),
    pytest.param(range(24, 100, 2), ValueError, "step", id="stepped"),
    pytest.param(range(100, 24, -1), ValueError, "step", id="stepped-down"),
    pytest.param(range(24, 4097), ValueError, "4095", id="beyond-4096"),
    pytest.param(range(5000, 5001), ValueError, "4095", id="far-beyond"),
    pytest.param([24, 25], TypeError, "range", id="list"),
    pytest.param(24, TypeError, "range", id="int"),
    pytest.param(None, TypeError, "range", id="none"),
]


@pytest.mark.parametrize(("gsis", "error", "words"), BAD_RANGES)
def test_gsis_that_no_kernel_takes_are_refused_at_opening(
    backend: Backend, guest: Guest, gsis: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        backend.open(gsis=gsis)
    still_works(guest)


@pytest.mark.parametrize(
    ("gsis", "words"),
    [
        pytest.param(range(24), "0-23", id="pins"),
        pytest.param(range(23, 30), "0-23", id="one-pin"),
        pytest.param(range(24, 4096), "4056", id="more-than-fit-beside-the-pins"),
        pytest.param(range(39, 4096), "4056", id="one-more-than-fits"),
    ],
)
def test_kvm_refuses_gsis_that_do_not_fit_beside_its_pins(
    backend: Backend, guest: Guest, gsis: range, words: str
) -> None:
    if backend.name == "kvm":
        with pytest.raises(ValueError, match=words):
            backend.open(gsis=gsis)
    else:
        backend.open(gsis=gsis).close()
    still_works(guest)


def test_every_gsi_that_a_kernel_takes_can_be_armed_in_one_table(backend: Backend, open_guest: Open) -> None:
    gsis = range(40, 4096) if backend.name == "kvm" else range(4096)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4500:
        pytest.skip(f"needs 4500 file descriptors, and RLIMIT_NOFILE allows {hard}: raise it (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4500), hard))
    try:
        guest = open_guest(gsis=gsis)
        with ExitStack() as stack:
            routes = [stack.enter_context(guest.partition.new_irqfd_route()) for _ in gsis]
            with guest.partition.batch() as batch:
                for route in routes:
                    batch.set_msi(route, msi(0x30 + route.gsi % 0x80))
            assert len(guest.partition.routing_table()) == len(gsis)
            for route in (routes[0], routes[-1]):
                route.signal()
            guest.receives(msi(0x30 + gsis[0] % 0x80), msi(0x30 + gsis[-1] % 0x80))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
