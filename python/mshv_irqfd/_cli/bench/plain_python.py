"""The plain-Python design: the same work with `os.eventfd`, `fcntl.ioctl` and `struct`."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress
from itertools import cycle
from typing import TYPE_CHECKING, Protocol

from mshv_irqfd import open_partition
from mshv_irqfd._cli.bench.timed import Timed
from mshv_irqfd._cli.bench.workloads import FIRST_GSI, VPS, Standing, storm, vector

if TYPE_CHECKING:
    from collections.abc import Callable

ADDRESS = 0xFEE00000
Msi = tuple[int, int]
"""Address and data."""


class Kernel(Protocol):
    """The ioctls of one kernel, from plain Python."""

    fixed: bytes
    fixed_count: int
    pack_entry: Callable[[int, Msi], bytes]

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
        self.pack_entry: Callable[[int, Msi], bytes] = lambda gsi, message: msi(
            gsi, self.MSI, 0, 0, message[0], 0, message[1], 0
        )
        pics = [pin(gsi, self.IRQCHIP, 0, 0, gsi // 8, gsi % 8) for gsi in range(16)]
        ioapic = [pin(gsi, self.IRQCHIP, 0, 0, 2, gsi) for gsi in range(24)]
        self.fixed = b"".join(pics + ioapic)
        self.fixed_count = len(pics) + len(ioapic)

    def push(self, table: bytes) -> object:
        """Pushes a routing table."""
        # ioctl() copies at most 1,024 bytes of an immutable buffer; it passes on a mutable one of any size.
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
        self.pack_entry: Callable[[int, Msi], bytes] = lambda gsi, msi: pack(gsi, msi[0], 0, msi[1])

    def push(self, table: bytes) -> object:
        """Pushes a routing table."""
        return fcntl.ioctl(self.vm, self.SET_MSI_ROUTING, bytearray(table), True)  # noqa: FBT003 -- of the standard library

    def irqfd(self, fd: int, gsi: int, *, deassign: bool) -> object:
        """Registers or unregisters an irqfd."""
        return fcntl.ioctl(self.vm, self.IRQFD, struct.pack("<iIII", fd, 0, gsi, deassign))


class NoIoctls(MshvIoctls):
    """Tables in the layout of mshv, without a kernel."""

    def push(self, table: bytes) -> object:
        """Pushes a routing table."""
        return table

    def irqfd(self, fd: int, gsi: int, *, deassign: bool) -> object:
        """Registers or unregisters an irqfd."""
        return fd, gsi, deassign


class PlainPython(Timed):
    """A dictionary of MSIs, packed into a routing table for every push."""

    def __init__(self, backend: str, count: int) -> None:
        super().__init__()
        self.count = count
        # Only the descriptor of this partition is used.
        self.partition = None if backend == "null" else open_partition(backend, vps=VPS)
        ioctls: dict[str, Callable[[int], Kernel]] = {"mshv": MshvIoctls, "kvm": KvmIoctls, "null": NoIoctls}
        self.kernel = ioctls[backend](-1 if self.partition is None else self.partition.fileno())
        self.table: dict[int, Msi] = {}
        self.events: list[int] = []
        self.middle = count // 2
        self.storm = cycle(
            [(FIRST_GSI + index, (ADDRESS | vp << 12, number)) for index, number, vp in storm(count)],
        )
        self.steps = {
            "create": self._create,
            "bring-up": self._bring_up,
            "bring-up-made": self._bring_up_made,
            "bring-up-batch": self._bring_up_batch,
            "msix-bring-up": self._msix_bring_up,
            "msix-retarget": self._msix_retarget,
            "retarget": self._retarget,
            "retarget-storm": self._retarget_storm,
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
            self._route_and_arm(index)

    def _bring_up_made(self) -> None:
        for index in range(self.count):
            self._route_and_arm(index)

    def _route_and_arm(self, index: int) -> None:
        self.table[FIRST_GSI + index] = ADDRESS, vector(index, turn=False)
        self._push()
        self._arm(index)

    def _set_all(self) -> None:
        self.table = {FIRST_GSI + index: (ADDRESS, vector(index, turn=self.turn)) for index in range(self.count)}

    def _bring_up_batch(self) -> None:
        self._set_all()
        self._push()
        for index in range(self.count):
            self._arm(index)

    def _msix_bring_up(self) -> None:
        self._create()
        self._bring_up_batch()

    def _retarget(self) -> None:
        self.turn = not self.turn
        self.table[FIRST_GSI + self.middle] = ADDRESS, vector(self.middle, turn=self.turn)
        self._push()

    def _msix_retarget(self) -> None:
        self._disarm(self.middle)
        self._retarget()
        self._arm(self.middle)

    def _retarget_storm(self) -> None:
        gsi, self.table[gsi] = next(self.storm)
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
        if self.standing in (Standing.ARMED, Standing.DEVICE, Standing.QUIET):
            armed = (self.middle,) if self.standing == Standing.QUIET else range(self.count)
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
        if standing in (Standing.ARMED, Standing.DEVICE, Standing.QUIET):
            self._set_all()
            self._push()
            for index in (self.middle,) if standing == Standing.QUIET else range(self.count):
                self._arm(index)

    def _prepare_steps(self) -> None:
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
