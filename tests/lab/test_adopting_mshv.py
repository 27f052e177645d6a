"""Adopting an mshv partition that somebody else made, as `tests/test_adopting.py` does with a VM of KVM."""

from __future__ import annotations

import fcntl
import io
import os
import struct
from typing import TYPE_CHECKING

import pytest
from backends import MshvGuest
from conftest import need
from mshv_irqfd import MissingVpError, Partition, RoutingEntry
from support import msi

if TYPE_CHECKING:
    from collections.abc import Iterator

CREATE_PARTITION, INITIALIZE, CREATE_VP = 0x4010B800, 0xB800, 0x4004B801
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


def test_an_adopted_partition_takes_the_interrupts_of_our_routes(made: int) -> None:
    guest = MshvGuest(Partition.from_fd(made, "mshv", vps=1))
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.signal()
        guest.receives(msi(0x41))
        with pytest.raises(MissingVpError):
            route.set_msi(msi(0x41, 5))
    assert guest.partition.quiesce
    guest.close()


def test_what_is_kept_stays_in_every_push_and_the_partition_is_left_to_its_maker(made: int) -> None:
    keep = RoutingEntry(5, 0xFEE00000, 0x55)
    with Partition.from_fd(made, "mshv", keep=[keep], vps=1) as partition, partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        assert partition.routing_table() == [keep, RoutingEntry(24, 0xFEE00000, 0x41)]
    # The descriptor is the maker's, and so is the partition: it can be adopted again.
    Partition.from_fd(made, "mshv").close()


def test_the_vps_of_an_adopted_partition_are_made_by_its_maker(made: int) -> None:
    with Partition.from_fd(made, "mshv") as partition:
        assert partition.vps is None
        with pytest.raises(io.UnsupportedOperation):
            partition.create_vp(1)
        with pytest.raises(ValueError, match="already"):
            Partition.from_fd(made, "mshv")
        with pytest.raises(ValueError, match="mshv_partition"):
            Partition.from_fd(made, "kvm")
