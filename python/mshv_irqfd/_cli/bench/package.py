"""The package's own design: its calls, as a Python program makes them."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from mshv_irqfd import MsiRoute, MsixTable, SimulatedPartition, _core, open_partition
from mshv_irqfd._cli.bench.timed import Timed
from mshv_irqfd._cli.bench.workloads import FIRST_GSI, VPS, Standing, storm, vector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mshv_irqfd import IrqFdRoute, Partition

TIMEOUT = 60.0
BRING_UPS = ("bring-up", "bring-up-made", "bring-up-batch", "msix-bring-up")
"""The workloads that begin on a new partition, whose kernel has no table yet."""
VECTORS = 2048
"""The most vectors of a device."""
ENTRY, CONTROL = 16, 12
"""The bytes of an entry of an MSI-X table, and where its vector control is (PCI Local Bus 3.0 section 6.8.2)."""
MASKED, UNMASKED = (1).to_bytes(4, "little"), bytes(4)
ENABLE, FUNCTION_MASK = 0x80, 0x40
"""Bits of message control's upper byte, which is at offset 3 of the capability."""


def entry_writes(index: int, msi: MsiRoute) -> list[tuple[int, bytes]]:
    """What a guest's driver writes to an MSI-X table to give a masked vector its MSI and unmask it."""
    entry = ENTRY * index
    return [
        (entry, msi.address.to_bytes(4, "little")),
        (entry + 4, bytes(4)),
        (entry + 8, msi.data.to_bytes(4, "little")),
        (entry + CONTROL, UNMASKED),
    ]


def driver_retargets(table: MsixTable, index: int, msis: Iterable[MsiRoute]) -> Callable[[], None]:
    """A function that retargets a vector to the next of some MSIs as a guest's driver does: it masks it meanwhile."""
    write, mask = table.write_table, (ENTRY * index + CONTROL, MASKED)
    turns = cycle([[mask, *entry_writes(index, msi)] for msi in msis])

    def retarget() -> None:
        for offset, data in next(turns):
            write(offset, data)

    return retarget


def driver_writes(msis: list[MsiRoute]) -> list[tuple[int, bytes]]:
    """What a guest's driver writes to an MSI-X table to give each vector its MSI: dwords, as Linux does."""
    masks = [(ENTRY * index + CONTROL, MASKED) for index in range(len(msis))]
    return masks + [write for index, msi in enumerate(msis) for write in entry_writes(index, msi)]


def bring_up_device(table: MsixTable, writes: list[tuple[int, bytes]]) -> None:
    """Enables MSI-X with the function masked, makes writes to the table, and clears the function mask."""
    write, control = table.write_table, table.write_message_control
    control(3, bytes([ENABLE | FUNCTION_MASK]))
    for offset, data in writes:
        write(offset, data)
    control(3, bytes([ENABLE]))


