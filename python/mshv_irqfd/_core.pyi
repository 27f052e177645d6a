"""The Rust half of `mshv_irqfd`; import that, not this."""

from collections.abc import Iterable
from os import PathLike
from types import TracebackType
from typing import Final, Protocol, Self, final, overload, type_check_only

from typing_extensions import disjoint_base

from mshv_irqfd.handles import EventFd as PublicEventFd
from mshv_irqfd.handles import IrqFdRoute as PublicIrqFdRoute
from mshv_irqfd.handles import Partition as PublicPartition
from mshv_irqfd.values import DeliveryMode, GsiState, Interrupt, PartitionStats, RoutingEntry

__all__: Final = [
    "DEBUG_BUILD",
    "Baseline",
    "Batch",
    "EventFd",
    "IrqFdRoute",
    "MsiRoute",
    "Partition",
    "RawPartition",
    "null_partition",
]
DEBUG_BUILD: Final[bool]

@type_check_only
class HasFileno(Protocol):
    def fileno(self) -> int: ...

@final
class MsiRoute:
    """An MSI: the address and data that a device would write.

    Immutable, comparable and hashable.

    Args:
        address: 0xFEE00000-0xFEEFFFFF with bits 11:4 and 1:0 clear. Bits 19:12 are the destination APIC id, bit 3
            the redirection hint, bit 2 the destination mode (Intel SDM volume 3, "Message Signalled Interrupts").
        data: 16 bits. Bits 7:0 are the vector (16 or more for fixed and lowest-priority delivery), bits 10:8 the
            delivery mode (3 and 6 are reserved), bit 14 the level, bit 15 the trigger mode.

    Raises:
        ValueError: one of these rules is broken; the message names the value and the rule.
        OverflowError: negative, or beyond 64 bits.
        TypeError: not an int.

    Example:
        >>> MsiRoute(0xFEE01000, 0x41) == MsiRoute.fixed(0x41, 1)
        True
    """

    def __new__(cls, address: int, data: int) -> Self: ...
    @staticmethod
    def fixed(vector: int, apic_id: int) -> MsiRoute:
        """An edge-triggered interrupt of fixed delivery to one APIC id: what nearly every device sends.

        Args:
            vector: 16 to 255.
            apic_id: 0 to 255 (255 is every processor).
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

    `EventFd()` makes one, non-blocking and close-on-exec. `EventFd.from_fd()` duplicates one, and
    `IrqFdRoute.event` is a view of a route's. Has `fileno()`, so it works with `selectors` and asyncio.

    Threads may share it. It works in a forked child, on the same counter as in the parent.

    Raises:
        IrqFdError: no descriptor is left (EMFILE).

    Example:
        >>> with EventFd() as event:
        ...     event.signal()
        ...     event.signal(2)
        ...     event.consume()
        3
    """

    def __new__(cls, _source: IrqFdRoute | int | None = None) -> Self: ...
    @classmethod
    def from_fd(cls, fd: HasFileno | int) -> Self:
        """Duplicates a caller's eventfd (an int, or an object with `fileno()`), which stays the caller's to close.

        Raises:
            ValueError: it is another kind of file, or an eventfd in semaphore mode.
            IrqFdError: it is not open (EBADF), or no descriptor is left (EMFILE).
        """

    def fileno(self) -> int:
        """The descriptor. Readable while something is pending and no kernel or thread has taken it.

        Raises:
            ClosedError: it is closed.
        """

    def signal(self, n: int | None = None) -> None:
        """Adds to the counter. Never waits: a counter too full to take `n` stays as it is, and pending.

        Args:
            n: 1 to 2**64 - 2.

        Raises:
            ValueError, OverflowError: `n` is out of range.
            ClosedError: it is closed.
        """

    def consume(self) -> int:
        """Empties the counter.

        Returns:
            What it held; 0 if nothing was pending. On a view of an armed route 0: nothing is pending there.

        Raises:
            ClosedError: it is closed.
        """

    def close(self) -> None:
        """Gives up the descriptor. Closing twice is fine; closing a view leaves the route its own."""

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def _is_left_open(self) -> bool:
        """Whether a finalizer has something to warn of: not in a forked child."""

    def _abandon(self) -> None:
        """What a finalizer does: as close()."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

@disjoint_base
class IrqFdRoute:
    """A route: one GSI, one eventfd, and the MSI that a signal on it becomes.

    Made by `Partition.new_irqfd_route()`, unmasked and without an MSI. Whoever has the eventfd (a device model,
    VFIO, vhost) signals it, and the kernel raises the MSI in the guest. A signal that comes while the route is not
    armed (masked, without an MSI, or about to be armed again) stays in the eventfd; arming then raises one
    interrupt for all that is pending.

    Threads may share a route; its properties are read without waiting. Close it, or use `with`. In a forked child
    only `signal()` and `fileno()` work; the rest raises `ForkedError`.

    Raises:
        ClosedError: from nearly everything, once it is closed.
        RouteBrokenError: from everything that would change it, once it is broken (`GsiState.BROKEN`).

    Example:
        >>> partition = open_partition("simulated")
        >>> route = partition.new_irqfd_route()
        >>> route.set_msi(0xFEE00000, 0x41)
        >>> route
        <IrqFdRoute gsi=24 ENABLED 0xfee00000/0x0041 (vector 0x41 to APIC 0)>
        >>> partition.close()
    """

    def __new__(cls, partition: Partition, event: int | None = None) -> Self: ...
    @property
    def gsi(self) -> int:
        """The GSI, an int. Another route may have it once this one is closed."""

    @property
    def partition(self) -> PublicPartition:
        """The partition that the route belongs to."""

    @property
    def event(self) -> PublicEventFd:
        """A view of the route's eventfd. Closing the view does not close the route's descriptor."""

    def fileno(self) -> int:
        """The descriptor of the eventfd, for `selectors`, asyncio, or whoever signals.

        It is readable only while the route is not armed: the kernel empties an armed one before anybody sees it.
        """

    def signal(self) -> None:
        """Raises the interrupt now if the route is armed, else leaves the signal pending.

        Never waits; a full counter is pending already. Works in a forked child.

        Raises:
            ClosedError: the route is closed.
        """

    @overload
    def set_msi(self, address: MsiRoute, data: None = None) -> None: ...
    @overload
    def set_msi(self, address: int, data: int) -> None:
        """Sets what a signal becomes, and arms the route unless it is masked.

        An MSI set while masked is kept and pushed by `unmask()`. Setting what is set already does nothing.

        Args:
            address: an `MsiRoute`, or the address of an MSI (see there for the rules of both).
            data: the data of the MSI, unless an `MsiRoute` is given.

        Raises:
            ValueError, OverflowError, TypeError: this is no MSI; the message names the value and the rule.
            MissingVpError: no VP has the destination's APIC id.
            RoutingError, IrqFdError: the kernel refused; everything is as it was.
        """

    def clear_msi(self) -> None:
        """Disarms the route and forgets its MSI. The entry leaves the kernel's table with the next push.

        Raises:
            IrqFdError: the kernel refused; everything is as it was.
        """

    def mask(self) -> None:
        """Disarms the route until `unmask()`, whatever MSI is set meanwhile. Never pushes.

        Raises:
            IrqFdError: the kernel refused; everything is as it was.
        """

    def unmask(self) -> None:
        """Ends `mask()`: arms the route if it has an MSI, with one interrupt if anything is pending.

        Pushes only if the MSI changed meanwhile.

        Raises:
            MissingVpError: no VP has the destination's APIC id.
            RoutingError, IrqFdError: the kernel refused; everything is as it was.
        """

    @property
    def masked(self) -> bool:
        """Whether `mask()` is in force."""

    @property
    def armed(self) -> bool:
        """Whether a signal becomes an interrupt now."""

    @property
    def msi(self) -> MsiRoute | None:
        """The MSI that is set, masked or not; None if none is."""

    @property
    def state(self) -> GsiState:
        """What the route's GSI is used for now, a `GsiState`.

        `ENABLED` exactly while armed, `DISABLED` while not, `BROKEN` when a failed call could not be undone.
        """

    @property
    def pending(self) -> bool:
        """Whether a signal waits for the route to be armed. False while it is armed."""

    def consume_pending(self) -> bool:
        """Takes what is pending, so that arming will not raise it.

        Returns:
            Whether anything was pending. False, without reading, while armed.
        """

    def close(self) -> None:
        """Disarms the route, gives its GSI back and closes its descriptor. Never pushes. Closing twice is fine.

        Raises:
            IrqFdError: the irqfd could not be disarmed; the route is closed all the same and its GSI set aside.
        """

    @property
    def closed(self) -> bool:
        """Whether it is closed."""

    def _is_left_open(self) -> bool:
        """Whether a finalizer has something to warn of: not in a forked child."""

    def _abandon(self) -> None:
        """What a finalizer does: closes, or in a forked child gives up the descriptor and nothing else."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

