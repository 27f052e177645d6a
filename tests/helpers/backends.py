"""The hypervisors that the behaviour suite runs on, and what their guests receive."""

from __future__ import annotations

import fcntl
import struct
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mshv_irqfd import (
    DeliveryMode,
    Interrupt,
    KvmPartition,
    MsiRoute,
    Partition,
    SimulatedPartition,
    open_partition,
    testing,
)
from mshv_irqfd._guest import FENCE, CountingGuest, GuestOfPartition
from mshv_irqfd.testing import expect, expect_nothing, patience

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hvstub import HvStub

Telling = SimulatedPartition | KvmPartition
"""A partition that tells what arrives, if no guest takes it."""

KVM_IRQFD = 0x4020AE76
KVM_IRQFD_FLAG_DEASSIGN = 1
BROADCAST = 0xFF
ARMINGS = 100
"""More than one signal meets, however slow the machine is."""


def unavailable(name: str) -> str | None:
    """The reason why a backend can't be tested here, with the remedy; None if it can."""
    if name == "mshv" and not Path("/dev/hvstub").exists():
        return "needs /dev/mshv and /dev/hvstub, which reports the interrupts: run `make lab`"
    return testing.unavailable(name)


class Guest(ABC):
    """A partition, and the interrupts that arrive in it, for `expect()`. Each has all fields that its backend knows."""

    counted = True
    """Whether interrupts are counted. Otherwise only the set of vectors is known."""
    merges = False
    """Whether interrupts of one vector to one VP become one if the guest has not taken the first before the next."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition

    @abstractmethod
    def take_interrupts(self) -> list[Interrupt]:
        """Takes the interrupts so far, without a fence. For use while other threads change the partition."""

    def settle(self) -> None:  # noqa: B027 - the mshv driver delivers before a write or an ioctl returns
        """The fence: the interrupts of every signal and arming before this call are among those to take.

        Nothing else may use the partition meanwhile.
        """

    @abstractmethod
    def writes(self, address: int, data: bytes) -> bool:
        """Writes to a guest-physical address below 4 GiB as the guest does. Returns whether a doorbell took it."""

    def reaches(self, msi: MsiRoute) -> bool:  # noqa: ARG002 - a subclass looks at it
        """Whether the guest shows the interrupt of an MSI."""
        return True

    def is_upset_by(self, mode: int) -> bool:  # noqa: ARG002 - a subclass looks at it
        """Whether an MSI whose data has this upper byte does more to the guest than to interrupt it."""
        return False

    def seen(self, msi: MsiRoute) -> list[Interrupt]:
        """The interrupts of an MSI as the guest shows them: one, but for a broadcast to several VPs."""
        whole = Interrupt(msi.vector, msi.destination, msi.delivery_mode, msi.logical, msi.level)
        return [whole if self.counted else Interrupt(msi.vector)]

    def stop(self) -> None:  # noqa: B027 - on other backends than KVM none run
        """Stops the guest's VPs, if they run. They run again as soon as anyone asks what arrived."""

    def arrived(self) -> list[Interrupt]:
        """Takes all interrupts so far, behind the fence."""
        self.settle()
        return self.take_interrupts()

    def receives(self, *expected: MsiRoute) -> None:
        """Asserts that exactly these interrupts have arrived since the last call.

        Where interrupts merge, one of several equal ones is enough: ask in between if each must arrive.
        """
        # The fence lets new VPs run, and `seen` must know of them.
        self.settle()
        self._expect([one for msi in expected for one in self.seen(msi)], timeout=0)

    def gets(self, expected: MsiRoute, *, once: bool = True) -> None:
        """Waits for this interrupt, and asserts that no other comes with it. Does not touch armed irqfds.

        Pass `once=False` if the signal may overlap armings, each of which may deliver it again.
        """
        self._expect(self.seen(expected) * (1 if once else ARMINGS), merged=not once)

    def receives_nothing(self) -> None:
        """Asserts that no interrupt has arrived since the last call."""
        self.receives()

    def _expect(self, expected: list[Interrupt], *, merged: bool = False, timeout: float | None = None) -> None:
        told = Told(self)
        if expected:
            expect(told, expected, timeout=timeout, merged=merged or self.merges or not self.counted)
        else:
            expect_nothing(told)

    def told(self, interrupts: list[Interrupt]) -> list[Interrupt]:
        """Interrupts as far as the guest tells them apart."""
        return interrupts if self.counted else list(dict.fromkeys(Interrupt(one.vector) for one in interrupts))

    def close(self) -> None:
        """Closes the routes, which flushes interrupts in flight, and asserts that no unexpected one arrived."""
        try:
            if not self.partition.closed:
                for route in self.partition.routes:
                    route.close()
                self.receives_nothing()
        finally:
            self.partition.close()
            self.stop()


