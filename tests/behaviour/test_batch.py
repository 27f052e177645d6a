"""A batch: several routes changed with one push, or none of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
from backends import Backend, Guest
from mshv_irqfd import Batch, ClosedError, IrqFdRoute
from support import NOTHING, collect, msi, still_works

Open = Callable[..., Guest]


def three(guest: Guest) -> list[IrqFdRoute]:
    return [guest.partition.new_irqfd_route() for _ in range(3)]


def close(routes: list[IrqFdRoute]) -> None:
    for route in routes:
        route.close()


def test_a_batch_changes_nothing_before_it_is_committed(guest: Guest) -> None:
    [route, *rest] = three(guest)
    with guest.partition.batch() as batch:
        batch.set_msi(route, msi(0x41))
        assert (route.msi, route.armed) == (None, False)
        assert guest.partition.stats().pushes == 0
    assert route.armed
    close([route, *rest])


@pytest.mark.parametrize("preload", [False, True])
def test_a_batch_of_all_kinds_of_changes_is_one_push_or_none_if_its_messages_are_loaded(
    backend: Backend, open_guest: Open, preload: bool
) -> None:
    guest = open_guest(preload=preload)
    new, moved, cleared, masked, unmasked = (guest.partition.new_irqfd_route() for _ in range(5))
    with guest.partition.batch() as batch:
        for number, route in enumerate((moved, cleared, masked, unmasked)):
            batch.set_msi(route, msi(0x41 + number))
        batch.mask(unmasked)
    unmasked.signal()
    before = guest.partition.stats().pushes
    with guest.partition.batch() as batch:
        batch.set_msi(new, msi(0x51))
        batch.set_msi(moved, msi(0x52))
        batch.clear_msi(cleared)
        batch.mask(masked)
        batch.unmask(unmasked)
    assert guest.partition.stats().pushes == before + (0 if preload and backend.loads() else 1)
    assert [route.armed for route in (new, moved, cleared, masked, unmasked)] == [True, True, False, False, True]
    assert cleared.msi is None
    assert masked.masked
    guest.receives(msi(0x44))
    for route in (new, moved, cleared, masked):
        route.signal()
    guest.receives(msi(0x51), msi(0x52))
    close([new, moved, cleared, masked, unmasked])


def test_two_routes_can_trade_their_msis(guest: Guest) -> None:
    first, second, third = three(guest)
    first.set_msi(msi(0x41))
    second.set_msi(msi(0x42))
    with guest.partition.batch() as batch:
        batch.set_msi(first, msi(0x42))
        batch.set_msi(second, msi(0x41))
    first.signal()
    guest.receives(msi(0x42))
    second.signal()
    guest.receives(msi(0x41))
    close([first, second, third])


def test_the_last_word_on_a_route_wins(guest: Guest) -> None:
    first, second, third = three(guest)
    with guest.partition.batch() as batch:
        batch.set_msi(first, msi(0x41))
        batch.clear_msi(first)
        batch.set_msi(first, msi(0x42))
        batch.mask(second)
        batch.set_msi(second, msi(0x43))
        batch.unmask(second)
        batch.set_msi(third, msi(0x44))
        batch.unmask(third)
        batch.mask(third)
    assert (first.msi, first.armed) == (msi(0x42), True)
    assert (second.masked, second.armed) == (False, True)
    assert (third.msi, third.masked, third.armed) == (msi(0x44), True, False)
    close([first, second, third])


def test_leaving_the_body_by_an_exception_applies_nothing(guest: Guest) -> None:
    routes = three(guest)
    with pytest.raises(KeyError, match="ours"), guest.partition.batch() as batch:
        batch.set_msi(routes[0], msi(0x41))
        raise KeyError("ours")
    assert routes[0].msi is None
    assert guest.partition.stats() == NOTHING
    with pytest.raises(ClosedError):
        batch.commit()
    close(routes)
    still_works(guest)


def test_committing_twice_raises(guest: Guest) -> None:
    routes = three(guest)
    batch = guest.partition.batch()
    batch.set_msi(routes[0], msi(0x41))
    batch.commit()
    with pytest.raises(ClosedError, match="batch"):
        batch.commit()
    assert routes[0].armed
    close(routes)


def test_a_commit_in_the_body_is_the_only_one(guest: Guest) -> None:
    routes = three(guest)
    with guest.partition.batch() as batch:
        batch.set_msi(routes[0], msi(0x41))
        batch.commit()
        routes[0].mask()
    assert routes[0].masked
    close(routes)


EDITS: dict[str, Callable[[Batch, IrqFdRoute], object]] = {
    "set_msi": lambda batch, route: batch.set_msi(route, msi(0x42)),
    "clear_msi": lambda batch, route: batch.clear_msi(route),
    "mask": lambda batch, route: batch.mask(route),
    "unmask": lambda batch, route: batch.unmask(route),
}
edits = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)


@edits
def test_a_closed_batch_takes_no_more_changes(guest: Guest, edit: Callable[[Batch, IrqFdRoute], object]) -> None:
    with guest.partition.new_irqfd_route() as route:
        batch = guest.partition.batch()
        batch.commit()
        with pytest.raises(ClosedError, match="batch"):
            edit(batch, route)
        assert repr(batch) == "<Batch closed>"
    still_works(guest)


@edits
def test_a_closed_route_fails_the_whole_batch_before_any_ioctl(
    guest: Guest, edit: Callable[[Batch, IrqFdRoute], object]
) -> None:
    first, second, third = three(guest)
    first.set_msi(msi(0x41))
    batch = guest.partition.batch()
    batch.set_msi(first, msi(0x51))
    edit(batch, second)
    batch.set_msi(third, msi(0x53))
    second.close()
    before = guest.partition.stats()
    with pytest.raises(ClosedError, match="25"):
        batch.commit()
    assert guest.partition.stats() == before
    assert (first.msi, third.msi) == (msi(0x41), None)
    close([first, third])
    still_works(guest)


@edits
def test_a_route_of_another_partition_fails_the_whole_batch_before_any_ioctl(
    open_guest: Open, edit: Callable[[Batch, IrqFdRoute], object]
) -> None:
    guest, other = open_guest(), open_guest()
    ours, theirs = guest.partition.new_irqfd_route(), other.partition.new_irqfd_route()
    theirs.set_msi(msi(0x41))
    batch = guest.partition.batch()
    batch.set_msi(ours, msi(0x51))
    edit(batch, theirs)
    before = guest.partition.stats(), other.partition.stats()
    with pytest.raises(ValueError, match=r"24.*another partition"):
        batch.commit()
    assert (guest.partition.stats(), other.partition.stats()) == before
    assert (ours.msi, theirs.armed, theirs.msi) == (None, True, msi(0x41))
    close([ours, theirs])
    still_works(guest)
    still_works(other)


def test_a_bad_msi_is_refused_at_the_call_and_the_batch_goes_on(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        with guest.partition.batch() as batch:
            batch.set_msi(route, msi(0x41))
            with pytest.raises(ValueError, match="0x0"):
                batch.set_msi(route, 0, 0x42)
        assert route.msi == msi(0x41)


@pytest.mark.parametrize("wrong", [None, 24, "route"])
def test_a_value_that_is_no_route_is_refused_at_the_call(guest: Guest, wrong: Any) -> None:
    with guest.partition.batch() as batch:
        for call in (batch.clear_msi, batch.mask, batch.unmask, lambda it: batch.set_msi(it, msi(0x41))):
            with pytest.raises(TypeError):
                call(wrong)
    still_works(guest)


def test_a_batch_checks_the_state_of_its_routes_at_commit(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        batch = guest.partition.batch()
        batch.unmask(route)
        route.set_msi(msi(0x41))
        route.mask()
        batch.commit()
        assert (route.armed, route.msi) == (True, msi(0x41))


def test_a_batch_of_a_closed_partition_fails(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    batch = guest.partition.batch()
    batch.set_msi(route, msi(0x41))
    guest.partition.close()
    with pytest.raises(ClosedError):
        batch.commit()
    with pytest.raises(ClosedError, match="partition"):
        guest.partition.batch()


def test_a_batch_knows_its_partition_and_shows_the_number_of_its_routes(guest: Guest) -> None:
    routes = three(guest)
    batch = guest.partition.batch()
    batch.mask(routes[0])
    batch.unmask(routes[0])
    batch.mask(routes[1])
    assert repr(batch) == "<Batch of 2 routes>"
    assert batch.partition is guest.partition
    close(routes)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_batch_keeps_its_routes_alive_until_the_commit(guest: Guest) -> None:
    batch = guest.partition.batch()
    batch.set_msi(guest.partition.new_irqfd_route(), msi(0x41))
    [route] = guest.partition.routes
    del route
    batch.commit()
    assert guest.partition.routes == []
    assert guest.partition.stats().arms == 1


def test_a_batch_that_its_own_route_refers_to_is_collected(guest: Guest) -> None:
    class Planned(IrqFdRoute):
        plan: Batch

    route = Planned(guest.partition)
    route.plan = guest.partition.batch()
    route.plan.mask(route)
    gone = weakref.ref(route)
    route.close()
    del route
    collect()
    assert gone() is None
