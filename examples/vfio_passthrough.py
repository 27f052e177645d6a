"""Passes a PCI device's interrupts through to a guest: VFIO signals the vectors of an MSI capability.

    python examples/vfio_passthrough.py [BACKEND [ADDRESS]]

A VMM that passes a device through gives VFIO an eventfd for each of the device's interrupts. VFIO's handler signals it,
still in the hard interrupt, and if the eventfd is armed as an irqfd, the hypervisor raises the guest's interrupt there
and then. Where the guest's interrupt goes, and whether it is masked, is between the guest's driver and the capability
that the VMM shows it: `MsiCapability` (or `MsixTable`). The device itself never learns of it.

This program is such a VMM without a guest: it plays the guest's driver too. The device is QEMU's `edu`, which computes
factorials and interrupts when one is done (`qemu-system-x86_64 -device intel-iommu -device edu`, or `make lab`, which
boots so). It needs root, the driver vfio-pci and an IOMMU, and it takes the device from its driver.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import time
from ctypes import addressof, c_char
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from mshv_irqfd import MsiCapability, MsiRoute, open_partition

if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence

DEVICES: Final = Path("/sys/bus/pci/devices")
VFIO_PCI: Final = Path("/sys/bus/pci/drivers/vfio-pci")
EDU: Final = ("0x1234", "0x11e8")


class VfioDevice:
    """A PCI device in the hands of this process. The numbers are those of Linux's `include/uapi/linux/vfio.h`.

    Args:
        address: its bus address, for instance "0000:00:03.0".
    """

    MSI, MSIX, REQUEST = 1, 2, 4
    """Kinds of interrupts. The last is not the device's: VFIO asks with it to give the device back."""
    CONFIG = 7
    """The region of configuration space; 0 to 5 are the BARs."""

    def __init__(self, address: str) -> None:
        self.address = address
        bind(address)
        group = (DEVICES / address / "iommu_group").readlink().name
        self._container = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
        self._group = os.open(f"/dev/vfio/{group}", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self._group, _call(4), struct.pack("i", self._container))  # VFIO_GROUP_SET_CONTAINER
        fcntl.ioctl(self._container, _call(2), 1)  # VFIO_SET_IOMMU: type 1
        name = bytearray(address.encode() + b"\0")  # with a mutable argument, ioctl() returns the new descriptor
        self._fd = fcntl.ioctl(self._group, _call(6), name)  # VFIO_GROUP_GET_DEVICE_FD
        self._regions = {index: self._region(index) for index in (0, self.CONFIG)}
        # Let the device decode its BARs and write to memory: an MSI is such a write.
        command = int.from_bytes(os.pread(self._fd, 2, self._regions[self.CONFIG] + 4), "little")
        os.pwrite(self._fd, struct.pack("<H", command | 6), self._regions[self.CONFIG] + 4)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the device back: VFIO resets it, and its interrupts end. A second call does nothing."""
        for fd in (self._fd, self._group, self._container):
            if fd >= 0:
                os.close(fd)
        self._fd = self._group = self._container = -1

    def read(self, offset: int, size: int = 4) -> int:
        """Reads a register in BAR 0."""
        return int.from_bytes(os.pread(self._fd, size, self._regions[0] + offset), "little")

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Writes a register in BAR 0."""
        os.pwrite(self._fd, value.to_bytes(size, "little"), self._regions[0] + offset)

    def connect(self, kind: int, events: Sequence[int]) -> None:
        """Has each interrupt of a kind, from the first on, signal an eventfd. No events: turns the kind off."""
        data, action = (1 << 2, 1 << 5) if events else (1 << 0, 1 << 5)  # eventfds or nothing; the trigger
        size = 20 + 4 * len(events)
        fds = struct.pack(f"{len(events)}i", *events)
        # VFIO_DEVICE_SET_IRQS
        fcntl.ioctl(self._fd, _call(10), struct.pack("IIIII", size, data | action, kind, 0, len(events)) + fds)

    def map(self, address: int, memory: mmap.mmap) -> None:
        """Lets the device see memory of this process at an address of its own, until it is closed."""
        view = c_char.from_buffer(memory)
        request = struct.pack("<IIQQQ", 32, 3, addressof(view), address, len(memory))
        fcntl.ioctl(self._container, _call(13), request)  # VFIO_IOMMU_MAP_DMA, to read and write

    def _region(self, index: int) -> int:
        info = bytearray(struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))
        fcntl.ioctl(self._fd, _call(8), info)  # VFIO_DEVICE_GET_REGION_INFO
        offset: int = struct.unpack("<IIIIQQ", info)[5]
        return offset


def _call(number: int) -> int:
    return ord(";") << 8 | 100 + number


def find(ids: tuple[str, str]) -> str | None:
    """The address of the first device with these vendor and device ids."""
    for device in sorted(DEVICES.iterdir()):
        if tuple((device / name).read_text().strip() for name in ("vendor", "device")) == ids:
            return device.name
    return None


def bind(address: str) -> None:
    """Takes a device from its driver and gives it to vfio-pci."""
    device = DEVICES / address
    if (device / "driver").exists():
        if (device / "driver").resolve() == VFIO_PCI.resolve():
            return
        (device / "driver" / "unbind").write_text(address)
    (device / "driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(address)


class Edu:
    """QEMU's `edu` device (its `docs/specs/edu`)."""

    _FACTORIAL, _STATUS, _RAISED, _ACKNOWLEDGE = 0x08, 0x20, 0x24, 0x64
    _COMPUTING, _INTERRUPT_WHEN_DONE = 0x01, 0x80

    def __init__(self, device: VfioDevice) -> None:
        self.device = device

    def factorial(self, number: int) -> int:
        """Has the device compute, which it ends with an interrupt, and acknowledges that."""
        self.device.write(self._STATUS, self._INTERRUPT_WHEN_DONE)
        self.device.write(self._FACTORIAL, number)
        while not (raised := self.device.read(self._RAISED)):
            time.sleep(0)
        result = self.device.read(self._FACTORIAL)
        self.device.write(self._ACKNOWLEDGE, raised)
        return result


def main(backend: str, address: str | None) -> None:
    """Computes some factorials, masked and not."""
    if address is None:
        sys.exit("no edu device here")
    with open_partition(backend) as partition, MsiCapability(partition, 1) as msi, VfioDevice(address) as device:
        # The VMM: from now on the device signals the guest's vector.
        vector = msi.vectors[0]
        device.connect(VfioDevice.MSI, [vector.event.fileno()])

        # The guest's driver: where the interrupt goes, and that it may come.
        message = MsiRoute.fixed(vector=0x41, apic_id=0)
        msi.write_config(4, message.address.to_bytes(4, "little"))
        msi.write_config(12, message.data.to_bytes(2, "little"))
        msi.write_config(2, (1).to_bytes(2, "little"))
        print(vector.route)

        edu = Edu(device)
        for number in range(1, 6):
            print(f"{number}! is {edu.factorial(number)}")
        print("pending:", vector.pending)  # no: each of the five was raised in the guest

        msi.write_config(16, (1).to_bytes(4, "little"))  # the guest masks the vector
        for number in range(6, 9):
            print(f"{number}! is {edu.factorial(number)}")
        while not vector.pending:
            time.sleep(0)
        print("masked, pending:", vector.pending)
        msi.write_config(16, bytes(4))  # one interrupt for all three
        print("unmasked, pending:", vector.pending)
        device.connect(VfioDevice.MSI, [])


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(given.get(1, "auto"), given.get(2) or find(EDU))
