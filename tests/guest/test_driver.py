"""A real CPU drives an MSI-X table: the guest's accesses leave KVM_RUN, reach `MsixTable`, and interrupt the guest."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from driver import ADDRESS, CONTROL, DATA, ENABLE, ENTRY, FUNCTION_MASK, MASK, MESSAGE_CONTROL, UPPER_ADDRESS
from mshv_irqfd import MsiRoute, MsixTable
from support import counting, msi

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backends import KvmGuest
    from mshv_irqfd._guest import Access, CountingGuest

BAR = 0xD0000000
PBA = BAR + 0x800
DOORBELL = BAR + 0x1000
CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
"""The ports of PCI configuration mechanism 1 (PCI Local Bus 3.0 section 3.2.2.3.2)."""
CAPABILITY = 0x40
"""The place of the MSI-X capability in the device's configuration space."""
VECTORS = 4


class Device:
    """A PCI device with MSI-X, as its VMM emulates it. A write to its doorbell asks for an interrupt of vector 0."""

    def __init__(self, table: MsixTable) -> None:
        self.table = table
        self.selected = 0
        self.strays: list[Access] = []

    def vmm(self, access: Access) -> bytes | None:
        """Emulates an access of the guest."""
        address, size, data, port = access
        if port and address == CONFIG_ADDRESS and data is not None:
            self.selected = int.from_bytes(data, "little") & 0xFC
        elif port and CONFIG_DATA <= address < CONFIG_DATA + 4 and data is not None:
            offset = self.selected + address - CONFIG_DATA - CAPABILITY
            self.table.write_message_control(offset, data)
        elif not port and BAR <= address < PBA:
            if data is None:
                return self.table.read_table(address - BAR, size).to_bytes(size, "little")
            self.table.write_table(address - BAR, data)
        elif not port and PBA <= address < DOORBELL and data is None:
            return self.table.read_pba(address - PBA, size).to_bytes(size, "little")
        else:
            self.strays.append(access)
        return None


class CpuDriver:
    """The driver that the guest's CPU runs."""

    def __init__(self, cpu: CountingGuest) -> None:
        self.cpu = cpu

    def write(self, vector: int, field: int, value: int) -> None:
        assert not self.cpu.write(BAR + ENTRY * vector + field, value.to_bytes(4, "little"))

    def read(self, vector: int, field: int) -> int:
        return int.from_bytes(self.cpu.read(BAR + ENTRY * vector + field, 4), "little")

    def control(self, value: int) -> None:
        """Writes message control, as Linux does: a word in configuration space."""
        self.cpu.write(CONFIG_ADDRESS, (0x80000000 | CAPABILITY).to_bytes(4, "little"), port=True)
        self.cpu.write(CONFIG_DATA + MESSAGE_CONTROL, value.to_bytes(2, "little"), port=True)

    def program(self, vector: int, message: MsiRoute) -> None:
        self.write(vector, CONTROL, MASK)
        self.write(vector, ADDRESS, message.address)
        self.write(vector, UPPER_ADDRESS, 0)
        self.write(vector, DATA, message.data)
        self.write(vector, CONTROL, 0)

    def pending(self) -> int:
        return int.from_bytes(self.cpu.read(PBA, 8), "little")

    def ring(self) -> None:
        """Kicks the device."""
        assert self.cpu.write(DOORBELL, bytes(4)), "the doorbell's write left the kernel"


@contextmanager
def device_of(kvm: KvmGuest) -> Iterator[Device]:
    """A device in the guest of a partition."""
    with MsixTable(kvm.partition, VECTORS) as table:
        device = Device(table)
        kvm.running().vmm = device.vmm
        yield device
    assert device.strays == []


def test_a_guest_brings_msix_up_kicks_the_device_and_takes_its_interrupts(kvm: KvmGuest) -> None:
    with device_of(kvm) as device:
        cpu, driver = kvm.running(), CpuDriver(kvm.running())
        driver.control(ENABLE | FUNCTION_MASK)
        for vector in range(VECTORS):
            driver.program(vector, msi(0x40 + vector))
        with counting(kvm.partition) as made:
            driver.control(ENABLE)
        assert made.stats.pushes == 1
        assert device.table.faults() == []
        assert [driver.read(vector, DATA) for vector in range(VECTORS)] == [0x40, 0x41, 0x42, 0x43]

        # The doorbell's eventfd is vector 0's: the guest's write interrupts it, and its VMM sees neither.
        left = cpu.left_kernel
        with kvm.partition.ioeventfd(DOORBELL, 4, event=device.table.vectors[0].route):
            for _ in range(100):
                driver.ring()
                cpu.fence()
            assert cpu.take() == {(0x40, 0): 100}
            assert cpu.left_kernel == left

            # Masked by the guest, the interrupt waits, and the guest sees it pending.
            driver.write(0, CONTROL, MASK)
            driver.ring()
            cpu.fence()
            assert (cpu.take(), driver.pending()) == ({}, 1)
            driver.write(0, CONTROL, 0)
            kvm.receives(msi(0x40))
            assert driver.pending() == 0

            # Moved while nobody kicks it, as Linux moves an interrupt.
            driver.program(0, msi(0x60))
            driver.ring()
            kvm.receives(msi(0x60))

        # The device signals its other vectors.
        for vector in range(1, VECTORS):
            device.table.vectors[vector].signal()
        kvm.receives(*(msi(0x40 + vector) for vector in range(1, VECTORS)))
        driver.control(0)
        device.table.vectors[1].signal()
        kvm.receives_nothing()


def test_a_guest_moves_a_vector_while_the_device_signals_it_and_nothing_is_lost(kvm: KvmGuest) -> None:
    with device_of(kvm) as device:
        cpu, driver = kvm.running(), CpuDriver(kvm.running())
        driver.program(0, msi(0x40))
        driver.control(ENABLE)
        for turn in range(50):
            # Masked at one message, unmasked at another: what waits arrives at the new one.
            driver.write(0, CONTROL, MASK)
            device.table.vectors[0].signal()
            driver.write(0, DATA, 0x41 + turn)
            assert cpu.take() == {}
            driver.write(0, CONTROL, 0)
            kvm.receives(msi(0x41 + turn))
        assert device.table.faults() == []
