"""Values that say what is or what happened: plain enumerations and named tuples."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import NamedTuple


class GsiState(Enum):
    """What a GSI is used for."""

    UNALLOCATED = "unallocated"
    """No route has it."""
    DISABLED = "disabled"
    """A route has it and is not armed."""
    ENABLED = "enabled"
    """Its route is armed: a signal is an interrupt."""
    BROKEN = "broken"
    """A failed call could not be undone; the GSI is not handed out again."""


class DeliveryMode(IntEnum):
    """How an interrupt is delivered: bits 10:8 of an MSI's data (Intel SDM volume 3). 3 and 6 are reserved."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    NMI = 4
    INIT = 5
    EXTINT = 7


class Interrupt(NamedTuple):
    """An interrupt that arrived. A KVM partition knows the vector only; the rest is None there."""

    vector: int
    destination: int | None = None
    delivery_mode: DeliveryMode | None = None
    logical: bool | None = None
    level: bool | None = None


class RoutingEntry(NamedTuple):
    """An MSI entry of a routing table."""

    gsi: int
    address: int
    data: int

    def __repr__(self) -> str:
        return f"RoutingEntry(gsi={self.gsi}, address={self.address:#010x}, data={self.data:#06x})"


class PartitionStats(NamedTuple):
    """Counts since a partition was opened."""

    pushes: int
    """Routing tables that the kernel took."""
    entries_pushed: int
    """Entries in those tables, with the 40 pins of KVM and the kept ones."""
    pushes_skipped: int
    """Changes (of one route, by a batch, or by closing a route) that needed no push."""
    arms: int
    """irqfds armed, those of quiesced pushes included."""
    disarms: int
    """irqfds disarmed, likewise."""
    failures: int
    """Calls that the kernel refused."""
