"""Adopting the VM of another VMM: the package takes charge of its routing table, and of nothing else."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import struct
from typing import TYPE_CHECKING, Any

import pytest
from mshv_irqfd import ClosedError, HypervisorUnavailableError, IrqFdError, Partition, RoutingEntry, open_partition
from needs import need
from raw_kvm import KVM_CREATE_IRQCHIP, KVM_CREATE_VM, KvmVm
from support import close_as_someone_else, in_child, msi

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import KvmGuest


@pytest.fixture
def event(for_each_thread: Callable[..., int]) -> int:
    return for_each_thread(lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), os.close)


def test_an_adopted_vm_receives_the_interrupts_of_its_routes(vm: KvmVm) -> None:
    with Partition.from_fd(vm.fd, "kvm") as partition, partition.new_irqfd_route() as route:
        assert (partition.backend, partition.quiesce, route.gsi) == ("kvm", False, 24)
        route.set_msi(msi(0x41))
        route.signal()
        assert vm.vectors() == {0x41}


def test_the_descriptor_is_duplicated(vm: KvmVm) -> None:
    twin = os.dup(vm.fd)
    with Partition.from_fd(twin, "kvm") as partition:
        assert partition.fileno() not in {twin, vm.fd}
        assert not os.get_inheritable(partition.fileno())
        os.close(twin)
        with partition.new_irqfd_route() as route:
            route.set_msi(msi(0x41))
            route.signal()
            assert vm.vectors() == {0x41}


def test_an_object_with_fileno_can_be_adopted(vm: KvmVm) -> None:
    Partition.from_fd(vm, "kvm").close()


def test_closing_an_adopted_partition_disarms_and_leaves_the_vm_open(vm: KvmVm, event: int) -> None:
    with Partition.from_fd(vm.fd, "kvm") as partition:
        route = partition.new_irqfd_route(event=event)
        route.set_msi(msi(0x41))
    os.eventfd_write(event, 1)
    assert vm.vectors() == set()
    assert os.eventfd_read(event) == 1
    vm.route((30, 0xFEE00000, 0x44))
    vm.arm(30, event)
    os.eventfd_write(event, 1)
    assert vm.vectors() == {0x44}


def test_the_first_push_replaces_the_entries_of_the_table(vm: KvmVm, event: int) -> None:
    vm.route((100, 0xFEE00000, 0x44))
    vm.arm(100, event)
    with Partition.from_fd(vm.fd, "kvm", gsis=range(24, 64)) as partition:
        os.eventfd_write(event, 1)
        assert vm.vectors() == {0x44}
        assert partition.routing_table() == []
        with partition.new_irqfd_route() as route:
            route.set_msi(msi(0x41))
            os.eventfd_write(event, 1)
            route.signal()
            assert vm.vectors() == {0x41}


def test_kept_entries_stay_in_every_push(vm: KvmVm, event: int) -> None:
    kept = RoutingEntry(100, 0xFEE00000, 0x44)
    vm.route(kept)
    vm.arm(100, event)
    with Partition.from_fd(vm.fd, "kvm", gsis=range(24, 64), keep=[kept]) as partition:
        route = partition.new_irqfd_route()
        for vector in (0x41, 0x42):
            route.set_msi(msi(vector))
            assert partition.routing_table() == [RoutingEntry(24, 0xFEE00000, vector), kept]
            os.eventfd_write(event, 1)
            route.signal()
            assert vm.vectors() == {0x44, vector}
        assert partition.stats().entries_pushed == 2 * (40 + 2)


def test_an_adopted_vm_refuses_to_create_vps(vm: KvmVm) -> None:
    with Partition.from_fd(vm.fd, "kvm", vps=1) as partition:
        with pytest.raises(io.UnsupportedOperation, match="adopted"):
            partition.create_vp(1)
        assert partition.vps == (0,)


def test_a_vm_can_be_adopted_once_at_a_time(vm: KvmVm) -> None:
    twin = os.dup(vm.fd)
    with Partition.from_fd(vm.fd, "kvm") as partition:
        for fd in (vm.fd, twin, partition.fileno()):
            with pytest.raises(ValueError, match="already"):
                Partition.from_fd(fd, "kvm")
        with partition.new_irqfd_route() as route:
            route.set_msi(msi(0x41))
            route.signal()
            assert vm.vectors() == {0x41}
    Partition.from_fd(twin, "kvm").close()
    os.close(twin)


def test_a_partition_opened_by_the_package_can_not_be_adopted(kvm: KvmGuest) -> None:
    with pytest.raises(ValueError, match="already"):
        Partition.from_fd(kvm.partition, "kvm")


def test_a_vm_that_another_process_made_can_not_be_adopted_and_the_error_says_so(vm: KvmVm) -> None:
    def adopt() -> tuple[int | None, str | None]:
        with pytest.raises(HypervisorUnavailableError) as failed:
            Partition.from_fd(vm, "kvm")
        return failed.value.errno, failed.value.hint

    number, hint = in_child(adopt)
    assert number == errno.EIO
    assert hint is not None
    assert "another process made the VM" in hint
    Partition.from_fd(vm, "kvm").close()


def test_quiescing_is_an_option_of_adopting(vm: KvmVm) -> None:
    with Partition.from_fd(vm.fd, "kvm", quiesce=True) as partition:
        assert partition.quiesce
        first, second = partition.new_irqfd_route(), partition.new_irqfd_route()
        first.set_msi(msi(0x41))
        second.set_msi(msi(0x42))
        assert partition.stats().disarms == 1


def test_an_eventfd_armed_by_someone_else_is_busy_and_the_error_says_so(vm: KvmVm, event: int) -> None:
    vm.route((100, 0xFEE00000, 0x44))
    vm.arm(100, event)
    with Partition.from_fd(vm.fd, "kvm", gsis=range(24, 64)) as partition:
        with partition.new_irqfd_route(event=event) as route:
            with pytest.raises(IrqFdError, match="already armed on a GSI") as failed:
                route.set_msi(msi(0x41))
            assert (failed.value.errno, failed.value.gsi, route.msi) == (errno.EBUSY, 24, None)
        with partition.new_irqfd_route() as other:
            other.set_msi(msi(0x42))
            other.signal()
            assert vm.vectors() == {0x42}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        pytest.param({"keep": [(30, 0xFEE00000, 0x41)]}, ValueError, "30.*allocated from", id="handed-out"),
        pytest.param({"keep": [(3, 0xFEE00000, 0x41)]}, ValueError, "GSI 3", id="pin"),
        pytest.param({"keep": [(4096, 0xFEE00000, 0x41)]}, ValueError, "4096", id="beyond"),
        pytest.param({"keep": [(100, 0xFEE00000, 0x41)] * 2}, ValueError, "100 appears twice", id="twice"),
        pytest.param({"keep": [100]}, TypeError, "100", id="no-entry"),
        pytest.param({"keep": [(100, "a", 0x41)]}, TypeError, "RoutingEntry", id="no-address"),
        pytest.param({"keep": 100}, TypeError, ".", id="no-iterable"),
        pytest.param({"gsis": range(40, 4096), "keep": [(30, 0xFEE00000, 0x41)]}, ValueError, "4055", id="too-many"),
        pytest.param({"gsis": range(23, 30)}, ValueError, "0-23", id="gsis"),
        pytest.param({"vps": 256}, ValueError, "254", id="vps"),
    ],
)
def test_invalid_entries_gsis_and_vps_are_refused_at_adopting(
    vm: KvmVm, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Partition.from_fd(vm.fd, "kvm", **{"gsis": range(24, 64), **options})
    # The refused call left the VM free to be adopted.
    Partition.from_fd(vm.fd, "kvm").close()


FILES: dict[str, Callable[[], int]] = {
    "eventfd": lambda: os.eventfd(0),
    "null": lambda: os.open("/dev/null", os.O_RDWR),
    "memory": lambda: os.memfd_create("vm"),
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
@pytest.mark.parametrize("name", ["kvm", "mshv"])
def test_a_file_that_is_no_vm_is_refused(make: Callable[[], int], name: Any) -> None:
    fd = make()
    with pytest.raises(ValueError, match=f"file descriptor {fd} is .*not a partition of {name}"):
        Partition.from_fd(fd, name)
    os.close(fd)


def test_a_vm_of_another_hypervisor_is_refused(vm: KvmVm) -> None:
    with pytest.raises(ValueError, match=r"anon_inode:kvm-vm.*mshv"):
        Partition.from_fd(vm.fd, "mshv")


@pytest.mark.parametrize(
    ("fd", "name", "error"),
    [(-1, "kvm", ValueError), ("3", "kvm", TypeError), (1 << 31, "kvm", OverflowError), (0, "simulated", ValueError),
     (0, "xen", ValueError), (0, None, TypeError)],
)  # fmt: skip
def test_an_invalid_descriptor_or_backend_is_refused(fd: Any, name: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Partition.from_fd(fd, name)


def test_a_closed_descriptor_is_refused() -> None:
    fd = os.eventfd(0)
    close_as_someone_else(fd)
    with pytest.raises(ValueError, match=f"file descriptor {fd} "):
        Partition.from_fd(fd, "kvm")


def test_a_simulated_partition_can_not_be_adopted() -> None:
    with open_partition("simulated") as partition, pytest.raises((ValueError, io.UnsupportedOperation)):
        Partition.from_fd(partition, "kvm")
    with pytest.raises(ClosedError):
        partition.routing_table()


KVM_IRQ_LINE = 0x4008AE61
KVM_GET_IRQCHIP = 0xC208AE62
KVM_ENABLE_CAP, KVM_CAP_SPLIT_IRQCHIP = 0x4068AEA3, 121


@pytest.fixture
def bare_vm(for_each_thread: Callable[..., int]) -> int:
    """A VM of KVM that has no interrupt controller yet."""
    need("kvm")

    def create() -> int:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        os.close(kvm)
        return vm

    return for_each_thread(create, os.close)


def test_the_pins_of_an_adopted_vm_still_raise_interrupts_after_a_push(vm: KvmVm) -> None:
    with Partition.from_fd(vm, "kvm") as partition, partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        fcntl.ioctl(vm.fd, KVM_IRQ_LINE, struct.pack("II", 4, 1))
        # struct kvm_irqchip: the id of the chip (0: the first PIC), padding, then the PIC's last IRR and IRR.
        chip = bytearray(520)
        fcntl.ioctl(vm.fd, KVM_GET_IRQCHIP, chip)
        assert chip[9] & 1 << 4


def test_a_vm_without_an_interrupt_controller_is_refused(bare_vm: int) -> None:
    with pytest.raises(HypervisorUnavailableError, match="adopt it after KVM_CREATE_IRQCHIP"):
        Partition.from_fd(bare_vm, "kvm")
    fcntl.ioctl(bare_vm, KVM_CREATE_IRQCHIP)
    Partition.from_fd(bare_vm, "kvm").close()


def test_a_vm_with_its_pins_in_user_space_keeps_their_entries(bare_vm: int) -> None:
    fcntl.ioctl(bare_vm, KVM_ENABLE_CAP, struct.pack("II4Q64x", KVM_CAP_SPLIT_IRQCHIP, 0, 24, 0, 0, 0))
    keep = [RoutingEntry(gsi, 0xFEE00000, 0x30 + gsi) for gsi in range(24)]
    with Partition.from_fd(bare_vm, "kvm", keep=keep) as partition, partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        assert partition.stats().entries_pushed == 25
        assert partition.routing_table() == [*keep, RoutingEntry(24, 0xFEE00000, 0x41)]


def test_more_kept_entries_than_fit_are_refused(vm: KvmVm) -> None:
    keep = [RoutingEntry(gsi, 0xFEE00000, 0x41) for gsi in range(24, 4084)]
    with pytest.raises(ValueError, match="at most 0 fit"):
        Partition.from_fd(vm, "kvm", keep=keep, gsis=range(4090, 4091))


def test_a_range_that_ends_before_a_start_beyond_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="gsis"):
        open_partition("simulated", gsis=range(2**32 + 24, 100))
