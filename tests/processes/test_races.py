"""Every pair of operations at the same moment: on one route, on two, and a batch beside either.

The outcome is that of one order of the two. `MSHV_IRQFD_RACES` sets how often each pair runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import pytest
from mshv_irqfd import ClosedError, GsiState, IrqFdRoute, Partition
from support import msi, still_works

if TYPE_CHECKING:
    from backends import Guest

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
    table = {entry.gsi: (entry.address, entry.data) for entry in guest.partition.routing_table()}
    guest.arrived()
    for route in routes:
        if route.closed:
            continue
        armed = route.msi is not None and not route.masked
        assert (route.armed, route.state) == (armed, GsiState.ENABLED if armed else GsiState.DISABLED)
        route.signal()
        assert route.pending is not armed
        if armed and route.msi is not None:
            assert route.armed_gsi is not None
            assert table[route.armed_gsi] == (route.msi.address, route.msi.data)
            guest.receives(route.msi)
        else:
            guest.receives_nothing()
        route.close()
    still_works(guest)


@pytest.mark.parametrize("on", ["one-route", "two-routes"])
@pytest.mark.parametrize("state", ["armed", "masked"])
@pytest.mark.parametrize(
    ("first", "second"),
    [pytest.param(*pair, id="+".join(pair)) for pair in combinations_with_replacement(OPERATIONS, 2)],
)
def test_two_operations_at_once_end_as_if_one_came_after_the_other(
    open_guest: Callable[..., Guest], on: str, state: str, first: str, second: str
) -> None:
    closing = "close-partition" in (first, second)
    guest = None if closing else open_guest()
    for _ in range(TIMES):
        if guest is None or closing:
            guest = open_guest()
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
