"""Masking: it is sticky, keeps signals pending, and restores the last MSI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mshv_irqfd import GsiState
from support import msi

if TYPE_CHECKING:
    from backends import Guest


def test_a_masked_route_is_silent_and_unmasking_restores_the_last_msi(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.mask()
        assert (route.masked, route.armed, route.msi) == (True, False, msi(0x41))
        route.unmask()
        assert (route.masked, route.armed, route.msi) == (False, True, msi(0x41))
        guest.receives_nothing()
        route.signal()
        guest.receives(msi(0x41))


def test_a_mask_outlives_set_msi(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.mask()
        route.set_msi(msi(0x41))
        assert (route.masked, route.armed, route.msi) == (True, False, msi(0x41))
        route.signal()
        guest.receives_nothing()
        route.set_msi(msi(0x42))
        assert (route.masked, route.armed) == (True, False)
        guest.receives_nothing()
        route.unmask()
        guest.receives(msi(0x42))


def test_a_mask_outlives_clear_msi(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.mask()
        route.clear_msi()
        assert (route.masked, route.msi) == (True, None)
        route.set_msi(msi(0x42))
        assert not route.armed


def test_unmasking_without_an_msi_is_no_error_and_arms_when_one_is_set(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.mask()
        route.unmask()
        assert (route.masked, route.armed) == (False, False)
        assert route.state is GsiState.DISABLED
        route.set_msi(msi(0x41))
        assert route.armed


def test_masking_one_route_leaves_the_others_armed(guest: Guest) -> None:
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    first.set_msi(msi(0x41))
    second.set_msi(msi(0x42))
    first.mask()
    first.signal()
    second.signal()
    guest.receives(msi(0x42))
    assert first.consume_pending()
    first.close()
    second.close()
