//! The Python objects, and what each holds: their methods are in files of their own, above this one.

use std::sync::{Arc, Mutex};

use pyo3::prelude::*;
use pyo3::types::PyWeakrefReference;

use crate::irqfd;

/// A partition (virtual machine) of a hypervisor, and the sole owner of its MSI routing table and irqfds.
///
/// Made by `open_partition()` or `Partition.from_fd()`. Threads may share it. Close it, or use `with`; that closes
/// its routes. In a forked child everything that would touch the partition raises `ForkedError`.
///
/// Raises:
///     ClosedError: from nearly everything, once it is closed.
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
/// Made by `Partition.new_irqfd_route()`, unmasked and without an MSI. Whoever has the eventfd (a device model,
/// VFIO, vhost) signals it, and the kernel raises the MSI in the guest. A signal that comes while the route is not
/// armed (masked, without an MSI, or about to be armed again) stays in the eventfd; arming then raises one
/// interrupt for all that is pending.
///
/// Threads may share a route; its properties are read without waiting. Close it, or use `with`. In a forked child
/// only `signal()` and `fileno()` work; the rest raises `ForkedError`.
///
/// Raises:
///     ClosedError: from nearly everything, once it is closed.
///     RouteBrokenError: from everything that would change it, once it is broken (`GsiState.BROKEN`).
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

/// Changes to several routes of one partition, made together with one push at the most, or not at all.
///
/// Made by `Partition.batch()`. Arguments are checked at each call, the state of the routes at the commit; the last
/// word on a route wins. Leaving the `with` body commits; leaving it by an exception applies nothing. No lock is
/// held meanwhile. A batch can be committed once.
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

/// A route that only the batch knows must not be finalized before the commit.
pub(super) struct Kept(pub(super) Py<IrqFdRoute>);

impl AsRef<irqfd::IrqFdRoute> for Kept {
    fn as_ref(&self) -> &irqfd::IrqFdRoute {
        &self.0.get().route
    }
}
