"""Rule 3: a descriptor closed by someone else gives EBADF, breaks at most its own route, and aborts nothing."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from mshv_irqfd import GsiState, IrqFdError
from support import close_as_someone_else, msi, rare, run_python, still_works

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Guest


def test_an_eventfd_closed_by_someone_else_gives_ebadf_and_the_rest_works(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    close_as_someone_else(route.fileno())
    uses: tuple[Callable[[], object], ...] = (
        lambda: route.set_msi(msi(0x41)),
        route.signal,
        lambda: route.pending,
        route.consume_pending,
    )
    for use in uses:
        with pytest.raises(IrqFdError) as failed:
            use()
        assert failed.value.errno == errno.EBADF
    assert (route.msi, route.armed) == (None, False)
    route.close()
    still_works(guest)


def test_an_armed_eventfd_closed_by_someone_else_stops_no_push(open_guest: Callable[..., Guest]) -> None:
    guest = open_guest(quiesce=True, preload=False)
    route, other = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    other.set_msi(msi(0x42))
    close_as_someone_else(route.fileno())
    other.set_msi(msi(0x43))
    other.signal()
    guest.receives(msi(0x43))
    assert (route.state, other.state) == (GsiState.BROKEN, GsiState.ENABLED)
    # Closing retries the disarming, which may fail again.
    with suppress(IrqFdError):
        guest.partition.close()


def test_an_armed_eventfd_closed_by_someone_else_stops_no_push_that_loads(loaded: Guest) -> None:
    route, other = loaded.partition.new_irqfd_route(), loaded.partition.new_irqfd_route()
    other.set_msi(msi(0x42))
    route.set_msi(msi(0x41))
    assert route.armed_gsi != route.gsi
    close_as_someone_else(route.fileno())
    # A move leaves it alone, a push finds it.
    other.set_msi(msi(0x43))
    assert route.state is GsiState.ENABLED
    other.set_msi(rare(0x44))
    other.signal()
    loaded.receives(rare(0x44))
    assert (route.state, other.state) == (GsiState.BROKEN, GsiState.ENABLED)
    with suppress(IrqFdError):
        loaded.partition.close()


def test_an_armed_eventfd_closed_by_someone_else_breaks_no_other_route(guest: Guest) -> None:
    route, other = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    other.set_msi(msi(0x42))
    close_as_someone_else(route.fileno())
    # A kernel disarms by itself when an eventfd is closed; that the disarming failed is still an error.
    with pytest.raises(IrqFdError) as failed:
        route.close()
    assert failed.value.errno == errno.EBADF
    assert route.closed
    other.signal()
    guest.receives(msi(0x42))
    other.close()
    still_works(guest)
    # Closing the partition retries the disarming, which may fail again.
    with suppress(IrqFdError):
        guest.partition.close()
    assert guest.partition.closed


@pytest.mark.parametrize("armed", [False, True])
def test_a_partition_fd_closed_by_someone_else_gives_errors_and_no_abort(backend: Any, armed: bool) -> None:
    if backend.name == "simulated":
        # A simulated partition has no descriptor to close.
        with pytest.raises(OSError, match="no file descriptor"), backend.open() as partition:
            partition.fileno()
        return
    code = f"""
import errno, os
from mshv_irqfd import IrqFdError, RoutingError, open_partition, MsiRoute
partition = open_partition({backend.name!r})
route, other = partition.new_irqfd_route(), partition.new_irqfd_route()
if {armed}:
    other.set_msi(MsiRoute.fixed(0x42, 0))
os.close(partition.fileno())
try:
    route.set_msi(MsiRoute.fixed(0x41, 0))
except (RoutingError, IrqFdError) as error:
    print(error.errno == errno.EBADF, error.hint)
try:
    partition.close()
except IrqFdError as error:
    print(error.errno == errno.EBADF)
print(partition.closed, route.closed, other.closed)
"""
    ended = run_python(code, "-W", "error")
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("True")
    assert "descriptor was closed by other code" in lines[0]
    assert lines[1:] == (["True"] if armed else []) + ["True True True"]
