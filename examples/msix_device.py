"""A PCI device with MSI-X, and a scripted guest that finds, programs, moves and masks its interrupts.

usage: python examples/msix_device.py

The device has four queues with a vector each. `Device` is what a VMM adds to its PCI bus: it answers the guest's
accesses to configuration space and to two BARs. `Guest` does what a driver does, in the order that Linux does it.
Everything that the package needs to know passes through `MsixTable`: no code here decides when an interrupt is sent.
"""

from __future__ import annotations

import struct

from mshv_irqfd import MsixTable, SimulatedPartition, open_partition

QUEUES = 4
VENDOR_AND_DEVICE = 0x10F0_1AF4
MSIX_CAPABILITY = 0x11
REGISTERS_BAR, MSIX_BAR = 0, 1
TABLE, PENDING_BITS = 0x000, 0x800
"""Offsets in the BAR of MSI-X."""
ENTRY, DATA, CONTROL = 16, 8, 12
"""The size of an entry of the table, and offsets in it. The address comes first."""
MASKED = 1
ENABLE, FUNCTION_MASK = 0x8000, 0x4000
"""Bits of message control."""
CAPABILITY_AT = 0x40
COMMAND_AND_STATUS, CAPABILITIES = 0x04, 0x34
HAS_CAPABILITIES = 1 << 20
PATIENCE = 10.0


class Device:
    """The device, as the VMM's PCI bus sees it."""

    def __init__(self, partition: SimulatedPartition) -> None:
        self.msix = MsixTable(partition, QUEUES)
        self.done = [0] * QUEUES
        self._config = bytearray(256)
        struct.pack_into("<II", self._config, 0, VENDOR_AND_DEVICE, HAS_CAPABILITIES)
        self._config[CAPABILITIES] = CAPABILITY_AT
        self._config[CAPABILITY_AT : CAPABILITY_AT + 12] = self.msix.capability(
            table_bar=MSIX_BAR, table_offset=TABLE, pba_bar=MSIX_BAR, pba_offset=PENDING_BITS
        )

    def close(self) -> None:
        """Removes the device."""
        self.msix.close()

    def work(self, queue: int) -> None:
        """Does a queue's work and signals its vector, whatever the guest has set or masked."""
        self.done[queue] += 1
        self.msix.vectors[queue].signal()

    def read_config(self, offset: int, size: int) -> int:
        """The guest reads configuration space."""
        # The one register of the capability that changes.
        struct.pack_into("<H", self._config, CAPABILITY_AT + 2, self.msix.message_control)
        return int.from_bytes(self._config[offset : offset + size], "little")

    def write_config(self, offset: int, data: bytes) -> None:
        """The guest writes configuration space. Only the capability is of interest here."""
        if CAPABILITY_AT <= offset < CAPABILITY_AT + 12:
            self.msix.write_message_control(offset - CAPABILITY_AT, data)

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """The guest reads a register."""
        if bar == REGISTERS_BAR:
            return self.done[offset // 4 % QUEUES]
        if offset >= PENDING_BITS:
            return self.msix.read_pba(offset - PENDING_BITS, size)
        return self.msix.read_table(offset - TABLE, size)

    def write_bar(self, bar: int, offset: int, data: bytes) -> None:
        """The guest writes a register. A queue's register is its doorbell."""
        if bar == REGISTERS_BAR:
            self.work(offset // 4 % QUEUES)
        elif offset < PENDING_BITS:
            self.msix.write_table(offset - TABLE, data)


class Guest:
    """A guest's driver of the device."""

    def __init__(self, partition: SimulatedPartition, device: Device) -> None:
        self._partition, self._device = partition, device
        assert device.read_config(0, 4) == VENDOR_AND_DEVICE
        assert device.read_config(COMMAND_AND_STATUS, 4) & HAS_CAPABILITIES
        at = device.read_config(CAPABILITIES, 1)
        while device.read_config(at, 1) != MSIX_CAPABILITY:
            at = device.read_config(at + 1, 1)
        self._message_control = at + 2
        self.vectors = (device.read_config(self._message_control, 2) & 0x7FF) + 1

    def set_message_control(self, value: int) -> None:
        """Enables MSI-X, or masks all of it."""
        self._device.write_config(self._message_control, value.to_bytes(2, "little"))

    def set_message(self, vector: int, cpu: int, number: int) -> None:
        """Sends a vector to a CPU, as interrupt `number` there. The vector must be masked."""
        entry = TABLE + ENTRY * vector
        self._device.write_bar(MSIX_BAR, entry, (0xFEE0_0000 | cpu << 12).to_bytes(4, "little"))
        self._device.write_bar(MSIX_BAR, entry + 4, bytes(4))
        self._device.write_bar(MSIX_BAR, entry + DATA, number.to_bytes(4, "little"))

    def mask(self, vector: int, *, masked: bool = True) -> None:
        """Sets or clears a vector's mask bit."""
        control = TABLE + ENTRY * vector + CONTROL
        self._device.write_bar(MSIX_BAR, control, (MASKED * masked).to_bytes(4, "little"))

    def bring_up(self) -> None:
        """Gives each queue an interrupt on CPU 0."""
        self.set_message_control(ENABLE | FUNCTION_MASK)
        for vector in range(self.vectors):
            self.set_message(vector, cpu=0, number=0x41 + vector)
            self.mask(vector, masked=False)
        self.set_message_control(ENABLE)

    def ring(self, queue: int) -> None:
        """Gives a queue work."""
        self._device.write_bar(REGISTERS_BAR, 4 * queue, bytes(4))

    def pending(self) -> int:
        """The pending bits."""
        return self._device.read_bar(MSIX_BAR, PENDING_BITS, 8)

    def interrupts(self) -> list[str]:
        """What the CPUs got, by vector: which of two signals is delivered first is the kernel's business."""
        self._partition.settle()
        arrived = sorted(self._partition.take_interrupts())
        return [f"{interrupt.vector:#x} on CPU {interrupt.destination}" for interrupt in arrived]


def main() -> None:
    """Runs the guest."""
    with open_partition("simulated", vps=2) as partition:
        device = Device(partition)
        guest = Guest(partition, device)
        print(f"the device has {guest.vectors} vectors")
        guest.bring_up()
        print(f"all are set up, by {partition.stats().pushes} push of the routing table")

        for queue in range(QUEUES):
            guest.ring(queue)
        print(f"each queue worked: {', '.join(guest.interrupts())}")

        # Linux moves an interrupt so: irqbalance does it all the time.
        guest.mask(2)
        guest.set_message(2, cpu=1, number=0x51)
        guest.mask(2, masked=False)
        guest.ring(2)
        print(f"queue 2 has moved: {', '.join(guest.interrupts())}; {partition.stats().pushes} push so far")

        guest.mask(3)
        guest.ring(3)
        guest.ring(3)
        print(f"queue 3 is masked: pending bits {guest.pending():#06b}, interrupts {guest.interrupts()}")
        guest.mask(3, masked=False)
        print(f"unmasked: {', '.join(guest.interrupts())}; pending bits {guest.pending():#06b}")

        # A guest can write anything. The device model goes on, and is told what does not work.
        guest.mask(0)
        guest.set_message(0, cpu=7, number=0x41)
        guest.mask(0, masked=False)
        guest.ring(0)
        for vector, reason in device.msix.faults():
            print(f"vector {vector} is not armed: {reason}")
        assert guest.interrupts() == []
        device.close()


if __name__ == "__main__":
    main()
