"""The objects that hold something of the kernel's: the Rust ones, with finalizers that warn, by backend."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal, Protocol, overload

from mshv_irqfd import _core
from mshv_irqfd.errors import HypervisorUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from os import PathLike

    from mshv_irqfd._core import HasFileno
    from mshv_irqfd.values import Interrupt

DEFAULT_GSIS = range(24, 2072)
"""2048 GSIs above those that are the IOAPIC's pins by custom."""


class _Closable(Protocol):
    def _is_left_open(self) -> bool: ...
    def _abandon(self) -> None: ...


class _Finalized:
    """Closes and warns, as files do, if an object goes that was left open."""

    __slots__ = ()

    def __del__(self: _Closable, warn: Callable[..., None] = warnings.warn) -> None:
        if self._is_left_open():
            try:
                # The module may be torn down already; its function is not.
                warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            finally:
                self._abandon()


class EventFd(_core.EventFd, _Finalized):  # noqa: D101 -- the docstring is the Rust half's
    __doc__ = _core.EventFd.__doc__
    __slots__ = ()


class IrqFdRoute(_core.IrqFdRoute, _Finalized):  # noqa: D101 -- the docstring is the Rust half's
    __doc__ = _core.IrqFdRoute.__doc__
    __slots__ = ()


class Partition(_core.Partition, _Finalized):  # noqa: D101 -- the docstring is the Rust half's
    __doc__ = _core.Partition.__doc__
    __slots__ = ()

    @classmethod
    def from_fd(
        cls,
        fd: HasFileno | int,
        backend: Literal["mshv", "kvm"],
        *,
        gsis: range = DEFAULT_GSIS,
        keep: Iterable[tuple[int, int, int]] = (),
        vps: int | Iterable[int] | None = None,
        quiesce: bool | None = None,
    ) -> Partition:
        """Takes sole charge of the MSI routing of a partition that somebody else made, on a duplicate of its fd.

        A VM of KVM can be adopted only by the process that made it. On mshv any process that has the descriptor can,
        also after another owner was killed: the kernel keeps the irqfds that were armed on eventfds which somebody
        still has open, and can't be asked for them. Until those are closed or disarmed, a signal on them raises what
        the table has for the GSI that they had (a new route's MSI, or vector 0), and a route can't be armed on them.

        Args:
            fd: a partition of the mshv driver or a VM of KVM (an int, or an object with `fileno()`).
            backend: "mshv" or "kvm".
            gsis: the GSIs to hand out; the others stay the caller's.
            keep: `RoutingEntry`s that stay in every table pushed. The first push replaces whatever was there. The
                pins of KVM's interrupt controllers stay anyhow.
            vps: how many VPs there are (from 0 up), or which; then MSIs are checked against them. None: unchecked.
            quiesce: whether irqfds are disarmed around every push; by default on mshv, not on KVM.

        Raises:
            ValueError: `fd` is another kind of file or a partition that this process has already; `gsis` or `keep`
                are not what the kernel takes.
            HypervisorUnavailableError: the kernel refused.
        """
        return _class(backend)(
            backend, device=None, fd=fd, gsis=gsis, keep=keep, vps=vps, quiesce=quiesce, allow_missing_vp=False
        )


class MshvPartition(Partition):
    """A partition of the Microsoft Hypervisor; see `Partition`."""

    __slots__ = ()


class KvmPartition(Partition):
    """A VM of KVM; see `Partition`."""

    __slots__ = ()

    def take_interrupts(self, timeout: float = 0.0) -> list[Interrupt]:
        """Takes the interrupts that wait in the local APICs of the vCPUs made by this partition.

        A vector is there or not, however often it was raised. Exact only while nobody signals: an interrupt that
        arrives between the two ioctls that read and clear a register is lost to the reader.

        Args:
            timeout: how long to wait, in seconds, for something to arrive. Ctrl-C ends the wait.

        Returns:
            `Interrupt`s by VP and vector, of which only the vector is known.
        """
        return self._take_interrupts(timeout)


