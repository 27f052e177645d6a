"""Rule 2: signals stay pending while a route is not armed, and arming delivers one interrupt for all of them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from backends import Backend, Guest, SimulatedGuest
from mshv_irqfd.testing import until
from support import msi

if TYPE_CHECKING:
    from mshv_irqfd import IrqFdRoute

Open = Callable[..., Guest]


def leave(_: IrqFdRoute) -> None:
    """Does nothing: a new route is not armed."""


def mask(route: IrqFdRoute) -> None:
    route.set_msi(msi(0x42))
    route.mask()


def clear(route: IrqFdRoute) -> None:
    route.set_msi(msi(0x41))
    route.clear_msi()


def mask_and_change(route: IrqFdRoute) -> None:
    route.set_msi(msi(0x41))
    route.mask()
    route.set_msi(msi(0x42))


def set_msi(route: IrqFdRoute) -> None:
    route.set_msi(msi(0x42))


def unmask(route: IrqFdRoute) -> None:
    route.unmask()


UNARMED: dict[str, tuple[Callable[[IrqFdRoute], object], Callable[[IrqFdRoute], object]]] = {
    "never-routed": (leave, set_msi),
    "masked": (mask, unmask),
    "cleared": (clear, set_msi),
    "changed-while-masked": (mask_and_change, unmask),
}

unarmed = pytest.mark.parametrize(("disarm", "arm"), UNARMED.values(), ids=UNARMED)


@unarmed
@pytest.mark.parametrize("signals", [1, 5])
def test_signals_stay_pending_until_the_route_is_armed_and_become_one_interrupt(
    guest: Guest, disarm: Callable[[IrqFdRoute], object], arm: Callable[[IrqFdRoute], object], signals: int
) -> None:
    with guest.partition.new_irqfd_route() as route:
        disarm(route)
        assert not route.pending
        for _ in range(signals):
            route.signal()
        assert route.pending
        guest.receives_nothing()
        assert route.pending
        arm(route)
        guest.receives(msi(0x42))
        assert not route.pending


def test_masking_keeps_pending_signals(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.signal()
        for _ in range(2):
            route.mask()
            assert route.pending
        route.set_msi(msi(0x41))
        route.unmask()
        guest.receives(msi(0x41))


@unarmed
def test_arming_without_a_signal_raises_nothing(
    guest: Guest, disarm: Callable[[IrqFdRoute], object], arm: Callable[[IrqFdRoute], object]
) -> None:
    with guest.partition.new_irqfd_route() as route:
        disarm(route)
        arm(route)
        guest.receives_nothing()


@unarmed
def test_a_consumed_signal_raises_no_interrupt(
    guest: Guest, disarm: Callable[[IrqFdRoute], object], arm: Callable[[IrqFdRoute], object]
) -> None:
    with guest.partition.new_irqfd_route() as route:
        disarm(route)
        route.signal()
        assert route.consume_pending() is True
        assert route.pending is False
        assert route.consume_pending() is False
        arm(route)
        # Disarming flushes the work that arming began.
        route.mask()
        guest.receives_nothing()


def test_nothing_is_pending_on_an_armed_route(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.signal()
        route.set_msi(msi(0x41))
        for _ in range(200):
            route.signal()
            assert route.pending is False
            assert route.consume_pending() is False
        route.mask()
        assert route.pending is False
        assert guest.arrived() != []


def test_consuming_an_armed_route_leaves_its_interrupts_alone(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        for _ in range(100):
            route.signal()
            assert route.consume_pending() is False
            guest.receives(msi(0x41))


def test_arming_leaves_nothing_in_the_counter_of_a_blocking_eventfd_and_does_not_block(guest: Guest) -> None:
    theirs = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        with guest.partition.new_irqfd_route(event=theirs) as route:
            route.set_msi(msi(0x41))
            route.mask()
            os.eventfd_write(theirs, 5)
            route.unmask()
            assert select.select([theirs], [], [], 0)[0] == []
            guest.receives(msi(0x41))
            route.mask()
            assert not route.pending
            assert route.consume_pending() is False
            route.unmask()
            guest.receives_nothing()
    finally:
        os.close(theirs)


def test_a_second_arming_does_not_repeat_the_interrupt_of_the_first(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.mask()
        route.signal()
        route.unmask()
        guest.receives(msi(0x41))
        for _ in range(20):
            route.mask()
            route.unmask()
        route.mask()
        guest.receives_nothing()


def test_a_push_for_one_route_keeps_the_signals_of_another(open_guest: Open) -> None:
    guest = open_guest(quiesce=True, preload=False)
    masked, other = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    masked.set_msi(msi(0x41))
    masked.mask()
    masked.signal()
    for vector in range(0x50, 0x60):
        other.set_msi(msi(vector))
    assert masked.pending
    guest.receives_nothing()
    masked.unmask()
    guest.receives(msi(0x41))
    masked.close()
    other.close()


Churn = Callable[["IrqFdRoute", "IrqFdRoute", int], object]

CHURN: dict[str, tuple[bool, Churn]] = {
    "masked-and-unmasked": (True, lambda route, _, turn: route.mask() if turn % 2 else route.unmask()),
    "pushes-for-another": (False, lambda _, other, turn: other.set_msi(msi(0x50 + turn % 2))),
    "moves-of-another": (True, lambda _, other, turn: other.set_msi(msi(0x50 + turn % 2))),
    "cleared-and-set": (True, lambda route, _, turn: route.clear_msi() if turn % 2 else route.set_msi(msi(0x41))),
}
"""Whether messages are loaded, and a change that is made again and again. An even turn leaves the route armed."""


@pytest.mark.parametrize(("preload", "churn"), CHURN.values(), ids=CHURN)
def test_no_signal_is_lost_or_becomes_another_vector_while_routes_change(
    backend: Backend, open_guest: Open, preload: bool, churn: Churn
) -> None:
    guest = open_guest(quiesce=None if backend.quiesces else True, preload=preload)
    route, other = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    done, errors = threading.Event(), list[BaseException]()

    def change() -> None:
        turn = 0
        try:
            while not done.is_set() or turn % 2 == 0:
                churn(route, other, turn)
                turn += 1
            churn(route, other, 0)
        except BaseException as error:
            errors.append(error)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(150):
            route.signal()
            seen: list[int] = []

            def delivered(seen: list[int] = seen) -> bool:
                seen += [interrupt.vector for interrupt in guest.take_interrupts()]
                return bool(seen)

            until(delivered, "the signal is delivered")
            assert set(seen) == {0x41}
    finally:
        done.set()
        changer.join()
    assert errors == []
    # A signal that overlaps an arming may be delivered twice; the interrupts left are such second deliveries.
    route.close()
    other.close()
    assert {interrupt.vector for interrupt in guest.arrived()} <= {0x41}


def test_a_signal_that_finds_the_counter_full_succeeds(guest: Guest) -> None:
    for flags in (os.EFD_CLOEXEC, os.EFD_CLOEXEC | os.EFD_NONBLOCK):
        theirs = os.eventfd(0, flags)
        with guest.partition.new_irqfd_route(event=theirs) as route:
            os.eventfd_write(theirs, 2**64 - 2)
            route.signal()
            route.event.signal(1000)
            assert route.pending
            route.set_msi(msi(0x41))
            guest.receives(msi(0x41))
        os.close(theirs)


def test_an_armed_route_delivers_before_it_is_disarmed(open_simulated: Callable[..., SimulatedGuest]) -> None:
    guest = open_simulated()
    with guest.partition.new_irqfd_route() as route:
        for _ in range(100):
            route.set_msi(msi(0x41))
            route.signal()
            route.mask()
            guest.receives(msi(0x41))
            assert not route.pending
            route.unmask()


def test_a_signal_before_the_mask_is_delivered(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.signal()
        route.mask()
        assert not route.pending
        guest.receives(msi(0x41))


@pytest.mark.thread_unsafe(reason="the signals are the main thread's")
def test_unix_signals_that_come_during_a_call_disturb_nothing(guest: Guest) -> None:
    caught = 0

    def catch(*_: object) -> None:
        nonlocal caught
        caught += 1

    before = signal.signal(signal.SIGUSR1, catch)
    # Another process: a thread would need the interpreter, which most calls here keep.
    disturb = f"import os\nwhile True: os.kill({os.getpid()}, {int(signal.SIGUSR1)})"
    with subprocess.Popen([sys.executable, "-c", disturb]) as disturber, guest.partition.new_irqfd_route() as route:
        try:
            mask(route)
            # A look at a counter fails with EINTR only if that is 0.
            while caught < 200:
                assert not any(route.pending for _ in range(1000))
                assert not guest.partition.save()["routes"][0]["pending"]
            route.signal()
            assert route.pending
        finally:
            disturber.kill()
            disturber.wait()
            signal.signal(signal.SIGUSR1, before)
        route.unmask()
        guest.receives(msi(0x42))
