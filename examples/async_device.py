"""Four queues in one event loop: a task for each, and no threads but the guest's.

usage: python examples/async_device.py [simulated | kvm]

A task waits for its queue's doorbell, serves the requests, and interrupts the guest. Closing the doorbells ends it.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mshv_irqfd import KvmPartition, MsiRoute, SimulatedPartition, open_partition

if TYPE_CHECKING:
    from mshv_irqfd import IoEventFd, IrqFdRoute

DOORBELLS = 0xD000_0000
"""The guest-physical address of the queues' doorbells, 8 bytes each."""
VECTORS = range(0x40, 0x44)
"""The vector of each queue."""


@dataclass
class Queue:
    """A queue of requests: strings that the device turns to capitals."""

    doorbell: IoEventFd
    interrupt: IrqFdRoute
    requests: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    async def serve(self) -> None:
        """What the device does, until the doorbell is closed."""
        async for _ in self.doorbell:
            # All rings so far are one reason to look.
            while self.requests:
                self.answers.append(self.requests.pop(0).upper())
            self.interrupt.signal()


class Guest:
    """The guest's driver. It is another CPU, so what it waits for runs in a thread."""

    def __init__(self, partition: SimulatedPartition | KvmPartition, queues: list[Queue]) -> None:
        self.partition, self.queues = partition, queues

    def request(self, number: int, *words: str) -> None:
        """Puts requests into a queue, and rings once for each."""
        for word in words:
            self.queues[number].requests.append(word)
            if isinstance(self.partition, SimulatedPartition):
                self.partition.write_mmio(DOORBELLS + 8 * number, bytes(4))
            else:
                self.queues[number].doorbell.signal()  # what the guest's write does: no guest code runs here

    async def interrupted_by(self, *numbers: int) -> None:
        """Waits for the interrupts of some queues."""
        await asyncio.to_thread(self.partition.wait_interrupts, [VECTORS[number] for number in numbers])


async def play(guest: Guest, queues: list[Queue]) -> None:
    """Three scenes."""
    guest.request(0, "one")
    await guest.interrupted_by(0)
    print(f"queue 0 answers {queues[0].answers}")

    for number in range(4):
        guest.request(number, "two", "three")
    await guest.interrupted_by(0, 1, 2, 3)
    print(f"all queues answer: {[len(queue.answers) for queue in queues]}")

    queues[3].interrupt.mask()
    guest.request(3, "four")
    await queues[3].interrupt.wait_pending()
    print(f"queue 3 is masked: it has answered {queues[3].answers[-1]!r}, and its interrupt waits")
    queues[3].interrupt.unmask()
    await guest.interrupted_by(3)
    print("unmasked: the interrupt has arrived")


async def main() -> None:
    """Makes the device, plays the guest, and takes the device away."""
    backend = sys.argv[1] if len(sys.argv) > 1 else "simulated"
    with ExitStack() as stack:
        partition = stack.enter_context(open_partition(backend))
        if not isinstance(partition, SimulatedPartition | KvmPartition):
            raise SystemExit(f"{backend} cannot tell which interrupts arrived: use simulated or kvm")
        queues = []
        for number, vector in enumerate(VECTORS):
            doorbell = stack.enter_context(partition.ioeventfd(DOORBELLS + 8 * number, 4))
            interrupt = stack.enter_context(partition.new_irqfd_route())
            interrupt.set_msi(MsiRoute.fixed(vector, apic_id=0))
            queues.append(Queue(doorbell, interrupt))
        async with asyncio.TaskGroup() as tasks:
            for queue in queues:
                tasks.create_task(queue.serve())
            await play(Guest(partition, queues), queues)
            for queue in queues:
                queue.doorbell.close()
        print("the doorbells are closed, and the tasks have ended")


if __name__ == "__main__":
    asyncio.run(main())
