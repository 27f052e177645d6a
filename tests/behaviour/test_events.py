"""Eventfds: `EventFd` itself, the view of a route's, and a caller's."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from backends import Guest, SimulatedGuest
from mshv_irqfd import ClosedError, EventFd, IrqFdError
from mshv_irqfd.testing import failing
from support import close_as_someone_else, collect, msi, still_works

Open = Callable[..., Guest]


def test_an_eventfd_counts_signals_until_they_are_consumed() -> None:
    with EventFd() as event:
        assert event.consume() == 0
        event.signal()
        event.signal(2)
        event.signal(n=3)
        assert event.consume() == 6
        assert event.consume() == 0


def test_our_eventfds_are_non_blocking_and_close_on_exec(guest: Guest) -> None:
    with EventFd() as event, guest.partition.new_irqfd_route() as route:
        for fd in (event.fileno(), route.fileno()):
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
            assert not os.get_inheritable(fd)


def test_a_signal_on_a_full_counter_succeeds_and_adds_nothing() -> None:
    with EventFd() as event:
        event.signal(2**64 - 2)
        event.signal()
        event.signal(2**64 - 2)
        assert event.consume() == 2**64 - 2


@pytest.mark.parametrize(
    ("n", "error"),
    [
        (0, ValueError),
        (2**64 - 1, ValueError),
        (2**64, OverflowError),
        (-1, OverflowError),
        ("1", TypeError),
        (1.0, TypeError),
    ],
)
def test_an_invalid_number_of_signals_is_refused(n: Any, error: type[Exception]) -> None:
    with EventFd() as event:
        with pytest.raises(error, match="1 to 2"):
            event.signal(n)
        assert event.consume() == 0


def test_a_closed_eventfd_raises_closed_error_and_closes_twice() -> None:
    event = EventFd()
    assert not event.closed
    event.close()
    event.close()
    assert event.closed
    for use in (event.fileno, event.signal, event.consume):
        with pytest.raises(ClosedError):
            use()
    assert repr(event) == "<EventFd closed>"


def test_an_adopted_eventfd_shares_the_counter_and_leaves_the_callers_open(theirs: int) -> None:
    with EventFd.from_fd(theirs) as event:
        assert event.fileno() != theirs
        assert not os.get_inheritable(event.fileno())
        os.eventfd_write(theirs, 3)
        assert event.consume() == 3
        event.signal(2)
    assert os.eventfd_read(theirs) == 2


def test_an_object_with_fileno_is_accepted_like_a_number() -> None:
    with EventFd() as event, EventFd.from_fd(event) as twin:
        twin.signal(5)
        assert event.consume() == 5


def test_the_event_of_a_route_is_a_view_of_its_eventfd(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        view = route.event
        assert view.fileno() == route.fileno()
        view.signal(3)
        assert route.pending
        assert view.consume() == 3
        view.signal()
        route.set_msi(msi(0x41))
        guest.receives(msi(0x41))
        assert view.consume() == 0
        view.signal(7)
        guest.receives(msi(0x41))
        assert repr(view) == f"<EventFd fd={route.fileno()} of the route of GSI 24>"


def test_closing_the_view_leaves_the_route_its_descriptor(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        view, other = route.event, route.event
        view.close()
        assert view.closed
        with pytest.raises(ClosedError):
            view.signal()
        other.signal()
        route.set_msi(msi(0x41))
        route.signal()
        assert msi(0x41).vector in {interrupt.vector for interrupt in guest.arrived()}


def test_the_view_of_a_closed_route_raises_closed_error(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    view = route.event
    route.close()
    for use in (view.fileno, view.signal, view.consume):
        with pytest.raises(ClosedError):
            use()
    assert repr(view) == "<EventFd of a closed route>"


def test_a_view_keeps_its_route_alive(guest: Guest) -> None:
    view = guest.partition.new_irqfd_route().event
    collect()
    [route] = guest.partition.routes
    view.signal()
    assert route.pending
    route.close()


@pytest.mark.parametrize("flags", [os.EFD_CLOEXEC, os.EFD_CLOEXEC | os.EFD_NONBLOCK], ids=["blocking", "non-blocking"])
def test_a_callers_eventfd_raises_the_interrupt_of_its_route(guest: Guest, flags: int) -> None:
    fd = os.eventfd(0, flags)
    try:
        with guest.partition.new_irqfd_route(event=fd) as route:
            assert route.fileno() != fd
            assert route.consume_pending() is False
            route.set_msi(msi(0x41))
            os.eventfd_write(fd, 1)
            guest.receives(msi(0x41))
            route.mask()
            os.eventfd_write(fd, 4)
            assert route.pending
            assert route.event.consume() == 4
    finally:
        os.close(fd)


@pytest.mark.parametrize("armed", [False, True])
def test_a_route_keeps_working_when_the_caller_closes_its_eventfd(guest: Guest, armed: bool) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    with guest.partition.new_irqfd_route(event=fd) as route:
        if armed:
            route.set_msi(msi(0x42))
        os.close(fd)
        route.set_msi(msi(0x41))
        route.signal()
        guest.receives(msi(0x41))
        route.mask()
        route.signal()
        route.unmask()
        guest.receives(msi(0x41))


def refused(guest: Guest, event: Any, error: type[Exception], words: str) -> None:
    """Asserts that `new_irqfd_route()` refuses an event and changes nothing."""
    before = guest.partition.stats(), guest.partition.routes
    with pytest.raises(error, match=words):
        guest.partition.new_irqfd_route(event=event)
    assert (guest.partition.stats(), guest.partition.routes) == before
    still_works(guest)


def test_a_file_that_is_no_eventfd_is_refused(guest: Guest) -> None:
    with tempfile.TemporaryFile() as file:
        refused(guest, file, ValueError, "not an eventfd")
    read, write = os.pipe()
    refused(guest, write, ValueError, "pipe.*not an eventfd")
    os.close(read)
    os.close(write)
    timer = os.open("/dev/null", os.O_RDONLY)
    refused(guest, timer, ValueError, "/dev/null, not an eventfd")
    with pytest.raises(ValueError, match="not an eventfd"):
        EventFd.from_fd(timer)
    os.close(timer)


def test_an_eventfd_in_semaphore_mode_is_refused(guest: Guest) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
    refused(guest, fd, ValueError, "semaphore")
    with pytest.raises(ValueError, match="semaphore"):
        EventFd.from_fd(fd)
    os.close(fd)


def test_a_closed_descriptor_is_refused(guest: Guest) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    close_as_someone_else(fd)
    with pytest.raises(IrqFdError, match=f"{fd}.*not open") as failed:
        guest.partition.new_irqfd_route(event=fd)
    assert failed.value.errno == errno.EBADF
    with pytest.raises(IrqFdError):
        EventFd.from_fd(fd)
    still_works(guest)


@pytest.mark.parametrize(
    ("event", "error"),
    [("3", TypeError), (3.0, TypeError), (object(), TypeError), (-1, ValueError), (1 << 31, OverflowError)],
)
def test_an_invalid_descriptor_is_refused(guest: Guest, event: Any, error: type[Exception]) -> None:
    refused(guest, event, error, "descriptor")
    with pytest.raises(error):
        EventFd.from_fd(event)


def test_an_error_raised_by_fileno_reaches_the_caller(guest: Guest) -> None:
    closed = EventFd()
    closed.close()
    refused(guest, closed, ClosedError, "closed")


def test_an_eventfd_of_another_route_is_refused(guest: Guest, theirs: int) -> None:
    with guest.partition.new_irqfd_route(event=theirs):
        with pytest.raises(ValueError, match="route of GSI 24"):
            guest.partition.new_irqfd_route(event=theirs)
        assert len(guest.partition.routes) == 1
        still_works(guest)


def test_a_duplicate_of_the_eventfd_of_another_route_is_refused(guest: Guest, theirs: int) -> None:
    with guest.partition.new_irqfd_route(event=theirs) as route:
        twin = os.dup(theirs)
        for event in (twin, route, route.event, route.fileno()):
            with pytest.raises(ValueError, match="route of GSI 24"):
                guest.partition.new_irqfd_route(event=event)
        os.close(twin)
        still_works(guest)


def test_an_eventfd_of_a_route_of_another_partition_is_refused(open_guest: Open, theirs: int) -> None:
    first, second = open_guest(), open_guest()
    with first.partition.new_irqfd_route(event=theirs):
        with pytest.raises(ValueError, match="route of GSI 24 of another partition"):
            second.partition.new_irqfd_route(event=theirs)
        with second.partition.new_irqfd_route() as route, pytest.raises(ValueError, match="another partition"):
            first.partition.new_irqfd_route(event=route)
    still_works(first)
    still_works(second)


def test_an_eventfd_is_free_again_when_its_route_is_closed(guest: Guest, theirs: int) -> None:
    for vector in (0x41, 0x42):
        with guest.partition.new_irqfd_route(event=theirs) as route:
            route.set_msi(msi(vector))
            os.eventfd_write(theirs, 1)
            guest.receives(msi(vector))


def test_an_eventfd_is_free_again_when_the_partition_of_its_broken_route_is_closed(
    open_simulated: Callable[..., SimulatedGuest], theirs: int
) -> None:
    closed, other = open_simulated().partition, open_simulated().partition
    route = closed.new_irqfd_route(event=theirs)
    route.set_msi(msi(0x41))
    with failing(closed, "deassign_irqfd", errno.ENOMEM), pytest.raises(IrqFdError):
        route.close()
    with pytest.raises(ValueError, match="of another partition"):
        other.new_irqfd_route(event=theirs)
    closed.close()
    other.new_irqfd_route(event=theirs).close()


def test_a_refused_eventfd_leaves_the_lowest_gsi_free(guest: Guest) -> None:
    with pytest.raises(ValueError):
        guest.partition.new_irqfd_route(event=-1)
    with guest.partition.new_irqfd_route() as route:
        assert route.gsi == 24
