"""Errors: their classes, their attributes, and their hints."""

from __future__ import annotations

import errno
import pickle
from typing import TYPE_CHECKING

import mshv_irqfd
import pytest
from mshv_irqfd import ClosedError, HypervisorUnavailableError, IrqFdError, MshvIrqFdError, RoutingError, VpError
from mshv_irqfd.testing import failing
from support import msi

if TYPE_CHECKING:
    from mshv_irqfd import SimulatedPartition


ERRORS = [getattr(mshv_irqfd, name) for name in mshv_irqfd.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_one_base_class(error: type[Exception]) -> None:
    assert issubclass(error, MshvIrqFdError)


def test_errors_are_also_the_built_in_errors_that_fit() -> None:
    assert issubclass(ClosedError, ValueError)
    for error in (HypervisorUnavailableError, RoutingError, IrqFdError, VpError):
        assert issubclass(error, OSError)


def test_a_failed_push_names_the_call_the_errno_and_a_hint(simulated_partition: SimulatedPartition) -> None:
    with (
        simulated_partition.new_irqfd_route() as route,
        failing(simulated_partition, "set_msi_routing", errno.ENOMEM),
        pytest.raises(RoutingError, match=r"MSHV_SET_MSI_ROUTING.*out of memory") as failed,
    ):
        route.set_msi(msi(0x41))
    error = failed.value
    assert (error.errno, error.gsi, error.hint) == (errno.ENOMEM, None, "the kernel is out of memory")
    assert error.ioctl is not None
    assert "MSHV_SET_MSI_ROUTING" in error.ioctl


def test_a_failed_arming_names_the_gsi_too(simulated_partition: SimulatedPartition) -> None:
    with (
        simulated_partition.new_irqfd_route() as route,
        failing(simulated_partition, "assign_irqfd", errno.EIO),
        pytest.raises(IrqFdError, match=r"GSI 24.*MSHV_IRQFD") as failed,
    ):
        route.set_msi(msi(0x41))
    error = failed.value
    assert (error.errno, error.gsi, error.hint) == (errno.EIO, 24, None)
    assert error.ioctl is not None
    assert "MSHV_IRQFD" in error.ioctl


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "RLIMIT_NOFILE"),
        (errno.EBUSY, "eventfd is already armed"),
        (errno.EINVAL, "eventfd"),
        (errno.EBADF, "closed"),
    ],
)
def test_an_error_with_a_known_cause_has_a_hint(
    simulated_partition: SimulatedPartition, number: int, words: str
) -> None:
    with simulated_partition.new_irqfd_route() as route:
        with failing(simulated_partition, "assign_irqfd", number), pytest.raises(IrqFdError, match=words) as failed:
            route.set_msi(msi(0x41))
        assert failed.value.hint is not None
        assert words in failed.value.hint


def test_an_error_survives_pickling(simulated_partition: SimulatedPartition) -> None:
    with (
        simulated_partition.new_irqfd_route() as route,
        failing(simulated_partition, "assign_irqfd", errno.EBUSY),
        pytest.raises(IrqFdError) as failed,
    ):
        route.set_msi(msi(0x41))
    error = failed.value
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is IrqFdError
    assert (again.errno, again.ioctl, again.gsi, again.hint) == (error.errno, error.ioctl, error.gsi, error.hint)
    assert str(again) == str(error)


def test_failures_are_counted(simulated_partition: SimulatedPartition) -> None:
    with (
        simulated_partition.new_irqfd_route() as route,
        failing(simulated_partition, "assign_irqfd", errno.EIO, times=2),
    ):
        for failures in (1, 2):
            with pytest.raises(IrqFdError):
                route.set_msi(msi(0x41))
            assert simulated_partition.stats().failures == failures
