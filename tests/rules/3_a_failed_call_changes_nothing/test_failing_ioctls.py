"""Rule 3: opening, adopting and creating a VP leave nothing behind if any ioctl fails, and a second try succeeds."""

from __future__ import annotations

import errno
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import pytest
from backends import Backend
from faults import KernelFaults, tried
from mshv_irqfd import HypervisorUnavailableError, Partition, VpError
from needs import need_faults
from raw_kvm import KvmVm
from support import msi, open_files, still_works

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(params=["kvm", "mshv"])
def kernel(request: pytest.FixtureRequest, _nothing_left_behind: None) -> Backend:
    """Each hypervisor that has ioctls."""
    need_faults(request.param)
    return Backend(request.param)


@pytest.fixture
def ioctls(kernel: Backend) -> Iterator[KernelFaults]:
    assert kernel
    with KernelFaults() as faults:
        yield faults


def errnos_of_failures(name: str, ioctls: KernelFaults, make: Callable[[], Partition]) -> list[int | None]:
    """Makes partitions with each ioctl failing in turn, and returns the errno of each failure."""
    errnos: list[int | None] = []
    for k in count():
        ioctls.clear()
        ioctls.fail(None, "ioctl", errno.ENOMEM, after=k)
        files = open_files()
        try:
            partition = ioctls.run(make)
        except (HypervisorUnavailableError, VpError) as error:
            errnos.append(error.errno)
        else:
            partition.close()
            break
        assert open_files() == files, f"after {errnos}"
    tried[name, "an ioctl of making a partition fails"] += len(errnos)
    return errnos


def test_opening_a_partition_fails_cleanly_whichever_ioctl_fails(kernel: Backend, ioctls: KernelFaults) -> None:
    errnos = errnos_of_failures(kernel.name, ioctls, partial(kernel.open, vps=2))
    assert len(errnos) > 3, "hardly anything failed: the test proves nothing"
    assert set(errnos) == {errno.ENOMEM}
    guest = kernel.guest(kernel.open(vps=2))
    still_works(guest)
    guest.close()


def test_adopting_a_vm_fails_cleanly_whichever_ioctl_fails() -> None:
    need_faults("kvm")
    vm = KvmVm()
    with KernelFaults() as ioctls:
        errnos = errnos_of_failures("adopted", ioctls, partial(Partition.from_fd, vm, "kvm"))
    assert len(errnos) > 1, "hardly anything failed: the test proves nothing"
    assert set(errnos) == {errno.ENOMEM}
    with Partition.from_fd(vm, "kvm") as partition, partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.signal()
        assert vm.vectors() == {0x41}
    vm.close()


@pytest.mark.parametrize("k", range(3))  # KVM makes three calls, mshv one
def test_a_vp_whose_creation_failed_can_be_created_later(kernel: Backend, ioctls: KernelFaults, k: int) -> None:
    guest = kernel.guest(kernel.open())
    ioctls.fail(guest.partition, "create_vp", errno.ENOMEM, after=k)
    if kernel.name == "kvm" or k == 0:
        with pytest.raises(VpError) as failed:
            ioctls.run(partial(guest.partition.create_vp, 1))
        assert (failed.value.errno, guest.partition.vps) == (errno.ENOMEM, (0,))
        tried[kernel.name, "an ioctl of making a VP fails"] += 1
    guest.partition.create_vp(1)
    assert guest.partition.vps == (0, 1)
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41, 1))
        route.signal()
        guest.receives(msi(0x41, 1))
    guest.close()
