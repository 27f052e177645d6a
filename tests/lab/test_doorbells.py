"""Doorbells and direct MSIs on the mshv driver: collisions that it misses, refused hypercalls, failing allocations."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING

import pytest
from backends import MshvGuest
from faults import MSHV_IOEVENTFD
from hvstub import Hypercall, Status, kernel_allocation_fails
from mshv_irqfd import InterruptError, IoEventFd, IoEventFdError, open_partition
from needs import need
from support import msi, still_works

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESS = 0xD0000000
LIMIT = 100
"""More allocations than any of these calls makes."""


@pytest.fixture
def guest() -> Iterator[MshvGuest]:
    need("mshv")
    guest = MshvGuest(open_partition("mshv"))
    yield guest
    guest.close()


def rings(guest: MshvGuest, doorbell: IoEventFd) -> bool:
    taken, count = guest.writes(ADDRESS, bytes(4)), doorbell.consume()
    assert (taken, count) in ((True, 1), (False, 0))
    return taken


def test_the_driver_misses_collisions_at_unequal_length_and_one_write_rings_both(guest: MshvGuest) -> None:
    # The reason why the package looks for collisions itself.
    events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    for event, length in zip(events, (0, 4), strict=True):
        fcntl.ioctl(guest.partition.fileno(), MSHV_IOEVENTFD, struct.pack("<QQIiI4x", 0, ADDRESS, length, event, 0))
    assert guest.writes(ADDRESS, bytes(4))
    assert [os.eventfd_read(event) for event in events] == [1, 1]
    with pytest.raises(OSError, match="File exists"):
        fcntl.ioctl(guest.partition.fileno(), MSHV_IOEVENTFD, struct.pack("<QQIiI4x", 0, ADDRESS, 4, events[0], 0))
    with pytest.raises(IoEventFdError, match="another program") as failed:
        guest.partition.ioeventfd(ADDRESS, 4)
    assert failed.value.errno == errno.EEXIST
    for event in events:
        os.close(event)


@pytest.mark.parametrize("code", [Hypercall.CREATE_PORT, Hypercall.CONNECT_PORT])
def test_a_doorbell_that_the_hypervisor_refuses_leaves_nothing(guest: MshvGuest, code: Hypercall) -> None:
    before = guest.stub.counters().held
    with guest.stub.failing(code) as outcome, pytest.raises(IoEventFdError) as failed:
        guest.partition.ioeventfd(ADDRESS, 4)
    assert outcome.injected
    assert failed.value.errno == errno.EIO
    assert guest.stub.counters().held == before
    with guest.partition.ioeventfd(ADDRESS, 4) as doorbell:
        assert rings(guest, doorbell)
    assert guest.stub.counters().held == before


def test_an_msi_that_the_hypervisor_refuses_is_an_error(guest: MshvGuest) -> None:
    with (
        guest.stub.failing(Hypercall.ASSERT_VIRTUAL_INTERRUPT, Status.OPERATION_FAILED) as outcome,
        pytest.raises(InterruptError, match="ASSERT_VIRTUAL_INTERRUPT") as failed,
    ):
        guest.partition.signal_msi(msi(0x41))
    assert outcome.injected
    assert failed.value.errno == errno.EIO
    assert [asserted.status for asserted in guest.stub.take()] == [Status.OPERATION_FAILED]
    still_works(guest)


def test_a_kernel_allocation_that_fails_makes_no_doorbell(guest: MshvGuest) -> None:
    before = guest.stub.counters().held
    failed = 0
    for number in range(1, LIMIT):
        doorbell: IoEventFd | None = None
        with kernel_allocation_fails(number) as outcome:
            try:
                doorbell = guest.partition.ioeventfd(ADDRESS, 4)
            except OSError as error:
                assert error.errno in (errno.ENOMEM, errno.ENFILE), error  # noqa: PT017 - it need not fail
        if doorbell is None:
            failed += 1
            assert not guest.writes(ADDRESS, bytes(4))
            doorbell = guest.partition.ioeventfd(ADDRESS, 4)
        assert rings(guest, doorbell)
        doorbell.close()
        assert guest.stub.counters().held == before
        if not outcome.injected:
            break
    else:
        pytest.fail(f"making a doorbell makes more than {LIMIT} allocations")
    assert failed > 0


def test_a_kernel_allocation_that_fails_leaves_closing_alone_or_is_an_error(guest: MshvGuest) -> None:
    for number in range(1, LIMIT):
        doorbell = guest.partition.ioeventfd(ADDRESS + 8 * number, 4)
        with kernel_allocation_fails(number) as outcome:
            try:
                doorbell.close()
            except IoEventFdError as error:
                assert error.errno == errno.ENOMEM  # noqa: PT017 - it need not fail
        assert doorbell.closed
        if not outcome.injected:
            return
    pytest.fail(f"closing a doorbell makes more than {LIMIT} allocations")


def test_a_kernel_allocation_that_fails_raises_no_msi(guest: MshvGuest) -> None:
    failed = 0
    for number in range(1, LIMIT):
        raised = True
        with kernel_allocation_fails(number) as outcome:
            try:
                guest.partition.signal_msi(msi(0x41))
            except InterruptError as error:
                assert error.errno == errno.ENOMEM  # noqa: PT017 - it need not fail
                raised = False
        guest.receives(*[msi(0x41)] if raised else [])
        failed += not raised
        if not outcome.injected:
            assert failed > 0
            return
    pytest.fail(f"raising an MSI makes more than {LIMIT} allocations")


def test_closed_partitions_leave_no_ports_behind(guest: MshvGuest) -> None:
    before = guest.stub.counters()
    for _ in range(20):
        with open_partition("mshv") as partition:
            doorbells = [partition.ioeventfd(ADDRESS + 8 * number, 4) for number in range(4)]
            doorbells[0].close()
            assert guest.stub.counters().ports == before.ports + 3
    assert guest.stub.counters().held == before.held
