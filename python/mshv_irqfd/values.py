"""Values that describe states and events: enumerations, named tuples, and the names of calls."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Literal, NamedTuple, TypeAlias

# stubtest takes a Literal of several for a union, and compares it with what it finds: so it is one.
SimulatedCall: TypeAlias = (
    Literal["set_msi_routing", "assign_irqfd", "deassign_irqfd"]  # noqa: PYI030
    | Literal["assign_ioeventfd", "deassign_ioeventfd", "signal_msi"]
)
"""A call into the simulated kernel that can be made to fail: a push; arming and disarming a route; making and closing a
doorbell; one MSI without a route."""


class GsiState(Enum):
    """The state of a GSI."""

    UNALLOCATED = "unallocated"
    """No route has it."""
    DISABLED = "disabled"
    """A route has it and is not armed."""
    ENABLED = "enabled"
    """Its route is armed: a signal raises the interrupt."""
    BROKEN = "broken"
    """A failed rollback left its route broken. The GSI is quarantined."""


class DeliveryMode(IntEnum):
    """How an interrupt is delivered: bits 10:8 of an MSI's data (Intel SDM volume 3). 3 and 6 are reserved."""

    FIXED = 0
    """The vector, to each CPU of the destination. Nearly all MSIs."""
    LOWEST_PRIORITY = 1
    """The vector, to one CPU of the destination."""
    SMI = 2
    """A system management interrupt."""
    NMI = 4
    """A non-maskable interrupt."""
    INIT = 5
    """An INIT, which resets the CPU."""
    EXTINT = 7
    """An interrupt whose vector an external controller gives."""


class Interrupt(NamedTuple):
    """An interrupt that has arrived. On KVM only the vector is known; the other fields are None."""

    vector: int
    """The vector, 0 to 255."""
    destination: int | None = None
    """The APIC id of its VP, or the logical destination."""
    delivery_mode: DeliveryMode | None = None
    """How it is delivered: FIXED for most."""
    logical: bool | None = None
    """Whether the destination is a logical one."""
    level: bool | None = None
    """Whether it is level-triggered."""


class RoutingEntry(NamedTuple):
    """An MSI entry of a routing table."""

    gsi: int
    """The GSI."""
    address: int
    """The MSI's address."""
    data: int
    """The MSI's data."""

    def __repr__(self) -> str:
        return f"RoutingEntry(gsi={self.gsi}, address={self.address:#010x}, data={self.data:#06x})"


class PartitionStats(NamedTuple):
    """Counters since the partition was opened."""

    pushes: int
    """Pushes that the kernel accepted."""
    entries_pushed: int
    """Entries in those pushes, including KVM's 40 pin entries and the `keep` entries."""
    pushes_skipped: int
    """Changes (to one route, by a batch, or by closing a route) that needed no push."""
    arms: int
    """irqfds armed, including by quiesced pushes."""
    disarms: int
    """irqfds disarmed, including by quiesced pushes."""
    failures: int
    """Calls that the kernel refused."""
    hits: int
    """Messages set on a route that the kernel's table already had."""
    misses: int
    """Messages set on a route that the kernel's table did not have."""
    entries_loaded: int
    """Spare entries that pushes loaded with messages that routes are likely to want next."""