class SimulatedPartition(Partition):
    """A partition of the simulated kernel, which behaves as the mshv driver does; see `Partition`."""

    __slots__ = ()

    def take_interrupts(self, timeout: float = 0.0) -> list[Interrupt]:
        """Takes the interrupts that arrived, in order.

        Args:
            timeout: how long to wait, in seconds, for something to arrive. Ctrl-C ends the wait.
        """
        return self._take_interrupts(timeout)

    def settle(self) -> None:
        """Returns when every signal written before the call is delivered."""
        self._settle()

    def fail(
        self,
        call: Literal["set_msi_routing", "assign_irqfd", "deassign_irqfd"],
        errno: int,
        *,
        after: int = 0,
        times: int = 1,
    ) -> None:
        """Makes calls into the simulated kernel fail.

        Args:
            call: which.
            errno: with which error, one of `errno`'s.
            after: how many to let through first.
            times: how many to fail then.
        """
        self._fail(call, errno, after, times)


_CLASSES: dict[str, type[Partition]] = {
    "mshv": MshvPartition,
    "kvm": KvmPartition,
    "simulated": SimulatedPartition,
}


def _class(backend: str) -> type[Partition]:
    # An unknown name is refused by the Rust half, with the names that there are.
    return _CLASSES.get(backend, Partition) if isinstance(backend, str) else Partition


@overload
def open_partition(
    backend: Literal["auto"] = ...,
    *,
    device: str | PathLike[str] | None = ...,
    gsis: range = ...,
    vps: int | Iterable[int] = ...,
    quiesce: bool | None = ...,
    allow_missing_vp: bool = ...,
) -> MshvPartition | KvmPartition: ...
@overload
def open_partition(
    backend: Literal["mshv"],
    *,
    device: str | PathLike[str] | None = ...,
    gsis: range = ...,
    vps: int | Iterable[int] = ...,
    quiesce: bool | None = ...,
    allow_missing_vp: bool = ...,
) -> MshvPartition: ...
@overload
def open_partition(
    backend: Literal["kvm"],
    *,
    device: str | PathLike[str] | None = ...,
    gsis: range = ...,
    vps: int | Iterable[int] = ...,
    quiesce: bool | None = ...,
    allow_missing_vp: bool = ...,
) -> KvmPartition: ...
@overload
def open_partition(
    backend: Literal["simulated"],
    *,
    device: None = ...,
    gsis: range = ...,
    vps: int | Iterable[int] = ...,
    quiesce: bool | None = ...,
    allow_missing_vp: bool = ...,
) -> SimulatedPartition: ...
@overload
def open_partition(
    backend: str,
    *,
    device: str | PathLike[str] | None = ...,
    gsis: range = ...,
    vps: int | Iterable[int] = ...,
    quiesce: bool | None = ...,
    allow_missing_vp: bool = ...,
) -> Partition: ...
def open_partition(
    backend: str = "auto",
    *,
    device: str | PathLike[str] | None = None,
    gsis: range = DEFAULT_GSIS,
    vps: int | Iterable[int] = 1,
    quiesce: bool | None = None,
    allow_missing_vp: bool = False,
) -> Partition:
    """Makes a partition.

    Args:
        backend: "mshv", "kvm", "simulated", or "auto": mshv if there is one, else kvm; never simulated.
        device: another device node than /dev/mshv or /dev/kvm.
        gsis: the GSIs to hand out, one run, lowest first. mshv takes 0-4095 (0-23 are the IOAPIC's pins by custom);
            KVM 24-4095, and at most 4056 of them beside its 40 pin entries.
        vps: how many VPs to create (from 0 up), or which. A VP's index is its APIC id, 0 to 254.
        quiesce: whether irqfds are disarmed around every push. None: where the kernel needs it (mshv, where a signal
            during a push may otherwise become vector 0, and simulated, which stands for it; not KVM).
        allow_missing_vp: whether a route may be armed although no VP has its destination. On mshv this can bring the
            host down.

    Raises:
        HypervisorUnavailableError: no usable device node; says which was tried and what to do.
        ValueError, TypeError, OverflowError: an argument is wrong; the message names the value and the rule.
        VpError: the kernel refused a VP.

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
            vps=vps,
            quiesce=quiesce,
            allow_missing_vp=allow_missing_vp,
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
