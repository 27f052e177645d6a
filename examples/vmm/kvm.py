"""A virtual machine of KVM by bare ioctls: memory, vCPUs, and the accesses that they leave to the VMM.

The numbers and structures are those of Linux's `Documentation/virt/kvm/api.rst` and `include/uapi/linux/kvm.h`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import struct
import threading
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

KVM_CREATE_VM: Final = 0xAE01
KVM_GET_VCPU_MMAP_SIZE: Final = 0xAE04
KVM_GET_SUPPORTED_CPUID: Final = 0xC008AE05
KVM_CREATE_VCPU: Final = 0xAE41
KVM_SET_USER_MEMORY_REGION: Final = 0x4020AE46
KVM_SET_TSS_ADDR: Final = 0xAE47
KVM_CREATE_IRQCHIP: Final = 0xAE60
KVM_IRQ_LINE: Final = 0x4008AE61
KVM_CREATE_PIT2: Final = 0x4040AE77
KVM_RUN: Final = 0xAE80
KVM_SET_REGS: Final = 0x4090AE82
KVM_GET_SREGS: Final = 0x8138AE83
KVM_SET_SREGS: Final = 0x4138AE84
KVM_SET_CPUID2: Final = 0x4008AE90
KVM_SET_TSC_KHZ: Final = 0xAEA2

KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN = 2, 6, 8

MEMORY_LIMIT: Final = 0x7000_0000
"""The end of the largest guest memory. Above are three pages for KVM itself and the devices' BARs."""
_TSS: Final = 0x7FFF_0000

# The processor that the guest sees: any x86-64, with what KVM offers of these leaves: the bits of EAX to EDX that stay.
# There is no XSAVE, nor anything that needs it, as the VMM keeps no extended state; and each CPU is a package.
_ALL: Final = 0xFFFFFFFF
_CPUID: Final = {
    0: (0, _ALL, _ALL, _ALL),  # and 1 is the last basic leaf
    1: (_ALL, 0xFFFF, 1 << 0 | 1 << 13 | 1 << 21 | 1 << 31, _ALL ^ 1 << 28),  # SSE3, CX16, x2APIC, hypervisor
    0x40000000: (_ALL,) * 4,
    0x40000001: (_ALL,) * 4,
    0x80000000: (0, _ALL, _ALL, _ALL),  # and 0x80000008 is the last extended leaf
    0x80000001: (_ALL, _ALL, 1 << 0, 1 << 11 | 1 << 20 | 1 << 29),  # LAHF; SYSCALL, NX, long mode
    **dict.fromkeys(range(0x80000002, 0x80000008), (_ALL,) * 4),
    0x80000008: (_ALL, 0, 0, 0),
}
_TSC_DEADLINE: Final = 1 << 24  # the kernel's local APIC has it, but leaves it to the VMM to say so


_libc: Final = ctypes.CDLL(None, use_errno=True)


class Bus(Protocol):
    """What lies behind an access of the guest that KVM does not handle itself."""

    def read(self, address: int, size: int) -> int:
        """Reads `size` bytes."""

    def write(self, address: int, data: bytes) -> None:
        """Writes bytes."""


class Vm:
    """A VM with its interrupt controllers and timer in the kernel. Close it when no vCPU runs any more.

    Args:
        memory: the size of the guest's memory, from address 0 up, in bytes.
    """

    def __init__(self, memory: int) -> None:
        if memory > MEMORY_LIMIT or memory % mmap.PAGESIZE:
            raise ValueError(f"memory of {memory} bytes: at most {MEMORY_LIMIT} bytes, in whole pages")
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.fd = fcntl.ioctl(self.kvm, KVM_CREATE_VM, 0)
        fcntl.ioctl(self.fd, KVM_SET_TSS_ADDR, _TSS)
        fcntl.ioctl(self.fd, KVM_CREATE_IRQCHIP)
        fcntl.ioctl(self.fd, KVM_CREATE_PIT2, struct.pack("<I60x", 1))  # with port 0x61, which gates its channel 2
        self._mmap = mmap.mmap(-1, memory, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self.memory = memoryview(self._mmap)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._mmap))
        fcntl.ioctl(self.fd, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, memory, address))

    def fileno(self) -> int:
        """The VM's descriptor."""
        return self.fd

    def vcpu(self, index: int, ports: Bus, mmio: Bus) -> Vcpu:
        """Makes the vCPU with this APIC id. It waits for the guest's start-up message if it is not the first."""
        return Vcpu(self.kvm, self.fd, index, ports, mmio)

    def set_irq(self, pin: int, *, level: bool) -> None:
        """Sets a pin of the interrupt controllers."""
        fcntl.ioctl(self.fd, KVM_IRQ_LINE, struct.pack("<II", pin, level))

    def close(self) -> None:
        """Closes the descriptors. The memory goes when nothing refers to it any more."""
        os.close(self.fd)
        os.close(self.kvm)


