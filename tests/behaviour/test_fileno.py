"""Descriptors in event loops: readable while something is pending on a route that is not armed."""

from __future__ import annotations

import asyncio
import io
import os
import select
import selectors
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mshv_irqfd import ClosedError, EventFd
from mshv_irqfd.testing import patience
from support import msi

if TYPE_CHECKING:
    from backends import Backend, Guest


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_a_descriptor_is_readable_exactly_while_something_is_pending(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        assert not readable(route.fileno())
        route.signal()
        assert readable(route.fileno())
        route.consume_pending()
        assert not readable(route.fileno())
        route.signal()
        route.set_msi(msi(0x41))
        assert not readable(route.fileno())
        guest.receives(msi(0x41))
        route.signal()
        guest.receives(msi(0x41))
        assert not readable(route.fileno())


def test_selectors_wait_for_routes_that_are_not_armed(guest: Guest) -> None:
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    with selectors.DefaultSelector() as selector:
        for route in (first, second):
            selector.register(route, selectors.EVENT_READ, route)
        assert selector.select(0) == []
        second.signal()
        [(key, _)] = selector.select(patience())
        assert key.data is second
        assert second.consume_pending()
        assert selector.select(0) == []
    first.close()
    second.close()


def test_asyncio_reads_what_is_pending(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route, EventFd() as own:

        async def two_signals() -> list[object]:
            loop, found = asyncio.get_running_loop(), asyncio.Queue[object]()
            loop.add_reader(route, lambda: found.put_nowait(route.consume_pending()))
            loop.add_reader(own, lambda: found.put_nowait(own.consume()))
            route.signal()
            first = await asyncio.wait_for(found.get(), patience())
            own.signal(3)
            second = await asyncio.wait_for(found.get(), patience())
            loop.remove_reader(route)
            loop.remove_reader(own)
            return [first, second]

        assert asyncio.run(two_signals()) == [True, 3]


def test_a_partition_has_its_own_descriptor_where_the_kernel_gives_one(backend: Backend, guest: Guest) -> None:
    if backend.name == "simulated":
        with pytest.raises(io.UnsupportedOperation):
            guest.partition.fileno()
        return
    fd = guest.partition.fileno()
    kind = {"kvm": "anon_inode:kvm-vm", "mshv": "anon_inode:mshv_partition"}[backend.name]
    assert str(Path(f"/proc/self/fd/{fd}").readlink()) == kind
    assert not os.get_inheritable(fd)
    guest.close()
    with pytest.raises(ClosedError):
        guest.partition.fileno()
