"""What is measured: the package's own calls, and the same work done with `fcntl.ioctl` and `struct`.

The floor and the rebuilt table are Rust (`_core.Baseline`). All run the same workloads, each on a partition of its own
with one VP; what leads up to a workload and away from it is not timed.
"""

from __future__ import annotations

import fcntl
import os
import struct
from abc import ABC, abstractmethod
from contextlib import suppress
from enum import Enum
from itertools import cycle
from time import perf_counter_ns
from typing import TYPE_CHECKING, Protocol

from mshv_irqfd import MsiRoute, SimulatedPartition, _core, open_partition

if TYPE_CHECKING:
    from collections.abc import Callable

    from mshv_irqfd import IrqFdRoute

WORKLOADS = {
    "create": "routes made, without an MSI",
    "bring-up": "routes made, routed and armed, one after the other",
    "bring-up-batch": "routes that exist, routed and armed together",
    "retarget": "one route moved to another vector",
    "retarget-all": "all routes moved to other vectors together",
    "mask-unmask": "one route masked and unmasked",
    "push": "the table pushed while one route alone is armed",
    "signal": "an armed eventfd written, until the interrupt is delivered",
    "tear-down": "all routes taken down, one after the other",
}
BACKENDS = ("mshv", "kvm", "simulated", "null")
FIRST_GSI = 24
ADDRESS = 0xFEE00000
TIMEOUT = 60.0


class Standing(Enum):
    """How far the routes of a design are brought up."""

    NOTHING = 0
    MADE = 1
    ARMED = 2
    QUIET = 3
    """All are in the table, and one alone is armed."""


BEGINS = {
    "create": Standing.NOTHING,
    "bring-up": Standing.NOTHING,
    "bring-up-batch": Standing.MADE,
    "push": Standing.QUIET,
}
"""What must be there when a workload begins; `ARMED` for the others."""
ENDS = {
    "create": Standing.MADE,
    "bring-up": Standing.ARMED,
    "bring-up-batch": Standing.ARMED,
    "push": Standing.QUIET,
    "tear-down": Standing.NOTHING,
}
"""What is there when it ends; `ARMED` for the others."""


def is_repeatable(workload: str) -> bool:
    """Whether a workload ends as it begins, so that it can be run again at once."""
    return BEGINS.get(workload, Standing.ARMED) == ENDS.get(workload, Standing.ARMED)


class Design(Protocol):
    """A way to run the routes of one partition."""

    def run(self, workload: str, calls: int) -> int:
        """Runs a workload a number of times in a row, and returns the nanoseconds that all of them took."""

    def close(self) -> None:
        """Gives up the partition."""


def vector(index: int, *, turn: bool) -> int:
    """The vector of a route; `turn` tells one retargeting from the next."""
    return 0x30 + index % 64 + (64 if turn else 0)


class Timed(ABC):
    """A design in Python: steps by the name of their workload, timed here."""

    def __init__(self) -> None:
        self.standing = Standing.NOTHING
        self.turn = False
        self.steps: dict[str, Callable[[], object]] = {}

    @abstractmethod
    def _arrange(self, standing: Standing) -> None:
        """Comes from any standing to another, by calls that are not timed."""

    @abstractmethod
    def _take_up(self) -> None:
        """Makes the steps on one route, which may be another than in the run before."""

    def run(self, workload: str, calls: int) -> int:
        """Runs a workload a number of times in a row, and returns the nanoseconds that all of them took."""
        begins, ends = (table.get(workload, Standing.ARMED) for table in (BEGINS, ENDS))
        repeatable = is_repeatable(workload)
        total = 0
        for _ in range(1 if repeatable else calls):
            if self.standing != begins:
                self._arrange(begins)
            self._take_up()
            step = self.steps[workload]
            repeat = range(calls if repeatable else 1)
            start = perf_counter_ns()
            for _ in repeat:
                step()
            total += perf_counter_ns() - start
            self.standing = ends
        return total