@final
class Batch:
    """Changes to several routes of one partition, made together with one push at the most, or not at all.

    Made by `Partition.batch()`. Arguments are checked at each call, the state of the routes at the commit; the last
    word on a route wins. Leaving the `with` body commits; leaving it by an exception applies nothing. No lock is
    held meanwhile. A batch can be committed once.

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
            ValueError, OverflowError, TypeError: this is no MSI, or `route` is no route.
            ClosedError: the batch is closed.
        """

    def clear_msi(self, route: IrqFdRoute) -> None:
        """Clears a route's MSI, as `IrqFdRoute.clear_msi()` does."""

    def mask(self, route: IrqFdRoute) -> None:
        """Masks a route, as `IrqFdRoute.mask()` does."""

    def unmask(self, route: IrqFdRoute) -> None:
        """Unmasks a route, as `IrqFdRoute.unmask()` does."""

    def commit(self) -> None:
        """Makes the changes: disarms, pushes once if any entry changed, arms.

        If anything is refused, all is as before. The batch is closed either way.

        Raises:
            ClosedError: the batch, its partition or one of its routes is closed.
            ValueError: a route belongs to another partition.
            RouteBrokenError: a route is broken.
            MissingVpError: no VP has a destination's APIC id.
            RoutingError, IrqFdError: the kernel refused.
        """

    @property
    def partition(self) -> PublicPartition:
        """The partition whose routes it changes."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        _exception: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None: ...

@disjoint_base
class Partition:
    """A partition (virtual machine) of a hypervisor, and the sole owner of its MSI routing table and irqfds.

    Made by `open_partition()` or `Partition.from_fd()`. Threads may share it. Close it, or use `with`; that closes
    its routes. In a forked child everything that would touch the partition raises `ForkedError`.

    Raises:
        ClosedError: from nearly everything, once it is closed.
    """

    def __new__(
        cls,
        backend_name: str,
        *,
        device: str | PathLike[str] | None,
        fd: HasFileno | int | None,
        gsis: range,
        keep: Iterable[tuple[int, int, int]],
        vps: int | Iterable[int] | None,
        quiesce: bool | None,
        allow_missing_vp: bool,
    ) -> Self: ...
    @property
    def backend(self) -> str:
        """Which kernel it stands on: "mshv", "kvm" or "simulated"."""

    @property
    def gsis(self) -> range:
        """The GSIs that are handed out, a `range`."""

    @property
    def quiesce(self) -> bool:
        """Whether irqfds are disarmed around every push."""

    @property
    def vps(self) -> tuple[int, ...] | None:
        """The indexes of the VPs, which are their APIC ids, in a tuple.

        None if they are not known: an adopted partition whose VPs were not named.
        """

    @property
    def routes(self) -> list[PublicIrqFdRoute]:
        """The open routes, in a list, by GSI."""

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
            event: an eventfd of the caller's (an int, or an object with `fileno()`), which is duplicated; by default
                the route gets one of its own.

        Raises:
            GsiExhaustedError: every GSI is taken.
            ValueError: `event` is no eventfd, one in semaphore mode, or the eventfd of another route of this process.
            IrqFdError: `event` is not open (EBADF), or no descriptor is left (EMFILE, which RLIMIT_NOFILE sets).
        """

    def create_vp(self, index: int) -> None:
        """Creates the VP with this index, which is also its APIC id.

        Args:
            index: 0 to 254.

        Raises:
            ValueError: out of range, or there already.
            VpError: the kernel refused.
            io.UnsupportedOperation: the partition was adopted; its VPs are made by whoever made it.
        """

    def batch(self) -> Batch:
        """Begins a batch of changes; see `Batch`."""

    def gsi_state(self, gsi: int) -> GsiState:
        """What a GSI is used for.

        Raises:
            ValueError: it is not one of `gsis`.
        """

    def routing_table(self) -> list[RoutingEntry]:
        """Our record of the MSI entries that the kernel holds, by GSI: no kernel can be asked.

        Entries on which nothing is armed may be among them; the next push takes those out that no route has.
        """

    def stats(self) -> PartitionStats:
        """Counts since the partition was opened. Works on a closed partition too."""

    def close(self) -> None:
        """Closes the routes and gives up the partition. Closing twice is fine.

        Raises:
            IrqFdError: some irqfds could not be disarmed; all is closed all the same.
        """

    def _take_interrupts(self, timeout: float) -> list[Interrupt]: ...
    def _settle(self) -> None: ...
    def _fail(self, call: str, errno: int, after: int, times: int) -> None: ...
    def _is_left_open(self) -> bool:
        """Whether a finalizer has something to warn of: not in a forked child."""

    def _abandon(self) -> None:
        """What a finalizer does: closes, or in a forked child nothing; the descriptors go with the memory."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

@final
class RawPartition:
    """A partition with VP 0, on which ioctls are made bare and no rule is kept; for `mshv-irqfd probe` alone."""

    def __new__(cls, backend: str, device: str | PathLike[str]) -> Self: ...
    def set_routing(self, table: list[tuple[int, int, int]]) -> None:
        """Pushes a table of (GSI, address, data); raises OSError where the kernel refuses."""

    def irqfd(self, event: int, gsi: int, *, deassign: bool = False, resample: int | None = None) -> None:
        """Assigns or deassigns an irqfd; raises OSError where the kernel refuses."""

    def take_vectors(self) -> list[int] | None:
        """Takes the vectors out of KVM's local APIC; None on mshv."""

    def push_while_signalling(
        self, table: list[tuple[int, int, int]], event: int, gsi: int, quiesce: bool, seconds: float
    ) -> tuple[int, int]:
        """Pushes a table again and again while another thread signals; returns the numbers of pushes and signals."""

    def fileno(self) -> int:
        """The partition's descriptor."""

    def close(self) -> None:
        """Gives up the partition."""

@final
class Baseline:
    """A design of `src/bench` on a partition of its own, with one VP.

    Args:
        design: "floor", "floor-quiesced" or "rebuild".
        backend: "mshv", "kvm", "simulated" or "null".
        routes: how many.
    """

    def __new__(cls, name: str, backend: str, routes: int) -> Self: ...
    def run(self, workload: str, calls: int) -> int:
        """Runs a workload a number of times in a row, and returns the nanoseconds that all of them took."""

    def close(self) -> None:
        """Gives up the partition."""

def null_partition(gsis: range) -> Partition:
    """A partition whose kernel does nothing, with one VP."""
