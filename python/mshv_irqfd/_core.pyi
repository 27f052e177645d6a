"""The Rust half of `mshv_irqfd`; import that, not this."""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar, final, overload, type_check_only

from typing_extensions import disjoint_base

from mshv_irqfd.handles import EventFd as PublicEventFd
from mshv_irqfd.handles import IoEventFd as PublicIoEventFd
from mshv_irqfd.handles import IrqFdRoute as PublicIrqFdRoute
from mshv_irqfd.handles import MsiCapability as PublicMsiCapability
from mshv_irqfd.handles import MsixTable as PublicMsixTable
from mshv_irqfd.handles import Partition as PublicPartition
from mshv_irqfd.values import DeliveryMode, GsiState, Interrupt, PartitionStats, RoutingEntry

__all__: Final = [
    "DEBUG_BUILD",
    "Baseline",
    "Batch",
    "Device",
    "EventFd",
    "IoEventFd",
    "IrqFdRoute",
    "MsiCapability",
    "MsiRoute",
    "MsiVector",
    "MsixTable",
    "MsixVector",
    "Partition",
    "RawPartition",
    "Vector",
    "Vectors",
    "Watch",
    "__version__",
    "null_partition",
    "signal_latencies",
]
DEBUG_BUILD: Final[bool]
__version__: Final[str]
_V = TypeVar("_V", bound=Vector)

@type_check_only
class HasFileno(Protocol):
    def fileno(self) -> int: ...

@final
class MsiRoute:
    """An MSI: the address and the data that a device would write there.

    Immutable, comparable and hashable.

    Args:
        address: 0xFEE00000-0xFEEFFFFF with bits 11:4 and 1:0 clear. Bits 19:12 are the destination APIC id, bit 3
            the redirection hint, bit 2 the destination mode (Intel SDM volume 3, "Message Signalled Interrupts").
        data: 16 bits. Bits 7:0 are the vector (16 or more for fixed and lowest-priority delivery), bits 10:8 the
            delivery mode (3 and 6 are reserved), bit 14 the level, bit 15 the trigger mode.

    Raises:
        ValueError: a value breaks one of these rules. The message names both.
        OverflowError: a value is negative, or has more than 64 bits.
        TypeError: a value is not an int.

    Example:
        >>> MsiRoute(0xFEE01000, 0x41) == MsiRoute.fixed(0x41, 1)
        True
    """

    def __new__(cls, address: int, data: int) -> Self: ...
    @staticmethod
    def fixed(vector: int, apic_id: int) -> MsiRoute:
        """An edge-triggered interrupt with fixed delivery to one APIC id. Nearly every device sends these.

        Args:
            vector: 16 to 255.
            apic_id: 0 to 255 (255 is all processors).
        """

    @property
    def address(self) -> int:
        """The address, an int."""

    @property
    def data(self) -> int:
        """The data, an int of 16 bits."""

    @property
    def vector(self) -> int:
        """The vector, data bits 7:0."""

    @property
    def destination(self) -> int:
        """The destination APIC id (or logical destination), address bits 19:12."""

    @property
    def delivery_mode(self) -> DeliveryMode:
        """The delivery mode, data bits 10:8."""

    @property
    def logical(self) -> bool:
        """Whether the destination is logical, address bit 2."""

    @property
    def level(self) -> bool:
        """Whether the interrupt is level-triggered, data bit 15."""

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[type[MsiRoute], tuple[int, int]]: ...

@disjoint_base
class EventFd:
    """An eventfd: a counter that one side adds to and the other empties.

    `EventFd()` makes a new one, non-blocking and close-on-exec. `EventFd.from_fd()` duplicates a caller's, and
    `IrqFdRoute.event` and `IoEventFd.event` are views of a route's and a doorbell's.

    To wait for signals in asyncio, use `await event.wait()` or `async for count in event`. In other event loops use
    `fileno()`, with `selectors` for instance.

    Threads may share it. It works in a forked child, on the same counter as in the parent.

    Raises:
        IrqFdError: the process has too many open files (EMFILE).

    Example:
        >>> with EventFd() as event:
        ...     event.signal()
        ...     event.signal(2)
        ...     event.consume()
        3
    """

    def __new__(cls, _source: IrqFdRoute | IoEventFd | int | None = None) -> Self: ...
    @classmethod
    def from_fd(cls, fd: HasFileno | int) -> Self:
        """Duplicates a caller's eventfd (an int, or an object with `fileno()`). The caller still closes its own.

        Raises:
            ValueError: `fd` is another kind of file, or an eventfd in semaphore mode.
            IrqFdError: `fd` is not open (EBADF), or the process has too many open files (EMFILE).
        """

    def fileno(self) -> int:
        """The descriptor. It is readable while signals are pending.

        Raises:
            ClosedError: it is closed.
        """

    def signal(self, n: int | None = None) -> None:
        """Adds `n` to the counter. Never waits: a counter without room for `n` stays as it is.

        Args:
            n: 1 to 2**64 - 2.

        Raises:
            ValueError, OverflowError: `n` is out of range.
            ClosedError: it is closed.
        """

    def consume(self) -> int:
        """Empties the counter.

        Returns:
            Its value; 0 if no signal was pending. Always 0 on a view of an armed route.

        Raises:
            ClosedError: it is closed.
        """

    async def wait(self) -> int:
        """Waits in asyncio for signals, and takes them.

        Any number of tasks may wait; one of them gets the signals, the others wait on. A task that is cancelled takes
        none. Other tasks run before this returns, even if it need not wait, so that signals without pause do not
        starve them. A view of a route waits until the route is not armed and a signal is pending.

        Returns:
            Their number, at least 1.

        Raises:
            ClosedError: it is closed, or it was closed while the task waited.
            IrqFdError: the process has too many open files (EMFILE). A waiting task needs two.
        """

    def __aiter__(self) -> AsyncIterator[int]: ...
    def _watch(self) -> Watch:
        """Begins a watch, for `mshv_irqfd._waiting`."""

    def close(self) -> None:
        """Closes the descriptor. Closing twice is fine. A view leaves the descriptor of its route or doorbell open."""

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def _is_left_open(self) -> bool:
        """Whether a finalizer should warn. Always false in a forked child."""

    def _abandon(self) -> None:
        """For finalizers and `with` blocks: closes."""

