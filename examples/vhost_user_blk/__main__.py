"""Serves a disk to a guest by qemu-storage-daemon, kills that, and starts another one in its place.

usage: python -m examples.vhost_user_blk [simulated | kvm]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mshv_irqfd import KvmPartition, MsiRoute, SimulatedPartition, open_partition

from .daemon import StorageDaemon
from .disk import SECTOR, Disk, Kind

if TYPE_CHECKING:
    from .disk import Done

DOORBELL = 0xD000_0000
"""The address of the register that the guest's driver writes to when it has submitted a request."""
PATIENCE = 30.0


def completed(partition: SimulatedPartition | KvmPartition, disk: Disk) -> list[Done]:
    """Waits for an interrupt that completes requests, as the guest's driver does.

    An interrupt may find nothing done: the device also sends one when it is told which eventfd to signal.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        vectors = {hex(interrupt.vector) for interrupt in partition.take_interrupts(timeout=0.1)}
        if vectors and (done := disk.done()):
            names = ", ".join(f"{one.kind.name} at {one.sector}" for one in done)
            print(f"  vector {', '.join(vectors)}: {names}")
            return done
    raise TimeoutError(f"no interrupt within {PATIENCE} s")


def main() -> None:
    """Runs the example."""
    backend = sys.argv[1] if len(sys.argv) > 1 else "simulated"
    with (
        tempfile.TemporaryDirectory() as name,
        open_partition(backend) as partition,
        # The device signals the route, and the kernel raises the interrupt.
        partition.new_irqfd_route() as route,
        # The guest writes to the doorbell, and the kernel wakes the device.
        partition.ioeventfd(DOORBELL, 4) as doorbell,
    ):
        if not isinstance(partition, SimulatedPartition | KvmPartition):
            raise SystemExit(f"{backend} cannot tell which interrupts arrived: use simulated or kvm")
        route.set_msi(MsiRoute.fixed(vector=0x41, apic_id=0))

        def notify() -> None:
            """Writes to the doorbell. On KVM there is no guest code here that could."""
            if isinstance(partition, SimulatedPartition):
                partition.write_mmio(DOORBELL, bytes(4))
            else:
                doorbell.signal()

        image = Path(name) / "image"
        image.write_bytes(bytes(1024 * SECTOR))
        with StorageDaemon(image, Path(name) / "socket") as daemon:
            daemon.start()
            with Disk(daemon.path, kick=doorbell, call=route, notify=notify) as disk:
                print(f"a disk of {disk.sectors} sectors; a write and a read")
                text = b"Served by another process.".ljust(SECTOR)
                disk.submit(Kind.WRITE, 7, text)
                completed(partition, disk)
                disk.submit(Kind.READ, 7, length=SECTOR)
                assert completed(partition, disk)[0].data == text

                print("the guest moves the interrupt to vector 0x52: the device need not know")
                route.set_msi(MsiRoute.fixed(vector=0x52, apic_id=0))
                disk.submit(Kind.FLUSH)
                completed(partition, disk)

                print("the guest masks the interrupt: it waits in the eventfd")
                route.mask()
                disk.submit(Kind.READ, 7, length=SECTOR)
                while not route.pending:
                    time.sleep(0.001)
                print(f"  {route}")
                route.unmask()
                completed(partition, disk)

                print("the process dies with a request in flight, and another takes its place")
                daemon.kill()
                disk.submit(Kind.READ, 7, length=SECTOR)
                daemon.start()
                disk.connect(daemon.path, call=route)
                assert completed(partition, disk)[0].data == text


if __name__ == "__main__":
    main()
