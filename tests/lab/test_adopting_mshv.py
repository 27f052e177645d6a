"""Adopting the mshv partition of another VMM, as `tests/behaviour/test_adopting.py` does with a VM of KVM."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import signal
import struct
from typing import TYPE_CHECKING

import pytest
from backends import Backend, MshvGuest
from mshv_irqfd import IrqFdError, MissingVpError, Partition, RoutingEntry
from needs import need
from support import an_owner, counting, msi, spare_entries

if TYPE_CHECKING:
    from collections.abc import Iterator

CREATE_PARTITION, INITIALIZE, CREATE_VP, IRQFD = 0x4010B800, 0xB800, 0x4004B801, 0x4010B803
IRQFD_DEASSIGN = 1
LAPIC_AND_X2APIC = 3


@pytest.fixture
def made() -> Iterator[int]:
    """A partition with VP 0, made by raw ioctls."""
    need("mshv")
    mshv = os.open("/dev/mshv", os.O_RDWR | os.O_CLOEXEC)
    partition = fcntl.ioctl(mshv, CREATE_PARTITION, bytearray(struct.pack("QQ", LAPIC_AND_X2APIC, 0)), True)
    os.close(mshv)
    fcntl.ioctl(partition, INITIALIZE)
    vp = fcntl.ioctl(partition, CREATE_VP, bytearray(struct.pack("I", 0)), True)
    yield partition
    os.close(vp)
    os.close(partition)


def test_an_adopted_partition_receives_the_interrupts_of_its_routes(made: int) -> None:
    guest = MshvGuest(Partition.from_fd(made, "mshv", vps=1))
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.signal()
        guest.receives(msi(0x41))
        with pytest.raises(MissingVpError):
            route.set_msi(msi(0x41, 5))
    assert guest.partition.quiesce
    guest.close()


def test_an_adopted_partition_has_doorbells_and_gets_msis(made: int) -> None:
    guest = MshvGuest(Partition.from_fd(made, "mshv", vps=1))
    with guest.partition.ioeventfd(0xD0000000, 4) as doorbell:
        assert guest.writes(0xD0000000, bytes(4))
        assert doorbell.consume() == 1
    assert guest.partition.signal_msi(msi(0x41)) is True
    guest.receives(msi(0x41))
    left = guest.partition.ioeventfd(0xD0000000, 4)
    guest.close()
    assert left.closed
    assert not guest.writes(0xD0000000, bytes(4))


def test_kept_entries_stay_in_every_push_and_closing_leaves_the_partition_open(made: int) -> None:
    keep = RoutingEntry(5, 0xFEE00000, 0x55)
    with Partition.from_fd(made, "mshv", keep=[keep], vps=1) as partition, partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        assert partition.routing_table() == [keep, RoutingEntry(24, 0xFEE00000, 0x41)]
    # Closing leaves the partition open, so it can be adopted again.
    Partition.from_fd(made, "mshv").close()


def test_routes_of_an_adopted_partition_move_among_the_spare_gsis_that_it_is_given(made: int) -> None:
    spare = range(3000, 3400)
    guest = MshvGuest(Partition.from_fd(made, "mshv", spare=spare, vps=1))
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        with counting(guest.partition) as delta:
            route.set_msi(msi(0x51))
        assert (delta.stats.pushes, delta.stats.hits) == (0, 1)
        assert route.armed_gsi in spare
        assert set(spare_entries(guest.partition)) <= {*spare}
        route.signal()
        guest.receives(msi(0x51))
    guest.close()


def test_an_adopted_partition_refuses_to_create_vps(made: int) -> None:
    with Partition.from_fd(made, "mshv") as partition:
        assert partition.vps is None
        with pytest.raises(io.UnsupportedOperation):
            partition.create_vp(1)
        with pytest.raises(ValueError, match="already"):
            Partition.from_fd(made, "mshv")
        with pytest.raises(ValueError, match="mshv_partition"):
            Partition.from_fd(made, "kvm")


def test_an_irqfd_that_a_killed_owner_left_armed_meets_the_next_owner(made: int) -> None:
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with an_owner(Backend("mshv"), "adopted", event, made, fds=(event, made)) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == f"{owner.pid}\n"
        owner.kill()
        assert owner.wait() == -signal.SIGKILL
    guest = MshvGuest(Partition.from_fd(made, "mshv", vps=1))
    os.eventfd_write(event, 1)
    guest.receives(msi(0x41))
    with guest.partition.new_irqfd_route() as first, guest.partition.new_irqfd_route(event=event) as second:
        # The first new route gets the GSI of the dead owner, whose irqfd is still armed on it.
        first.set_msi(msi(0x51))
        first.signal()
        guest.receives(msi(0x51))
        os.eventfd_write(event, 1)
        guest.receives(msi(0x51))
        with pytest.raises(IrqFdError, match="already armed on a GSI") as failed:
            second.set_msi(msi(0x52))
        assert failed.value.errno == errno.EBUSY
        fcntl.ioctl(made, IRQFD, struct.pack("iiII", event, 0, first.gsi, IRQFD_DEASSIGN))
        second.set_msi(msi(0x52))
        os.eventfd_write(event, 1)
        guest.receives(msi(0x52))
    guest.close()
    os.close(event)