@disjoint_base
class IoEventFd:
    """A doorbell: the guest's writes to one address signal an eventfd, with no trip through user space.

    `Partition.ioeventfd()` makes a doorbell. To wait for rings in asyncio, use `await doorbell.wait()` or
    `async for count in doorbell`. The eventfd is readable once the guest has rung, so `fileno()` works with
    `selectors`, and can be given to vhost as a queue's kick. A ring stays in the eventfd until it is taken.

    Threads may share a doorbell. Close it, or use `with`. In a forked child `signal()`, `consume()`, `wait()` and
    `fileno()` work, on the same counter as in the parent; `close()` raises `ForkedError`.

    Raises:
        ClosedError: the doorbell is closed. `signal()`, `consume()`, `fileno()` and `event` raise this.

    Example:
        >>> partition = open_partition("simulated")
        >>> doorbell = partition.ioeventfd(0xD0000000, 4, datamatch=7)
        >>> partition.write_mmio(0xD0000000, (7).to_bytes(4, "little"))
        True
        >>> doorbell.consume()
        1
        >>> doorbell
        <IoEventFd MMIO 0xd0000000, 4 bytes, value 0x7>
        >>> partition.close()
    """

    def __new__(
        cls,
        partition: Partition,
        address: int,
        length: int,
        datamatch: int | None = None,
        event: HasFileno | int | None = None,
        port: bool = False,
    ) -> Self: ...
    @property
    def address(self) -> int:
        """The guest-physical address, or the number of the I/O port."""

    @property
    def length(self) -> int:
        """The size in bytes of the writes that ring; 0: any size."""

    @property
    def datamatch(self) -> int | None:
        """The value that rings; None: any value."""

    @property
    def port(self) -> bool:
        """Whether `address` is an I/O port."""

    @property
    def partition(self) -> PublicPartition:
        """The partition that the doorbell belongs to."""

    @property
    def event(self) -> PublicEventFd:
        """A view of the doorbell's eventfd. Closing the view does not close the doorbell's descriptor."""

    def fileno(self) -> int:
        """The descriptor of the eventfd. It is readable once the guest has rung."""

    def signal(self) -> None:
        """Rings, as the guest does. Never waits. Works in a forked child.

        Device models ring once when they resume from a saved state, because it does not have the rings in flight.

        Raises:
            ClosedError: the doorbell is closed.
        """

    def consume(self) -> int:
        """Takes the rings so far. Never waits. Works in a forked child.

        Returns:
            Their number; 0 if there are none. Always 0 on the eventfd of an armed route: the kernel takes them.

        Raises:
            ClosedError: the doorbell is closed.
        """

    async def wait(self) -> int:
        """Waits in asyncio for the guest to ring, and takes the rings.

        Any number of tasks may wait; one of them gets the rings, the others wait on. A task that is cancelled takes
        none. Other tasks run before this returns, even if it need not wait, so that a guest that rings without pause
        does not starve them.

        Returns:
            Their number, at least 1.

        Raises:
            ClosedError: the doorbell is closed, or it was closed while the task waited.
            IrqFdError: the process has too many open files (EMFILE). A waiting task needs two.
        """

    def __aiter__(self) -> AsyncIterator[int]: ...
    def _watch(self) -> Watch:
        """Begins a watch, for `mshv_irqfd._waiting`."""

    def close(self) -> None:
        """Takes the doorbell away from the guest and closes its descriptor. Closing twice is fine.

        Raises:
            IoEventFdError: the kernel refused. The doorbell is closed nevertheless. Its address stays taken, and
                closing the partition tries once more.
        """

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def _is_left_open(self) -> bool:
        """Whether a finalizer should warn. Always false in a forked child."""

    def _abandon(self) -> None:
        """For finalizers and `with` blocks: closes. In a forked child closes only the descriptor."""

