"""Threads share a partition and its routes safely."""

from __future__ import annotations

import threading
from itertools import count
from typing import TYPE_CHECKING

import pytest
from mshv_irqfd import ClosedError, IrqFdRoute, MshvIrqFdError, MsiRoute, Partition
from mshv_irqfd.testing import until
from support import msi, still_works

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Backend, Guest


def in_threads(number_of_threads: int, work: Callable[[int], object]) -> None:
    """Runs work in many threads at once, and fails if any of them raises."""
    errors, gate = list[BaseException](), threading.Barrier(number_of_threads)

    def run(number: int) -> None:
        gate.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(number_of_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_routes_made_by_many_threads_each_have_their_own_gsi(guest: Guest) -> None:
    routes: list[IrqFdRoute] = []
    in_threads(8, lambda _: routes.extend(guest.partition.new_irqfd_route() for _ in range(25)))
    assert sorted(route.gsi for route in routes) == list(range(24, 224))
    assert guest.partition.routes == sorted(routes, key=lambda route: route.gsi)

    def close(number: int) -> None:
        for route in routes[number::8]:
            route.close()

    in_threads(8, close)
    assert guest.partition.routes == []
    still_works(guest)


def test_threads_that_use_routes_of_their_own_do_not_disturb_each_other(guest: Guest) -> None:
    def live(number: int) -> None:
        for turn in range(15):
            with guest.partition.new_irqfd_route() as route:
                route.set_msi(msi(0x40 + number))
                route.mask()
                assert not route.armed
                route.set_msi(msi(0x60 + turn))
                route.unmask()
                assert (route.armed, route.msi) == (True, msi(0x60 + turn))
                route.clear_msi()
                assert route.msi is None

    in_threads(8, live)
    assert guest.partition.routes == []
    stats = guest.partition.stats()
    assert (stats.arms, stats.failures) == (stats.disarms, 0)
    still_works(guest)


def test_threads_that_share_a_route_leave_it_consistent(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:

        def change(number: int) -> None:
            for turn in range(40):
                match (number + turn) % 4:
                    case 0:
                        route.set_msi(msi(0x41 + number))
                    case 1:
                        route.mask()
                    case 2:
                        route.unmask()
                    case _:
                        route.clear_msi()

        in_threads(6, change)
        route.consume_pending()
        assert route.armed == (not route.masked and route.msi is not None)
        route.unmask()
        route.set_msi(msi(0x51))
        route.signal()
        guest.receives(msi(0x51))


def test_one_eventfd_brought_by_many_threads_becomes_one_route(guest: Guest) -> None:
    import os  # noqa: PLC0415 - for the caller's eventfd

    fd, made, refused = os.eventfd(0, os.EFD_CLOEXEC), list[IrqFdRoute](), list[ValueError]()

    def bring(_: int) -> None:
        try:
            made.append(guest.partition.new_irqfd_route(event=fd))
        except ValueError as error:
            refused.append(error)

    in_threads(8, bring)
    assert (len(made), len(refused)) == (1, 7)
    made[0].close()
    os.close(fd)


def test_a_partition_closed_while_in_use_raises_only_closed_error(backend: Backend) -> None:
    for _ in range(5):
        partition = backend.open()
        busy = threading.Semaphore(0)

        def use(number: int, partition: Partition = partition, busy: threading.Semaphore = busy) -> None:
            if number == 0:
                for _ in range(7):
                    busy.acquire()
                partition.close()
            else:
                with pytest.raises(ClosedError), partition.new_irqfd_route() as route:
                    for turn in count():
                        busy.release()
                        route.set_msi(msi(0x41 + turn % 2))
                        route.signal()
                        partition.new_irqfd_route().close()

        in_threads(8, use)
        assert partition.closed


def test_signals_of_many_threads_become_interrupts_of_their_routes(simulated: Guest) -> None:
    routes = [simulated.partition.new_irqfd_route() for _ in range(6)]
    for number, route in enumerate(routes):
        route.set_msi(msi(0x41 + number))

    def churn(number: int) -> None:
        for turn in range(50):
            if number < 6:
                routes[number].signal()
            else:
                routes[turn % 6].mask()
                routes[turn % 6].unmask()

    in_threads(8, churn)
    vectors = {interrupt.vector for interrupt in simulated.arrived()}
    assert vectors == {0x41 + number for number in range(6)}
    for route in routes:
        route.close()


def test_reading_a_route_never_waits_for_changes_to_it(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        stop = threading.Event()

        def change() -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                route.set_msi(msi(0x41 + turn % 2))

        thread = threading.Thread(target=change)
        thread.start()
        try:
            until(lambda: route.msi is not None, "an MSI is set")
            seen: set[MsiRoute | None] = set()

            def both() -> bool:
                seen.add(route.msi)
                return seen >= {msi(0x41), msi(0x42)}

            until(both, "both MSIs are seen")
            assert seen == {msi(0x41), msi(0x42)}
        finally:
            stop.set()
            thread.join()


def test_an_error_in_one_thread_does_not_reach_another(simulated: Guest) -> None:
    def misuse(number: int) -> None:
        for _ in range(50):
            with simulated.partition.new_irqfd_route() as route:
                if number % 2:
                    with pytest.raises(MshvIrqFdError):
                        route.set_msi(msi(0x41, 9))
                else:
                    route.set_msi(msi(0x41))

    in_threads(6, misuse)
    still_works(simulated)
