"""MSI as PCI Local Bus 3.0 section 6.8.1 describes it, in plain Python: what a capability must show and send."""

from __future__ import annotations

from dataclasses import dataclass

from mshv_irqfd import MsiRoute
from msix_model import sendable

LENGTH = 24
PENDING = 20
"""Where the pending bits are."""
DATA = range(12, 14)


@dataclass
class Vector:
    live: bool = False
    pending: bool = False
    message: MsiRoute | None = None
    """The message that it sends; None if it is not armed."""
    faulty: bool = False
    has_route: bool = False


class Model:
    """A capability with 64-bit addresses and per-vector masking, and what it has sent since it was last asked."""

    def __init__(self, count: int, vps: set[int]) -> None:
        self.vectors = [Vector() for _ in range(count)]
        self.vps = vps
        self.sent: list[MsiRoute] = []
        self.capable = count.bit_length() - 1
        mask = (1 << count) - 1
        self.writable = (
            b"\0\0\x71\0" + b"\xfc" + b"\xff" * 7 + b"\xff\xff\0\0" + mask.to_bytes(4, "little") + b"\0\0\0\0"
        )
        self.registers = bytearray()
        self.clear()

    def clear(self) -> None:
        self.registers = bytearray(LENGTH)
        self.registers[0] = 5
        self.registers[2:4] = (0x180 | self.capable << 1).to_bytes(2, "little")

    def field(self, start: int, end: int) -> int:
        return int.from_bytes(self.registers[start:end], "little")

    @property
    def granted(self) -> int:
        """The logarithm of the number of vectors granted."""
        return min(self.registers[2] >> 4 & 7, self.capable)

    def masked(self, number: int) -> bool:
        return bool(self.field(16, 20) >> number & 1)

    def live(self, number: int) -> bool:
        return bool(self.registers[2] & 1) and number < 1 << self.granted and not self.masked(number)

    @property
    def shown(self) -> bytes:
        bits = sum(vector.pending << number for number, vector in enumerate(self.vectors))
        return bytes(self.registers[:PENDING]) + bits.to_bytes(4, "little")

    # The guest

    @staticmethod
    def defined(offset: int, size: int) -> bool:
        return size in (1, 2, 4) and offset % size == 0 and 0 <= offset <= LENGTH - size

    def read(self, offset: int, size: int) -> int:
        if not self.defined(offset, size):
            return (1 << 8 * min(size, 8)) - 1
        return int.from_bytes(self.shown[offset : offset + size], "little")

    def write(self, offset: int, data: bytes) -> None:
        if not self.defined(offset, len(data)):
            return
        for at, value in enumerate(data, offset):
            self.registers[at] = self.registers[at] & ~self.writable[at] | value & self.writable[at]
        complete = offset < DATA.stop and DATA.start < offset + len(data)
        for number, vector in enumerate(self.vectors):
            before, vector.live = vector.live, self.live(number)
            if vector.live and (complete or not before):
                self.arm(number, vector)
            elif before and not vector.live:
                vector.message = None

    def arm(self, number: int, vector: Vector) -> None:
        own = (1 << self.granted) - 1
        address, data = self.field(4, 12), self.field(12, 14) & ~own | number
        vector.faulty = not sendable(address, data, self.vps)
        vector.message = None if vector.faulty else MsiRoute(address, data)
        if vector.message is not None:
            vector.has_route = True
            if vector.pending:
                self.signal(vector)

    # The device

    def signal(self, vector: Vector) -> None:
        vector.pending = vector.message is None
        if vector.message is not None:
            self.sent.append(vector.message)

    def reset(self) -> None:
        self.clear()
        self.vectors = [Vector(has_route=vector.has_route) for vector in self.vectors]
