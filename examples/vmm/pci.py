"""PCI devices on one bus, found through configuration mechanism #1 (PCI Local Bus 3.0, sections 3.2.2.3.2 and 6)."""

from __future__ import annotations

import struct
import threading
from typing import Final

ADDRESS_PORT: Final = 0xCF8
DATA_PORT: Final = 0xCFC

COMMAND, BAR0, CAPABILITIES = 0x04, 0x10, 0x34
MEMORY_SPACE: Final = 1 << 1


class PciFunction:
    """A device's configuration space, with one 32-bit memory BAR if it has a size.

    Args:
        vendor: the vendor id.
        device: the device id.
        class_code: the class, subclass and programming interface, 24 bits.
        bar_size: the size of BAR 0, a power of two; 0: no BAR.
        bar: where BAR 0 is at first.
    """

    def __init__(self, vendor: int, device: int, class_code: int, *, bar_size: int = 0, bar: int = 0) -> None:
        self.config = bytearray(256)
        self._writable = bytearray(256)
        self._bar_size = bar_size
        struct.pack_into("<HHHHI", self.config, 0, vendor, device, 0, 0, class_code << 8 | 1)
        struct.pack_into("<H", self._writable, COMMAND, 0x0407)
        self._writable[0x0C] = self._writable[0x3C] = 0xFF  # cache line size and interrupt line: only remembered
        self._bars_at: int | None = None
        if bar_size:
            struct.pack_into("<I", self._writable, BAR0, -bar_size & 0xFFFFFFFF)
            struct.pack_into("<I", self.config, BAR0, bar)
        self._last_capability = CAPABILITIES

    def add_capability(self, at: int, capability: bytes) -> None:
        """Puts a capability at this offset, and links it to the one before."""
        self.config[at : at + len(capability)] = capability
        self.config[at + 1] = 0
        self.config[self._last_capability] = at
        self.config[0x06] |= 0x10  # the status register: there is a list
        self._last_capability = at + 1

    def write_config(self, offset: int, data: bytes) -> None:
        """Writes configuration space for the guest; read-only bits stay."""
        for at, byte in enumerate(data[: len(self.config) - offset], offset):
            self.config[at] = self.config[at] & ~self._writable[at] | byte & self._writable[at]
        if self._bar_size:
            (command,), (bar,) = (
                struct.unpack_from("<H", self.config, COMMAND),
                struct.unpack_from("<I", self.config, BAR0),
            )
            at_now = bar if command & MEMORY_SPACE else None
            if at_now != self._bars_at:
                self._bars_at = at_now
                self.moved(at_now)

    def read_config(self, offset: int, size: int) -> int:
        """Reads configuration space for the guest."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def claims(self, address: int) -> bool:
        """Whether BAR 0 decodes an address now."""
        at = self._bars_at
        return at is not None and at <= address < at + self._bar_size

    def moved(self, bar: int | None) -> None:
        """BAR 0 is at another address now, or (None) decodes none. For subclasses."""

    def read(self, address: int, size: int) -> int:
        """Reads from BAR 0 for the guest."""
        return self.read_bar(address - (self._bars_at or 0), size)

    def write(self, address: int, data: bytes) -> None:
        """Writes to BAR 0 for the guest."""
        self.write_bar(address - (self._bars_at or 0), data)

    def read_bar(self, offset: int, size: int) -> int:
        """Reads at an offset in BAR 0. For subclasses."""
        del offset
        return (1 << 8 * size) - 1

    def write_bar(self, offset: int, data: bytes) -> None:
        """Writes at an offset in BAR 0. For subclasses."""


class PciBus:
    """Bus 0 with its host bridge, behind the two ports of configuration mechanism #1."""

    def __init__(self) -> None:
        self.functions = [PciFunction(0x8086, 0x1237, 0x060000)]  # the bridge that everybody knows
        self._address = 0
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> int:
        """Reads the ports for the guest, at an offset from the first."""
        if offset < 4:
            return self._address if (offset, size) == (0, 4) else (1 << 8 * size) - 1
        function, register = self._selected(offset - 4)
        return function.read_config(register, size) if function else (1 << 8 * size) - 1

    def write(self, offset: int, data: bytes) -> None:
        """Writes the ports for the guest."""
        if offset < 4:
            if (offset, len(data)) == (0, 4):
                self._address = int.from_bytes(data, "little")
            return
        function, register = self._selected(offset - 4)
        if function:
            with self._lock:
                function.write_config(register, data)

    def save(self) -> int:
        """The bus, for `restore()`: what the guest has written to the first port."""
        return self._address

    def restore(self, state: int) -> None:
        """Goes on with a saved bus."""
        self._address = state

    def _selected(self, byte: int) -> tuple[PciFunction | None, int]:
        bus, device, number = self._address >> 16 & 0xFF, self._address >> 11 & 0x1F, self._address >> 8 & 7
        if not self._address >> 31 or bus or number or device >= len(self.functions):
            return None, 0
        return self.functions[device], (self._address & 0xFC) + byte
