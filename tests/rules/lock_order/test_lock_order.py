"""Lock order: batches of many threads do not deadlock, and the body of a batch holds no lock."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from support import msi, places

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Guest


def test_the_body_of_a_batch_holds_no_lock(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        with guest.partition.batch() as batch:
            batch.set_msi(route, msi(0x41))
            thread = threading.Thread(target=route.set_msi, args=(msi(0x42),))
            thread.start()
            thread.join()
            assert route.msi == msi(0x42)
            with guest.partition.batch() as inner:
                inner.set_msi(route, msi(0x43))
            assert route.msi == msi(0x43)
        assert route.msi == msi(0x41)


@pytest.mark.parametrize("preload", [False, True])
def test_overlapping_batches_of_many_threads_do_not_deadlock(open_guest: Callable[..., Guest], preload: bool) -> None:
    guest = open_guest(preload=preload)
    routes = [guest.partition.new_irqfd_route() for _ in range(12)]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            order = routes[number:] + routes[:number]
            for turn in range(30):
                with guest.partition.batch() as batch:
                    for route in order[:8]:
                        batch.set_msi(route, msi(0x40 + (number * 30 + turn) % 0x80))
                routes[(number + turn) % 12].mask()
                routes[(number + turn) % 12].unmask()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(route.armed for route in routes)
    assert places(guest.partition, routes) == {route.gsi: route.msi for route in routes}
    for route in routes:
        assert route.msi is not None
        route.signal()
        guest.receives(route.msi)
    for route in routes:
        route.close()
