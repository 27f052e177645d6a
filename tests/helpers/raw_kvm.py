"""A VM of KVM made by bare ioctls, without the package under test."""

from __future__ import annotations

import fcntl
import os
import struct

from backends import KVM_IRQFD

KVM_CREATE_VM, KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU = 0xAE01, 0xAE60, 0xAE41
KVM_SET_GSI_ROUTING, KVM_IRQ_ROUTING_MSI = 0x4008AE6A, 2
KVM_GET_LAPIC, KVM_SET_LAPIC = 0x8400AE8E, 0x4400AE8F


class KvmVm:
    """A VM of KVM with one vCPU whose local APIC is on, made without the package under test."""

    def __init__(self) -> None:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.fd = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        os.close(kvm)
        fcntl.ioctl(self.fd, KVM_CREATE_IRQCHIP)
        self.vcpu = fcntl.ioctl(self.fd, KVM_CREATE_VCPU, 0)
        registers = self._registers()
        registers[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
        fcntl.ioctl(self.vcpu, KVM_SET_LAPIC, registers)

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        os.close(self.vcpu)
        os.close(self.fd)

    def route(self, *entries: tuple[int, int, int]) -> None:
        """Sets a routing table of MSIs, as the VMM may have done."""
        table = struct.pack("II", len(entries), 0)
        for gsi, address, data in entries:
            table += struct.pack("IIII III 20x", gsi, KVM_IRQ_ROUTING_MSI, 0, 0, address, 0, data)
        fcntl.ioctl(self.fd, KVM_SET_GSI_ROUTING, table)

    def arm(self, gsi: int, event: int) -> None:
        self.irqfd(gsi, event, 0)

    def irqfd(self, gsi: int, event: int, flags: int) -> None:
        fcntl.ioctl(self.fd, KVM_IRQFD, struct.pack("IIII16x", event, gsi, flags, 0))

    def vectors(self) -> set[int]:
        """Takes the vectors in the IRR."""
        registers = self._registers()
        found = {
            vector
            for vector in range(256)
            if registers[0x200 + 16 * (vector // 32) + vector % 32 // 8] >> vector % 8 & 1
        }
        for at in range(8):
            registers[0x200 + 16 * at : 0x204 + 16 * at] = bytes(4)
        fcntl.ioctl(self.vcpu, KVM_SET_LAPIC, registers)
        return found

    def _registers(self) -> bytearray:
        registers = bytearray(1024)
        fcntl.ioctl(self.vcpu, KVM_GET_LAPIC, registers, True)
        return registers
