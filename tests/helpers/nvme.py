"""A driver for an NVMe controller that VFIO has passed to this process: enough to have it interrupt on any vector.

Registers and commands are those of the NVM Express Base Specification 1.4.
"""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING

from mshv_irqfd.testing import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio_passthrough import VfioDevice

CONFIGURATION, STATUS, QUEUE_SIZES, SUBMISSIONS, COMPLETIONS, DOORBELLS = 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
FLUSH, WRITE, READ = 0, 1, 2
CREATE_SUBMISSIONS, CREATE_COMPLETIONS = 1, 5
ENTRIES = 16
BLOCK = 512

IOVA = 0x100000
PAGE = 4096


class Queue:
    """A pair of queues: commands go in, completions come out."""

    def __init__(self, controller: Nvme, number: int) -> None:
        self.controller, self.number = controller, number
        self.submissions, self.completions = controller.page(2 * number), controller.page(2 * number + 1)
        self.tail = self.head = 0
        self.phase = 1

    def submit(self, operation: int, *, namespace: int = 0, data: int = 0, words: tuple[int, ...] = ()) -> None:
        """Gives the controller one command; its completion interrupts."""
        command = struct.pack(
            "<BBHI16xQQ6I", operation, 0, self.tail, namespace, data, 0, *words, *[0] * (6 - len(words))
        )
        at = self.submissions - IOVA + 64 * self.tail
        self.controller.memory[at : at + 64] = command
        self.tail = (self.tail + 1) % ENTRIES
        self.controller.device.write(DOORBELLS + 8 * self.number, self.tail)

    def complete(self) -> None:
        """Waits for one command, without interrupts, and asserts that it succeeded."""
        at = self.completions - IOVA + 16 * self.head + 14

        def status() -> int:
            return int.from_bytes(self.controller.memory[at : at + 2], "little")

        until(lambda: status() & 1 == self.phase, "the command is complete")
        assert status() >> 1 == 0, f"status {status() >> 1:#x}"
        self.head = (self.head + 1) % ENTRIES
        self.phase ^= self.head == 0
        self.controller.device.write(DOORBELLS + 8 * self.number + 4, self.head)


class Nvme:
    """The controller, with an I/O queue for each of the vectors from 1 up. Vector 0 is the admin queue's.

    `interrupted` is called after each command of the admin queue: two are needed to make an I/O queue. Without a wait
    for its interrupt there, the next command's may merge with it.
    """

    def __init__(self, device: VfioDevice, queues: int, interrupted: Callable[[], object] = lambda: None) -> None:
        self.device = device
        self.memory = mmap.mmap(-1, (2 * queues + 3) * PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        device.map(IOVA, self.memory)
        device.write(CONFIGURATION, 0)
        until(lambda: not device.read(STATUS) & 1, "the controller is off")
        admin = Queue(self, 0)
        device.write(QUEUE_SIZES, (ENTRIES - 1) << 16 | ENTRIES - 1)
        for register, address in ((SUBMISSIONS, admin.submissions), (COMPLETIONS, admin.completions)):
            device.write(register, address & 0xFFFFFFFF)
            device.write(register + 4, address >> 32)
        device.write(CONFIGURATION, 4 << 20 | 6 << 16 | 1)  # completions of 16 bytes, commands of 64; on
        until(lambda: device.read(STATUS) & 1 == 1, "the controller is on")
        self.queues = [admin]
        self._data = 2 * queues + 2
        for number in range(1, queues + 1):
            queue = Queue(self, number)
            size = (ENTRIES - 1) << 16 | number
            for command, address, how in (
                (CREATE_COMPLETIONS, queue.completions, number << 16 | 3),  # interrupts on, on this vector
                (CREATE_SUBMISSIONS, queue.submissions, number << 16 | 1),
            ):
                admin.submit(command, data=address, words=(size, how))
                admin.complete()
                interrupted()
            self.queues.append(queue)

    def page(self, number: int) -> int:
        """The address, as the controller sees it, of a page of its memory."""
        return IOVA + number * PAGE

    def transfer(self, queue: int, operation: int, block: int, data: bytes = b"") -> bytes:
        """Reads or writes one block through a queue, and returns what is there then."""
        at = self._data * PAGE
        self.memory[at : at + BLOCK] = data or bytes(BLOCK)
        self.queues[queue].submit(operation, namespace=1, data=self.page(self._data), words=(block, 0, 0))
        self.queues[queue].complete()
        return self.memory[at : at + BLOCK]

    def interrupt(self, queue: int) -> None:
        """Has the controller interrupt once, on a queue's vector."""
        self.queues[queue].submit(FLUSH, namespace=1)
        self.queues[queue].complete()
