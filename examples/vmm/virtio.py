"""A virtio device on PCI, in the modern layout (Virtual I/O Device 1.2, section 4.1).

This is where the package is at work. The guest's driver programs the device's interrupts through `MsixTable`; its
notifications are doorbells (`Partition.ioeventfd`), and the device's are signals of vectors. So the guest rings and is
interrupted with no VMM in between.

What drivers for Linux do not need is left out: interrupts without MSI-X, and access through configuration space.
"""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from mshv_irqfd import EventFd, IoEventFd, MsixTable, Partition

from .pci import COMMAND, PciFunction
from .queue import MAX_SIZE, NO_VECTOR, GuestError, Virtqueue

if TYPE_CHECKING:
    from .ledger import Ledger

VERSION_1: Final = 1 << 32

# BAR 0: a part for each kind of access
_COMMON, _ISR, _DEVICE, _NOTIFY, _TABLE, _PENDING = 0x0000, 0x1000, 0x2000, 0x3000, 0x4000, 0x8000
_BAR_SIZE, _PART = 0x10000, 0xF000
_NOTIFY_STEP: Final = 4

_MSIX_AT, _VIRTIO_AT = 0x40, 0x50
_DRIVER_OK, _FEATURES_OK, _NEEDS_RESET = 1 << 2, 1 << 3, 1 << 6
_SAVED: Final = ("_offered_page", "_accepted_page", "_accepted", "_status", "_config_vector", "_selected")


