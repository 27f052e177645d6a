"""Rule 5: finalizers warn as those of files do, close open objects, and never raise."""

from __future__ import annotations

import errno
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from mshv_irqfd import EventFd, GsiState
from mshv_irqfd.testing import failing, until
from support import collect, msi, native_threads, open_files, recorded, still_works

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Backend, Guest, SimulatedGuest


def dropped(make: Callable[[], object]) -> list[str]:
    """Drops an object, and returns the warnings of its finalizer."""
    with recorded() as told:
        it: object = make()
        del it
        collect()
    assert all(category is ResourceWarning for category, _ in told)
    return [message for _, message in told]


def test_a_route_left_open_is_closed_with_a_warning(guest: Guest) -> None:
    assert dropped(guest.partition.new_irqfd_route) == ["unclosed <IrqFdRoute gsi=24 DISABLED no MSI>"]
    assert guest.partition.gsi_state(24) is GsiState.UNALLOCATED
    still_works(guest)


def test_a_partition_left_open_is_closed_with_a_warning(backend: Backend) -> None:
    files, threads = open_files(), native_threads()
    [told] = dropped(backend.open)
    assert told.startswith("unclosed <")
    assert f"backend={backend.name}" in told
    assert open_files() == files
    until(lambda: native_threads() <= threads, "its threads have ended")


def test_an_eventfd_left_open_is_closed_with_a_warning() -> None:
    files = open_files()
    [told] = dropped(EventFd)
    assert told.startswith("unclosed <EventFd fd=")
    assert open_files() == files


def test_closed_objects_are_dropped_without_a_warning(backend: Backend) -> None:
    def closed() -> object:
        with backend.open() as partition, partition.new_irqfd_route() as route, EventFd() as event:
            return partition, route, route.event, event, partition.batch()

    assert dropped(closed) == []


def test_a_view_is_dropped_without_a_warning(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        assert dropped(lambda: route.event) == []
        assert route.fileno() >= 0


def test_a_dropped_route_keeps_its_signals_out_of_the_guest(guest: Guest) -> None:
    with EventFd() as event:

        def armed() -> object:
            route = guest.partition.new_irqfd_route(event=event)
            route.set_msi(msi(0x41))
            return route

        assert len(dropped(armed)) == 1
        event.signal(2)
        guest.receives_nothing()
        assert event.consume() == 2
    still_works(guest)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_objects_dropped_in_any_order_warn_once_each_and_are_closed(backend: Backend, order: tuple[int, ...]) -> None:
    files = open_files()
    with recorded() as told:
        partition = backend.open()
        held: list[Any] = [partition, partition.new_irqfd_route(), partition.new_irqfd_route()]
        del partition
        held[1].set_msi(msi(0x41))
        for index in order:
            held[index] = None
        collect()
    kinds = sorted(message.split()[1] for _, message in told)
    assert kinds[:2] == ["<IrqFdRoute", "<IrqFdRoute"]
    assert len(kinds) == 3
    assert open_files() == files


def test_objects_in_a_reference_cycle_are_closed(backend: Backend) -> None:
    files = open_files()

    def cycle() -> object:
        partition = backend.open()
        ring: list[object] = [partition, partition.new_irqfd_route(), partition.batch()]
        ring.append(ring)
        return ring

    # The collector may start anywhere in the cycle; a partition closes its routes.
    assert any("Partition" in message for message in dropped(cycle))
    assert open_files() == files


def test_a_finalizer_whose_warning_is_an_error_still_closes_and_reports_it(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda it: reported.append(it.exc_type))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route: object = guest.partition.new_irqfd_route()
        event: object = EventFd()
        files = len(open_files())
        del route, event
        collect()
    assert reported == [ResourceWarning, ResourceWarning]
    assert guest.partition.gsi_state(24) is GsiState.UNALLOCATED
    assert len(open_files()) == files - 2


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_failure_in_a_finalizer_goes_to_the_unraisable_hook(
    simulated: SimulatedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda it: reported.append((it.exc_type.__name__, it.exc_value.errno)))
    route = simulated.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    with failing(simulated.partition, "deassign_irqfd", errno.EIO):
        del route
        collect()
    assert reported == [("IrqFdError", errno.EIO)]
    assert simulated.partition.gsi_state(24) is GsiState.BROKEN
    still_works(simulated)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_dropped_route_is_cleaned_up(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    del route
    collect()
    assert guest.partition.routes == []
    assert guest.partition.gsi_state(24) is GsiState.UNALLOCATED
    assert guest.partition.stats().disarms == 1
    still_works(guest)
