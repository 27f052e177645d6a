"""Fault injection: `SimulatedPartition.fail()`, and the same for the ioctls of real kernels."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from mshv_irqfd import IrqFdError
from support import msi

if TYPE_CHECKING:
    from backends import Guest
    from faults import Faults
    from mshv_irqfd import SimulatedPartition


def test_a_fault_is_injected_by_call_errno_and_number(guest: Guest, faults: Faults) -> None:
    with guest.partition.new_irqfd_route() as route:
        faults.fail(guest.partition, "assign_irqfd", errno.EMFILE, after=1, times=2)
        faults.run(partial(route.set_msi, msi(0x41)))
        faults.run(route.mask)
        for _ in range(2):
            with pytest.raises(IrqFdError) as failed:
                faults.run(route.unmask)
            assert failed.value.errno == errno.EMFILE
        faults.run(route.unmask)
        assert route.armed


@pytest.mark.parametrize(
    ("call", "number", "error"),
    [("open", errno.EIO, ValueError), ("assign_irqfd", 0, ValueError), ("assign_irqfd", "EIO", TypeError)],
)
def test_an_invalid_fault_is_refused(
    simulated_partition: SimulatedPartition, call: Any, number: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        simulated_partition.fail(call, number)
    with pytest.raises(OverflowError):
        simulated_partition.fail("assign_irqfd", errno.EIO, after=-1)