class VirtioDevice(PciFunction, ABC):
    """The transport. A subclass does the requests.

    Args:
        kind: the virtio device id.
        class_code: the PCI class, subclass and programming interface.
        features: the feature bits to offer.
        partition: the partition that the guest runs in.
        ledger: explains the pushes that the guest's accesses cause.
        memory: the guest's memory.
        queues: the number of queues.
        vectors: the number of MSI-X vectors.
        bar: where the device's registers are at first.
    """

    def __init__(
        self,
        kind: int,
        class_code: int,
        features: int,
        *,
        partition: Partition,
        ledger: Ledger,
        memory: memoryview,
        queues: int,
        vectors: int,
        bar: int,
    ) -> None:
        super().__init__(0x1AF4, 0x1040 + kind, class_code, bar_size=_BAR_SIZE, bar=bar)
        self._partition, self._ledger = partition, ledger
        self._features = features | VERSION_1
        self.queues = [Virtqueue(memory) for _ in range(queues)]
        self.kicks = [EventFd() for _ in range(queues)]
        self.msix = MsixTable(partition, vectors)
        self.signals: Counter[int] = Counter()
        self._doorbells: list[IoEventFd] = []
        self._lock = threading.Lock()  # over the registers and the queues. The MSI-X table has its own.
        self._reset()
        self.add_capability(
            _MSIX_AT, self.msix.capability(table_bar=0, table_offset=_TABLE, pba_bar=0, pba_offset=_PENDING)
        )
        at = _VIRTIO_AT
        for number, offset, extra in (
            (1, _COMMON, b""),
            (2, _NOTIFY, struct.pack("<I", _NOTIFY_STEP)),
            (3, _ISR, b""),
            (4, _DEVICE, b""),
        ):
            body = struct.pack("<BBBBBxxxII", 9, 0, 16 + len(extra), number, 0, offset, 0x1000) + extra
            self.add_capability(at, body)
            at += len(body)

    @abstractmethod
    def serve_queue(self, queue: Virtqueue) -> bool:
        """Does the requests in a queue. Returns whether there were any. Raises GuestError if one is malformed."""

    @abstractmethod
    def device_config(self) -> bytes:
        """The device's own registers."""

    def close(self) -> None:
        """Takes the device away from the guest."""
        self.moved(None)
        self.msix.close()
        for kick in self.kicks:
            kick.close()

    def serve(self, number: int) -> None:
        """Does what a queue's kick asks for."""
        self.kicks[number].consume()
        queue = self.queues[number]
        with self._lock:
            if not queue.enabled or self._status & (_DRIVER_OK | _NEEDS_RESET) != _DRIVER_OK:
                return
            try:
                if self.serve_queue(queue) and queue.wants_interrupt():
                    self._signal(queue.vector)
            except GuestError:
                self._status |= _NEEDS_RESET
                self._signal(self._config_vector)

    def _signal(self, vector: int) -> None:
        if vector != NO_VECTOR:
            self.signals[vector] += 1
            self.msix.vectors[vector].signal()

    def _reset(self) -> None:
        self._offered_page = self._accepted_page = self._accepted = 0
        self._status, self._config_vector, self._selected = 0, NO_VECTOR, 0
        for queue in self.queues:
            queue.reset()

    def save(self) -> dict[str, Any]:
        """The device, for `restore()`. Nothing may use it meanwhile."""
        return {
            "config": self.config.hex(),
            "registers": {name: getattr(self, name) for name in _SAVED},
            "queues": [queue.save() for queue in self.queues],
            "msix": self.msix.save(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Makes a new device what another one was. The doorbells are there, and wait for someone to ring them."""
        self.config[:] = bytes.fromhex(state["config"])
        for name in _SAVED:
            setattr(self, name, state["registers"][name])
        for queue, saved in zip(self.queues, state["queues"], strict=True):
            queue.restore(saved)
        self.msix.close()
        with self._ledger.access("restored"):
            self.msix = MsixTable.restore(self._partition, state["msix"])
        self.write_config(COMMAND, b"")  # looks where the BAR is

    # ---- the guest's accesses

    def moved(self, bar: int | None) -> None:
        """Puts the doorbells where the guest has put the BAR."""
        for doorbell in self._doorbells:
            doorbell.close()
        self._doorbells.clear()
        if bar is not None:
            for number, kick in enumerate(self.kicks):
                at = bar + _NOTIFY + number * _NOTIFY_STEP
                # A guest may put two devices at one address. No write may ring two doorbells, so those come here.
                with suppress(ValueError):
                    self._doorbells.append(self._partition.ioeventfd(at, 2, event=kick))

    def write_config(self, offset: int, data: bytes) -> None:
        """Also passes MSI-X its message control."""
        super().write_config(offset, data)
        if _MSIX_AT <= offset < _MSIX_AT + 4:
            with self._ledger.access("message control"):
                self.msix.write_message_control(offset - _MSIX_AT, data)
            self.config[_MSIX_AT + 2 : _MSIX_AT + 4] = struct.pack("<H", self.msix.message_control)

    def read_bar(self, offset: int, size: int) -> int:
        """Reads a register."""
        part, at = offset & _PART, offset & ~_PART
        if _TABLE <= part < _PENDING:
            return self.msix.read_table(offset - _TABLE, size)
        if part >= _PENDING:
            return self.msix.read_pba(offset - _PENDING, size)
        if part == _DEVICE:
            return int.from_bytes(self.device_config()[at : at + size].ljust(size, b"\0"), "little")
        if part == _COMMON:
            with self._lock:
                return self._read_common(at) & (1 << 8 * size) - 1
        return 0  # with MSI-X there is nothing to see in the ISR

    def write_bar(self, offset: int, data: bytes) -> None:
        """Writes a register."""
        part, at = offset & _PART, offset & ~_PART
        if _TABLE <= part < _PENDING:
            with self._ledger.access("vector"):
                self.msix.write_table(offset - _TABLE, data)
        elif part == _NOTIFY and at // _NOTIFY_STEP < len(self.kicks):
            self.kicks[at // _NOTIFY_STEP].signal()  # there is no doorbell, or one of another size
        elif part == _COMMON:
            with self._lock:
                self._write_common(at, int.from_bytes(data, "little"))

    def _read_common(self, at: int) -> int:
        queue = self.queues[self._selected] if self._selected < len(self.queues) else None
        match at:
            case 0x00:
                return self._offered_page
            case 0x04:
                return self._features >> 32 * self._offered_page & 0xFFFFFFFF
            case 0x08:
                return self._accepted_page
            case 0x0C:
                return self._accepted >> 32 * self._accepted_page & 0xFFFFFFFF
            case 0x10:
                return self._config_vector
            case 0x12:
                return len(self.queues)
            case 0x14:
                return self._status
            case 0x16:
                return self._selected
            case _ if queue is None:
                return 0
            case 0x18:
                return queue.size
            case 0x1A:
                return queue.vector
            case 0x1C:
                return queue.enabled
            case 0x1E:
                return self._selected
            case 0x20 | 0x24:
                return queue.descriptors >> 8 * (at - 0x20)
            case 0x28 | 0x2C:
                return queue.driver >> 8 * (at - 0x28)
            case 0x30 | 0x34:
                return queue.device >> 8 * (at - 0x30)
        return 0

    def _write_common(self, at: int, value: int) -> None:
        queue = self.queues[self._selected] if self._selected < len(self.queues) else None
        match at:
            case 0x00:
                self._offered_page = value
            case 0x08:
                self._accepted_page = value
            case 0x0C if self._accepted_page < 2:
                self._accepted = _half(self._accepted, self._accepted_page, value)
            case 0x10:
                self._config_vector = self._vector(value)
            case 0x14 if value == 0:
                self._reset()
            case 0x14:
                if self._accepted & ~self._features or not self._accepted & VERSION_1:
                    value &= ~_FEATURES_OK  # refused: the driver looks whether the bit has stayed
                self._status = value | self._status & _NEEDS_RESET
            case 0x16:
                self._selected = value
            case _ if queue is None or queue.enabled:
                pass
            case 0x18 if 0 < value <= MAX_SIZE and value & value - 1 == 0:
                queue.size = value
            case 0x1A:
                queue.vector = self._vector(value)
            case 0x1C:
                queue.enabled = value == 1
            case 0x20 | 0x24:
                queue.descriptors = _half(queue.descriptors, (at - 0x20) // 4, value)
            case 0x28 | 0x2C:
                queue.driver = _half(queue.driver, (at - 0x28) // 4, value)
            case 0x30 | 0x34:
                queue.device = _half(queue.device, (at - 0x30) // 4, value)

    def _vector(self, value: int) -> int:
        return value if value < len(self.msix.vectors) else NO_VECTOR


def _half(register: int, half: int, value: int) -> int:
    """A 64-bit register with its low (0) or high (1) half, or the whole, replaced."""
    if value > 0xFFFFFFFF:
        return value
    return register & (0xFFFFFFFF << 32 * (1 - half)) | value << 32 * half
