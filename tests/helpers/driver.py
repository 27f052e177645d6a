"""A guest's driver: the accesses that it makes to the MSI-X registers of a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mshv_irqfd import MsixTable

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from backends import Guest
    from mshv_irqfd import MsiRoute, MsixVector

ENTRY = 16
ADDRESS, UPPER_ADDRESS, DATA, CONTROL = 0, 4, 8, 12
"""The fields of an entry (PCI Local Bus 3.0 sections 6.8.2.6 to 6.8.2.9)."""
MASK = 1
MESSAGE_CONTROL = 2
ENABLE, FUNCTION_MASK = 0x8000, 0x4000


class Driver:
    """A device with MSI-X, and the driver that a guest has for it."""

    def __init__(self, guest: Guest, vectors: int, **options: Any) -> None:
        self.guest = guest
        self.table = MsixTable(guest.partition, vectors, **options)

    @classmethod
    def of(cls, guest: Guest, table: MsixTable) -> Self:
        """The driver of a device that is there already."""
        driver = cls.__new__(cls)
        driver.guest, driver.table = guest, table
        return driver

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.table.close()

    def __getitem__(self, number: int) -> MsixVector:
        return self.table.vectors[number]

    def write(self, vector: int, field: int, value: int, size: int = 4) -> None:
        self.table.write_table(ENTRY * vector + field, value.to_bytes(size, "little"))

    def read(self, vector: int, field: int, size: int = 4) -> int:
        return self.table.read_table(ENTRY * vector + field, size)

    def set_message(self, vector: int, message: MsiRoute) -> None:
        """Writes the message of an entry, as Linux does: dword by dword."""
        self.write(vector, ADDRESS, message.address)
        self.write(vector, UPPER_ADDRESS, 0)
        self.write(vector, DATA, message.data)

    def mask(self, vector: int) -> None:
        self.write(vector, CONTROL, MASK)

    def unmask(self, vector: int) -> None:
        self.write(vector, CONTROL, 0)

    def program(self, vector: int, message: MsiRoute) -> None:
        """Sets the message of a masked vector and unmasks it."""
        self.set_message(vector, message)
        self.unmask(vector)

    def retarget(self, vector: int, message: MsiRoute) -> None:
        """Moves an unmasked vector to another message, as Linux does."""
        self.mask(vector)
        self.program(vector, message)

    def control(self, value: int) -> None:
        """Writes the message control register."""
        self.table.write_message_control(MESSAGE_CONTROL, value.to_bytes(2, "little"))

    def enable(self) -> None:
        self.control(ENABLE)

    def bring_up(self, *messages: MsiRoute) -> None:
        """Sets up the first vectors in Linux's order: enable with all masked, program each, clear the function mask."""
        self.control(ENABLE | FUNCTION_MASK)
        for vector, message in enumerate(messages):
            self.program(vector, message)
        self.control(ENABLE)

    def pending_bits(self) -> set[int]:
        """The vectors whose pending bits are set."""
        count = len(self.table.vectors)
        found = set()
        for start in range(0, count, 64):
            bits = self.table.read_pba(start // 8, 8)
            found |= {start + bit for bit in range(64) if bits >> bit & 1}
        return found

    def faulty(self) -> set[int]:
        """The vectors that could not be armed or disarmed."""
        return {vector for vector, _ in self.table.faults()}

    def armed(self) -> set[int]:
        return {vector.index for vector in self.table.vectors if vector.route is not None and vector.route.armed}
