"""The exceptions of this package, all derived from `MshvIrqFdError`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mshv_irqfd.values import Interrupt


class MshvIrqFdError(Exception):
    """Base class of this package's exceptions."""


class ClosedError(MshvIrqFdError, ValueError):
    """A closed partition, route, doorbell, batch or eventfd was used."""


class ForkedError(MshvIrqFdError):
    """A forked child used an object that its parent opened. The mshv driver would allow it, and disturb the parent."""


class GsiExhaustedError(MshvIrqFdError):
    """Every GSI of the partition is in use or quarantined."""


class RouteBrokenError(MshvIrqFdError):
    """The rollback of a failed call failed too, and left the route broken. Close it; its GSI stays quarantined."""


class MissingVpError(MshvIrqFdError):
    """No VP has the APIC id that an MSI targets. Arming it on mshv can crash the host."""


class MissingInterruptError(MshvIrqFdError, TimeoutError):
    """Expected interrupts did not arrive in time (`wait_interrupts()`). None has been taken.

    Attributes:
        missing: the number of each `Interrupt` that is missing.
        arrived: the `Interrupt`s that have arrived instead, or beside it, in order.
    """

    missing: dict[Interrupt, int]
    arrived: list[Interrupt]

    def __init__(self, message: str, *, missing: dict[Interrupt, int], arrived: list[Interrupt]) -> None:
        super().__init__(message)
        self.missing = missing
        self.arrived = arrived

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), missing=self.missing, arrived=self.arrived), self.args


class _CallError(MshvIrqFdError, OSError):
    """A call into the kernel failed.

    Attributes:
        errno: the error number, from the `errno` module.
        ioctl: the name of the ioctl or system call.
        gsi: the GSI that the call concerned; None if none or several.
        hint: the usual cause of this error; None if unknown.
    """

    ioctl: str | None
    gsi: int | None
    hint: str | None

    def __init__(
        self,
        errno: int,
        strerror: str,
        *,
        ioctl: str | None = None,
        gsi: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(errno, strerror)
        self.ioctl = ioctl
        self.gsi = gsi
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, self.strerror), self.__dict__


class HypervisorUnavailableError(_CallError):
    """No device node is usable. The message names the node and a remedy."""


class RoutingError(_CallError):
    """The kernel refused a routing table, and keeps the old one."""


class IrqFdError(_CallError):
    """The kernel refused to arm or disarm an irqfd, or to create or read an eventfd."""


class IoEventFdError(_CallError):
    """The kernel refused to make a doorbell or to take one away."""


class InterruptError(_CallError):
    """The kernel refused to raise an MSI (`Partition.signal_msi()`)."""


class VpError(_CallError):
    """The kernel refused to create a VP."""
