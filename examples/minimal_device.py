"""The smallest device: the guest rings a doorbell, the device does its work, and an interrupt tells the guest.

usage: python examples/minimal_device.py [simulated | kvm]

The device adds numbers. The guest writes numbers to memory, rings, waits for the interrupt, and reads their sum.
"""

from __future__ import annotations

import selectors
import struct
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mshv_irqfd import EventFd, KvmPartition, MsiRoute, SimulatedPartition, open_partition

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mshv_irqfd import IoEventFd, IrqFdRoute

DOORBELL = 0xD000_0000
"""The guest-physical address of the device's one register."""
VECTOR = 0x41
PATIENCE = 10.0
NUMBERS = struct.Struct("<4I")
SUM = struct.Struct("<I")


def work(memory: bytearray) -> None:
    """What the device is for."""
    SUM.pack_into(memory, NUMBERS.size, sum(NUMBERS.unpack_from(memory)))


@contextmanager
def device(memory: bytearray, doorbell: IoEventFd, interrupt: IrqFdRoute) -> Iterator[None]:
    """Runs the device in a thread of its own.

    It knows two eventfds: it waits for one and writes to the other. In another process it would do the same.
    """

    def serve() -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(doorbell, selectors.EVENT_READ)
            selector.register(stop, selectors.EVENT_READ)
            while all(key.fileobj is doorbell for key, _ in selector.select()):
                # All rings so far are one reason to work.
                doorbell.consume()
                work(memory)
                interrupt.signal()

    with EventFd() as stop:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stop.signal()
            thread.join()


def main() -> None:
    """Plays the guest."""
    backend = sys.argv[1] if len(sys.argv) > 1 else "simulated"
    with open_partition(backend) as partition:
        if not isinstance(partition, SimulatedPartition | KvmPartition):
            raise SystemExit(f"{backend} cannot tell which interrupts arrived: use simulated or kvm")
        memory = bytearray(4096)
        doorbell = partition.ioeventfd(DOORBELL, 4)
        interrupt = partition.new_irqfd_route()
        # The guest's driver chooses the vector and the CPU. A VMM sets what the driver writes to the device.
        interrupt.set_msi(MsiRoute.fixed(VECTOR, apic_id=0))
        with device(memory, doorbell, interrupt):
            for numbers in [(1, 2, 3, 4), (10, 20, 30, 40)]:
                NUMBERS.pack_into(memory, 0, *numbers)
                if isinstance(partition, SimulatedPartition):
                    partition.write_mmio(DOORBELL, bytes(4))
                else:
                    doorbell.signal()  # what the guest's write does: no guest code runs here
                (arrived,) = partition.take_interrupts(timeout=PATIENCE)
                assert arrived.vector == VECTOR
                (total,) = SUM.unpack_from(memory, NUMBERS.size)
                print(f"vector {arrived.vector:#x}: the sum of {numbers} is {total}")


if __name__ == "__main__":
    main()
