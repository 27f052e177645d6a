"""The hypervisors that the behaviour suite runs on, and what their guests receive."""

from __future__ import annotations

import fcntl
import os
import struct
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvm_code import KvmCode
from mshv_irqfd import DeliveryMode, Interrupt, KvmPartition, MsiRoute, Partition, SimulatedPartition, open_partition
from support import until

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hvstub import HvStub

NAMES = ("simulated", "kvm", "mshv")

SELECTION = "MSHV_IRQFD_BACKENDS"
"""The environment variable that lists the backends to run on, with commas between. A listed one is never skipped."""

KVM_IRQFD = 0x4020AE76
KVM_IRQFD_FLAG_DEASSIGN = 1
KVM_SIGNAL_MSI = 0x4020AEA5


def selected() -> tuple[str, ...]:
    """The backends to run on."""
    names = tuple(name.strip() for name in os.environ.get(SELECTION, "").split(",") if name.strip())
    unknown = set(names) - set(NAMES)
    if unknown:
        raise ValueError(f"{SELECTION} names {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return names or NAMES


def required(name: str) -> bool:
    """Whether a backend was asked for by name."""
    return bool(os.environ.get(SELECTION)) and name in selected()


def unavailable(name: str) -> str | None:
    """The reason why a backend can't be tested here, with the remedy; None if it can."""
    if name == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "needs /dev/kvm and access to it: turn virtualization on, load kvm_intel or kvm_amd, join group kvm"
    if name == "mshv" and not Path("/dev/mshv").exists():
        return "needs /dev/mshv: run `make lab`"
    if name == "mshv" and not Path("/dev/hvstub").exists():
        return "needs /dev/hvstub, which reports the interrupts: run `make lab`"
    return None


class Guest(ABC):
    """A partition, and the interrupts that arrive in it.

    Where interrupts are counted, each is compared in all its fields. Elsewhere only the set of vectors is known.
    """

    counted = True

    def __init__(self, partition: Partition) -> None:
        self.partition = partition

    @abstractmethod
    def arrived(self) -> list[Interrupt]:
        """Takes all interrupts so far, behind a fence: those of every signal and arming before the call are among them.

        Nothing else may use the partition meanwhile.
        """

    def poll(self) -> list[Interrupt]:
        """Takes the interrupts so far, without the fence. For use while other threads change the partition."""
        return self.arrived()

    @abstractmethod
    def writes(self, address: int, data: bytes) -> bool:
        """Writes to a guest-physical address below 4 GiB as the guest does. Returns whether a doorbell took it."""

    def reaches(self, msi: MsiRoute) -> bool:  # noqa: ARG002 - a subclass looks at it
        """Whether the guest shows the interrupt of an MSI."""
        return True

    def receives(self, *expected: MsiRoute) -> None:
        """Asserts that exactly these interrupts have arrived since the last call."""
        assert self._told(self.arrived()) == self._told(map(_interrupt, expected))

    def gets(self, expected: MsiRoute, *, once: bool = True) -> None:
        """Waits for this interrupt, and asserts that no other comes with it. Does not touch armed irqfds.

        Pass `once=False` if the signal may overlap an arming, and so may be delivered twice.
        """
        arrived: list[Interrupt] = []

        def some() -> bool:
            arrived.extend(self.poll())
            return arrived != []

        until(some, f"{expected} arrived")
        told, wanted = self._told(arrived), self._told([_interrupt(expected)])
        assert told == wanted if once else set(told) == set(wanted)

    def receives_nothing(self) -> None:
        """Asserts that no interrupt has arrived since the last call."""
        self.receives()

    def _told(self, interrupts: Iterable[Interrupt]) -> Counter[Interrupt]:
        if self.counted:
            return Counter(interrupts)
        return Counter({Interrupt(interrupt.vector) for interrupt in interrupts})

    def close(self) -> None:
        """Closes the routes, which flushes interrupts in flight, and asserts that no unexpected one arrived."""
        if not self.partition.closed:
            for route in self.partition.routes:
                route.close()
            self.receives_nothing()
            self.partition.close()


def _interrupt(msi: MsiRoute) -> Interrupt:
    return Interrupt(msi.vector, msi.destination, msi.delivery_mode, msi.logical, msi.level)


class SimulatedGuest(Guest):
    partition: SimulatedPartition

    def arrived(self) -> list[Interrupt]:
        self.partition.settle()
        return self.partition.take_interrupts()

    def writes(self, address: int, data: bytes) -> bool:
        return self.partition.write_mmio(address, data)


class KvmGuest(Guest):
    """A guest of KVM: its interrupts are the vectors in the local APICs.

    KVM injects from a work item if a signal was pending at arming or can't be injected at once. Disarming flushes that
    work, so the fence disarms each armed irqfd and arms it again by bare ioctls, which the partition does not see.
    """

    counted = False
    partition: KvmPartition
    SENTINEL = 0xFE
    _code: KvmCode | None = None

    @property
    def code(self) -> KvmCode:
        """A vCPU to run guest code on."""
        if self._code is None:
            self._code = KvmCode(self.partition.fileno())
        return self._code

    def writes(self, address: int, data: bytes) -> bool:
        return self.code.write(address, data)

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self._code is not None:
                self._code.close()

    def arrived(self) -> list[Interrupt]:
        vm = self.partition.fileno()
        for route in self.partition.routes:
            if route.armed:
                for flags in (KVM_IRQFD_FLAG_DEASSIGN, 0):
                    fcntl.ioctl(vm, KVM_IRQFD, struct.pack("IIII16x", route.fileno(), route.armed_gsi, flags, 0))
        vps = self.partition.vps
        if not vps:
            return []
        # The sentinel proves that the IRR is read: it is there when the ioctl returns.
        msi = MsiRoute.fixed(self.SENTINEL, vps[0])
        fcntl.ioctl(vm, KVM_SIGNAL_MSI, struct.pack("IIII16x", msi.address, 0, msi.data, 0))
        arrived = self.partition.take_interrupts()
        assert Interrupt(self.SENTINEL) in arrived, "the sentinel did not arrive"
        return [interrupt for interrupt in arrived if interrupt.vector != self.SENTINEL]

    def poll(self) -> list[Interrupt]:
        return self.partition.take_interrupts()

    def reaches(self, msi: MsiRoute) -> bool:
        """Only an existing VP has a local APIC to read, and no VP has a logical id."""
        return not msi.logical and msi.destination in (self.partition.vps or ())


class MshvGuest(Guest):
    """A guest of mshv: its interrupts are those that the driver asks the lab's stand-in hypervisor to assert.

    The driver does so before a write or an ioctl returns. Under the root scheduler it may put the vector into a VP's
    register page instead, which shows the vector alone, and once however often it came.
    """

    _stub: HvStub | None = None
    _taken: dict[int, list[Interrupt]] = {}  # noqa: RUF012 - the stand-in has one buffer for all partitions

    def __init__(self, partition: Partition) -> None:
        import hvstub  # noqa: PLC0415 - its device exists in the lab only

        super().__init__(partition)
        if MshvGuest._stub is None:
            MshvGuest._stub = hvstub.HvStub()
        self.stub = MshvGuest._stub
        self.id = hvstub.partition_id(partition.fileno())
        self.root = self.stub.scheduler == hvstub.Scheduler.ROOT
        self.counted = not self.root

    def arrived(self) -> list[Interrupt]:
        for one in self.stub.take():
            interrupt = Interrupt(one.vector, one.destination, DeliveryMode(one.delivery_mode), one.logical, one.level)
            self._taken.setdefault(one.partition_id, []).append(interrupt)
        arrived = self._taken.pop(self.id, [])
        if self.root:
            for vp in self.partition.vps or ():
                arrived += map(Interrupt, self.stub.registers(self.id, vp))
        return arrived

    def writes(self, address: int, data: bytes) -> bool:
        return self.stub.fire_doorbell(self.id, address, int.from_bytes(data, "little"), len(data)) > 0


GUESTS: dict[str, type[Guest]] = {"simulated": SimulatedGuest, "kvm": KvmGuest, "mshv": MshvGuest}


class Backend:
    """A hypervisor that this machine has."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    @property
    def quiesces(self) -> bool:
        """Whether pushes are quiesced by default."""
        return self.name != "kvm"

    def loads(self, *, quiesce: bool | None = None) -> bool:
        """Whether pushes load spare GSIs while there are few routes.

        On KVM a push is cheaper than a move then, so it loads them only if pushes are quiesced.
        """
        return self.quiesces or bool(quiesce)

    @property
    def takes_broadcast(self) -> bool:
        return self.name == "kvm"

    def open(self, **options: Any) -> Partition:
        return open_partition(self.name, **options)

    def guest(self, partition: Partition) -> Guest:
        return GUESTS[self.name](partition)


def close_all(guests: Iterable[Guest]) -> None:
    """Closes all guests, even if some received unexpected interrupts."""
    errors = []
    for guest in guests:
        try:
            guest.close()
        except AssertionError as error:
            errors.append(error)
            guest.partition.close()
    if errors:
        raise errors[0]
