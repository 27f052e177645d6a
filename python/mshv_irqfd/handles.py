"""Handles on kernel objects: the Rust classes with finalizers that warn, and a partition class for each backend."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, Protocol, cast, overload

from mshv_irqfd import _core, _interrupts
from mshv_irqfd._describe import Description
from mshv_irqfd.errors import HypervisorUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from os import PathLike
    from typing import Self

    from mshv_irqfd._core import HasFileno
    from mshv_irqfd._interrupts import Expected
    from mshv_irqfd.values import Interrupt, SimulatedCall

DEFAULT_GSIS = range(24, 2072)
"""2048 GSIs, above the 24 that are IOAPIC pins by convention."""


class _Closable(Protocol):
    def _is_left_open(self) -> bool: ...
    def _abandon(self) -> None: ...


class _Handle:
    """Closes at the end of a `with` block, and when an open object is collected, with a warning, as files do.

    In a forked child, where `close()` would raise, both close the descriptors alone.
    """

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self: _Closable, *_exception: object) -> None:
        self._abandon()

    def __del__(self: _Closable, warn: Callable[..., None] = warnings.warn) -> None:
        if self._is_left_open():
            try:
                # At interpreter exit the module's globals may be gone; a default argument is not.
                warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            finally:
                self._abandon()


class EventFd(_core.EventFd, _Handle):  # noqa: D101 -- the docstring is the Rust half's
    __doc__ = _core.EventFd.__doc__
    __slots__ = ()


class IoEventFd(_core.IoEventFd, _Handle):  # noqa: D101 -- the docstring is the Rust half's
    __doc__ = _core.IoEventFd.__doc__
    __slots__ = ()


class IrqFdRoute(_core.IrqFdRoute, _Handle):  # noqa: D101 -- the docstring is the Rust half's
    __doc__ = _core.IrqFdRoute.__doc__
    __slots__ = ()


class MsixTable(_core.MsixTable, _Handle):  # noqa: D101 -- the docstring is the Rust half's
    __doc__ = _core.MsixTable.__doc__
    __slots__ = ()


class MsiCapability(_core.MsiCapability, _Handle):  # noqa: D101 -- the docstring is the Rust half's
    __doc__ = _core.MsiCapability.__doc__
    __slots__ = ()


class Partition(_core.Partition, _Handle):  # noqa: D101 -- the docstring is the Rust half's
    __doc__ = _core.Partition.__doc__
    __slots__ = ()

    def describe(self) -> str:
        """A table for people: the routes (GSI, state, where armed, MSI, interrupt, masked, pending) and the counters.

        A device's vectors are among the routes once they are used. `rich.print()` shows a table with rules.

        Example:
            >>> with open_partition("simulated") as partition:
            ...     route = partition.new_irqfd_route()
            ...     route.set_msi(0xFEE00000, 0x41)
            ...     print(partition.describe().splitlines()[2])
            24   ENABLED  24        0xfee00000/0x0041  vector 0x41 to APIC 0  -       -
        """
        return Description(self)

    @classmethod
    def from_fd(
        cls,
        fd: HasFileno | int,
        backend: Literal["mshv", "kvm"],
        *,
        gsis: range = DEFAULT_GSIS,
        keep: Iterable[tuple[int, int, int]] = (),
        spare: range | None = None,
        vps: int | Iterable[int] | None = None,
        quiesce: bool | None = None,
    ) -> Partition:
        """Adopts a partition that another VMM made: duplicates its descriptor and takes sole charge of its MSI routing.

        Only the process that made a KVM VM can adopt it. On mshv any process with the descriptor can, even after the
        previous owner was killed. The kernel then keeps the old owner's irqfds for as long as any process holds their
        eventfds open, and cannot list them. Until they are disarmed or closed, a signal on such an eventfd raises the
        table's entry for its old GSI (a new route's MSI, or vector 0), and no route can be armed on it.

        Args:
            fd: an mshv partition or a KVM VM (an int, or an object with `fileno()`).
            backend: "mshv" or "kvm".
            gsis: the GSIs to allocate to routes. All others remain the caller's.
            keep: `RoutingEntry`s to include in every push. The first push replaces the table that the kernel has.
                KVM's pin entries are always included.
            spare: GSIs that nothing else uses, to hold the MSIs that routes are likely to want next (see `preload` of
                `open_partition`). None: no spare GSIs, so every new MSI is a push.
            vps: the number of VPs (indices from 0 up), or their indices. MSIs are checked against them. None: MSIs
                are not checked.
            quiesce: whether to disarm all irqfds around every push. None: yes on mshv, no on KVM.

        Raises:
            ValueError: `fd` is another kind of file, or a partition that this process has already; or the kernel does
                not accept `gsis`, `keep` or `spare`.
            HypervisorUnavailableError: the kernel refused the descriptor.
        """
        return _class(backend)(
            backend,
            device=None,
            fd=fd,
            gsis=gsis,
            keep=keep,
            spare=spare,
            vps=vps,
            quiesce=quiesce,
            allow_missing_vp=False,
            preload=False,
        )


class MshvPartition(Partition):
    """A partition of the Microsoft Hypervisor; see `Partition`."""

    __slots__ = ()


class KvmPartition(Partition):
    """A VM of KVM; see `Partition`."""

    __slots__ = ()

    def take_interrupts(self, timeout: float = 0.0) -> list[Interrupt]:
        """Takes the interrupts that are pending in the local APICs of the vCPUs that this partition created.

        The APIC has one bit for each vector: it shows that a vector was raised, but not how often, nor in which order.
        The vCPUs do not run, so no guest takes an interrupt before the next. The result is exact only while no signal
        is in flight: an interrupt that arrives between the ioctl that reads a register and the one
        that clears it is lost. What a running guest takes is not in these registers.

        Args:
            timeout: how long to wait for the first interrupt, in seconds. Ctrl-C ends the wait.

        Returns:
            `Interrupt`s in order of VP and vector. Only their vector is known.

        Raises:
            io.UnsupportedOperation: a guest runs on the vCPUs (`mshv-irqfd demo` runs one), and takes the interrupts.
        """
        return self._take_interrupts(timeout)

    def wait_interrupts(
        self, expected: Expected, *, count: int | None = None, timeout: float = 10.0
    ) -> list[Interrupt]:
        """Waits until all expected interrupts are pending, and takes them, and no others.

        The local APIC records that a vector was raised, not how often, so each expected vector has a count of 1. Taking
        clears registers: as with `take_interrupts()`, an interrupt that arrives in that moment is lost.

        Args:
            expected: a vector, an `MsiRoute` or an `Interrupt`, or several of them. Only their vectors are compared.
            count: 1; see `SimulatedPartition.wait_interrupts()`.
            timeout: how long to wait, in seconds. Ctrl-C ends the wait.

        Returns:
            The expected `Interrupt`s. All others stay, for later calls of this and of `take_interrupts()`.

        Raises:
            MissingInterruptError: not all have arrived in time. It says which are missing and what did arrive.
            io.UnsupportedOperation: a guest runs on the vCPUs; see `take_interrupts()`.
            ValueError, TypeError: an argument is invalid.
        """
        wanted = _interrupts.expected_interrupts(expected, count, counted=False)
        return _interrupts.wait(self, wanted, timeout, counted=False)

    def settle(self) -> None:
        """Returns once the interrupt of every signal before this call is pending in a local APIC.

        KVM may take a signal and raise its interrupt a little later. This disarms every irqfd, which waits for that,
        and arms it again. Signals that arrive meanwhile raise one interrupt then.

        Raises:
            IrqFdError: the kernel refused, and everything is as before.
        """
        self._settle()


class SimulatedPartition(Partition):
    """A partition of the simulated kernel, which behaves as the mshv driver does; see `Partition`."""

    __slots__ = ()

    def take_interrupts(self, timeout: float = 0.0) -> list[Interrupt]:
        """Takes the interrupts that have arrived, in order.

        Args:
            timeout: how long to wait for the first interrupt, in seconds. Ctrl-C ends the wait.
        """
        return self._take_interrupts(timeout)

    def wait_interrupts(
        self, expected: Expected, *, count: int | None = None, timeout: float = 10.0
    ) -> list[Interrupt]:
        """Waits until all expected interrupts have arrived, and takes them, and no others.

        Args:
            expected: a vector, an `MsiRoute` or an `Interrupt`, whose fields may be None to match anything; a mapping
                of such to counts; or several of them, each once.
            count: how many of a single one are expected. None: one.
            timeout: how long to wait, in seconds. Ctrl-C ends the wait.

        Returns:
            The expected `Interrupt`s, in the order of their arrival. All others, surplus ones among them, stay, for
            later calls of this and of `take_interrupts()`.

        Raises:
            MissingInterruptError: not all have arrived in time. It says which are missing and what did arrive. None
                has been taken.
            ValueError, TypeError: an argument is invalid.

        Example:
            >>> partition = open_partition("simulated")
            >>> route = partition.new_irqfd_route()
            >>> route.set_msi(0xFEE00000, 0x41)
            >>> partition.signal_msi(0xFEE00000, 0x42)
            True
            >>> route.signal()
            >>> [hex(interrupt.vector) for interrupt in partition.wait_interrupts({0x41: 1, 0x42: 1})]
            ['0x42', '0x41']
            >>> partition.close()
        """
        return _interrupts.wait(self, _interrupts.expected_interrupts(expected, count), timeout)

    def settle(self) -> None:
        """Returns once every signal written before this call is delivered."""
        self._settle()

    def write_mmio(self, address: int, data: bytes) -> bool:
        """Writes to the guest's memory space as the guest does, and rings the doorbells that the write matches.

        They have rung when this returns. Other writes do nothing: there is no guest memory.

        Args:
            address: the guest-physical address, 64 bits.
            data: 1, 2, 4 or 8 bytes, little-endian.

        Returns:
            Whether a doorbell rang. A real guest's other writes go to its VMM.

        Raises:
            ValueError, OverflowError, TypeError: an argument is invalid.
        """
        return self._write_mmio(address, data)

    def fail(
        self,
        call: SimulatedCall,
        errno: int,
        *,
        after: int = 0,
        times: int = 1,
    ) -> None:
        """Makes calls into the simulated kernel fail.

        Args:
            call: the call to fail; `testing.SimulatedCall` lists them.
            errno: the error number, from the `errno` module.
            after: how many calls succeed first.
            times: how many calls fail then.
        """
        self._fail(call, errno, after, times)


_CLASSES: dict[str, type[Partition]] = {
    "mshv": MshvPartition,
    "kvm": KvmPartition,
    "simulated": SimulatedPartition,
}


def _class(backend: str) -> type[Partition]:
    # The Rust half rejects an unknown name and lists the valid ones.
    return _CLASSES.get(backend, Partition) if isinstance(backend, str) else Partition


_Options = ParamSpec("_Options")


class _ByBackend(Protocol[_Options]):
    """The type of a function whose first argument names a backend and determines the class it returns."""

    @overload
    def __call__(
        self, backend: Literal["auto"] = ..., *args: _Options.args, **options: _Options.kwargs
    ) -> MshvPartition | KvmPartition: ...
    @overload
    def __call__(self, backend: Literal["mshv"], *args: _Options.args, **options: _Options.kwargs) -> MshvPartition: ...
    @overload
    def __call__(self, backend: Literal["kvm"], *args: _Options.args, **options: _Options.kwargs) -> KvmPartition: ...
    @overload
    def __call__(
        self, backend: Literal["simulated"], *args: _Options.args, **options: _Options.kwargs
    ) -> SimulatedPartition: ...
    @overload
    def __call__(self, backend: str, *args: _Options.args, **options: _Options.kwargs) -> Partition: ...


def _by_backend(function: Callable[Concatenate[str, _Options], Partition]) -> _ByBackend[_Options]:
    """Gives a function the overloads of `_ByBackend`, with its own options in each of them."""
    return cast("_ByBackend[_Options]", function)


@_by_backend
def open_partition(
    backend: str = "auto",
    *,
    device: str | PathLike[str] | None = None,
    gsis: range = DEFAULT_GSIS,
    vps: int | Iterable[int] = 1,
    quiesce: bool | None = None,
    allow_missing_vp: bool = False,
    preload: bool = True,
) -> Partition:
    """Creates a partition.

    Args:
        backend: "mshv", "kvm", "simulated", or "auto": mshv if available, else kvm, never simulated.
        device: the device node to open. None: /dev/mshv or /dev/kvm.
        gsis: the GSIs to allocate to routes, lowest first; a range of step 1. mshv accepts 0-4095 (0-23 are IOAPIC
            pins by convention); KVM accepts 24-4095, and at most 4056 of them, as its 40 pin entries are in the same
            table.
        vps: the number of VPs to create (indices from 0 up), or their indices. A VP's index is its APIC id, 0 to 254.
        quiesce: whether to disarm all irqfds around every push. None: where the kernel needs it. On mshv a signal
            during a push can otherwise raise vector 0, and the simulated kernel behaves alike; KVM does not need it.
        allow_missing_vp: whether to arm a route whose destination has no VP. On mshv this can crash the host.
        preload: whether to use the GSIs outside `gsis` as spare ones, whose entries pushes load with the MSIs that
            routes are likely to want next. Setting a loaded MSI moves one irqfd and makes no push. False: every new
            MSI is a push.

    Raises:
        HypervisorUnavailableError: no device node is usable. The message names the node and a remedy.
        ValueError, TypeError, OverflowError: an argument is invalid. The message names the value and the rule.
        VpError: the kernel refused to create a VP.

    Example:
        >>> with open_partition("simulated", gsis=range(24, 32)) as partition:
        ...     print(partition)
        <SimulatedPartition backend=simulated gsis=24-31 quiesced>
    """

    def open_one(name: str) -> Partition:
        return _class(name)(
            name,
            device=device,
            fd=None,
            gsis=gsis,
            keep=(),
            spare=None,
            vps=vps,
            quiesce=quiesce,
            allow_missing_vp=allow_missing_vp,
            preload=preload,
        )

    if backend != "auto":
        return open_one(backend)
    if not isinstance(vps, int):
        vps = tuple(vps)
    try:
        return open_one("mshv")
    except HypervisorUnavailableError as error:
        no_mshv = error
    try:
        return open_one("kvm")
    except HypervisorUnavailableError as no_kvm:
        raise HypervisorUnavailableError(
            no_kvm.errno or 0,
            f"no hypervisor: {no_mshv.strerror}; {no_kvm.strerror}",
            ioctl=no_kvm.ioctl,
            hint='open_partition("simulated") works everywhere, without guests',
        ) from no_mshv
