"""A split virtqueue in guest memory, seen from the device (Virtual I/O Device 1.2, section 2.7)."""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import Final

MAX_SIZE: Final = 256
NO_VECTOR: Final = 0xFFFF

_NEXT, _WRITE = 1, 2
_NO_INTERRUPT: Final = 1
_SAVED: Final = ("size", "vector", "enabled", "descriptors", "driver", "device", "_taken")


class GuestError(Exception):
    """The guest's driver broke the rules of its device."""


@dataclass
class Chain:
    """A chain of buffers: those that the device reads, then those that it writes, as views of guest memory."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]


class Virtqueue:
    """A queue. The guest sets its public attributes."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        # On x86 a store may become visible after a later load, and taking a lock is a fence against that.
        self._fence = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Makes the queue as it is before the guest sets it up."""
        self.size, self.vector, self.enabled = MAX_SIZE, NO_VECTOR, False
        self.descriptors = self.driver = self.device = 0
        self._taken = 0

    def save(self) -> dict[str, int]:
        """The queue, for `restore()`: what the guest has set, and how far the device has come."""
        return {name: getattr(self, name) for name in _SAVED}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on with a saved queue."""
        for name in _SAVED:
            setattr(self, name, state[name])

    def pop(self) -> Chain | None:
        """Takes the next chain that the guest has made available."""
        (available,) = struct.unpack("<H", self._at(self.driver + 2, 2))
        if available == self._taken:
            return None
        (head,) = struct.unpack("<H", self._at(self.driver + 4 + 2 * (self._taken % self.size), 2))
        self._taken = self._taken + 1 & 0xFFFF
        chain = Chain(head, [], [])
        index: int | None = head
        for _ in range(self.size):
            if index is None:
                return chain
            if index >= self.size:
                raise GuestError(f"descriptor {index} of a queue of {self.size}")
            address, length, flags, after = struct.unpack("<QIHH", self._at(self.descriptors + 16 * index, 16))
            (chain.writable if flags & _WRITE else chain.readable).append(self._at(address, length))
            index = after if flags & _NEXT else None
        raise GuestError(f"the chain at descriptor {head} has no end")

    def push(self, chain: Chain, written: int) -> None:
        """Gives a chain back to the guest."""
        index = self._at(self.device + 2, 2)
        (used,) = struct.unpack("<H", index)
        self._at(self.device + 4 + 8 * (used % self.size), 8)[:] = struct.pack("<II", chain.head, written)
        index[:] = struct.pack("<H", used + 1 & 0xFFFF)

    def wants_interrupt(self) -> bool:
        """Whether the guest wants to hear of the chains that it has been given back."""
        with self._fence:
            (flags,) = struct.unpack("<H", self._at(self.driver, 2))
        return not flags & _NO_INTERRUPT

    def _at(self, address: int, length: int) -> memoryview:
        if address + length > len(self._memory):
            raise GuestError(f"{length} bytes at {address:#x}: outside the guest's memory")
        return self._memory[address : address + length]
