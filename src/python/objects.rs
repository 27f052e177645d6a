//! The Python classes and their fields. The methods of each are in a file of its own, which imports this one.

use std::sync::{Arc, Mutex};

use pyo3::prelude::*;
use pyo3::types::PyWeakrefReference;

use crate::irqfd;

/// A partition (virtual machine) of a hypervisor, and the sole owner of its MSI routing table and irqfds.
///
/// `open_partition()` and `Partition.from_fd()` make partitions. Threads may share one. Close it, or use `with`;
/// closing it closes its routes and doorbells. In a forked child everything that would touch the partition raises
/// `ForkedError`.
///
/// Raises:
///     ClosedError: the partition is closed. Nearly every method raises this.
#[pyclass(frozen, subclass, weakref, module = "mshv_irqfd._core")]
pub(crate) struct Partition {
    pub(super) core: Arc<irqfd::Partition>,
    /// The Python objects of the routes, by GSI counted from the first.
    pub(super) routes: Mutex<Vec<Option<Py<PyWeakrefReference>>>>,
}

impl Partition {
    pub(super) fn new(core: Arc<irqfd::Partition>) -> Self {
        Self { core, routes: Mutex::default() }
    }
}

/// A route: one GSI, one eventfd, and the MSI that a signal on it becomes.
///
/// `Partition.new_irqfd_route()` makes a route, unmasked and without an MSI. The holder of the eventfd (a device model,
/// VFIO, vhost) signals it, and the kernel raises the MSI in the guest. While the route is not armed (masked, without
/// an MSI, or during a push), signals stay pending in the eventfd. Arming then raises one interrupt for all of them.
///
/// Threads may share a route. Reading its properties never waits. Close it, or use `with`. In a forked child
/// only `signal()` and `fileno()` work; the rest raises `ForkedError`.
///
/// Raises:
///     ClosedError: the route is closed. Nearly every method raises this.
///     RouteBrokenError: the route is broken (`GsiState.BROKEN`). Every method that would change it raises this.
///
/// Example:
///     >>> partition = open_partition("simulated")
///     >>> route = partition.new_irqfd_route()
///     >>> route.set_msi(0xFEE00000, 0x41)
///     >>> route
///     <IrqFdRoute gsi=24 ENABLED 0xfee00000/0x0041 (vector 0x41 to APIC 0)>
///     >>> partition.close()
#[pyclass(frozen, subclass, weakref, module = "mshv_irqfd._core")]
pub(crate) struct IrqFdRoute {
    pub(super) route: irqfd::IrqFdRoute,
    pub(super) partition: Py<Partition>,
}

/// A doorbell: the guest's writes to one address signal an eventfd, with no trip through user space.
///
/// `Partition.ioeventfd()` makes a doorbell. The eventfd is readable once the guest has rung, so `fileno()` works with
/// `selectors` and asyncio, and can be given to vhost as a queue's kick. A ring that nobody takes stays in the eventfd.
///
/// Threads may share a doorbell. Close it, or use `with`. In a forked child `signal()`, `consume()` and `fileno()`
/// work, on the same counter as in the parent; `close()` raises `ForkedError`.
///
/// Raises:
///     ClosedError: the doorbell is closed. `signal()`, `consume()`, `fileno()` and `event` raise this.
///
/// Example:
///     >>> partition = open_partition("simulated")
///     >>> doorbell = partition.ioeventfd(0xD0000000, 4, datamatch=7)
///     >>> partition.write_mmio(0xD0000000, (7).to_bytes(4, "little"))
///     True
///     >>> doorbell.consume()
///     1
///     >>> doorbell
///     <IoEventFd MMIO 0xd0000000, 4 bytes, value 0x7>
///     >>> partition.close()
#[pyclass(frozen, subclass, weakref, module = "mshv_irqfd._core")]
pub(crate) struct IoEventFd {
    pub(super) doorbell: irqfd::IoEventFd,
    pub(super) partition: Py<Partition>,
}

/// Changes to several routes of one partition, made together with at most one push, or not at all.
///
/// `Partition.batch()` begins a batch. Each call checks its arguments; the commit checks the state of the routes. The
/// last change of a route wins. Leaving the `with` block commits; leaving it by an exception changes nothing. The batch
/// holds no lock until it commits. A batch can be committed once.
///
/// Example:
///     >>> partition = open_partition("simulated")
///     >>> routes = [partition.new_irqfd_route() for _ in range(3)]
///     >>> with partition.batch() as batch:
///     ...     for number, route in enumerate(routes):
///     ...         batch.set_msi(route, MsiRoute.fixed(0x40 + number, 0))
///     >>> partition.stats().pushes
///     1
///     >>> partition.close()
#[pyclass(frozen, module = "mshv_irqfd._core")]
pub(crate) struct Batch {
    pub(super) open: Mutex<Option<Edits>>,
    pub(super) partition: Py<Partition>,
}

pub(super) type Edits = irqfd::Batch<Kept>;

/// Keeps a route from being finalized before the commit, even if only the batch refers to it.
pub(super) struct Kept(pub(super) Py<IrqFdRoute>);

impl AsRef<irqfd::IrqFdRoute> for Kept {
    fn as_ref(&self) -> &irqfd::IrqFdRoute {
        &self.0.get().route
    }
}
