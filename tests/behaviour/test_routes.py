"""A route: its interrupts, its attributes, and the routes beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from backends import Backend, Guest
from mshv_irqfd import ClosedError, DeliveryMode, GsiState, Interrupt, IrqFdRoute, MsiRoute
from support import msi, still_works

Open = Callable[..., Guest]


def test_a_new_route_is_unmasked_and_has_no_msi(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        assert (route.masked, route.msi, route.armed, route.pending) == (False, None, False, False)
        assert route.state is GsiState.DISABLED
        assert route.partition is guest.partition
        assert not route.closed


def test_a_signal_on_an_armed_route_raises_its_interrupt(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(0xFEE00000, 0x41)
        assert (route.armed, route.msi) == (True, msi(0x41))
        for _ in range(3):
            route.signal()
            guest.receives(msi(0x41))


def test_a_bare_write_to_the_eventfd_raises_the_interrupt(guest: Guest) -> None:
    import os  # noqa: PLC0415 - the point is the bare write

    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        os.eventfd_write(route.fileno(), 1)
        guest.receives(msi(0x41))


def test_each_route_raises_its_own_interrupt(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(16)]
    for route in routes:
        route.set_msi(msi(0x80 + route.gsi))
    for route in routes[::3]:
        route.signal()
    guest.receives(*(msi(0x80 + route.gsi) for route in routes[::3]))
    for route in routes:
        route.close()


def test_a_retargeted_route_raises_the_new_interrupt_only(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        for vector in (0x41, 0x42, 0x43):
            route.set_msi(msi(vector))
            route.signal()
            guest.receives(msi(vector))


def test_interrupts_go_to_the_vp_that_the_msi_names(open_guest: Open) -> None:
    guest = open_guest(vps=2)
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41, 1))
        route.signal()
        guest.receives(msi(0x41, 1))


@pytest.mark.parametrize(
    ("address", "data"),
    [
        pytest.param(0xFEE00000, 0x8041, id="level"),
        pytest.param(0xFEE01004, 0x0141, id="logical-lowest-priority"),
        pytest.param(0xFEE00000, 0x0400, id="nmi"),
        pytest.param(0xFEE00008, 0xC041, id="hint-and-level-asserted"),
    ],
)
def test_an_interrupt_arrives_as_the_msi_says(simulated: Guest, address: int, data: int) -> None:
    with simulated.partition.new_irqfd_route() as route:
        route.set_msi(address, data)
        route.signal()
        simulated.receives(MsiRoute(address, data))


def test_an_interrupt_has_all_the_fields_that_its_backend_knows(backend: Backend, guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.signal()
        [interrupt] = guest.arrived()
    if backend.name == "kvm":
        assert interrupt == Interrupt(0x41, 0, None, None, None)
    elif not guest.counted:
        assert interrupt == Interrupt(0x41, None, None, None, None)
    else:
        assert interrupt == Interrupt(0x41, 0, DeliveryMode.FIXED, logical=False, level=False)
        assert interrupt.delivery_mode is DeliveryMode.FIXED


def test_a_closed_route_leaves_the_others_as_they_are(guest: Guest) -> None:
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    first.set_msi(msi(0x41))
    second.set_msi(msi(0x42))
    first.close()
    second.signal()
    guest.receives(msi(0x42))
    second.close()
    still_works(guest)


USES: dict[str, Callable[[IrqFdRoute], object]] = {
    "set_msi": lambda route: route.set_msi(msi(0x42)),
    "clear_msi": lambda route: route.clear_msi(),
    "mask": lambda route: route.mask(),
    "unmask": lambda route: route.unmask(),
    "masked": lambda route: route.masked,
    "armed": lambda route: route.armed,
    "msi": lambda route: route.msi,
    "state": lambda route: route.state,
    "pending": lambda route: route.pending,
    "consume_pending": lambda route: route.consume_pending(),
    "signal": lambda route: route.signal(),
    "fileno": lambda route: route.fileno(),
    "event": lambda route: route.event,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_closed_route_raises_closed_error(guest: Guest, use: Callable[[IrqFdRoute], object]) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    route.close()
    assert route.closed
    with pytest.raises(ClosedError, match="24"):
        use(route)
    still_works(guest)


def test_closing_a_route_twice_is_fine(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.close()
    with guest.partition.new_irqfd_route() as other:
        assert other.gsi == route.gsi
        route.close()
        assert guest.partition.gsi_state(other.gsi) is GsiState.DISABLED
    with route:
        pass
    still_works(guest)


def test_with_closes_a_route_and_lets_the_exception_through(guest: Guest) -> None:
    with pytest.raises(KeyError, match="ours"), guest.partition.new_irqfd_route() as route:
        raise KeyError("ours")
    assert route.closed
    assert guest.partition.gsi_state(24) is GsiState.UNALLOCATED


def test_open_routes_are_listed_by_gsi_as_the_same_objects(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(4)]
    routes[1].close()
    listed = guest.partition.routes
    assert len(listed) == 3
    assert all(one is other for one, other in zip(listed, (routes[0], routes[2], routes[3]), strict=True))
    for route in routes:
        route.close()
    assert guest.partition.routes == []


def test_a_route_refuses_attributes_that_it_does_not_have(simulated: Guest) -> None:
    with simulated.partition.new_irqfd_route() as route:
        wrong: Any = route
        for name in ("gsi", "armed", "colour"):
            with pytest.raises(AttributeError):
                setattr(wrong, name, 1)


def test_the_repr_of_a_route_shows_gsi_state_msi_and_pending(simulated: Guest) -> None:
    route = simulated.partition.new_irqfd_route()
    assert repr(route) == "<IrqFdRoute gsi=24 DISABLED no MSI>"
    route.signal()
    assert repr(route) == "<IrqFdRoute gsi=24 DISABLED no MSI pending>"
    route.consume_pending()
    route.set_msi(0xFEE01004, 0x8141)
    assert repr(route) == (
        "<IrqFdRoute gsi=24 ENABLED 0xfee01004/0x8141 (vector 0x41 lowest-priority level to logical 1)>"
    )
    route.mask()
    assert "DISABLED masked 0xfee01004/0x8141" in repr(route)
    route.close()
    assert repr(route) == "<IrqFdRoute gsi=24 closed>"
