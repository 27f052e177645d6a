"""MSI-X as PCI Local Bus 3.0 section 6.8 describes it, in plain Python: what a table must show and send."""

from __future__ import annotations

from dataclasses import dataclass, field

from driver import CONTROL, DATA, ENABLE, ENTRY, FUNCTION_MASK, MASK
from mshv_irqfd import MsiRoute

WORD = 0xFFFFFFFF
WINDOW = range(0xFEE00000, 0xFEF00000)


def sendable(address: int, data: int, vps: set[int]) -> bool:
    """Whether a message is one that a VP of these can take."""
    mode, vector = data >> 8 & 7, data & 0xFF
    return (
        address in WINDOW
        and address & 0xFF3 == 0
        and data <= 0xFFFF
        and mode not in (3, 6)
        and (mode > 1 or vector > 15)
        and (address & 4 != 0 or address >> 12 & 0xFF in vps)
    )


@dataclass
class Vector:
    entry: bytearray = field(default_factory=lambda: bytearray(12) + bytearray([MASK, 0, 0, 0]))
    pending: bool = False
    message: MsiRoute | None = None
    """The message that it sends; None if it is not armed."""
    faulty: bool = False
    has_route: bool = False

    def word(self, at: int) -> int:
        return int.from_bytes(self.entry[at : at + 4], "little")

    @property
    def masked(self) -> bool:
        return bool(self.word(CONTROL) & MASK)


class Model:
    """A table of vectors, and what it has sent since it was last asked."""

    def __init__(self, count: int, vps: set[int]) -> None:
        self.vectors = [Vector() for _ in range(count)]
        self.control = 0
        self.vps = vps
        self.sent: list[MsiRoute] = []

    @property
    def length(self) -> int:
        return len(self.vectors) * ENTRY

    def live(self, number: int) -> bool:
        return self.control == ENABLE and not self.vectors[number].masked

    def masked(self, number: int) -> bool:
        return bool(self.control & FUNCTION_MASK) or self.vectors[number].masked

    # The guest

    def read_table(self, offset: int, size: int) -> int:
        if not (size in (4, 8) and offset % size == 0 and 0 <= offset <= self.length - size):
            return self.ones(size)
        entries = b"".join(vector.entry for vector in self.vectors)
        return int.from_bytes(entries[offset : offset + size], "little")

    def read_pba(self, offset: int, size: int) -> int:
        length = (len(self.vectors) + 63) // 64 * 8
        if not (size in (4, 8) and offset % size == 0 and 0 <= offset <= length - size):
            return self.ones(size)
        bits = sum(vector.pending << number for number, vector in enumerate(self.vectors))
        return bits >> 8 * offset & (1 << 8 * size) - 1

    @staticmethod
    def ones(size: int) -> int:
        return (1 << 8 * min(size, 8)) - 1

    def write_table(self, offset: int, data: bytes) -> None:
        if not (len(data) in (4, 8) and offset % len(data) == 0 and 0 <= offset <= self.length - len(data)):
            return
        number = offset // ENTRY
        vector, before = self.vectors[number], self.live(number)
        vector.entry[offset % ENTRY : offset % ENTRY + len(data)] = data
        vector.entry[CONTROL:] = bytes([vector.entry[CONTROL] & MASK, 0, 0, 0])
        self.follow(number, before)

    def write_message_control(self, offset: int, data: bytes) -> None:
        if len(data) in (1, 2, 4) and offset % len(data) == 0 and 0 <= offset <= 3 < offset + len(data):
            before = [self.live(number) for number in range(len(self.vectors))]
            self.control = data[3 - offset] << 8 & (ENABLE | FUNCTION_MASK)
            for number, was_live in enumerate(before):
                self.follow(number, was_live)

    def follow(self, number: int, before: bool) -> None:
        """Arms or disarms a vector that may send now and could not before, or the other way round."""
        if before == self.live(number):
            return
        vector = self.vectors[number]
        vector.message = None
        if before:
            return
        address, data = int.from_bytes(vector.entry[:8], "little"), vector.word(DATA)
        vector.faulty = not sendable(address, data, self.vps)
        if not vector.faulty:
            vector.message = MsiRoute(address, data)
            vector.has_route = True
            if vector.pending:
                self.signal(vector)

    # The device

    def signal(self, vector: Vector) -> None:
        if vector.message is None:
            vector.pending = True
        else:
            vector.pending = False
            self.sent.append(vector.message)

    def reset(self) -> None:
        self.control = 0
        self.vectors = [Vector(has_route=vector.has_route) for vector in self.vectors]