class Package(Timed):
    """This package, as a caller in Python uses it."""

    def __init__(self, backend: str, count: int, *, quiesce: bool | None = None) -> None:
        super().__init__()
        self.count = count
        gsis = range(FIRST_GSI, FIRST_GSI + max(count, 2048))
        self.partition = (
            _core.null_partition(gsis) if backend == "null" else open_partition(backend, gsis=gsis, quiesce=quiesce)
        )
        self.routes: list[IrqFdRoute] = []
        self.msis = [[MsiRoute.fixed(vector(index, turn=turn), 0) for index in range(count)] for turn in (False, True)]
        self.middle = count // 2
        self.steps = {
            "create": self._create,
            "bring-up": self._bring_up,
            "bring-up-batch": self._set_all,
            "retarget-all": self._set_all,
            "tear-down": self._tear_down,
        }

    def _create(self) -> None:
        new = self.partition.new_irqfd_route
        self.routes = [new() for _ in range(self.count)]

    def _bring_up(self) -> None:
        # Other MSIs than before: the kernel has those of closed routes until the next push, and needs none for them.
        self.turn = not self.turn
        new = self.partition.new_irqfd_route
        for msi in self.msis[self.turn]:
            route = new()
            self.routes.append(route)
            route.set_msi(msi)

    def _set_all(self) -> None:
        self.turn = not self.turn
        with self.partition.batch() as batch:
            set_msi = batch.set_msi
            for route, msi in zip(self.routes, self.msis[self.turn], strict=True):
                set_msi(route, msi)

    def _tear_down(self) -> None:
        for route in self.routes:
            route.close()

    def _take_up(self) -> None:
        # As a caller does who keeps the route.
        if not self.routes:
            return
        route = self.routes[self.middle]
        set_msi, mask, unmask = route.set_msi, route.mask, route.unmask
        # The first must be another than it has: setting that again would do nothing.
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

    def run(self, workload: str, calls: int) -> int:
        """Runs a workload, with no route of an earlier one left over."""
        if self.standing == Standing.NOTHING:
            self.routes = []
        return super().run(workload, calls)

    def _arrange(self, standing: Standing) -> None:
        if standing == Standing.NOTHING:
            self._tear_down()
            self.routes = []
            return
        if self.standing == Standing.NOTHING:
            self._create()
        others = [route for index, route in enumerate(self.routes) if index != self.middle]
        with self.partition.batch() as batch:
            if standing == Standing.MADE:
                for route in self.routes:
                    batch.clear_msi(route)
            else:
                for route, msi in zip(self.routes, self.msis[self.turn], strict=True):
                    batch.set_msi(route, msi)
            for route in others:
                batch.unmask(route)
        if standing == Standing.QUIET:
            with self.partition.batch() as batch:
                for route in others:
                    batch.mask(route)

    def close(self) -> None:
        """Gives up the partition and its routes."""
        self.partition.close()


class Kernel(Protocol):
    """How one kernel's ioctls are called from plain Python."""

    fixed: bytes
    fixed_count: int
    pack_entry: Callable[[int, int], bytes]

    def push(self, table: bytes) -> object:
        """Pushes a routing table."""

    def irqfd(self, fd: int, gsi: int, *, deassign: bool) -> object:
        """Registers or unregisters an irqfd."""


