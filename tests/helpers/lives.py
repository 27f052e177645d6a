"""Whole lives of partitions, from opening to closing, each of another kind.

As a program it runs all of them and some more; `make memcheck` runs it under valgrind.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from contextlib import suppress
from itertools import cycle, islice, permutations
from typing import TYPE_CHECKING, Any

from backends import Backend
from mshv_irqfd import EventFd, IrqFdError, SimulatedPartition
from support import collect, fork, msi, rare, refusal

if TYPE_CHECKING:
    from mshv_irqfd import IrqFdRoute


def closed(backend: Backend) -> None:
    with backend.open() as partition, partition.new_irqfd_route() as route, partition.new_irqfd_route() as other:
        with partition.batch() as batch:
            batch.set_msi(route, msi(0x41))
            batch.mask(other)
        view = route.event
        view.signal()
        view.close()
        route.set_event(None)
        with EventFd() as event, partition.batch() as batch:
            batch.set_event(other, route)
            batch.set_event(route, event)
        with partition.ioeventfd(0xD0000000, 4) as doorbell, doorbell.event as kick:
            doorbell.signal()
            assert kick.consume() == 1
        assert partition.signal_msi(msi(0x43))
        assert partition.routes == [route, other]


ORDERS = cycle(islice(permutations(range(6)), 0, None, 7))


def dropped(backend: Backend) -> None:
    partition = backend.open()
    routes = partition.new_irqfd_route(), partition.new_irqfd_route()
    held: list[Any] = [partition, *routes, routes[0].event, partition.batch(), EventFd()]
    held[1].set_msi(msi(0x41))
    held[4].set_msi(held[2], msi(0x42))
    del partition, routes
    for index in next(ORDERS):
        held[index] = None


def in_a_cycle(backend: Backend) -> None:
    partition = backend.open()
    ring: list[Any] = [partition, partition.new_irqfd_route(), partition.batch(), EventFd()]
    ring += [ring, ring[1].event, partition.ioeventfd(0xD0000000, 4)]
    ring[1].set_msi(msi(0x41))


def raising(backend: Backend) -> None:
    with suppress(KeyError), backend.open() as partition, partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        with partition.batch() as batch:
            batch.set_msi(route, msi(0x42))
            raise KeyError


def refused(backend: Backend) -> None:
    assert refusal(lambda: backend.open(vps=[255])) == "ValueError"
    with backend.open() as partition, partition.new_irqfd_route() as route:
        assert refusal(lambda: partition.new_irqfd_route(event=route)) == "ValueError"
        assert refusal(lambda: partition.new_irqfd_route(event=-1)) == "ValueError"
        with partition.new_irqfd_route() as other:
            assert refusal(lambda: route.set_event(other)) == "ValueError"
            with suppress(ValueError), partition.batch() as batch:
                batch.set_event(route, other)
        assert refusal(lambda: route.set_msi(0, 0)) == "ValueError"
        assert refusal(lambda: route.set_msi(msi(0x41, 9))) == "MissingVpError"


def closed_by_others(backend: Backend) -> None:
    theirs = os.eventfd(0, os.EFD_CLOEXEC)
    with suppress(IrqFdError), backend.open() as partition:
        route, other = partition.new_irqfd_route(event=theirs), partition.new_irqfd_route()
        route.set_msi(msi(0x41))
        other.set_msi(msi(0x42))
        os.close(theirs)
        os.close(other.fileno())
        assert refusal(other.close) == "IrqFdError"


LIVES_LED = (closed, dropped, in_a_cycle, raising, refused, closed_by_others)


def busy(backend: Backend, *, preload: bool = True) -> None:
    guest = backend.guest(backend.open(vps=2, preload=preload))
    partition = guest.partition
    routes = [partition.new_irqfd_route() for _ in range(50)]
    with partition.batch() as batch:
        for number, route in enumerate(routes):
            batch.set_msi(route, msi(0x40 + number, number % 2))
    for route in routes:
        route.signal()
    guest.receives(*(msi(0x40 + number, number % 2) for number in range(50)))
    routes[0].mask()
    routes[0].event.signal(3)
    assert routes[0].pending
    routes[0].unmask()
    guest.receives(msi(0x40))
    routes[1].clear_msi()
    assert partition.stats().arms >= 51
    loads = preload and backend.loads()
    assert len(partition.routing_table()) == 50 + (480 if loads else 0)
    if isinstance(partition, SimulatedPartition):
        failing(partition, routes)
    forking(backend, routes)
    routes[2].signal()
    guest.receives(msi(0x42))
    guest.close()


def failing(partition: SimulatedPartition, routes: list[IrqFdRoute]) -> None:
    def retarget() -> None:
        with partition.batch() as batch:
            for route in routes[10:]:
                batch.set_msi(route, rare(0x90))

    partition.fail("set_msi_routing", errno.ENOMEM)
    assert refusal(retarget) == "RoutingError"
    partition.fail("assign_irqfd", errno.EIO, after=20)
    partition.fail("deassign_irqfd", errno.EIO, after=55)
    assert refusal(retarget) == "IrqFdError"


def pushing(backend: Backend) -> None:
    busy(backend, preload=False)


def forking(backend: Backend, routes: list[IrqFdRoute]) -> None:
    pid = fork()
    if pid == 0:
        assert refusal(routes[0].mask) == "ForkedError"
        assert refusal(lambda: closed(backend)) == "none"
        routes.clear()
        collect()
        sys.exit()
    assert os.waitpid(pid, 0) == (pid, 0)


def main(*names: str) -> None:
    warnings.simplefilter("ignore", ResourceWarning)
    for name in names:
        for live in (*LIVES_LED, busy, pushing):
            live(Backend(name))
            collect()
            print(name, live.__name__, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
