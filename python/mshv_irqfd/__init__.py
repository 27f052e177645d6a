"""irqfd and MSI routing for virtual machines: on the Microsoft Hypervisor, KVM, or a simulated kernel.

Open a partition with `open_partition()`, create routes with `Partition.new_irqfd_route()`, set their MSIs, and signal
their eventfds: the kernel raises the interrupts with no trip through user space. The other direction is
`Partition.ioeventfd()`: the guest's writes signal an eventfd. `MsixTable` and `MsiCapability` are what a guest's driver
sees of a device's routes.

Import from this module only. The others are private.
"""

from mshv_irqfd._core import Batch, MsiRoute, MsiVector, MsixVector, __version__
from mshv_irqfd.errors import (
    ClosedError,
    ForkedError,
    GsiExhaustedError,
    HypervisorUnavailableError,
    InterruptError,
    IoEventFdError,
    IrqFdError,
    MissingInterruptError,
    MissingVpError,
    MshvIrqFdError,
    RouteBrokenError,
    RoutingError,
    VpError,
)
from mshv_irqfd.handles import (
    EventFd,
    IoEventFd,
    IrqFdRoute,
    KvmPartition,
    MshvPartition,
    MsiCapability,
    MsixTable,
    Partition,
    SimulatedPartition,
    open_partition,
)
from mshv_irqfd.values import DeliveryMode, GsiState, Interrupt, PartitionStats, RoutingEntry

__all__ = [
    "Batch",
    "ClosedError",
    "DeliveryMode",
    "EventFd",
    "ForkedError",
    "GsiExhaustedError",
    "GsiState",
    "HypervisorUnavailableError",
    "Interrupt",
    "InterruptError",
    "IoEventFd",
    "IoEventFdError",
    "IrqFdError",
    "IrqFdRoute",
    "KvmPartition",
    "MissingInterruptError",
    "MissingVpError",
    "MshvIrqFdError",
    "MshvPartition",
    "MsiCapability",
    "MsiRoute",
    "MsiVector",
    "MsixTable",
    "MsixVector",
    "Partition",
    "PartitionStats",
    "RouteBrokenError",
    "RoutingEntry",
    "RoutingError",
    "SimulatedPartition",
    "VpError",
    "__version__",
    "open_partition",
]