class KvmIoctls:
    """KVM_SET_GSI_ROUTING and KVM_IRQFD (include/uapi/linux/kvm.h)."""

    SET_GSI_ROUTING = 0x4008AE6A
    IRQFD = 0x4020AE76
    IRQCHIP, MSI = 1, 2

    def __init__(self, vm: int) -> None:
        self.vm = vm
        msi = struct.Struct("<IIIIIIII16x").pack
        pin = struct.Struct("<IIIIII24x").pack
        self.pack_entry: Callable[[int, int], bytes] = lambda gsi, data: msi(gsi, self.MSI, 0, 0, ADDRESS, 0, data, 0)
        pics = [pin(gsi, self.IRQCHIP, 0, 0, gsi // 8, gsi % 8) for gsi in range(16)]
        ioapic = [pin(gsi, self.IRQCHIP, 0, 0, 2, gsi) for gsi in range(24)]
        self.fixed = b"".join(pics + ioapic)
        self.fixed_count = len(pics) + len(ioapic)

    def push(self, table: bytes) -> object:
        """Pushes a routing table."""
        # Larger than the 1,024 bytes that ioctl() copies: it takes a mutable buffer of any size as it is.
        return fcntl.ioctl(self.vm, self.SET_GSI_ROUTING, bytearray(table), True)  # noqa: FBT003 -- of the standard library

    def irqfd(self, fd: int, gsi: int, *, deassign: bool) -> object:
        """Registers or unregisters an irqfd."""
        return fcntl.ioctl(self.vm, self.IRQFD, struct.pack("<IIII16x", fd, gsi, deassign, 0))


class MshvIoctls:
    """MSHV_SET_MSI_ROUTING and MSHV_IRQFD (include/uapi/linux/mshv.h)."""

    SET_MSI_ROUTING = 0x4008B805
    IRQFD = 0x4010B803
    fixed = b""
    fixed_count = 0

    def __init__(self, vm: int) -> None:
        self.vm = vm
        pack = struct.Struct("<IIII").pack
        self.pack_entry: Callable[[int, int], bytes] = lambda gsi, data: pack(gsi, ADDRESS, 0, data)

    def push(self, table: bytes) -> object:
        """Pushes a routing table."""
        return fcntl.ioctl(self.vm, self.SET_MSI_ROUTING, bytearray(table), True)  # noqa: FBT003 -- of the standard library

    def irqfd(self, fd: int, gsi: int, *, deassign: bool) -> object:
        """Registers or unregisters an irqfd."""
        return fcntl.ioctl(self.vm, self.IRQFD, struct.pack("<iIII", fd, 0, gsi, deassign))


class NoIoctls(MshvIoctls):
    """The tables of mshv, for nobody."""

    def push(self, table: bytes) -> object:
        """Pushes a routing table."""
        return table

    def irqfd(self, fd: int, gsi: int, *, deassign: bool) -> object:
        """Registers or unregisters an irqfd."""
        return fd, gsi, deassign


class PlainPython(Timed):
    """What one would write with `os.eventfd`, `fcntl.ioctl` and `struct`: a table of MSIs, packed for every push."""

    def __init__(self, backend: str, count: int) -> None:
        super().__init__()
        self.count = count
        # The partition is ours, and nothing else of it is used.
        self.partition = None if backend == "null" else open_partition(backend)
        ioctls: dict[str, Callable[[int], Kernel]] = {"mshv": MshvIoctls, "kvm": KvmIoctls, "null": NoIoctls}
        self.kernel = ioctls[backend](-1 if self.partition is None else self.partition.fileno())
        self.table: dict[int, int] = {}
        self.events: list[int] = []
        self.middle = count // 2
        self.steps = {
            "create": self._create,
            "bring-up": self._bring_up,
            "bring-up-batch": self._bring_up_batch,
            "retarget": self._retarget,
            "retarget-all": self._retarget_all,
            "mask-unmask": self._mask_unmask,
            "push": self._retarget,
            "tear-down": self._tear_down,
        }

    def _push(self) -> None:
        kernel = self.kernel
        head = struct.pack("<II", kernel.fixed_count + len(self.table), 0)
        kernel.push(head + kernel.fixed + b"".join(map(kernel.pack_entry, self.table.keys(), self.table.values())))

    def _arm(self, index: int) -> None:
        self.kernel.irqfd(self.events[index], FIRST_GSI + index, deassign=False)

    def _disarm(self, index: int) -> None:
        self.kernel.irqfd(self.events[index], FIRST_GSI + index, deassign=True)

    def _create(self) -> None:
        self.events = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(self.count)]

    def _bring_up(self) -> None:
        for index in range(self.count):
            self.events.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            self.table[FIRST_GSI + index] = vector(index, turn=False)
            self._push()
            self._arm(index)

    def _set_all(self) -> None:
        self.table = {FIRST_GSI + index: vector(index, turn=self.turn) for index in range(self.count)}

    def _bring_up_batch(self) -> None:
        self._set_all()
        self._push()
        for index in range(self.count):
            self._arm(index)

    def _retarget(self) -> None:
        self.turn = not self.turn
        self.table[FIRST_GSI + self.middle] = vector(self.middle, turn=self.turn)
        self._push()

    def _retarget_all(self) -> None:
        self.turn = not self.turn
        self._set_all()
        self._push()

    def _mask_unmask(self) -> None:
        self._disarm(self.middle)
        self._arm(self.middle)

    def _tear_down(self) -> None:
        for index, fd in enumerate(self.events):
            self._disarm(index)
            os.close(fd)
        self.events = []
        self.table = {}

    def _arrange(self, standing: Standing) -> None:
        if self.standing in (Standing.ARMED, Standing.QUIET):
            armed = range(self.count) if self.standing == Standing.ARMED else (self.middle,)
            for index in armed:
                self._disarm(index)
        self.turn = False
        self.table = {}
        if standing == Standing.NOTHING:
            for fd in self.events:
                os.close(fd)
            self.events = []
            return
        if self.standing == Standing.NOTHING:
            self._create()
        if standing in (Standing.ARMED, Standing.QUIET):
            self._set_all()
            self._push()
            for index in range(self.count) if standing == Standing.ARMED else (self.middle,):
                self._arm(index)

    def _take_up(self) -> None:
        if self.events:
            fd, write = self.events[self.middle], os.eventfd_write
            self.steps["signal"] = lambda: write(fd, 1)

    def close(self) -> None:
        """Closes the eventfds and the partition."""
        for fd in self.events:
            with suppress(OSError):
                os.close(fd)
        if self.partition is not None:
            self.partition.close()


MAKERS: dict[str, Callable[[str, int], Design]] = {
    "package": Package,
    "package, not quiesced": lambda backend, count: Package(backend, count, quiesce=False),
    "floor": lambda backend, count: _core.Baseline("floor", backend, count),
    "floor, quiesced": lambda backend, count: _core.Baseline("floor-quiesced", backend, count),
    "rebuild": lambda backend, count: _core.Baseline("rebuild", backend, count),
    "plain Python": PlainPython,
}


def of_backend(backend: str) -> list[str]:
    """The designs that a backend can have."""
    names = list(MAKERS)
    if backend in ("kvm", "null"):
        names = [name for name in names if "quiesced" not in name]
    if backend == "simulated":
        # It has no ioctls to call.
        names.remove("plain Python")
    return names
