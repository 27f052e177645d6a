"""The driver's side of a split virtqueue (virtio 1.2, section 2.7).

The queue is three arrays in guest memory. The *descriptor table* describes buffers; buffers of one request are chained.
In the *available ring* the driver tells the device which chains to work on. In the *used ring* the device tells which
ones it is done with. The driver then notifies the device by a write to a register (the *kick*), and the device the
driver by an interrupt (the *call*).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .memory import Memory

DESCRIPTOR = struct.Struct("<QIHH")
"""Address, length, flags, and the number of the next descriptor of the chain."""
NEXT, DEVICE_WRITES = 1, 2
"""Flags: another descriptor follows; the device writes to the buffer."""
USED_ELEMENT = struct.Struct("<II")
"""The first descriptor of a chain, and the number of bytes that the device wrote."""
INDEX, ENTRIES = 2, 4
"""Offsets in both rings. Flags come first; the driver leaves its own 0, which asks for an interrupt for each chain."""


class Buffer(NamedTuple):
    """A buffer of a request."""

    address: int
    length: int
    device_writes: bool = False


class Ring:
    """A split virtqueue at the beginning of a piece of guest memory.

    Args:
        memory: the memory.
        size: the number of descriptors, a power of two up to 32768.
    """

    def __init__(self, memory: Memory, size: int) -> None:
        if size not in (1 << bit for bit in range(16)):
            raise ValueError(f"a ring of {size} descriptors: must be a power of two up to 32768")
        self.size = size
        self.descriptors = memory.address
        self.available = self.descriptors + DESCRIPTOR.size * size
        # Aligned to 4 bytes: the available ring ends with a word that is of no use here.
        self.used = (self.available + ENTRIES + 2 * size + 2 + 3) // 4 * 4
        self.end = self.used + ENTRIES + USED_ELEMENT.size * size + 2
        self._memory = memory
        self._published = 0
        self._seen = 0

    def reset(self) -> None:
        """Makes the queue new, after the device has gone. The chains stay described, and none is available."""
        self._published = self._seen = 0
        self._memory.store(self.available + INDEX, 0)
        self._memory.store(self.used + INDEX, 0)

    def describe(self, first: int, buffers: Sequence[Buffer]) -> None:
        """Describes a chain of buffers in consecutive descriptors. The device must not have the chain."""
        last = first + len(buffers) - 1
        for number, (address, length, device_writes) in enumerate(buffers, first):
            flags = (NEXT if number != last else 0) | (DEVICE_WRITES if device_writes else 0)
            place = self.descriptors + DESCRIPTOR.size * number
            self._memory.write(place, DESCRIPTOR.pack(address, length, flags, number + 1 if number != last else 0))

    def publish(self, first: int) -> None:
        """Makes a chain available to the device."""
        self._memory.store(self.available + ENTRIES + 2 * (self._published % self.size), first)
        self._published = (self._published + 1) % 0x10000
        # Last, as the device may look at once.
        self._memory.store(self.available + INDEX, self._published)

    def take_used(self) -> Iterator[tuple[int, int]]:
        """Takes the chains that the device is done with: the first descriptor, and the number of bytes written."""
        while self._seen != self._memory.load(self.used + INDEX):
            place = self.used + ENTRIES + USED_ELEMENT.size * (self._seen % self.size)
            first, written = USED_ELEMENT.unpack(self._memory.read(place, USED_ELEMENT.size))
            self._seen = (self._seen + 1) % 0x10000
            yield first, written
