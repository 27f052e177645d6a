"""Memory of a guest that another process shares."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class Memory:
    """A piece of guest memory in a memfd, which can be sent to a device's process.

    Args:
        address: the guest-physical address of its first byte.
        size: its size in bytes, a multiple of the page size.
    """

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self._fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        self._bytes = mmap.mmap(self._fd, size)
        self._words = memoryview(self._bytes).cast("H")

    def fileno(self) -> int:
        """The descriptor of the memory."""
        return self._fd

    def close(self) -> None:
        """Unmaps the memory here. The device's process keeps its own mapping."""
        self._words.release()
        self._bytes.close()
        os.close(self._fd)

    def read(self, address: int, size: int) -> bytes:
        """Reads bytes at a guest-physical address."""
        at = self._offset(address, size)
        return self._bytes[at : at + size]

    def write(self, address: int, data: bytes) -> None:
        """Writes bytes at a guest-physical address."""
        at = self._offset(address, len(data))
        self._bytes[at : at + len(data)] = data

    def load(self, address: int) -> int:
        """Reads a 16-bit word in one access."""
        return self._words[self._offset(address, 2) // 2]

    def store(self, address: int, value: int) -> None:
        """Writes a 16-bit word in one access, as the other side may read it at any time.

        Bytes written one by one would show it half a word. x86 makes stores visible in the order of the program.
        """
        self._words[self._offset(address, 2) // 2] = value

    def _offset(self, address: int, size: int) -> int:
        if not self.address <= address <= self.address + self.size - size:
            end = self.address + self.size
            raise ValueError(f"{address:#x}, {size} bytes, is outside the memory {self.address:#x}-{end:#x}")
        return address - self.address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()
