"""QEMU's `ivshmem-doorbell` device without a guest: another machine's device that interrupts us, and that we interrupt.

The device connects virtual machines by shared memory and doorbells. A server, which is here, hands each machine the
memory and the eventfds of all (QEMU's docs/specs/ivshmem-spec.rst). QEMU runs no guest code: its accesses to the
device's registers are made through qtest, QEMU's interface for tests.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from typing import TYPE_CHECKING, Self

from mshv_irqfd.testing import patience

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vhost_user_blk.front_end import HasFileno

PROGRAM = "qemu-system-x86_64"
WE, QEMU = 0, 1
"""The peers."""
MESSAGE = struct.Struct("<q")
VERSION, MEMORY = 0, -1
MEMORY_SIZE = 1 << 20

SLOT = 4
CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
COMMAND, BAR_0, CAPABILITIES = 0x04, 0x10, 0x34
MEMORY_SPACE_AND_BUS_MASTER = 6
MSIX, MSIX_ENABLE = 0x11, 1 << 31
IV_POSITION, DOORBELL = 8, 12
"""Registers of BAR 0."""
REGISTERS, TABLE, SHARED = 0xFE000000, 0xFE001000, 0xFE100000
"""Where the BARs are put: BAR 0, 1 (MSI-X table and pending bits) and 2."""
MAILBOX = 0x1000
"""QEMU's guest memory, to which the device's messages are addressed: they show there."""


class Ivshmem:
    """A QEMU whose device has been set up as a guest's driver does. Its vectors are masked."""

    def __init__(self, program: str, ours: Sequence[HasFileno], theirs: Sequence[HasFileno]) -> None:
        """Starts QEMU. The eventfds in `ours` are signalled by its doorbell, and those in `theirs` interrupt it."""
        self.memory = os.memfd_create("ivshmem", os.MFD_CLOEXEC)
        os.ftruncate(self.memory, MEMORY_SIZE)
        self._server, qemus = socket.socketpair()
        self._tests, qtest = socket.socketpair()
        self._tests.settimeout(patience())
        self._process = subprocess.Popen(
            [
                *(program, "-machine", "pc", "-accel", "tcg", "-S", "-nodefaults", "-display", "none"),
                *("-chardev", f"socket,id=qtest,fd={qtest.fileno()}", "-qtest", "chardev:qtest"),
                *("-qtest-log", "/dev/null"),
                *("-chardev", f"socket,id=ivshmem,fd={qemus.fileno()}"),
                *("-device", f"ivshmem-doorbell,chardev=ivshmem,vectors={len(theirs)},addr={SLOT}"),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[qemus.fileno(), qtest.fileno()],
        )
        for end in (qemus, qtest):
            end.close()
        try:
            self._serve(ours, theirs)
            self._set_up(len(theirs))
        except BaseException:
            self.close()
            raise

    def _serve(self, ours: Sequence[HasFileno], theirs: Sequence[HasFileno]) -> None:
        # In this order: QEMU 7.2 crashes if an eventfd precedes the memory.
        self._send(VERSION)
        self._send(QEMU)
        self._send(MEMORY, self.memory)
        for peer, events in ((WE, ours), (QEMU, theirs)):
            for event in events:
                self._send(peer, event.fileno())

    def _send(self, value: int, fd: int | None = None) -> None:
        socket.send_fds(self._server, [MESSAGE.pack(value)], [] if fd is None else [fd])

    def _set_up(self, vectors: int) -> None:
        for number, address in enumerate((REGISTERS, TABLE, SHARED)):
            self._write_config(BAR_0 + 4 * number, address)
        self._write_config(COMMAND, MEMORY_SPACE_AND_BUS_MASTER)
        at = self._read_config(CAPABILITIES) & 0xFF
        while (header := self._read_config(at)) & 0xFF != MSIX:
            at = header >> 8 & 0xFF
            assert at, "the device has no MSI-X"
        for vector in range(vectors):
            for place, value in enumerate((MAILBOX + 4 * vector, 0, 0)):
                self.write(TABLE + 16 * vector + 4 * place, value)
        self._write_config(at, header | MSIX_ENABLE)
        pending_bits = self._read_config(at + 8)
        assert pending_bits & 7 == 1, "the pending bits are in BAR 1"
        self._pending_bits = TABLE + (pending_bits & ~7)
        # The device takes the server's messages as they come. It has read those before the eventfds by now.
        assert self.read(REGISTERS + IV_POSITION) == QEMU

    def ring(self, vector: int) -> None:
        """Writes to the device's doorbell: interrupts us. The eventfd is signalled when this returns."""
        self.write(REGISTERS + DOORBELL, WE << 16 | vector)

    def set_data(self, vector: int, data: int) -> None:
        """Sets the data of a vector's message."""
        self.write(TABLE + 16 * vector + 8, data)

    def mask(self, vector: int, *, masked: bool = True) -> None:
        """Sets or clears a vector's mask bit."""
        self.write(TABLE + 16 * vector + 12, int(masked))

    def pending(self) -> set[int]:
        """The vectors whose pending bits are set."""
        bits = self.read(self._pending_bits)
        return {vector for vector in range(32) if bits >> vector & 1}

    def sent(self, vector: int) -> int:
        """The data of the last message that a vector has sent since the last call; 0 if it sent none."""
        data = self.read(MAILBOX + 4 * vector)
        if data:
            self.write(MAILBOX + 4 * vector, 0)
        return data

    def read(self, address: int) -> int:
        """Reads a dword of QEMU's guest-physical memory."""
        return self._ask(f"readl {address:#x}")

    def write(self, address: int, value: int) -> None:
        """Writes a dword of QEMU's guest-physical memory."""
        self._ask(f"writel {address:#x} {value:#x}")

    def _read_config(self, register: int) -> int:
        self._ask(f"outl {CONFIG_ADDRESS:#x} {1 << 31 | SLOT << 11 | register:#x}")
        return self._ask(f"inl {CONFIG_DATA:#x}")

    def _write_config(self, register: int, value: int) -> None:
        self._ask(f"outl {CONFIG_ADDRESS:#x} {1 << 31 | SLOT << 11 | register:#x}")
        self._ask(f"outl {CONFIG_DATA:#x} {value:#x}")

    def _ask(self, command: str) -> int:
        self._tests.sendall(command.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            more = self._tests.recv(4096)
            assert more, f"QEMU went away at {command!r}: status {self._process.wait()}"
            answer += more
        word, *value = answer.decode().split()
        assert word == "OK", f"{command}: {answer!r}"
        return int(value[0], 16) if value else 0

    def close(self) -> None:
        """Ends QEMU. A second call does nothing."""
        self._process.kill()
        self._process.wait()
        self._server.close()
        self._tests.close()
        memory, self.memory = self.memory, -1
        if memory >= 0:
            os.close(memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