class Package(Timed):
    """Routes of this package on one partition."""

    def __init__(self, backend: str, count: int, *, preload: bool = True, quiesce: bool | None = None) -> None:
        super().__init__()
        self.count = count
        gsis = range(FIRST_GSI, FIRST_GSI + max(count, 2048))

        def make() -> Partition | _core.Partition:
            if backend == "null":
                return _core.null_partition(gsis, preload=preload)
            return open_partition(backend, gsis=gsis, vps=VPS, quiesce=quiesce, preload=preload)

        self._open = make
        self.partition = make()
        self.routes: list[IrqFdRoute] = []
        self.msis = [[MsiRoute.fixed(vector(index, turn=turn), 0) for index in range(count)] for turn in (False, True)]
        self.middle = count // 2
        self.tables: list[MsixTable] = []
        msis = self.msis[False]
        self.writes = [driver_writes(msis[at : at + VECTORS]) for at in range(0, count, VECTORS)]
        self.storm = cycle([(index, MsiRoute.fixed(number, vp)) for index, number, vp in storm(count)])
        self.steps = {
            "create": self._create,
            "bring-up": self._bring_up,
            "bring-up-made": self._bring_up_made,
            "bring-up-batch": self._set_all,
            "msix-bring-up": self._msix_bring_up,
            "retarget-storm": self._retarget_storm,
            "retarget-all": self._set_all,
            "tear-down": self._tear_down,
        }

    def _create(self) -> None:
        new = self.partition.new_irqfd_route
        self.routes = [new() for _ in range(self.count)]

    def _bring_up(self) -> None:
        new = self.partition.new_irqfd_route
        for msi in self.msis[self.turn]:
            route = new()
            self.routes.append(route)
            route.set_msi(msi)

    def _bring_up_made(self) -> None:
        for route, msi in zip(self.routes, self.msis[self.turn], strict=True):
            route.set_msi(msi)

    def _msix_bring_up(self) -> None:
        for table, writes in zip(self.tables, self.writes, strict=True):
            bring_up_device(table, writes)

    def _retarget_storm(self) -> None:
        index, msi = next(self.storm)
        self.routes[index].set_msi(msi)

    def _set_all(self) -> None:
        self.turn = not self.turn
        with self.partition.batch() as batch:
            set_msi = batch.set_msi
            for route, msi in zip(self.routes, self.msis[self.turn], strict=True):
                set_msi(route, msi)

    def _tear_down(self) -> None:
        for route in self.routes:
            route.close()

    def _prepare_steps(self) -> None:
        # Bound methods, as in a program that keeps its route.
        if not self.routes:
            return
        route = self.routes[self.middle]
        set_msi, mask, unmask = route.set_msi, route.mask, route.unmask
        # The first must differ from the current MSI: setting the same one again does nothing.
        now = route.msi
        msis = cycle(sorted((turn[self.middle] for turn in self.msis), key=lambda msi: msi == now))

        def retarget() -> None:
            set_msi(next(msis))

        def mask_unmask() -> None:
            mask()
            unmask()

        self.steps |= {"retarget": retarget, "push": retarget, "mask-unmask": mask_unmask, "signal": route.signal}
        if isinstance(self.partition, SimulatedPartition):
            signal, take = route.signal, self.partition.take_interrupts

            def delivered() -> None:
                signal()
                if not take(TIMEOUT):
                    raise TimeoutError("the simulated kernel delivered no interrupt")

            self.steps["signal"] = delivered

    def _renew(self) -> None:
        """Opens another partition: the kernel's table of this one has what a bring-up is to push."""
        self.close()
        self.routes = []
        self.partition = self._open()
        self.standing = Standing.NOTHING

    def run(self, workload: str, calls: int) -> int:
        """Runs a workload, without the closed routes of an earlier one."""
        total = 0
        for _ in range(calls if workload in BRING_UPS else 1):
            if workload in BRING_UPS:
                self._renew()
            if workload == "msix-bring-up":
                total += self._run_devices()
                continue
            if self.standing == Standing.NOTHING:
                self.routes = []
            total += super().run(workload, 1 if workload in BRING_UPS else calls)
        return total

    def _run_devices(self) -> int:
        """Times the bring-up of new devices, and takes them away."""
        self._make_devices()
        took = super().run("msix-bring-up", 1)
        self._close_devices()
        self.standing = Standing.NOTHING
        return took

    def _make_devices(self) -> None:
        left = range(self.count, 0, -VECTORS)
        self.tables = [MsixTable(self.partition, min(VECTORS, vectors)) for vectors in left]

    def _close_devices(self) -> None:
        for table in self.tables:
            table.close()
        self.tables = []

    def _arrange_devices(self) -> None:
        """Brings up devices and prepares the writes that give the vector in the middle one MSI after the other."""
        self._tear_down()
        self.routes = []
        self._make_devices()
        self._msix_bring_up()
        number, index = divmod(self.middle, VECTORS)
        msis = [self.msis[turn][self.middle] for turn in (True, False)]
        self.steps["msix-retarget"] = driver_retargets(self.tables[number], index, msis)

    def _arrange(self, standing: Standing) -> None:
        if self.standing == Standing.DEVICE:
            self._close_devices()
            self.standing = Standing.NOTHING
        if standing == Standing.DEVICE:
            self._arrange_devices()
            return
        if standing == Standing.NOTHING:
            self._tear_down()
            self.routes = []
            return
        if self.standing == Standing.NOTHING:
            self._create()
        if standing == Standing.MADE:
            return
        others = [route for index, route in enumerate(self.routes) if index != self.middle]
        with self.partition.batch() as batch:
            for route, msi in zip(self.routes, self.msis[self.turn], strict=True):
                batch.set_msi(route, msi)
            for route in others:
                batch.unmask(route)
        if standing == Standing.QUIET:
            with self.partition.batch() as batch:
                for route in others:
                    batch.mask(route)

    def close(self) -> None:
        """Closes the partition, its routes and the devices."""
        self._close_devices()
        self.partition.close()
