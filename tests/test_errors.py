"""Errors: what they are, what they carry, and what they advise."""

from __future__ import annotations

import errno
import pickle
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import mshv_irqfd
import pytest
from mshv_irqfd import (
    ClosedError,
    GsiState,
    HypervisorUnavailableError,
    IrqFdError,
    MshvIrqFdError,
    RoutingError,
    VpError,
)
from support import close_behind_its_back, msi, run_python, still_works

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Guest, SimulatedGuest

ERRORS = [getattr(mshv_irqfd, name) for name in mshv_irqfd.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_of_one_family(error: type[Exception]) -> None:
    assert issubclass(error, MshvIrqFdError)


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(ClosedError, ValueError)
    for error in (HypervisorUnavailableError, RoutingError, IrqFdError, VpError):
        assert issubclass(error, OSError)


def test_a_failed_push_names_the_call_the_errno_and_a_hint(simulated: SimulatedGuest) -> None:
    with simulated.partition.new_irqfd_route() as route:
        simulated.partition.fail("set_msi_routing", errno.ENOMEM)
        with pytest.raises(RoutingError, match=r"MSHV_SET_MSI_ROUTING.*out of memory") as failed:
            route.set_msi(msi(0x41))
    error = failed.value
    assert (error.errno, error.gsi, error.hint) == (errno.ENOMEM, None, "the kernel is out of memory")
    assert error.ioctl is not None
    assert "MSHV_SET_MSI_ROUTING" in error.ioctl


def test_a_failed_arming_names_the_gsi_too(simulated: SimulatedGuest) -> None:
    with simulated.partition.new_irqfd_route() as route:
        simulated.partition.fail("assign_irqfd", errno.EIO)
        with pytest.raises(IrqFdError, match=r"GSI 24.*MSHV_IRQFD") as failed:
            route.set_msi(msi(0x41))
    error = failed.value
    assert (error.errno, error.gsi, error.hint) == (errno.EIO, 24, None)
    assert error.ioctl is not None
    assert "MSHV_IRQFD" in error.ioctl


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "RLIMIT_NOFILE"),
        (errno.EBUSY, "eventfd is armed"),
        (errno.EINVAL, "eventfd"),
        (errno.EBADF, "closed"),
    ],
)
def test_an_error_with_a_known_cause_says_so(simulated: SimulatedGuest, number: int, words: str) -> None:
    with simulated.partition.new_irqfd_route() as route:
        simulated.partition.fail("assign_irqfd", number)
        with pytest.raises(IrqFdError, match=words) as failed:
            route.set_msi(msi(0x41))
        assert failed.value.hint is not None
        assert words in failed.value.hint


def test_an_error_survives_pickling(simulated: SimulatedGuest) -> None:
    with simulated.partition.new_irqfd_route() as route:
        simulated.partition.fail("assign_irqfd", errno.EBUSY)
        with pytest.raises(IrqFdError) as failed:
            route.set_msi(msi(0x41))
    error = failed.value
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is IrqFdError
    assert (again.errno, again.ioctl, again.gsi, again.hint) == (error.errno, error.ioctl, error.gsi, error.hint)
    assert str(again) == str(error)


def test_failures_are_counted(simulated: SimulatedGuest) -> None:
    with simulated.partition.new_irqfd_route() as route:
        simulated.partition.fail("assign_irqfd", errno.EIO, times=2)
        for failures in (1, 2):
            with pytest.raises(IrqFdError):
                route.set_msi(msi(0x41))
            assert simulated.partition.stats().failures == failures


def test_an_eventfd_closed_behind_our_back_gives_ebadf_and_the_rest_works(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    close_behind_its_back(route.fileno())
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


def test_an_armed_eventfd_closed_behind_our_back_stops_no_push(open_guest: Callable[..., Guest]) -> None:
    guest = open_guest(quiesce=True)
    route, other = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    other.set_msi(msi(0x42))
    close_behind_its_back(route.fileno())
    other.set_msi(msi(0x43))
    other.signal()
    guest.receives(msi(0x43))
    assert (route.state, other.state) == (GsiState.BROKEN, GsiState.ENABLED)
    # Closing tries once more, and may say so.
    with suppress(IrqFdError):
        guest.partition.close()


def test_an_armed_eventfd_closed_behind_our_back_spoils_nothing_else(guest: Guest) -> None:
    route, other = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    other.set_msi(msi(0x42))
    close_behind_its_back(route.fileno())
    # A kernel disarms by itself then; that it could not be asked to is an error all the same.
    with pytest.raises(IrqFdError) as failed:
        route.close()
    assert failed.value.errno == errno.EBADF
    assert route.closed
    other.signal()
    guest.receives(msi(0x42))
    other.close()
    still_works(guest)
    # Closing the partition tries once more, and may say so.
    with suppress(IrqFdError):
        guest.partition.close()
    assert guest.partition.closed


@pytest.mark.parametrize("armed", [False, True])
def test_a_partition_fd_closed_behind_our_back_gives_errors_and_no_abort(backend: Any, armed: bool) -> None:
    if backend.name == "simulated":
        # It has no descriptor of its own to close.
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
    assert "descriptor was closed by somebody else" in lines[0]
    assert lines[1:] == (["True"] if armed else []) + ["True True True"]
