"""A virtio block device (virtio 1.2, section 5.2): a guest's driver for it, and the front end that connects it."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Self

from .front_end import BackEndError, FrontEnd
from .memory import Memory
from .ring import Buffer, Ring

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from types import TracebackType

    from .front_end import HasFileno

SECTOR = 512
HEADER = struct.Struct("<IIQ")
"""Kind, a reserved word, and the first sector."""
CHAIN = 4
"""Descriptors for a request, of which it uses three: header, data, status."""
LONGEST = 16 * 1024
"""The most bytes that a request moves."""
DATA = 4096
"""Where a request's data begins in its memory. Header and status come first."""
GUEST_ADDRESS = 0x4000_0000
NOT_DONE = 0xFF
CAPACITY = struct.Struct("<Q")
"""The beginning of the configuration space: the size in sectors."""


class Kind(IntEnum):
    """The kinds of requests."""

    READ = 0
    WRITE = 1
    FLUSH = 4


class Done(NamedTuple):
    """A request that the device is done with."""

    number: int
    kind: Kind
    sector: int
    data: bytes
    """What was read; empty for other requests."""
    status: int
    """0, or the device's reason why the request failed."""


class Disk:
    """A disk of a guest, served by another process.

    Args:
        path: the Unix socket of that process.
        kick: the eventfd of the guest's doorbell, as `Partition.ioeventfd()` makes it.
        call: the eventfd of the route that the device signals.
        notify: writes to the doorbell, as the guest does.
        depth: how many requests can be in flight, a power of two up to 8192.

    Raises:
        OSError, BackEndError: the process cannot be reached, or lacks a feature.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        kick: HasFileno,
        call: HasFileno,
        notify: Callable[[], object],
        depth: int = 16,
    ) -> None:
        self.in_flight: dict[int, tuple[int, Kind, int, int]] = {}
        """By first descriptor: the request's number, kind, first sector and number of bytes."""
        self._kick, self._notify = kick, notify
        self._submitted = 0
        self._front: FrontEnd | None = None
        # The ring comes first, with room for 32 bytes a descriptor; then each request's memory.
        self._requests = GUEST_ADDRESS + 4096 + 32 * CHAIN * depth // 4096 * 4096
        self._memory = Memory(GUEST_ADDRESS, self._place(CHAIN * depth) - GUEST_ADDRESS)
        self._free = [CHAIN * number for number in range(depth)]
        try:
            self._ring = Ring(self._memory, CHAIN * depth)
            self.connect(path, call=call)
        except BaseException:
            self.close()
            raise

    def _place(self, first: int) -> int:
        """The memory of the request whose first descriptor this is."""
        return self._requests + first // CHAIN * (DATA + LONGEST)

    def connect(self, path: str | os.PathLike[str], *, call: HasFileno) -> None:
        """Connects to the device's process: the first time, or after `disconnect()`, or to one in place of a dead one.

        Nobody else may be at work on the queue. A process that dies takes its knowledge of the requests in flight with
        it, so the queue starts anew, and all that the driver has not seen done are submitted again, oldest first. Those
        that were done, but perhaps without an interrupt, are done twice, which does a disk no harm.

        A guest's own driver does all this when the device tells that it needs a reset. If the process has the
        protocol's INFLIGHT_SHMFD, the guest need not know; Debian 12's qemu-storage-daemon has not.
        """
        self.disconnect()
        front = FrontEnd(path)
        try:
            (self.sectors,) = CAPACITY.unpack(front.config(CAPACITY.size))
            front.share(self._memory)
            self._ring.reset()
            for first in self.in_flight:
                self._ring.publish(first)
            front.start(self._ring, kick=self._kick, call=call)
        except BaseException:
            front.close()
            raise
        self._front = front
        if self.in_flight:
            self._notify()

    def disconnect(self) -> None:
        """Ends the connection, if there is one. The requests stay in the queue.

        Wait until none is in flight: QEMU 7.2's daemon aborts if its client leaves while it is at work.
        """
        if self._front is not None:
            self._front.close()
            self._front = None

    def set_call(self, call: HasFileno) -> None:
        """Moves the queue's interrupts to another route's eventfd while it runs."""
        if self._front is None:
            raise BackEndError("no process serves the disk: connect first")
        self._front.set_call(call)

    def submit(self, kind: Kind, sector: int = 0, data: bytes = b"", *, length: int = 0) -> int:
        """Submits a request, and tells the device.

        Args:
            kind: what to do.
            sector: the first sector.
            data: what to write: whole sectors.
            length: how many bytes to read: whole sectors.

        Returns:
            The number of the request, which counts from 0.

        Raises:
            ValueError: there is no room for the request: take those that are done first. Or it is not of whole sectors.
        """
        size = len(data) or length
        if size % SECTOR or size > LONGEST:
            raise ValueError(f"{size} bytes: must be whole sectors of {SECTOR} bytes, at most {LONGEST} bytes")
        if not self._free:
            raise ValueError(f"{len(self.in_flight)} requests are in flight already, which is all that fit")
        first = self._free.pop()
        place = self._place(first)
        status = place + HEADER.size
        self._memory.write(place, HEADER.pack(kind, 0, sector) + bytes([NOT_DONE]))
        self._memory.write(place + DATA, data)
        body = [Buffer(place + DATA, size, device_writes=kind == Kind.READ)] if size else []
        self._ring.describe(first, [Buffer(place, HEADER.size), *body, Buffer(status, 1, device_writes=True)])
        number = self._submitted
        self.in_flight[first] = (number, kind, sector, size)
        self._submitted += 1
        self._ring.publish(first)
        self._notify()
        return number

    @property
    def full(self) -> bool:
        """Whether there is no room for another request."""
        return not self._free

    def done(self) -> list[Done]:
        """Takes the requests that the device is done with. A driver looks here when it is interrupted."""
        taken = []
        for first, _ in self._ring.take_used():
            number, kind, sector, size = self.in_flight.pop(first)
            place = self._place(first)
            (status,) = self._memory.read(place + HEADER.size, 1)
            data = self._memory.read(place + DATA, size) if kind == Kind.READ else b""
            self._free.append(first)
            taken.append(Done(number, kind, sector, data, status))
        return taken

    def close(self) -> None:
        """Ends the connection and unmaps the memory."""
        self.disconnect()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()
