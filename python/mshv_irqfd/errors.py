"""The exceptions of this package, all of them `MshvIrqFdError`."""

from __future__ import annotations

from typing import Any


class MshvIrqFdError(Exception):
    """Base of every exception that is this package's own."""


class ClosedError(MshvIrqFdError, ValueError):
    """A closed partition, route, batch or eventfd was used."""


class ForkedError(MshvIrqFdError):
    """A forked child used what its parent opened. On mshv the kernel would let it, and harm the parent."""


class GsiExhaustedError(MshvIrqFdError):
    """Every GSI of the partition is taken."""


class RouteBrokenError(MshvIrqFdError):
    """A failed call could not be undone, and left the route broken. Close it; its GSI stays set aside."""


class MissingVpError(MshvIrqFdError):
    """No VP has the APIC id that an MSI is for. Arming it can bring a host of the mshv driver down."""


class _CallError(MshvIrqFdError, OSError):
    """A call into the kernel failed.

    Attributes:
        errno: the error number, one of `errno`'s.
        ioctl: the ioctl or system call, as its manual names it.
        gsi: the GSI it was for; None if for none or many.
        hint: what usually lies behind this error; None if that is not known.
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
    """No usable device node. Says which was tried and what to do."""


class RoutingError(_CallError):
    """The kernel refused a routing table. The old one stays in force."""


class IrqFdError(_CallError):
    """The kernel refused to arm or disarm an irqfd, or to make or read an eventfd."""


class VpError(_CallError):
    """The kernel refused to create a VP."""
