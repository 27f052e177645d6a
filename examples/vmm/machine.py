"""The machine: its parts, what lies at which address, and the loop that serves its devices."""

from __future__ import annotations

import os
import selectors
import signal
from typing import TYPE_CHECKING, Final, Self

from mshv_irqfd import EventFd, Partition

from . import boot, pci, serial
from .block import Disk
from .kvm import Vm
from .ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


BARS: Final = 0xE0000000


class Machine:
    """A PC without firmware: memory, CPUs, a serial console, and virtio disks on a PCI bus.

    Args:
        memory: the size of the guest's memory in bytes.
        cpus: the number of CPUs.
        output: takes what the guest writes to its console.
    """

    def __init__(self, *, memory: int, cpus: int, output: Callable[[bytes], None]) -> None:
        self.vm = Vm(memory)
        self.cpus = cpus
        # The VM is made without the package, as a VMM's own code would: the package takes charge of its MSIs alone.
        self.partition = Partition.from_fd(self.vm, "kvm", vps=cpus)
        self.ledger = Ledger(self.partition)
        self.serial = serial.Serial(output, lambda level: self.vm.set_irq(serial.IRQ, level=level))
        self.bus = pci.PciBus()
        self.disks: list[Disk] = []
        self._loop = selectors.DefaultSelector()
        self._stop = EventFd()
        self._shut_down = False
        self._error: BaseException | None = None
        self._loop.register(self._stop, selectors.EVENT_READ)
        self.vcpus = [self.vm.vcpu(index, Ports(self), Mmio(self)) for index in range(cpus)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for disk in self.disks:
            disk.close()
        self._loop.close()
        self._stop.close()
        self.partition.close()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()

    def add_disk(self, file: int, *, vectors: int) -> Disk:
        """Adds a disk with a queue for each CPU; see `Disk`."""
        number = len(self.disks)
        disk = Disk(
            file,
            partition=self.partition,
            ledger=self.ledger,
            memory=self.vm.memory,
            queues=self.cpus,
            vectors=vectors,
            bar=BARS + number * 0x100000,
        )
        self.disks.append(disk)
        self.bus.functions.append(disk)
        for index, kick in enumerate(disk.kicks):
            self._loop.register(kick, selectors.EVENT_READ, lambda index=index: disk.serve(index))
        return disk

    def type_from(self, file: int) -> None:
        """Types what a file has, a terminal or a pipe, on the console, until the file ends."""

        def some() -> None:
            data = os.read(file, 4096)
            self.serial.type(data)
            if not data:
                self._loop.unregister(file)

        self._loop.register(file, selectors.EVENT_READ, some)

    def boot(self, kernel: bytes, initrd: bytes, command_line: str) -> None:
        """Loads Linux, for `run()` to start."""
        self.vcpus[0].enter_at(*boot.load_linux(self.vm.memory, kernel, initrd, command_line, self.cpus))

    def run(self) -> bool:
        """Runs the guest until it shuts down, or until `stop()`.

        Returns:
            Whether it has shut down. With `reboot=t`, Linux does so by a triple fault.

        Raises what a vCPU's thread raised.
        """
        # The signal only interrupts KVM_RUN.
        before = signal.signal(signal.SIGUSR1, lambda *_: None)
        try:
            for vcpu in self.vcpus:
                vcpu.start(self._end)
            self._serve()
        finally:
            for vcpu in self.vcpus:
                vcpu.stop()
            signal.signal(signal.SIGUSR1, before)
        if self._error is not None:
            raise self._error
        return self._shut_down

    def stop(self) -> None:
        """Makes `run()` return, with CPUs and devices at rest. A signal handler may call it."""
        self._stop.signal()

    def _end(self, error: BaseException | None) -> None:
        self._error = self._error or error
        self._shut_down = True
        self._stop.signal()

    def _serve(self) -> None:
        while True:
            for key, _ in self._loop.select():
                if key.data is None:
                    return
                key.data()


class Ports:
    """I/O ports: the serial port and PCI configuration. Nobody answers at the others."""

    def __init__(self, machine: Machine) -> None:
        self._parts: Sequence[tuple[int, int, serial.Serial | pci.PciBus]] = (
            (serial.PORT, 8, machine.serial),
            (pci.ADDRESS_PORT, 8, machine.bus),
        )

    def read(self, address: int, size: int) -> int:
        """Reads a port for the guest."""
        for start, length, part in self._parts:
            if start <= address < start + length:
                return part.read(address - start, size)
        return (1 << 8 * size) - 1

    def write(self, address: int, data: bytes) -> None:
        """Writes a port for the guest."""
        for start, length, part in self._parts:
            if start <= address < start + length:
                part.write(address - start, data)


class Mmio:
    """Memory that is none: the devices' BARs. Nobody answers elsewhere."""

    def __init__(self, machine: Machine) -> None:
        self._functions = machine.bus.functions

    def read(self, address: int, size: int) -> int:
        """Reads for the guest."""
        for function in self._functions:
            if function.claims(address):
                return function.read(address, size)
        return (1 << 8 * size) - 1

    def write(self, address: int, data: bytes) -> None:
        """Writes for the guest."""
        for function in self._functions:
            if function.claims(address):
                function.write(address, data)
