"""Every pair of operations at the same moment: on one route, on two, and a batch beside either.

The outcome is that of one order of the two. `MSHV_IRQFD_RACES` sets how often each pair runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import combinations_with_replacement, cycle, islice
from typing import TYPE_CHECKING

import pytest
from modes import Mode, options
from mshv_irqfd import ClosedError, GsiState, IrqFdError, IrqFdRoute, Partition
from support import msi, places, still_works

if TYPE_CHECKING:
    from backends import Backend, Guest

MODES: tuple[Mode, ...] = ("loaded", "unloaded")
TIMES = int(os.environ.get("MSHV_IRQFD_RACES", "3"))

Operation = Callable[[Partition, IrqFdRoute, IrqFdRoute, int], object]


def batch(partition: Partition, route: IrqFdRoute, other: IrqFdRoute, base: int) -> None:
    with partition.batch() as changes:
        changes.set_msi(route, msi(base + 4))
        changes.unmask(other)
        changes.set_msi(other, msi(base + 5))


def batch_that_silences(partition: Partition, route: IrqFdRoute, other: IrqFdRoute, _: int) -> None:
    with partition.batch() as changes:
        changes.mask(other)
        changes.clear_msi(route)


def write(_: Partition, route: IrqFdRoute, __: IrqFdRoute, ___: int) -> None:
    try:
        route.event.signal(2)
    except ClosedError:
        assert route.closed
        raise


def exchange(partition: Partition, route: IrqFdRoute, other: IrqFdRoute, _: int) -> None:
    """Exchanges the eventfds of two routes. Another thread may have given one of them another meanwhile."""
    with suppress(ValueError, IrqFdError), partition.batch() as changes:
        changes.set_event(route, other)
        changes.set_event(other, route)


def make_and_close(partition: Partition, _: IrqFdRoute, __: IrqFdRoute, base: int) -> None:
    with partition.new_irqfd_route() as route:
        route.set_msi(msi(base + 6))


OPERATIONS: dict[str, Operation] = {
    "set_msi": lambda _, route, __, base: route.set_msi(msi(base + 1)),
    "set_msi-again": lambda _, route, __, base: route.set_msi(msi(base)),
    "clear_msi": lambda _, route, __, ___: route.clear_msi(),
    "mask": lambda _, route, __, ___: route.mask(),
    "unmask": lambda _, route, __, ___: route.unmask(),
    "signal": lambda _, route, __, ___: route.signal(),
    "write": write,
    "consume_pending": lambda _, route, __, ___: route.consume_pending(),
    "consume-view": lambda _, route, __, ___: route.event.consume(),
    "look": lambda _, route, __, ___: (route.state, route.armed, route.msi, route.masked, route.pending, repr(route)),
    "look-at-all": lambda partition, *_: (partition.routing_table(), partition.routes, partition.stats()),
    "close": lambda _, route, __, ___: route.close(),
    "set_event": lambda _, route, __, ___: route.set_event(None),
    "exchange": exchange,
    "batch": batch,
    "batch-that-silences": batch_that_silences,
    "make-and-close": make_and_close,
    "close-partition": lambda partition, *_: partition.close(),
}


def race(*operations: Callable[[], object]) -> None:
    """Starts operations at the same moment. They may raise ClosedError, and no other error."""
    start = threading.Barrier(len(operations))
    wrong: list[BaseException] = []

    def run(operation: Callable[[], object]) -> None:
        try:
            start.wait()
            operation()
        except ClosedError:
            pass
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(operation,)) for operation in operations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def check(guest: Guest, *routes: IrqFdRoute) -> None:
    """Asserts that the attributes of routes agree with the table, and that their signals arrive."""
    at = places(guest.partition, [route for route in routes if not route.closed])
    guest.arrived()
    for route in routes:
        if route.closed:
            continue
        armed = route.msi is not None and not route.masked
        assert (route.armed, route.state) == (armed, GsiState.ENABLED if armed else GsiState.DISABLED)
        route.signal()
        assert route.pending is not armed
        if armed and route.msi is not None:
            assert at[route.gsi] == route.msi
            guest.receives(route.msi)
        else:
            guest.receives_nothing()
        route.close()
    still_works(guest)


@pytest.mark.parametrize("on", ["one-route", "two-routes"])
@pytest.mark.parametrize("state", ["armed", "masked"])
@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, id="+".join(pair)) for pair in combinations_with_replacement(OPERATIONS, 2)],
)
def test_two_operations_at_once_end_as_if_one_came_after_the_other(
    backend: Backend, open_guest: Callable[..., Guest], on: str, state: str, pair: tuple[str, str]
) -> None:
    first, second = pair
    closing = "close-partition" in (first, second)
    guests: dict[Mode, Guest] = {}
    # In turn a new message is a push, or moves the route.
    for mode in islice(cycle(MODES), TIMES):
        if mode not in guests or closing:
            guests[mode] = open_guest(**options(backend, mode))
        guest = guests[mode]
        partition = guest.partition
        a, b = partition.new_irqfd_route(), partition.new_irqfd_route()
        for route, base in ((a, 0x40), (b, 0x50)):
            route.set_msi(msi(base))
            if state == "masked":
                route.mask()
        one = partial(OPERATIONS[first], partition, a, b, 0x40)
        two = partial(OPERATIONS[second], partition, *((a, b, 0x40) if on == "one-route" else (b, a, 0x50)))
        race(one, two)
        if closing:
            assert partition.closed
            assert a.closed
            assert b.closed
        else:
            check(guest, a, b)
