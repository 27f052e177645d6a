"""Messages of errors that no other test meets; docs/errors.md lists them all."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from mshv_irqfd import (
    EventFd,
    HypervisorUnavailableError,
    InterruptError,
    IoEventFdError,
    IrqFdError,
    MsiRoute,
    RoutingError,
    _core,
    open_partition,
)
from mshv_irqfd.testing import failing
from support import msi, open_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backends import KvmGuest
    from mshv_irqfd import SimulatedPartition


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_partition_without_a_descriptor_names_the_limit() -> None:
    with no_descriptor_left(), pytest.raises(HypervisorUnavailableError, match=r"raise RLIMIT_NOFILE") as failed:
        open_partition("simulated")
    assert failed.value.errno == errno.EMFILE


def test_a_callers_eventfd_that_can_not_be_duplicated_is_named(simulated_partition: SimulatedPartition) -> None:
    with EventFd() as event:
        number = event.fileno()
        with no_descriptor_left(), pytest.raises(IrqFdError, match=f"file descriptor {number}: ") as failed:
            simulated_partition.new_irqfd_route(event=number)
    assert failed.value.errno == errno.EMFILE


def test_each_refusal_has_the_hint_of_its_error(simulated_partition: SimulatedPartition) -> None:
    route = simulated_partition.new_irqfd_route()
    with (
        failing(simulated_partition, "assign_irqfd", errno.ENFILE),
        pytest.raises(IrqFdError, match=r"fs\.file-max"),
    ):
        route.set_msi(msi(0x41))
    with (
        failing(simulated_partition, "set_msi_routing", errno.EINVAL),
        pytest.raises(RoutingError, match="the kernel refuses an entry of the table"),
    ):
        # A message that the table lacks, so that there is a push to refuse.
        route.set_msi(MsiRoute(0xFEE0_0004, 0x41))
    with (
        failing(simulated_partition, "signal_msi", errno.EPERM),
        pytest.raises(InterruptError, match="no vCPU that could take it"),
    ):
        simulated_partition.signal_msi(msi(0x41))
    doorbell = simulated_partition.ioeventfd(0xD000_0000, 4)
    with (
        failing(simulated_partition, "deassign_ioeventfd", errno.ENOENT),
        pytest.raises(IoEventFdError, match="other code took the doorbell away"),
    ):
        doorbell.close()
    route.close()


def test_what_only_a_simulated_partition_can_do_names_it(kvm: KvmGuest) -> None:
    with pytest.raises(TypeError, match="only a simulated partition can do that"):
        kvm.partition._fail("assign_irqfd", errno.EIO, 0, 1)


def test_what_only_kvm_can_do_names_it(simulated_partition: SimulatedPartition) -> None:
    with pytest.raises(TypeError, match="only KVM has vCPUs that a program can run"):
        simulated_partition._lend_vcpu(0)


def test_a_vcpu_that_was_not_made_is_named_and_a_lent_one_takes_the_interrupts(kvm: KvmGuest) -> None:
    with pytest.raises(ValueError, match="this partition made no VP 200"):
        kvm.partition._lend_vcpu(200)
    vcpu = kvm.partition._lend_vcpu(0)
    try:
        with pytest.raises(Exception, match="a guest runs on the vCPUs and takes the interrupts itself"):
            kvm.partition.take_interrupts()
    finally:
        kvm.partition._take_vcpus_back()
        os.close(vcpu)


def test_a_driver_that_does_not_report_interrupts_is_named() -> None:
    before = open_files()
    partition = _core.null_partition(range(24, 32), preload=False)
    with pytest.raises(TypeError, match="the mshv driver does not report which interrupts arrived"):
        partition._take_interrupts(0.0)
    partition.close()
    del partition
    assert open_files() == before
