"""A virtio disk (Virtual I/O Device 1.2, section 5.2) on a file."""

from __future__ import annotations

import os
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from .queue import MAX_SIZE, Chain, GuestError, Virtqueue
from .virtio import VirtioDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

SECTOR: Final = 512

_SEG_MAX, _FLUSH, _MULTIQUEUE = 1 << 2, 1 << 9, 1 << 12
_OK, _IO_ERROR, _UNSUPPORTED = 0, 1, 2


class Disk(VirtioDevice):
    """The disk; a request is done when its queue is served.

    Args:
        file: the descriptor of a file or block device, which remains the caller's.
        options: those of `VirtioDevice`. With one vector more than there are queues, Linux gives each queue one of its
            own and binds it to CPUs for good. With two, the queues share one, which the guest's root may move.
    """

    def __init__(self, file: int, **options: Any) -> None:  # noqa: ANN401 -- they are VirtioDevice's
        super().__init__(2, 0x018000, _SEG_MAX | _FLUSH | _MULTIQUEUE, **options)
        self._file = file
        self._size = os.lseek(file, 0, os.SEEK_END) // SECTOR * SECTOR
        self.requests: Counter[str] = Counter()

    def device_config(self) -> bytes:
        """`struct virtio_blk_config` up to the number of queues."""
        return struct.pack("<QII18xH", self._size // SECTOR, 0, MAX_SIZE - 2, len(self.queues))

    def serve_queue(self, queue: Virtqueue) -> bool:
        """Does the requests in a queue, one after the other."""
        served = False
        while chain := queue.pop():
            queue.push(chain, self._request(chain))
            served = True
        return served

    def _request(self, chain: Chain) -> int:
        """Does a request. Returns how many bytes of the guest's memory it has written."""
        header, to_write = _split(chain.readable, 16)
        to_read, status = _split(chain.writable, sum(map(len, chain.writable)) - 1)
        if sum(map(len, header)) != 16 or len(status) != 1:
            raise GuestError("a request without a header, or without room for its status")
        kind, sector = struct.unpack("<I4xQ", b"".join(header))
        try:
            result, written = self._do(kind, sector * SECTOR, to_write, to_read)
        except OSError:
            result, written = _IO_ERROR, 0
        status[0][:] = bytes([result])
        return written + 1

    def _do(self, kind: int, at: int, to_write: list[memoryview], to_read: list[memoryview]) -> tuple[int, int]:
        length = sum(map(len, to_write if kind == 1 else to_read))
        match kind:
            case 0 | 1 if at + length > self._size:
                return _IO_ERROR, 0
            case 0:
                self.requests["reads"] += 1
                read = os.preadv(self._file, to_read, at)
                return (_OK if read == length else _IO_ERROR), read
            case 1:
                self.requests["writes"] += 1
                return (_OK if os.pwritev(self._file, to_write, at) == length else _IO_ERROR), 0
            case 4:
                self.requests["flushes"] += 1
                os.fdatasync(self._file)
                return _OK, 0
            case 8 if to_read:
                name = b"mshv_irqfd".ljust(20, b"\0")[: len(to_read[0])]
                to_read[0][: len(name)] = name
                return _OK, len(name)
        return _UNSUPPORTED, 0


def _split(buffers: Sequence[memoryview], at: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `at` bytes of some buffers, and the rest: drivers may divide a request as they like."""
    before, after = [], []
    for buffer in buffers:
        before.append(buffer[:at])
        after.append(buffer[max(at, 0) :])
        at = max(0, at - len(buffer))
    return [buffer for buffer in before if buffer], [buffer for buffer in after if buffer]
