"""Guest code on KVM: a vCPU that writes to an address or a port, and tells which writes left the kernel."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct

KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, KVM_RUN = 0xAE04, 0xAE41, 0xAE80
KVM_SET_USER_MEMORY_REGION, KVM_SET_MP_STATE = 0x4020AE46, 0x4004AE99
KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
KVM_EXIT_IO, KVM_EXIT_MMIO = 2, 6
CR0_PROTECTED = 1

CODE, DATA = 0x1000, 0x2000
STOP = 0xF4
"""A port that no doorbell of a test has: the write that ends the code."""


class KvmCode:
    """A vCPU in flat 32-bit protected mode, in a VM that has no memory of its own yet.

    It is not the package's: its id is above those of the VPs in use.
    """

    ID = 200

    def __init__(self, vm: int) -> None:
        self._memory = mmap.mmap(-1, 0x4000)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("IIQQQ", 0, 0, 0, len(self._memory), address))
        self._vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, self.ID)
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self._run = mmap.mmap(self._vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE))
        os.close(kvm)
        fcntl.ioctl(self._vcpu, KVM_SET_MP_STATE, struct.pack("I", 0))  # runnable, without a wake-up by vCPU 0
        sregs = bytearray(312)
        fcntl.ioctl(self._vcpu, KVM_GET_SREGS, sregs)
        for place, kind in enumerate((11, 3, 3, 3, 3, 3)):  # code; data and stack
            struct.pack_into("QIHBBBBBBBB", sregs, 24 * place, 0, 0xFFFFFFFF, 8, kind, 1, 0, 1, 1, 0, 1, 0)
        struct.pack_into("Q", sregs, 224, CR0_PROTECTED)
        fcntl.ioctl(self._vcpu, KVM_SET_SREGS, bytes(sregs))

    def close(self) -> None:
        self._run.close()
        os.close(self._vcpu)
        self._memory.close()

    def write(self, address: int, data: bytes) -> bool:
        """Writes 1, 2, 4 or 8 bytes to an address below 4 GiB. Returns whether the kernel kept the write to itself."""
        at = struct.pack("<I", address)
        code = {
            1: b"\xc6\x05" + at + data,  # mov byte [address], data
            2: b"\x66\xc7\x05" + at + data,
            4: b"\xc7\x05" + at + data,
            8: b"\x0f\x6f\x05"
            + struct.pack("<I", DATA)
            + b"\x0f\x7f\x05"
            + at,  # movq mm0, [DATA]; movq [address], mm0
        }[len(data)]
        self._memory[DATA : DATA + len(data)] = data
        return self._exits(code) == []

    def write_port(self, port: int, data: bytes) -> bool:
        """Writes 1, 2 or 4 bytes to a port. Returns whether the kernel kept the write to itself."""
        value = data.ljust(4, b"\0")
        out = {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}[len(data)]  # out dx, al / ax / eax
        return self._exits(b"\xba" + struct.pack("<I", port) + b"\xb8" + value + out) == []

    def _exits(self, code: bytes) -> list[tuple[int, int, bytes]]:
        """Runs code, and returns the writes that the VMM got: the reason, the address and the data of each."""
        code += bytes((0xE6, STOP))  # out STOP, al
        self._memory[CODE : CODE + len(code)] = code
        fcntl.ioctl(self._vcpu, KVM_SET_REGS, struct.pack("18Q", *[0] * 16, CODE, 2))
        exits: list[tuple[int, int, bytes]] = []
        while True:
            fcntl.ioctl(self._vcpu, KVM_RUN)
            (reason,) = struct.unpack_from("I", self._run, 8)
            if reason == KVM_EXIT_IO:
                _, size, address, _, offset = struct.unpack_from("BBHIQ", self._run, 32)
                data = self._run[offset : offset + size]
            else:
                assert reason == KVM_EXIT_MMIO, f"KVM_RUN ended with exit reason {reason}"
                address, data, size = struct.unpack_from("Q8sI", self._run, 32)
            if (reason, address) == (KVM_EXIT_IO, STOP):
                return exits
            exits.append((reason, address, data[:size]))
