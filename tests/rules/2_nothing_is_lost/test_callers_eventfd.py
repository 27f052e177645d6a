"""Rule 2: signals in a caller's eventfd survive the route, before it is made and after it is closed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from support import msi

if TYPE_CHECKING:
    from backends import Backend, Guest


def test_signals_from_before_the_route_become_its_first_interrupt(guest: Guest, theirs: int) -> None:
    os.eventfd_write(theirs, 3)
    with guest.partition.new_irqfd_route(event=theirs) as route:
        assert route.pending
        route.set_msi(msi(0x41))
        guest.receives(msi(0x41))


def test_signals_after_a_route_is_closed_stay_in_the_callers_eventfd(guest: Guest, theirs: int) -> None:
    route = guest.partition.new_irqfd_route(event=theirs)
    route.set_msi(msi(0x41))
    route.close()
    os.eventfd_write(theirs, 2)
    guest.receives_nothing()
    assert os.eventfd_read(theirs) == 2


def test_signals_pending_when_a_route_is_closed_stay_in_the_callers_eventfd(guest: Guest, theirs: int) -> None:
    route = guest.partition.new_irqfd_route(event=theirs)
    route.set_msi(msi(0x41))
    route.mask()
    os.eventfd_write(theirs, 2)
    route.close()
    guest.receives_nothing()
    assert os.eventfd_read(theirs) == 2


def test_signals_after_a_partition_is_closed_stay_in_the_callers_eventfd(backend: Backend) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with backend.open() as partition:
        route = partition.new_irqfd_route(event=fd)
        route.set_msi(msi(0x41))
    os.eventfd_write(fd, 2)
    assert os.eventfd_read(fd) == 2
    os.close(fd)
