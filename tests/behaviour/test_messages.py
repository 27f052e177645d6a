"""Messages of errors that no other test meets; docs/errors.md lists them all."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import faults
import pytest
from faults import SYS_EPOLL_CREATE1, SYS_READLINK, SYS_READLINKAT, without
from mshv_irqfd import (
    ClosedError,
    EventFd,
    HypervisorUnavailableError,
    InterruptError,
    IoEventFdError,
    IrqFdError,
    MsiRoute,
    MsixTable,
    Partition,
    RoutingError,
    SimulatedPartition,
    _core,
    open_partition,
)
from mshv_irqfd.testing import failing
from support import msi, open_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backends import KvmGuest
    from raw_kvm import KvmVm


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
    wrong: Any = kvm.partition
    for use in (
        lambda: SimulatedPartition.fail(wrong, "assign_irqfd", errno.EIO),
        lambda: SimulatedPartition.write_mmio(wrong, 0xD000_0000, b"1"),
    ):
        with pytest.raises(TypeError, match="only a simulated partition can do that"):
            use()


needs_seccomp = pytest.mark.skipif(faults.unavailable() is not None, reason=str(faults.unavailable()))


@needs_seccomp
def test_a_simulated_partition_that_the_system_denies_says_which_call_failed() -> None:
    before = open_files()
    with pytest.raises(
        HypervisorUnavailableError, match=r"\(epoll_create1\): the simulated partition could not be set up"
    ) as failed:
        without((SYS_EPOLL_CREATE1,), errno.ENOMEM, lambda: open_partition("simulated"))
    assert failed.value.errno == errno.ENOMEM
    assert open_files() == before


@needs_seccomp
def test_without_proc_a_descriptor_to_adopt_can_not_be_inspected(vm: KvmVm) -> None:
    before = open_files()
    with pytest.raises(ValueError, match=r"file descriptor \d+ can't be inspected: .*No such file or directory"):
        without((SYS_READLINK, SYS_READLINKAT), errno.ENOENT, lambda: Partition.from_fd(vm, "kvm"))
    assert open_files() == before


def test_a_vector_with_two_eventfds_is_named_and_nothing_is_left(simulated_partition: SimulatedPartition) -> None:
    class First(int):
        """A number that a dict tells apart from 0."""

        __hash__ = object.__hash__

        def __eq__(self, other: object) -> bool:
            return self is other

    with EventFd() as one, EventFd() as other:
        events = {0: one.fileno(), First(0): other.fileno()}
        assert len(events) == 2
        with pytest.raises(ValueError, match="vector 0 has two eventfds in events; give one"):
            MsixTable(simulated_partition, 4, events=events)
    assert simulated_partition.routes == []


def test_a_watch_after_its_end_is_closed() -> None:
    with EventFd() as event:
        with event._watch() as watch:
            assert watch.signalled != watch.changed
        for name in ("signalled", "changed"):
            with pytest.raises(ClosedError, match="the watch is closed"):
                getattr(watch, name)


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
