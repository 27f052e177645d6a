"""The partition that a row of the probe runs on: its bare ioctls, and the interrupts that it raises."""

from __future__ import annotations

import errno
import os
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from mshv_irqfd._cli.probe.finding import UNSEEN
from mshv_irqfd._core import RawPartition

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

GSI: Final = 24
ADDRESS: Final = 0xFEE00000
VECTOR: Final = 0x41
MSI: Final = (GSI, ADDRESS, VECTOR)
OTHER: Final = (3000, ADDRESS, 0x42)
PATIENCE: Final = 10.0
"""Seconds after which an interrupt that KVM may still be delivering counts as lost."""
RECORD: Final = struct.Struct("=QQQII")
"""An interrupt as the lab's /dev/hvstub reports it: partition, APIC id, control, vector, status."""
ACCEPTED: Final = "accepted"


class Scene:
    """A partition with VP 0, the steps of a row on it, and the interrupts that it raises."""

    def __init__(self, options: Namespace, device: str) -> None:
        self.mshv = options.backend == "mshv"
        self.may_crash_the_host: bool = options.may_crash_the_host
        self.partition = RawPartition(options.backend, device)
        self.events: list[int] = []
        self.observer: int | None = None
        if options.interrupts and self.mshv:
            self.observer = os.open(options.interrupts, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self.arrived()

    def close(self) -> None:
        """Closes the partition, the eventfds and the observer."""
        self.partition.close()
        for event in self.events:
            with suppress(OSError):
                os.close(event)
        if self.observer is not None:
            os.close(self.observer)

    def event(self) -> int:
        """Creates an eventfd."""
        event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.events.append(event)
        return event

    def armed(self, gsi: int = GSI, table: list[tuple[int, int, int]] | None = None) -> int:
        """Pushes a table (by default, one entry for GSI 24) unless it is empty, and arms a new eventfd on a GSI."""
        if table is None:
            table = [MSI]
        if table:
            self.partition.set_routing(table)
        event = self.event()
        self.partition.irqfd(event, gsi)
        return event

    def arrived(self) -> list[str] | None:
        """Returns the interrupts since the last call: "vector to APIC id" (KVM: "vector"). None if not observable."""
        if not self.mshv:
            return [f"{vector:#04x}" for vector in self.partition.take_vectors() or []]
        if self.observer is None:
            return None
        found: list[str] = []
        while True:
            try:
                data = os.read(self.observer, RECORD.size * 1024)
            except BlockingIOError:
                return found
            for _, destination, _, vector, _ in RECORD.iter_unpack(data):
                found.append(f"{vector:#04x} to APIC {destination}")

    def left(self, event: int) -> int:
        """Reads and resets an eventfd's counter."""
        try:
            return os.eventfd_read(event)
        except BlockingIOError:
            return 0

    def after(self, event: int, *, patient: bool = False) -> str:
        """Describes the new interrupts and the eventfd's counter. If patient, waits for an interrupt first."""
        arrived = self.arrived()
        end = time.monotonic() + PATIENCE
        while patient and arrived == [] and time.monotonic() < end:
            arrived = self.arrived()
        if arrived is None:
            return UNSEEN
        return f"{', '.join(arrived) or 'nothing'}; counter {self.left(event)}"

    def signalled(self, event: int) -> str:
        """Signals, and describes the outcome."""
        self.arrived()
        os.eventfd_write(event, 1)
        return self.after(event)


def tried(action: Callable[[], object]) -> str:
    """Returns the name of an ioctl's error, or that the kernel accepted it."""
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return ACCEPTED