class Vcpu:
    """A virtual CPU, which runs on a thread of its own between `start()` and `stop()`."""

    def __init__(self, kvm: int, vm: int, index: int, ports: Bus, mmio: Bus) -> None:
        self.index = index
        self._fd = fcntl.ioctl(vm, KVM_CREATE_VCPU, index)
        self._run = mmap.mmap(self._fd, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE))
        self._ports, self._mmio = ports, mmio
        self._stopping = False
        fcntl.ioctl(self._fd, KVM_SET_CPUID2, _cpuid(kvm, index))
        # At the host's rate. KVM's default is the rate measured when KVM started, which may be off a little; a KVM that
        # can't scale refuses it then, and the deadlines of the guest's timers are wrong.
        fcntl.ioctl(self._fd, KVM_SET_TSC_KHZ, 0)

    def enter_at(self, address: int, rsi: int) -> None:
        """Sets the registers for 32-bit code: flat segments, no paging, interrupts off."""
        sregs = bytearray(312)
        fcntl.ioctl(self._fd, KVM_GET_SREGS, sregs)
        code = struct.pack("<QIH10B", 0, 0xFFFFFFFF, 0x10, 0xB, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        data = struct.pack("<QIH10B", 0, 0xFFFFFFFF, 0x18, 0x3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
        sregs[: 6 * 24] = code + 5 * data
        struct.pack_into("<Q", sregs, 224, 1)  # CR0: protected mode
        fcntl.ioctl(self._fd, KVM_SET_SREGS, bytes(sregs))
        registers = [0] * 18  # in the kernel's order; RSI is the fifth, RIP and RFLAGS are the last
        registers[4], registers[16], registers[17] = rsi, address, 2
        fcntl.ioctl(self._fd, KVM_SET_REGS, struct.pack("<18Q", *registers))

    def fileno(self) -> int:
        """The vCPU's descriptor."""
        return self._fd

    def start(self, ended: Callable[[BaseException | None], None]) -> None:
        """Runs the vCPU, and calls `ended` on its thread when the guest has shut down, or with what went wrong."""
        self._thread = threading.Thread(target=self._loop, args=[ended], name=f"vcpu {self.index}")
        self._thread.start()

    def stop(self) -> None:
        """Makes the vCPU leave the guest, with no access half done, and waits for its thread."""
        self._stopping = True
        self._run[1] = 1  # immediate_exit: KVM_RUN returns even if the signal comes before it
        if self._thread.is_alive() and self._thread.ident is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(self._thread.ident, signal.SIGUSR1)
        self._thread.join()

    def close(self) -> None:
        """Closes the vCPU, which does not run."""
        self._run.close()
        os.close(self._fd)

    def _loop(self, ended: Callable[[BaseException | None], None]) -> None:
        try:
            while True:
                try:
                    # Completes the access before, if there was one, and goes on.
                    self._enter()
                except InterruptedError:
                    if self._stopping:
                        return
                    continue
                except BlockingIOError:  # a start-up message has arrived
                    continue
                if not self._handle_exit():
                    break
        except BaseException as error:  # noqa: BLE001 -- it is the main thread's to raise
            ended(error)
        else:
            ended(None)

    def _enter(self) -> None:
        """KVM_RUN. Not by fcntl.ioctl(), which calls again after a signal from Python 3.14 on, and never returned."""
        if _libc.ioctl(self._fd, ctypes.c_ulong(KVM_RUN), 0) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _handle_exit(self) -> bool:
        """Does what the guest's exit asks for. Returns false if the guest has shut down."""
        run = self._run
        (reason,) = struct.unpack_from("<I", run, 8)
        if reason == KVM_EXIT_MMIO:
            address, length, write = struct.unpack_from("<Q8xIB", run, 32)
            if write:
                self._mmio.write(address, run[40 : 40 + length])
            else:
                run[40 : 40 + length] = self._mmio.read(address, length).to_bytes(length, "little")
        elif reason == KVM_EXIT_IO:
            out, size, port, count, offset = struct.unpack_from("<BBHIQ", run, 32)
            for at in range(offset, offset + size * count, size):  # more than one for a string instruction
                if out:
                    self._ports.write(port, run[at : at + size])
                else:
                    run[at : at + size] = self._ports.read(port, size).to_bytes(size, "little")
        elif reason == KVM_EXIT_SHUTDOWN:
            return False
        else:
            raise RuntimeError(f"vCPU {self.index} left the guest with reason {reason}: {bytes(run[32:64]).hex()}")
        return True


def _cpuid(kvm: int, index: int) -> bytes:
    """The processor that a vCPU reports, one thread to a package: `kvm_cpuid2`."""
    offered = bytearray(struct.pack("<II", 256, 0) + bytes(256 * 40))
    fcntl.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, offered)
    (number,) = struct.unpack_from("<I", offered)
    kept = []
    for leaf, subleaf, flags, *registers in struct.iter_unpack("<7I12x", offered[8 : 8 + 40 * number]):
        if leaf in _CPUID:
            added = {0: (1,), 1: (0, index << 24, _TSC_DEADLINE), 0x80000000: (0x80000008,)}.get(leaf, ())
            shown = [
                value & keep | add
                for value, keep, add in zip(registers, _CPUID[leaf], (*added, 0, 0, 0, 0)[:4], strict=True)
            ]
            kept.append(struct.pack("<7I12x", leaf, subleaf, flags, *shown))
    return struct.pack("<II", len(kept), 0) + b"".join(kept)
