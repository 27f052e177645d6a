"""Rule 7: a route is armed only if its destination has a VP."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from backends import Backend, Guest, KvmGuest
from mshv_irqfd import MissingVpError, MsiRoute, Partition, VpError
from support import NOTHING, msi, still_works

if TYPE_CHECKING:
    from raw_kvm import KvmVm

Open = Callable[..., Guest]


@pytest.mark.parametrize(
    ("vps", "indexes"),
    [(1, (0,)), (3, (0, 1, 2)), (0, ()), ([0, 5], (0, 5)), ((7, 2, 2), (2, 7)), (range(1, 4), (1, 2, 3))],
    ids=str,
)
def test_vps_are_a_number_or_indexes(open_guest: Open, vps: Any, indexes: tuple[int, ...]) -> None:
    assert open_guest(vps=vps).partition.vps == indexes


def test_there_is_one_vp_by_default(guest: Guest) -> None:
    assert guest.partition.vps == (0,)


def test_a_destination_without_a_vp_is_refused_before_any_ioctl(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        with pytest.raises(MissingVpError, match=r"GSI 24.*APIC id 1 .*VPs: 0"):
            route.set_msi(msi(0x41, 1))
        assert (route.msi, route.armed) == (None, False)
        assert guest.partition.stats() == NOTHING
    still_works(guest)


def test_a_retarget_to_a_destination_without_a_vp_is_refused_and_the_old_msi_stays(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        before = guest.partition.stats()
        with pytest.raises(MissingVpError):
            route.set_msi(msi(0x42, 9))
        assert (route.msi, route.armed, guest.partition.stats()) == (msi(0x41), True, before)
        route.signal()
        guest.receives(msi(0x41))


def test_an_msi_set_while_masked_is_checked_when_it_would_be_armed(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.mask()
        route.set_msi(msi(0x41, 3))
        with pytest.raises(MissingVpError, match="APIC id 3"):
            route.unmask()
        assert (route.masked, route.armed) == (True, False)
        guest.partition.create_vp(3)
        route.unmask()
        assert route.armed
        route.signal()
        guest.receives(msi(0x41, 3))


def test_a_vp_can_be_created_later(open_guest: Open) -> None:
    guest = open_guest(vps=0)
    with guest.partition.new_irqfd_route() as route:
        with pytest.raises(MissingVpError, match="VPs: none"):
            route.set_msi(msi(0x41))
        guest.partition.create_vp(0)
        assert guest.partition.vps == (0,)
        route.set_msi(msi(0x41))
        route.signal()
        guest.receives(msi(0x41))


def test_the_broadcast_destination_is_taken_only_where_it_is_safe(backend: Backend, guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        if backend.takes_broadcast:
            route.set_msi(msi(0x41, 0xFF))
            route.signal()
            guest.receives(msi(0x41, 0xFF))
        else:
            with pytest.raises(MissingVpError, match="255"):
                route.set_msi(msi(0x41, 0xFF))
            assert not route.armed
    still_works(guest)


def test_a_logical_destination_is_not_an_apic_id(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(MsiRoute(0xFEE07004, 0x41))
        assert route.armed


def test_the_check_can_be_turned_off(open_simulated: Open) -> None:
    guest = open_simulated(allow_missing_vp=True)
    with guest.partition.new_irqfd_route() as route:
        for apic_id in (9, 0xFF):
            route.set_msi(msi(0x41, apic_id))
            route.signal()
            guest.receives(msi(0x41, apic_id))


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (0, ValueError, "0 already exists"),
        (255, ValueError, "0 to 254"),
        (256, ValueError, "0 to 254"),
        (-1, ValueError, "0 to 254"),
        (1 << 64, OverflowError, "0 to 254"),
        ("1", TypeError, "'1'"),
        (1.0, TypeError, "1.0"),
        (None, TypeError, "None"),
    ],
)
def test_an_invalid_vp_index_is_refused(guest: Guest, index: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        guest.partition.create_vp(index)
    assert guest.partition.vps == (0,)
    still_works(guest)


@pytest.mark.parametrize(
    ("vps", "error"),
    [(-1, ValueError), (256, ValueError), ([255], ValueError), ([-1], ValueError), ("1", TypeError), (1.5, TypeError),
     ([None], TypeError), (1 << 64, OverflowError)],
    ids=str,
)  # fmt: skip
def test_invalid_vps_are_refused_at_opening(backend: Backend, vps: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"vps|VP"):
        backend.open(vps=vps)


def test_a_vp_that_the_kernel_refuses_is_an_error_and_the_partition_works_on(kvm: KvmGuest) -> None:
    import fcntl  # noqa: PLC0415 - one test alone needs it

    # A vCPU with the same index, made by a bare ioctl.
    vcpu = fcntl.ioctl(kvm.partition.fileno(), 0xAE41, 1)
    try:
        with pytest.raises(VpError, match="KVM_CREATE_VCPU") as failed:
            kvm.partition.create_vp(1)
        assert failed.value.errno == errno.EEXIST
        assert kvm.partition.vps == (0,)
    finally:
        import os  # noqa: PLC0415

        os.close(vcpu)
    still_works(kvm)


def test_one_missing_vp_fails_the_whole_batch_before_any_ioctl(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(3)]
    routes[0].set_msi(msi(0x41))
    before = guest.partition.stats()
    with pytest.raises(MissingVpError, match="7"), guest.partition.batch() as batch:
        batch.set_msi(routes[0], msi(0x51))
        batch.set_msi(routes[1], msi(0x52, 7))
        batch.mask(routes[2])
    assert guest.partition.stats() == before
    assert [(route.msi, route.masked) for route in routes] == [(msi(0x41), False), (None, False), (None, False)]
    for route in routes:
        route.close()
    still_works(guest)


def test_destinations_in_an_adopted_vm_are_checked_only_if_its_vps_are_named(vm: KvmVm) -> None:
    with Partition.from_fd(vm.fd, "kvm") as partition, partition.new_irqfd_route() as route:
        assert partition.vps is None
        route.set_msi(msi(0x41, 9))
        assert route.armed
    with Partition.from_fd(vm.fd, "kvm", vps=1) as partition, partition.new_irqfd_route() as route:
        assert partition.vps == (0,)
        with pytest.raises(MissingVpError):
            route.set_msi(msi(0x41, 9))
        route.set_msi(msi(0x41))
    with Partition.from_fd(vm.fd, "kvm", vps=[0, 9]) as partition, partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41, 9))