class Told:
    """A guest's interrupts so far, as far as it tells them apart, for `expect()`. Its fence is its users' business."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def settle(self) -> None:
        pass

    def take_interrupts(self) -> list[Interrupt]:
        return self._guest.told(self._guest.take_interrupts())


class SimulatedGuest(Guest):
    partition: SimulatedPartition

    def settle(self) -> None:
        self.partition.settle()

    def take_interrupts(self) -> list[Interrupt]:
        return self.partition.take_interrupts()

    def writes(self, address: int, data: bytes) -> bool:
        return self.partition.write_mmio(address, data)


class KvmGuest(Guest):
    """A guest of KVM: its CPUs run code that counts the interrupts which they take, by VP and vector.

    KVM injects from a work item if a signal was pending at arming or can't be injected at once. Disarming flushes that
    work, so the fence disarms each armed irqfd and arms it again by bare ioctls, which the partition does not see.
    """

    merges = True
    partition: KvmPartition
    _running: CountingGuest | None = None

    def __init__(self, partition: KvmPartition) -> None:
        super().__init__(partition)
        # From the beginning, so that the guest takes each interrupt before the next.
        self.running()

    def running(self) -> CountingGuest:
        """The code that runs on the VPs."""
        if self._running is None:
            self._running = self._run()
        return self._running

    def _run(self) -> CountingGuest:
        return GuestOfPartition(self.partition, patience=patience())

    def stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def writes(self, address: int, data: bytes) -> bool:
        return self.running().write(address, data)

    def settle(self) -> None:
        vm = self.partition.fileno()
        for route in self.partition.routes:
            if route.armed:
                for flags in (KVM_IRQFD_FLAG_DEASSIGN, 0):
                    fcntl.ioctl(vm, KVM_IRQFD, struct.pack("IIII16x", route.fileno(), route.armed_gsi, flags, 0))
        running = self.running()
        if isinstance(running, GuestOfPartition):
            running.add_new_vps()
        running.fence()

    def take_interrupts(self) -> list[Interrupt]:
        return [Interrupt(vector, vp) for vector, vp in self.running().take().elements()]

    def seen(self, msi: MsiRoute) -> list[Interrupt]:
        # No VP has a logical id. Of the other delivery modes none arrives by its vector: KVM drops an ExtINT. The
        # vector of fences is not counted.
        by_vector = msi.data >> 8 & 7 in (0b000, 0b001) and msi.vector != FENCE
        vps = self.running().vps if by_vector and not msi.logical else ()
        return [Interrupt(msi.vector, vp) for vp in vps if msi.destination in (vp, BROADCAST)]

    def reaches(self, msi: MsiRoute) -> bool:
        return self.seen(msi) != []

    def is_upset_by(self, mode: int) -> bool:
        # SMI, NMI and INIT: the counting guest has handlers for none of them.
        return mode & 7 in (0b010, 0b100, 0b101)


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

    def take_interrupts(self) -> list[Interrupt]:
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


GUESTS: dict[str, Callable[[Any], Guest]] = {"simulated": SimulatedGuest, "kvm": KvmGuest, "mshv": MshvGuest}


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
    if errors:
        raise errors[0]