@disjoint_base
class IrqFdRoute:
    """A route: one GSI, one eventfd, and the MSI that a signal on it becomes.

    `Partition.new_irqfd_route()` makes a route, unmasked and without an MSI. The holder of the eventfd (a device model,
    VFIO, vhost) signals it, and the kernel raises the MSI in the guest. While the route is not armed (masked, without
    an MSI, or during a push), signals stay pending in the eventfd. Arming then raises one interrupt for all of them.

    Threads may share a route. Reading its properties never waits. Close it, or use `with`. In a forked child
    only `signal()` and `fileno()` work; the rest raises `ForkedError`.

    Raises:
        ClosedError: the route is closed. Nearly every method raises this.
        RouteBrokenError: the route is broken (`GsiState.BROKEN`). Every method that would change it raises this.

    Example:
        >>> partition = open_partition("simulated")
        >>> route = partition.new_irqfd_route()
        >>> route.set_msi(0xFEE00000, 0x41)
        >>> route
        <IrqFdRoute gsi=24 ENABLED 0xfee00000/0x0041 (vector 0x41 to APIC 0)>
        >>> partition.close()
    """

    def __new__(cls, partition: Partition, event: object = None) -> Self: ...
    @property
    def gsi(self) -> int:
        """The GSI, an int. After this route is closed, another route may have the same GSI."""

    @property
    def partition(self) -> PublicPartition:
        """The partition that the route belongs to."""

    @property
    def event(self) -> PublicEventFd:
        """A view of the eventfd that the route has at the time of each call: it follows `set_event()`.

        Closing the view does not close the route's descriptor.
        """

    def fileno(self) -> int:
        """The descriptor of the eventfd, for `selectors`, asyncio, or a device model that signals.

        It is readable only while the route is not armed: the kernel empties an armed eventfd first. `set_event()`
        closes it and gives the route another one. So take it out of selectors before that, and put the new one in.
        """

    def signal(self) -> None:
        """Raises the interrupt now if the route is armed; otherwise leaves the signal pending.

        Never waits, even if the counter is full. Works in a forked child.

        Raises:
            ClosedError: the route is closed.
        """

    @overload
    def set_msi(self, address: MsiRoute, data: None = None) -> None: ...
    @overload
    def set_msi(self, address: int, data: int) -> None:
        """Sets the MSI that a signal becomes, and arms the route unless it is masked.

        Pushes only if the kernel's table lacks the MSI, or if a push is cheaper than moving the irqfd to the GSI that
        has it (few routes on KVM). An MSI that is set while the route is masked is kept, and `unmask()` arms it.
        Setting the same MSI again does nothing.

        Args:
            address: an `MsiRoute`, or the address of an MSI. `MsiRoute` has the rules for address and data.
            data: the data of the MSI. Omit it with an `MsiRoute`.

        Raises:
            ValueError, OverflowError, TypeError: the arguments are not an MSI. The message names the value and the
                rule.
            MissingVpError: no VP has the destination's APIC id.
            RoutingError, IrqFdError: the kernel refused, and everything was rolled back.
        """

    def clear_msi(self) -> None:
        """Disarms the route and forgets its MSI. The next push drops the entry of its own GSI from the kernel's table.

        Raises:
            IrqFdError: the kernel refused, and nothing changed.
        """

    def mask(self) -> None:
        """Disarms the route until `unmask()`, even if an MSI is set meanwhile. Never pushes.

        Raises:
            IrqFdError: the kernel refused, and nothing changed.
        """

    def unmask(self) -> None:
        """Ends `mask()`: arms the route if it has an MSI, and raises one interrupt if signals are pending.

        Pushes only if the kernel's table lacks the route's MSI, which it may if the MSI changed meanwhile.

        Raises:
            MissingVpError: no VP has the destination's APIC id.
            RoutingError, IrqFdError: the kernel refused, and everything was rolled back.
        """

    @property
    def masked(self) -> bool:
        """Whether the route is masked."""

    @property
    def armed_gsi(self) -> int | None:
        """The GSI where the route is armed, an int: its own, or a spare one whose entry is the same MSI.

        None while it is not armed. A kernel's traces name this GSI.
        """

    @property
    def armed(self) -> bool:
        """Whether a signal becomes an interrupt now."""

    @property
    def msi(self) -> MsiRoute | None:
        """The MSI, also while masked; None if none is set."""

    @property
    def state(self) -> GsiState:
        """The state of the route's GSI, a `GsiState`.

        `ENABLED` while armed, `DISABLED` while not armed, `BROKEN` after a failed rollback.
        """

    @property
    def pending(self) -> bool:
        """Whether a signal waits for the route to be armed. Always false while the route is armed."""

    async def wait_pending(self) -> None:
        """Waits in asyncio until a signal is pending, and leaves it pending.

        Takes nothing: the caller decides whether the guest still gets the interrupt. `unmask()` raises it, and
        `consume_pending()` drops it. So every waiting task returns. While the route is armed nothing is pending, and
        this keeps waiting. Other tasks run before this returns, even if it need not wait.

        Raises:
            ClosedError: the route is closed, or it was closed while the task waited.
            IrqFdError: the process has too many open files (EMFILE). A waiting task needs two.
        """

    def _watch(self) -> Watch:
        """Begins a watch, for `mshv_irqfd._waiting`."""

    def consume_pending(self) -> bool:
        """Takes the pending signals, so that arming raises no interrupt for them.

        Returns:
            Whether a signal was pending. Always false while the route is armed.
        """

    def set_event(self, event: HasFileno | int | None) -> None:
        """Replaces the route's eventfd, in any state of the route. It needs no push.

        Nothing is lost: signals that the old eventfd holds are carried over to the new one, and those of `signal()`
        reach the route before, during and after the call (twice at most if they overlap it). If the route is armed, it
        raises one interrupt for what the new eventfd held before. A process that still has the old eventfd no longer
        reaches the route. `fileno()` changes: the route closes its descriptor of the old eventfd.

        To give a route the eventfd of another route, change both in a batch; see `Batch.set_event()`.

        Args:
            event: the caller's eventfd, an int or an object with `fileno()`, which is duplicated as in
                `Partition.new_irqfd_route()`. None: a new one, which no other code has. The one that the route has
                already changes nothing.

        Raises:
            ValueError: `event` is not an eventfd, is in semaphore mode, or is the eventfd of another route of this
                process.
            IrqFdError: `event` is not open (EBADF); too many files are open (EMFILE); another process has armed `event`
                on a VM of its own (EBUSY: KVM from Linux 6.17 on); other code has closed the descriptor of an armed
                route (EBADF: close the route). Everything is as before.
        """

    def close(self) -> None:
        """Disarms the route, frees its GSI and closes its descriptor. Never pushes. Closing twice is fine.

        Raises:
            IrqFdError: the irqfd could not be disarmed. The route is closed nevertheless, and its GSI is quarantined.
        """

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def _is_left_open(self) -> bool:
        """Whether a finalizer should warn. Always false in a forked child."""

    def _abandon(self) -> None:
        """For finalizers and `with` blocks: closes. In a forked child closes only the descriptor."""

