"""A program that owns routes, for `test_processes.py` to start and to kill.

owner.py BACKEND children END      forks a child in each of PLACES, which ends by END; interrupts still arrive here
owner.py BACKEND pushing END       the same, while other threads push
owner.py BACKEND moving END        the same, while other threads move routes among spare GSIs
owner.py BACKEND killed EVENT      arms EVENT, says so, and pushes until it is killed
owner.py BACKEND outlived EVENT    arms EVENT, says so, and moves routes until it is killed, with a child that keeps the
                                   inherited descriptors until standard input ends
owner.py BACKEND adopted EVENT FD  adopts the partition FD, arms EVENT, says so, and waits to be killed
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from backends import Backend, Guest
from mshv_irqfd import EventFd, IrqFdRoute, Partition
from mshv_irqfd.testing import until
from support import MANY, changing, fork, msi, refusal

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    Life = Callable[[Guest, IrqFdRoute], bool]


def raise_it() -> NoReturn:
    raise KeyError("ours")


def wait_for_ever() -> None:
    while True:
        signal.pause()


ENDS: dict[str, Callable[[], object]] = {
    "end": lambda: None,
    "sys.exit": lambda: sys.exit(3),
    "exception": raise_it,
    "os._exit": lambda: os._exit(4),
    "SIGTERM": wait_for_ever,
    "SIGKILL": wait_for_ever,
}

KEPT: list[object] = []


class Late:
    """Uses a route while the modules are torn down."""

    def __init__(self, route: IrqFdRoute) -> None:
        self.mask, self.owner = route.mask, os.getpid()

    def __del__(self, getpid: Callable[[], int] = os.getpid, write: Callable[[int, bytes], int] = os.write) -> None:
        if getpid() != self.owner:
            try:
                self.mask()
            except Exception as error:
                write(1, f"late {type(error).__name__}\n".encode())


def armed(backend: Backend, *, preload: bool = True) -> tuple[Guest, IrqFdRoute]:
    guest = backend.guest(backend.open(preload=preload))
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    return guest, route


def in_globals(backend: Backend, life: Life, *, preload: bool = True) -> bool:
    guest, route = armed(backend, preload=preload)
    batch, event = guest.partition.batch(), EventFd()
    batch.mask(route)
    KEPT[:] = guest, route, route.event, batch, event, Late(route)
    if life(guest, route):
        return True
    KEPT.clear()
    event.close()
    guest.close()
    return False


def in_a_cycle(backend: Backend, life: Life) -> bool:
    guest, route = armed(backend)
    ring: list[object] = [guest, route, route.event, guest.partition.batch()]
    ring.append(ring)
    if life(guest, route):
        return True
    guest.close()
    return False


def in_with(backend: Backend, life: Life) -> bool:
    with backend.open() as partition, partition.new_irqfd_route() as route, route.event, EventFd():
        route.set_msi(msi(0x41))
        return life(backend.guest(partition), route)


def in_a_batch(backend: Backend, life: Life) -> bool:
    with backend.open() as partition, partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        with partition.batch() as batch:
            batch.mask(route)
            return life(backend.guest(partition), route)


PLACES = {"globals": in_globals, "cycle": in_a_cycle, "with": in_with, "batch": in_a_batch}


def children(backend: Backend, end: str) -> None:
    for name, place in PLACES.items():
        if place(backend, partial(has_a_child, name, end)):
            return


def children_meanwhile(backend: Backend, what: str, end: str) -> None:
    def life(guest: Guest, route: IrqFdRoute) -> bool:
        others = [guest.partition.new_irqfd_route() for _ in range(MANY)]
        with changing(guest.partition, others):
            stats = guest.partition.stats
            until(lambda: (stats().pushes if what == "pushing" else stats().hits) > 1, "the first change is made")
            ended = has_a_child(what, end, guest, route, once=False)
        if not ended:
            for each in (route, *others):
                each.close()
            assert {interrupt.vector for interrupt in guest.arrived()} <= {0x41}
        return ended

    in_globals(backend, life, preload=what == "moving")


def has_a_child(place: str, end: str, guest: Guest, route: IrqFdRoute, *, once: bool = True) -> bool:
    """Checks that signals arrive before, during and after a child's life. Returns True in the child, at its end."""

    def beat() -> None:
        route.signal()
        guest.gets(msi(0x41), once=once)

    beat()
    begin, begun = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(begun)
        os.read(begin, 1)
        atexit.register(lambda: print("atexit", refusal(route.mask), flush=True))
        ENDS[end]()
        return True
    os.close(begin)
    beat()
    os.close(begun)
    if end in signal.Signals.__members__:
        os.kill(pid, signal.Signals[end])
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        beat()
    for _ in range(3):
        beat()
    print(place, os.waitstatus_to_exitcode(ended[1]), flush=True)
    return False


def killed(backend: Backend, event: int, *, outlived: bool = False) -> None:
    # One owner is killed while it pushes, the other while it moves routes.
    partition = backend.open(preload=outlived)
    route = partition.new_irqfd_route(event=event)
    route.set_msi(msi(0x41))
    others = [partition.new_irqfd_route() for _ in range(MANY)]
    pid = fork() if outlived else os.getpid()
    if pid == 0:
        sys.stdin.read()
        os._exit(0)
    print(pid, flush=True)
    for turn in count():
        with partition.batch() as batch:
            for other in others:
                batch.set_msi(other, msi(0x42 + turn % 2))


def adopted(backend: Backend, event: int, fd: int) -> None:
    partition = Partition.from_fd(fd, backend.name, vps=1)  # type: ignore[arg-type]
    route, own = partition.new_irqfd_route(event=event), partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    own.set_msi(msi(0x42))
    print(os.getpid(), flush=True)
    wait_for_ever()


def main(name: str, what: str, *arguments: str) -> None:
    backend = Backend(name)
    match what, arguments:
        case "children", (end,):
            children(backend, end)
        case (("pushing" | "moving"), (end,)):
            children_meanwhile(backend, what, end)
        case (("killed" | "outlived"), (event,)):
            killed(backend, int(event), outlived=what == "outlived")
        case "adopted", (event, fd):
            adopted(backend, int(event), int(fd))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
