"""A guest's driver of a vhost-user disk: it looks at the queue only when it is interrupted, and checks every byte."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mshv_irqfd.testing import until
from vhost_user_blk.disk import SECTOR, Disk, Kind

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from backends import Guest
    from mshv_irqfd import Interrupt, IoEventFd
    from vhost_user_blk.disk import Done
    from vhost_user_blk.front_end import HasFileno

DOORBELL = 0xD0000000
SECTORS = 256
LONGEST = 8
"""The most sectors of a request of `load`."""


class DiskDriver:
    """A disk, and the driver that a guest has for it.

    A lost interrupt leaves the driver waiting for ever, as it would leave a guest.
    """

    def __init__(self, guest: Guest, doorbell: IoEventFd, path: Path, call: HasFileno, *, depth: int = 8) -> None:
        self.guest = guest
        self.path = path
        self.signals = 1
        """How often the daemon may signal: once for each submission, and each time that it is told the eventfd."""
        self.disk = Disk(path, kick=doorbell, call=call, notify=self._ring, depth=depth)
        self.contents = bytearray(SECTORS * SECTOR)
        """What the disk holds when all requests are done."""
        self.interrupts: Counter[Interrupt] = Counter()
        self.completed: Counter[int] = Counter()
        """How often each request was reported done, by number."""
        self.submitted = 0
        self._expected: dict[int, bytes] = {}
        self._busy: dict[int, range] = {}

    def _ring(self) -> None:
        assert self.guest.writes(DOORBELL, bytes(4)), "no doorbell took the guest's write"

    def connect(self, call: HasFileno) -> None:
        """Connects to the daemon again, or to another one."""
        self.signals += 1 + len(self.disk.in_flight)
        self.disk.connect(self.path, call=call)

    def set_call(self, call: HasFileno) -> None:
        """Moves the running queue to another eventfd."""
        self.signals += 1
        self.disk.set_call(call)

    def submit(self, kind: Kind, sector: int = 0, data: bytes = b"", *, count: int = 0) -> int:
        """Submits a request whose sectors no other request in flight has."""
        number = self.disk.submit(kind, sector, data, length=count * SECTOR)
        size = len(data) or count * SECTOR
        here = slice(sector * SECTOR, sector * SECTOR + size)
        if kind == Kind.WRITE:
            self.contents[here] = data
        self._expected[number] = bytes(self.contents[here]) if kind == Kind.READ else b""
        self._busy[number] = range(sector, sector + size // SECTOR)
        self.submitted += 1
        self.signals += 1
        return number

    def take_done(self) -> list[Done]:
        """Takes the requests that are done, and checks each."""
        taken = self.disk.done()
        for done in taken:
            self.completed[done.number] += 1
            assert done.status == 0, done
            assert done.data == self._expected.pop(done.number), f"{done.kind.name} at sector {done.sector}"
            del self._busy[done.number]
        return taken

    def interrupted(self) -> list[Done]:
        """Waits for interrupts, and takes the requests that are done."""
        what = f"an interrupt: {len(self._busy)} of {self.submitted} requests are in flight"
        self.interrupts.update(until(self.guest.take_interrupts, what))
        return self.take_done()

    def finish(self) -> None:
        """Waits until no request is in flight."""
        while self._busy:
            self.interrupted()

    def load(self, requests: int, chance: random.Random) -> None:
        """Submits random reads, writes and flushes, as many at a time as fit."""
        for _ in range(requests):
            while self.disk.full:
                self.interrupted()
            self.submit_any(chance)

    def submit_any(self, chance: random.Random) -> None:
        count = chance.randint(1, LONGEST)
        sector = chance.randrange(SECTORS - count)
        busy = {number for one in self._busy.values() for number in one}
        if not busy.isdisjoint(range(sector, sector + count)):
            self.submit(Kind.FLUSH)
        elif chance.random() < 0.5:
            self.submit(Kind.WRITE, sector, chance.randbytes(count * SECTOR))
        else:
            self.submit(Kind.READ, sector, count=count)

    def check(self, image: Path) -> None:
        """Asserts that each request was done once, and that the image holds what was written."""
        assert self.completed == Counter(range(self.submitted))
        assert image.read_bytes() == bytes(self.contents)