@final
class Batch:
    """Changes to several routes of one partition, made together with at most one push, or not at all.

    `Partition.batch()` begins a batch. Each call checks its arguments; the commit checks the state of the routes. The
    last change of a route wins. Leaving the `with` block commits; leaving it by an exception changes nothing. The batch
    holds no lock until it commits. A batch can be committed once.

    Example:
        >>> partition = open_partition("simulated")
        >>> routes = [partition.new_irqfd_route() for _ in range(3)]
        >>> with partition.batch() as batch:
        ...     for number, route in enumerate(routes):
        ...         batch.set_msi(route, MsiRoute.fixed(0x40 + number, 0))
        >>> partition.stats().pushes
        1
        >>> partition.close()
    """

    @overload
    def set_msi(self, route: IrqFdRoute, address: MsiRoute, data: None = None) -> None: ...
    @overload
    def set_msi(self, route: IrqFdRoute, address: int, data: int) -> None:
        """Sets a route's MSI, as `IrqFdRoute.set_msi()` does.

        Raises:
            ValueError, OverflowError, TypeError: the arguments are not a route and an MSI.
            ClosedError: the batch is closed.
        """

    def clear_msi(self, route: IrqFdRoute) -> None:
        """Clears a route's MSI, as `IrqFdRoute.clear_msi()` does."""

    def mask(self, route: IrqFdRoute) -> None:
        """Masks a route, as `IrqFdRoute.mask()` does."""

    def unmask(self, route: IrqFdRoute) -> None:
        """Unmasks a route, as `IrqFdRoute.unmask()` does."""

    def set_event(self, route: IrqFdRoute, event: HasFileno | int | None) -> None:
        """Replaces a route's eventfd, as `IrqFdRoute.set_event()` does.

        In one batch, routes may also give their eventfds to one another: in a chain, or in exchange. A moved eventfd
        takes the signals that it holds along to its new route, and keeps those that arrive meanwhile; what the new
        route's old eventfd holds is carried over to it. A route that is unmasked in the same batch raises one interrupt
        for what its new eventfd holds, and one for what is carried over.

        Args:
            route: the route.
            event: an eventfd, an int or an object with `fileno()`, which is duplicated at once; None: a new one.

        Raises:
            ValueError: `event` is not an eventfd, or is in semaphore mode. `commit()` raises ValueError if another
                route of this process has it, and does not give it up in this batch.
            IrqFdError: `event` is not open (EBADF), or too many files are open (EMFILE).
            ClosedError: the batch is closed.

        Example:
            >>> partition = open_partition("simulated")
            >>> old, new = partition.new_irqfd_route(), partition.new_irqfd_route()
            >>> old.signal()
            >>> with partition.batch() as batch:  # the queue of `old` interrupts through `new` from now on
            ...     batch.set_event(new, old)
            ...     batch.set_event(old, None)
            >>> old.pending, new.pending
            (False, True)
            >>> partition.close()
        """

    def commit(self) -> None:
        """Makes the changes: disarms, pushes once if the kernel's table lacks a message, arms.

        If a call fails, everything is rolled back. The batch is closed either way.

        Raises:
            ClosedError: the batch, its partition or one of its routes is closed.
            ValueError: a route belongs to another partition, or an eventfd to another route.
            RouteBrokenError: a route is broken.
            MissingVpError: no VP has a destination's APIC id.
            RoutingError, IrqFdError: the kernel refused.
        """

    @property
    def partition(self) -> PublicPartition:
        """The partition that the routes belong to."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        _exception: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None: ...

@disjoint_base
class Device:
    """What devices with MSI-X and with MSI have in common. See `MsixTable` and `MsiCapability`."""

    @property
    def partition(self) -> PublicPartition:
        """The partition that gets the interrupts."""

    @property
    def vectors(self) -> Vectors[MsixVector] | Vectors[MsiVector]:
        """The vectors, a sequence."""

    def reset(self) -> None:
        """Returns to the state after a reset of the device: disabled; in MSI-X, every vector masked and every entry 0.

        Takes away what is pending, and the faults. The vectors keep their eventfds and GSIs. Never raises for what
        the kernel refuses: see `faults()`.
        """

    def faults(self) -> list[tuple[int, Exception]]:
        """The vectors that are not armed or disarmed as the guest asked.

        Returns:
            Pairs of a vector's number and an exception: the one that the same call on a route would have raised. A
            vector is among them until it is next unmasked with success, `retry_faults()` succeeds for it, or the device
            is reset. A vector that another route's failed call left disarmed is among them (EAGAIN) until a push has
            armed it again.
        """

    def retry_faults(self) -> list[tuple[int, Exception]]:
        """Tries again to arm and disarm the vectors in `faults()`, with one push at most.

        For a device model that can remove the cause: it creates the missing VP, or frees GSIs or memory. The guest
        writes nothing for this. A vector is armed with the message that its entry had when it was unmasked, and sends
        what is pending. One whose message is invalid stays as it is until the guest unmasks it with a valid one.

        Returns:
            The vectors that failed again, as `faults()` does.
        """

    def save(self) -> dict[str, Any]:
        """Saves the registers and the vectors, for a snapshot or a migration.

        Says of each vector whether a signal is pending, as `Partition.save()` does for routes: takes nothing away, and
        disarms each vector for a moment. The page "Saved state" of the docs describes it, key by key.

        Returns:
            A dict of values that JSON has.

        Raises:
            RouteBrokenError: a vector's route is broken.
            IrqFdError: the kernel refused to disarm a vector, or to arm it again.
        """

    @classmethod
    def restore(
        cls,
        partition: Partition,
        state: dict[str, Any],
        *,
        events: Mapping[int, HasFileno | int] | Sequence[HasFileno | int | None] | None = None,
    ) -> Self:
        """The device that was saved, with its registers, GSIs and pending signals, or an error and no change.

        Arms the vectors that were armed, with the MSIs that they had, by one push at most. A pending signal is
        delivered once: now if the vector is armed, or when it is. A vector that had a fault keeps it, as a `ValueError`
        with the same text, until the guest unmasks it again.

        Args:
            partition: the partition that gets the interrupts. Restore all states before making routes or other devices,
                which could take their GSIs.
            state: the dict that `save()` returned, as it was or from JSON.
            events: eventfds of the caller's for vectors that have a GSI in the state, as for a new device. By default
                each vector makes a new one.

        Raises:
            ValueError, TypeError, OverflowError: the state or `events` is invalid, or a GSI is taken or not one of
                `partition.gsis`. The message names the key and the rule.
            MissingVpError: no VP has the destination of a vector that is to be armed.
            RoutingError, IrqFdError: the kernel refused, or an eventfd can't be made (EMFILE) or is not open (EBADF).
        """

    def close(self) -> None:
        """Disarms the vectors, frees their GSIs and closes their eventfds. Never pushes. Closing twice is fine.

        Raises:
            IrqFdError: some irqfds could not be disarmed. Everything is closed nevertheless.
        """

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def _is_left_open(self) -> bool:
        """Whether a finalizer should warn. Always false in a forked child."""

    def _abandon(self) -> None:
        """For finalizers and `with` blocks: closes. In a forked child closes only the descriptors."""

@disjoint_base
class MsixTable(Device):
    """A device's MSI-X capability: the registers of its guest driver, and a route for each vector that is used.

    The registers are the table, the pending bits and message control (PCI Local Bus 3.0 section 6.8.2, PCI Express
    5.0 section 7.7.2).

    A device model passes the guest's accesses on, and signals `vectors`, or hands `vectors[i].event` to VFIO or
    vhost. A vector's route is armed while MSI-X is enabled and neither the vector's mask bit nor the function mask
    is set, with the message that its entry had at that moment. A later change of the entry's message waits for
    the vector's next unmasking. A vector takes a GSI and an eventfd when it is first unmasked, or when its `event` is
    read. Enabling MSI-X or clearing the function mask makes one push at most, for all vectors.

    Signals on a vector that is not armed stay pending, and show as its pending bit, no matter who wrote them to the
    eventfd. Unmasking sends one message for all of them.

    A guest may write anything: its accesses never raise. A vector that can't be armed, because its message is
    invalid or the kernel refuses, stays disarmed, and the others are armed; `faults()` has the reason. Only the
    device model's own mistakes raise: a closed table or partition, a forked child, an argument of the wrong type.

    Threads may share a table. Close it, or use `with`; closing its partition closes its routes too. In a forked
    child only `signal()` of a vector with a route works.

    Args:
        partition: the partition that gets the interrupts.
        vectors: the number of vectors, 1 to 2048.
        events: eventfds of the caller's, in a mapping from vectors, or in a sequence from vector 0 up with None for
            vectors without. Each is an int or an object with `fileno()`. The table duplicates them, and takes a GSI
            for each at once.

    Raises:
        ClosedError: the table or its partition is closed. Every method but `close()` raises this.
        ValueError, TypeError: `vectors` or `events` is invalid; see also `Partition.new_irqfd_route()`.
        GsiExhaustedError, IrqFdError: no route can be made for an eventfd in `events`.

    Example:
        >>> partition = open_partition("simulated")
        >>> table = MsixTable(partition, 4)
        >>> table.write_table(16 * 2, (0xFEE00000).to_bytes(8, "little"))  # the guest programs vector 2
        >>> table.write_table(16 * 2 + 8, (0x41).to_bytes(8, "little"))  # data 0x41, and vector control 0: unmasked
        >>> table.vectors[2].signal()
        >>> hex(table.read_pba(0, 8))
        '0x4'
        >>> table.write_message_control(2, (0x8000).to_bytes(2, "little"))  # the guest enables MSI-X
        >>> hex(table.read_pba(0, 8))
        '0x0'
        >>> table
        <MsixTable of 4 vectors, 1 with a route, enabled>
        >>> [hex(interrupt.vector) for interrupt in partition.take_interrupts(timeout=10)]
        ['0x41']
        >>> table.close()
        >>> partition.close()
    """

    def __new__(
        cls,
        partition: Partition,
        vectors: int,
        *,
        events: Mapping[int, HasFileno | int] | Sequence[HasFileno | int | None] | None = None,
    ) -> Self: ...
    @property
    def vectors(self) -> Vectors[MsixVector]:
        """The vectors, a sequence."""

    def read_table(self, offset: int, size: int) -> int:
        """Reads the table, for the guest.

        An entry has 16 bytes: the message's address, its upper address, its data, and vector control, whose bit 0
        is the mask bit. The other bits of vector control are read-only and 0.

        Args:
            offset: the offset from the table's first byte.
            size: the number of bytes, 4 or 8. The offset must be a multiple of it.

        Returns:
            The value, little-endian. All ones (in eight bytes at most) for any other offset or size, which the
            specification leaves undefined.
        """

    def write_table(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Writes the table, for the guest.

        Makes a call into the kernel only if it unmasks or masks a vector. A message that is written to an unmasked
        entry takes effect when the vector is next unmasked.

        Args:
            offset: the offset from the table's first byte.
            data: 4 or 8 bytes, little-endian. The offset must be a multiple of their number. Any other write is
                ignored.
        """

    def read_pba(self, offset: int, size: int) -> int:
        """Reads the pending bits, for the guest: one for each vector, set while a signal waits for it to be armed.

        A guest can't write them: ignore its writes.

        Args:
            offset: the offset from the first byte of the pending bits.
            size: the number of bytes, 4 or 8. The offset must be a multiple of it.

        Returns:
            The value, little-endian. All ones (in eight bytes at most) for any other offset or size.
        """

    @property
    def message_control(self) -> int:
        """The message control register, an int of 16 bits.

        Bit 15 enables MSI-X, bit 14 masks all vectors, bits 10:0 are the number of vectors less one.
        """

    def write_message_control(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Takes a write to the capability in configuration space, for the guest.

        Pass every write on: only bits 15 and 14 of message control take effect, and the rest of the capability is
        read-only. Guests write them as a byte, as a word, or as the dword that starts with the capability's id.

        Args:
            offset: the offset from the capability's first byte. Message control is at 2.
            data: 1, 2 or 4 bytes, little-endian. The offset must be a multiple of their number. Any other write is
                ignored.
        """

    def capability(self, *, table_bar: int, table_offset: int, pba_bar: int, pba_offset: int) -> bytes:
        """The capability for the device's configuration space, 12 bytes.

        The pointer to the next capability is 0. Message control is as the register is now.

        Args:
            table_bar: the BAR with the table, 0 to 5.
            table_offset: the offset of the table in it, a multiple of 8.
            pba_bar: the BAR with the pending bits, 0 to 5.
            pba_offset: the offset of the pending bits in it, a multiple of 8.

        Raises:
            ValueError: a value breaks one of these rules, or the pending bits overlap the table.
        """

@disjoint_base
class MsiCapability(Device):
    """A device's MSI capability: the registers of its guest driver, and a route for each vector that is used.

    It has 64-bit addresses and a mask bit for each vector (PCI Local Bus 3.0 section 6.8.1, PCI Express 5.0 section
    7.7.1). All its registers are in configuration space. A vector's route is armed while MSI is enabled, the vector is
    not masked, and the guest has granted that many vectors. Its message is the address and the data, with the vector's
    number in the lowest bits of the data. It is taken when the vector is armed, and again when the guest writes the
    data, which drivers write last: half of a new message is never sent.

    Everything else is as with `MsixTable`: signals, pending bits, accesses that never raise, faults, threads.

    Args:
        partition: the partition that gets the interrupts.
        vectors: the number of vectors: 1, 2, 4, 8, 16 or 32.
        events: eventfds of the caller's, as with `MsixTable`.

    Raises:
        ClosedError: the capability or its partition is closed. Every method but `close()` raises this.
        ValueError, TypeError: `vectors` or `events` is invalid; see also `Partition.new_irqfd_route()`.
        GsiExhaustedError, IrqFdError: no route can be made for an eventfd in `events`.

    Example:
        >>> partition = open_partition("simulated")
        >>> device = MsiCapability(partition, 2)
        >>> device.write_config(4, (0xFEE00000).to_bytes(4, "little"))  # the guest sets the address
        >>> device.write_config(12, (0x40).to_bytes(2, "little"))  # and the data
        >>> device.write_config(2, (0x11).to_bytes(2, "little"))  # grants two vectors and enables MSI
        >>> device.vectors[1].signal()
        >>> [hex(interrupt.vector) for interrupt in partition.take_interrupts(timeout=10)]
        ['0x41']
        >>> device.close()
        >>> partition.close()
    """

    def __new__(
        cls,
        partition: Partition,
        vectors: int,
        *,
        events: Mapping[int, HasFileno | int] | Sequence[HasFileno | int | None] | None = None,
    ) -> Self: ...
    @property
    def vectors(self) -> Vectors[MsiVector]:
        """The vectors, a sequence."""

    def read_config(self, offset: int, size: int) -> int:
        """Reads the capability in configuration space, for the guest.

        Args:
            offset: the offset from the capability's first byte.
            size: the number of bytes, 1, 2 or 4. The offset must be a multiple of it.

        Returns:
            The value, little-endian. All ones (in eight bytes at most) for any other offset or size.
        """

    def write_config(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Writes the capability in configuration space, for the guest.

        Pass every write on: what is read-only stays as it is.

        Args:
            offset: the offset from the capability's first byte.
            data: 1, 2 or 4 bytes, little-endian. The offset must be a multiple of their number. Any other write is
                ignored.
        """

    def capability(self) -> bytes:
        """The capability as it is now, 24 bytes, for the device's configuration space.

        The pointer to the next capability is 0.
        """

@final
class Vectors(Generic[_V]):
    """The vectors of a device, by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> _V: ...
    def __iter__(self) -> Iterator[_V]: ...

@disjoint_base
class Vector:
    """A vector of a device. It keeps the device alive."""

    @property
    def index(self) -> int:
        """The number of the vector."""

    @property
    def device(self) -> PublicMsixTable | PublicMsiCapability:
        """The `MsixTable` or `MsiCapability` that it is a vector of."""

    @property
    def event(self) -> PublicEventFd:
        """A view of the vector's eventfd, for VFIO, vhost, or a device model. Takes the vector's route if it has none.

        It follows `vectors[i].route.set_event()`, and works as long as the device is open.

        Raises:
            GsiExhaustedError, IrqFdError: the vector has no route, and none can be made.
        """

    def signal(self) -> None:
        """Sends the vector's message now if it is armed; otherwise leaves the signal pending.

        Never waits. In a forked child it works if the vector has a route.

        Raises:
            ClosedError: the device, its partition or the vector's route is closed.
        """

    @property
    def masked(self) -> bool:
        """Whether the vector is masked, by its own mask bit or, of MSI-X, by the function mask."""

    @property
    def pending(self) -> bool:
        """Whether a signal waits for the vector to be armed: its pending bit."""

    async def wait_pending(self) -> None:
        """Waits in asyncio until a signal is pending, and leaves it pending: see `IrqFdRoute.wait_pending()`.

        Takes the vector's route if it has none and must wait, as `event` does.

        Raises:
            ClosedError: the device is closed, or it was closed while the task waited.
            GsiExhaustedError, IrqFdError: the vector has no route, and none can be made; or the process has too many
                open files (EMFILE). A waiting task needs two.
        """

    def _watch(self) -> Watch:
        """Begins a watch, for `mshv_irqfd._waiting`."""

    def consume_pending(self) -> bool:
        """Takes the pending signals, so that unmasking sends no message for them.

        For a device that no longer has a reason to interrupt (PCI Local Bus 3.0 section 6.8.3.5, PCI Express 5.0
        section 6.1.4.5).

        Returns:
            Whether a signal was pending. Always false while the vector is armed.
        """

    @property
    def route(self) -> PublicIrqFdRoute | None:
        """The vector's route; None if it has not been taken yet.

        The device sets, masks and closes it: read it, and do not change it.
        """

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class MsixVector(Vector):
    """A vector of an `MsixTable`: `table.vectors[i]`. It keeps the table alive.

    Keep it in a variable where signals must be fast: `signal()` is one write.
    """

@final
class MsiVector(Vector):
    """A vector of an `MsiCapability`: `capability.vectors[i]`. It keeps the capability alive.

    Keep it in a variable where signals must be fast: `signal()` is one write.
    """

@disjoint_base
class Partition:
    """A partition (virtual machine) of a hypervisor, and the sole owner of its MSI routing table and irqfds.

    `open_partition()` and `Partition.from_fd()` make partitions. Threads may share one. Close it, or use `with`;
    closing it closes its routes and doorbells. In a forked child everything that would touch the partition raises
    `ForkedError`.

    Raises:
        ClosedError: the partition is closed. Nearly every method raises this.
    """

    def __new__(
        cls,
        backend_name: str,
        *,
        device: str | PathLike[str] | None,
        fd: HasFileno | int | None,
        gsis: range,
        keep: Iterable[tuple[int, int, int]],
        spare: range | None,
        vps: int | Iterable[int] | None,
        quiesce: bool | None,
        allow_missing_vp: bool,
        preload: bool,
    ) -> Self: ...
    @property
    def backend(self) -> str:
        """The kernel interface: "mshv", "kvm" or "simulated"."""

    @property
    def gsis(self) -> range:
        """The GSIs that are allocated to routes, a `range`."""

    @property
    def quiesce(self) -> bool:
        """Whether irqfds are disarmed around every push."""

    @property
    def log_calls(self) -> bool:
        """Whether every push, arming and disarming is logged, with its reason: at DEBUG, by the logger `mshv_irqfd`.

        Set at opening if that logger takes such records by then. Calls that the kernel refused are logged always, at
        WARNING. Records are emitted once a call is over and before it returns, unless another thread is emitting them
        just then. When the interpreter ends, finalizers log nothing.
        """

    @log_calls.setter
    def log_calls(self, log_calls: bool) -> None: ...
    @property
    def vps(self) -> tuple[int, ...] | None:
        """The indexes of the VPs, which are also their APIC ids, in a tuple.

        None if they are unknown: the partition was adopted without `vps`.
        """

    @property
    def routes(self) -> list[PublicIrqFdRoute]:
        """The open routes, those of devices' vectors among them, in a list ordered by GSI."""

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def fileno(self) -> int:
        """The descriptor of the partition (of the VM, for KVM).

        Raises:
            io.UnsupportedOperation: a simulated partition has none.
        """

    def new_irqfd_route(self, *, event: HasFileno | int | None = None) -> PublicIrqFdRoute:
        """A new route with the lowest free GSI, unmasked and without an MSI.

        Args:
            event: a caller's eventfd (an int, or an object with `fileno()`), which the route duplicates. By default the
                route makes a new eventfd.

        Raises:
            GsiExhaustedError: every GSI is taken.
            ValueError: `event` is not an eventfd, is in semaphore mode, or belongs to another route of this process.
            IrqFdError: `event` is not open (EBADF), or the process has too many open files (EMFILE; raise
                RLIMIT_NOFILE).
        """

    @overload
    def signal_msi(self, address: MsiRoute, data: None = None) -> bool: ...
    @overload
    def signal_msi(self, address: int, data: int) -> bool:
        """Raises one MSI now, with no eventfd and no route.

        Takes what `IrqFdRoute.set_msi()` takes, and checks it the same way. Pushes nothing.

        Args:
            address: an `MsiRoute`, or the address of an MSI. `MsiRoute` has the rules for address and data.
            data: the data of the MSI. Omit it with an `MsiRoute`.

        Returns:
            False if the kernel reports that the guest did not take it. Only KVM reports that, for instance while the
            guest's local APIC is off. True otherwise: the kernel or the hypervisor has accepted it.

        Raises:
            ValueError, OverflowError, TypeError: the arguments are not an MSI. The message names the value and the
                rule.
            MissingVpError: no VP has the destination's APIC id.
            InterruptError: the kernel refused.
        """

    def ioeventfd(
        self,
        address: int,
        length: int,
        *,
        datamatch: int | None = None,
        event: HasFileno | int | None = None,
        port: bool = False,
    ) -> PublicIoEventFd:
        """A new doorbell: the guest's writes to an address signal an eventfd; see `IoEventFd`.

        A write that rings does not leave the kernel: no VMM sees it. On KVM, writes to guest memory never ring.

        No write may ring two doorbells of a partition. So at one address, doorbells differ in length, or in `datamatch`
        at one length; a doorbell of length 0 is alone.

        Args:
            address: the guest-physical address (64 bits), or the number of an I/O port. The write must begin there.
            length: the size of the write in bytes: 1, 2, 4 or 8 (not 8 on a port). 0: any size.
            datamatch: the value that rings, at most `length` bytes wide. None: any value.
            event: a caller's eventfd (an int, or an object with `fileno()`), which the doorbell duplicates. Several
                doorbells may share one. It may also be a route's: then the guest's write raises the route's MSI, and
                the signals are the route's to take. By default the doorbell makes a new eventfd.
            port: whether `address` is an I/O port. Only KVM has doorbells there.

        Raises:
            ValueError, OverflowError, TypeError: an argument is invalid, or the doorbell collides with another one of
                this partition. The message names the value and the rule.
            io.UnsupportedOperation: `port` on mshv or a simulated partition.
            IoEventFdError: the kernel refused, and nothing changed.
            IrqFdError: `event` is not open (EBADF), or the process has too many open files (EMFILE).
        """

    @property
    def ioeventfds(self) -> list[PublicIoEventFd]:
        """The open doorbells, in a list ordered by address; those on I/O ports come last."""

    def save(self) -> dict[str, Any]:
        """Saves the state of the routes, for a snapshot or a migration.

        The routes of devices are not in it: `MsixTable.save()` and `MsiCapability.save()` have those of theirs. Nor is
        any descriptor, nor a VP. The page "Saved state" of the docs describes it, key by key.

        Takes nothing away, and changes no route. Each armed route is disarmed for the moment in which its eventfd is
        looked at, so that every signal so far is either in a VP's local APIC or pending in the state: stop the VPs
        first, and save their state afterwards. Arming the route again raises the interrupt for the signals since then.

        Returns:
            A dict of values that JSON has.

        Raises:
            RouteBrokenError: a route is broken. Close it.
            IrqFdError: the kernel refused to disarm a route, or to arm it again.
        """

    def restore(
        self,
        state: dict[str, Any],
        *,
        events: Mapping[int, HasFileno | int] | None = None,
        ring_doorbells: bool = False,
    ) -> dict[int, PublicIrqFdRoute]:
        """Makes the routes of a saved state, with their GSIs, masks, MSIs and pending signals, or changes nothing.

        Makes one push at most. A pending signal is delivered once: now if the route is armed, or when it is. Restore
        all states before making other routes, which could take their GSIs. The state may come from another backend.

        Args:
            state: the dict that `save()` returned, as it was or from JSON.
            events: the caller's eventfds, in a mapping from GSIs, each an int or an object with `fileno()`. The routes
                duplicate them, and deliver what is pending in them. By default each route makes a new eventfd.
            ring_doorbells: whether to ring every open doorbell of the partition once, after that, but for those on the
                eventfd of a route, of any partition of this process. No state has the rings that were in flight, so a
                device should look at each of its queues when it resumes.

        Returns:
            The routes by GSI, in a dict ordered by GSI.

        Raises:
            ValueError, TypeError, OverflowError: the state or `events` is invalid, or a GSI is taken or not one of
                `gsis`. The message names the key and the rule.
            MissingVpError: no VP has the destination of a route that is to be armed.
            RoutingError, IrqFdError: the kernel refused, or an eventfd can't be made (EMFILE) or is not open (EBADF).
        """

    def create_vp(self, index: int) -> None:
        """Creates the VP with this index, which is also its APIC id.

        Args:
            index: 0 to 254.

        Raises:
            ValueError: `index` is out of range, or the VP already exists.
            VpError: the kernel refused.
            io.UnsupportedOperation: the partition was adopted. The VMM that made it makes its VPs.
        """

    def batch(self) -> Batch:
        """Begins a batch of changes; see `Batch`."""

    def gsi_state(self, gsi: int) -> GsiState:
        """The state of a GSI, a `GsiState`.

        Raises:
            ValueError: `gsi` is not one of `gsis`.
        """

    def routing_table(self) -> list[RoutingEntry]:
        """The MSI entries of the last push, in a list ordered by GSI. No kernel can be asked for its table.

        Entries at spare GSIs are among them, and inert ones. The next push drops the entries of closed and cleared
        routes, and may replace inert spare ones.
        """

    def stats(self) -> PartitionStats:
        """Counts since the partition was opened. Works on a closed partition too."""

    def close(self) -> None:
        """Closes the routes, the doorbells and the partition. Closing twice is fine.

        Raises:
            IrqFdError: some irqfds could not be disarmed. Everything is closed nevertheless.
            IoEventFdError: some doorbells could not be taken away. Everything is closed nevertheless.
        """

    def _take_interrupts(self, timeout: float) -> list[Interrupt]: ...
    def _lend_vcpu(self, index: int) -> int:
        """For a program that runs a guest: a new descriptor of a vCPU of KVM. The caller closes it."""

    def _take_vcpus_back(self) -> None:
        """For a program that ran a guest: nobody runs the lent vCPUs any more."""

    def _arrived_interrupts(self, timeout: float, known: int) -> list[tuple[int, Interrupt]]:
        """The interrupts that nobody has taken, each with its number. Waits a little for one numbered `known`."""

    def _claim_interrupts(self, numbers: list[int]) -> bool:
        """Takes the interrupts with these numbers, unless somebody has taken one of them."""

    def _settle(self) -> None: ...
    def _write_mmio(self, address: int, data: bytes) -> bool: ...
    def _fail(self, call: str, errno: int, after: int, times: int) -> None: ...
    def _clear_faults(self, call: str) -> int:
        """Forgets the faults of a kind. Returns the number of calls that were still to fail."""

    def _is_left_open(self) -> bool:
        """Whether a finalizer should warn. Always false in a forked child."""

    def _abandon(self) -> None:
        """For finalizers and `with` blocks: closes. In a forked child nothing: the drop closes descriptors."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

@final
class RawPartition:
    """A partition with VP 0 that makes bare ioctls and checks nothing. For `mshv-irqfd probe` alone."""

    def __new__(cls, backend: str, device: str | PathLike[str]) -> Self: ...
    def set_routing(self, table: list[tuple[int, int, int]]) -> None:
        """Pushes a table of (GSI, address, data). Raises OSError if the kernel refuses."""

    def irqfd(self, event: int, gsi: int, *, deassign: bool = False, resample: int | None = None) -> None:
        """Assigns or deassigns an irqfd. Raises OSError if the kernel refuses."""

    def take_vectors(self) -> list[int] | None:
        """Takes the vectors from KVM's local APIC; None on mshv."""

    def push_while_signalling(
        self, table: list[tuple[int, int, int]], event: int, gsi: int, quiesce: bool, seconds: float
    ) -> tuple[int, int]:
        """Pushes a table repeatedly while another thread signals. Returns the numbers of pushes and signals."""

    def fileno(self) -> int:
        """The partition's descriptor."""

    def close(self) -> None:
        """Closes the partition."""

@final
class Baseline:
    """A design of `src/instruments` on a partition of its own, with four VPs.

    Args:
        design: "floor", "floor-quiesced", "floor-move" or "rebuild".
        backend: "mshv", "kvm", "simulated" or "null".
        routes: the number of routes.
    """

    def __new__(cls, name: str, backend: str, routes: int) -> Self: ...
    def run(self, workload: str, calls: int) -> int:
        """Runs a workload a number of times in a row, and returns the total time in nanoseconds."""

    def close(self) -> None:
        """Closes the partition."""

@final
class Watch:
    """A watch on an eventfd, for an event loop. For `mshv_irqfd._waiting` alone."""

    @property
    def signalled(self) -> int:
        """A descriptor that is readable while the eventfd is."""

    @property
    def changed(self) -> int:
        """A descriptor that is readable once the eventfd is closed or replaced."""

    @property
    def is_own(self) -> bool:
        """Whether this process began it. A forked child has a copy of the loop, and the parent's epoll set."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

def null_partition(gsis: range, *, preload: bool) -> Partition:
    """A partition whose kernel does nothing, with four VPs."""

def signal_latencies(
    routes: Sequence[IrqFdRoute], moved: IrqFdRoute | None, msis: Sequence[MsiRoute], seconds: float
) -> tuple[list[int], int, int]:
    """Signals routes in turn, and times each signal until its delivery, while another thread sets MSIs on `moved`.

    Returns:
        The nanoseconds of each signal, the number of late ones, and the number of MSIs set.
    """
