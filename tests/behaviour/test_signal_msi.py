"""`Partition.signal_msi()`: one MSI with no eventfd and no route."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from mshv_irqfd import ClosedError, InterruptError, MissingVpError, MsiRoute, Partition
from raw_kvm import KVM_SET_LAPIC
from support import counting, msi

if TYPE_CHECKING:
    from backends import Backend, Guest
    from faults import Faults
    from raw_kvm import KvmVm

Open = Callable[..., "Guest"]


def test_an_msi_arrives_without_a_route_and_without_a_push(guest: Guest) -> None:
    with counting(guest.partition) as delta:
        assert guest.partition.signal_msi(0xFEE00000, 0x41) is True
        assert guest.partition.signal_msi(msi(0x42)) is True
    guest.receives(msi(0x41), msi(0x42))
    assert not any(delta.stats)


def test_an_msi_arrives_with_its_destination_mode_and_trigger(open_guest: Open) -> None:
    guest = open_guest(vps=2)
    for one in (msi(0x41, 1), MsiRoute(0xFEE00000, 0xC142), MsiRoute(0xFEE0100C, 0x43)):
        guest.partition.signal_msi(one)
        guest.receives(*[one] if guest.reaches(one) else [])


def test_an_msi_beside_a_route_leaves_it_and_its_signals_alone(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.mask()
        route.signal()
        guest.partition.signal_msi(msi(0x51))
        guest.receives(msi(0x51))
        assert route.pending
        route.unmask()
        guest.receives(msi(0x41))


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ((0xFEF00000, 0x41), ValueError, "0xfef00000.*outside"),
        ((0xFEE00010, 0x41), ValueError, "bits 11:4"),
        ((0xFEE00000, 0x0F), ValueError, "vector 15"),
        ((0xFEE00000, 0x341), ValueError, "delivery mode 3"),
        ((0xFEE00000, 0x10041), ValueError, "16 bits"),
        ((2**64, 0x41), OverflowError, "MSI address"),
        ((-1, 0x41), OverflowError, "MSI address"),
        ((0xFEE00000, "A"), TypeError, "MSI data"),
        ((0xFEE00000,), TypeError, "address and data"),
        ((msi(0x41), 0x41), TypeError, "includes its data"),
    ],
)
def test_what_is_no_msi_is_refused_as_routes_refuse_it(
    guest: Guest, arguments: tuple[Any, ...], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        guest.partition.signal_msi(*arguments)
    guest.receives_nothing()


def test_a_destination_without_a_vp_is_refused_before_any_ioctl(guest: Guest) -> None:
    with pytest.raises(MissingVpError, match=r"^no VP has APIC id 9 \(VPs: 0\)"):
        guest.partition.signal_msi(msi(0x41, 9))
    assert guest.partition.stats().failures == 0
    guest.receives_nothing()
    guest.partition.create_vp(9)
    assert guest.partition.signal_msi(msi(0x41, 9))
    guest.receives(msi(0x41, 9))


def test_the_broadcast_destination_is_taken_where_routes_may_have_it(backend: Backend, guest: Guest) -> None:
    if backend.takes_broadcast:
        assert guest.partition.signal_msi(msi(0x41, 0xFF))
        guest.receives(msi(0x41))
    else:
        with pytest.raises(MissingVpError):
            guest.partition.signal_msi(msi(0x41, 0xFF))


def test_a_destination_without_a_vp_is_the_kernels_business_if_the_caller_allows_it(
    backend: Backend, open_guest: Open
) -> None:
    guest = open_guest(allow_missing_vp=True)
    # Only KVM reports that nobody took it.
    assert guest.partition.signal_msi(msi(0x41, 9)) is (backend.name != "kvm")
    guest.receives(*[] if backend.name == "kvm" else [msi(0x41, 9)])


def test_an_adopted_vm_gets_msis_and_tells_whether_its_guest_took_them(vm: KvmVm) -> None:
    with Partition.from_fd(vm, "kvm") as partition:
        assert partition.signal_msi(msi(0x41)) is True
        assert vm.vectors() == {0x41}
        registers = vm._registers()
        registers[0xF0:0xF4] = (0xFF).to_bytes(4, "little")  # the local APIC off
        fcntl.ioctl(vm.vcpu, KVM_SET_LAPIC, registers)
        assert partition.signal_msi(msi(0x42)) is False
        assert vm.vectors() == set()


def test_a_refused_msi_raises_interrupt_error_and_the_next_arrives(guest: Guest, faults: Faults) -> None:
    faults.fail(guest.partition, "signal_msi", errno.ENOMEM)
    with pytest.raises(InterruptError, match="out of memory") as failed:
        faults.run(partial(guest.partition.signal_msi, msi(0x41)))
    assert failed.value.errno == errno.ENOMEM
    assert failed.value.gsi is None
    assert failed.value.ioctl is not None
    assert isinstance(failed.value, OSError)
    assert guest.partition.stats().failures == 1
    guest.receives_nothing()
    assert faults.run(partial(guest.partition.signal_msi, msi(0x41)))
    guest.receives(msi(0x41))


def test_a_closed_partition_raises_closed_error(backend: Backend) -> None:
    partition = backend.open()
    partition.close()
    with pytest.raises(ClosedError):
        partition.signal_msi(msi(0x41))
