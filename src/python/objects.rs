//! The Python classes and their fields. The methods of each are in a file of its own, which imports this one.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use pyo3::prelude::*;
use pyo3::types::PyWeakrefReference;

use crate::{irqfd, pci};

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
    /// The Python objects of the doorbells.
    pub(super) doorbells: Mutex<Vec<Py<PyWeakrefReference>>>,
    /// The vectors of devices, which have routes of the partition.
    pub(super) devices: Mutex<Vec<Weak<DeviceRoutes>>>,
}

impl Partition {
    pub(super) fn new(core: Arc<irqfd::Partition>) -> Self {
        Self { core, routes: Mutex::default(), doorbells: Mutex::default(), devices: Mutex::default() }
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
    pub(super) route: Arc<irqfd::IrqFdRoute>,
    pub(super) partition: Py<Partition>,
    /// Whether it is the route of a vector, which its device closes.
    pub(super) of_device: bool,
}

/// A route that exists already, on its way into an `IrqFdRoute`.
#[pyclass(frozen)]
pub(super) struct TakenRoute {
    pub(super) route: Arc<irqfd::IrqFdRoute>,
    pub(super) of_device: bool,
}

/// A doorbell: the guest's writes to one address signal an eventfd, with no trip through user space.
///
/// `Partition.ioeventfd()` makes a doorbell. To wait for rings in asyncio, use `await doorbell.wait()` or
/// `async for count in doorbell`. The eventfd is readable once the guest has rung, so `fileno()` works with
/// `selectors`, and can be given to vhost as a queue's kick. A ring stays in the eventfd until it is taken.
///
/// Threads may share a doorbell. Close it, or use `with`. In a forked child `signal()`, `consume()`, `wait()` and
/// `fileno()` work, on the same counter as in the parent; `close()` raises `ForkedError`.
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

/// A device's vectors, and the Python objects of their routes.
pub(super) struct DeviceRoutes {
    pub(super) vectors: Arc<pci::Vectors>,
    /// Made when they are asked for. They live as long as the device, and do not refer to it.
    pub(super) objects: Mutex<BTreeMap<usize, Py<IrqFdRoute>>>,
}

/// What devices with MSI-X and with MSI have in common. See `MsixTable` and `MsiCapability`.
#[pyclass(frozen, subclass, weakref, module = "mshv_irqfd._core")]
pub(crate) struct Device {
    pub(super) core: Arc<dyn pci::AnyDevice>,
    pub(super) routes: Arc<DeviceRoutes>,
    pub(super) partition: Py<Partition>,
}

/// A restored `pci::Device`, on its way into the Python object of its class.
#[pyclass(frozen)]
pub(super) struct RestoredDevice(pub(super) Arc<dyn Any + Send + Sync>);

/// A device's MSI-X capability: the registers of its guest driver, and a route for each vector that is used.
///
/// The registers are the table, the pending bits and message control (PCI Local Bus 3.0 section 6.8.2, PCI Express
/// 5.0 section 7.7.2).
///
/// A device model passes the guest's accesses on, and signals `vectors`, or hands `vectors[i].event` to VFIO or
/// vhost. A vector's route is armed while MSI-X is enabled and neither the vector's mask bit nor the function mask
/// is set, with the message that its entry had at that moment. A later change of the entry's message waits for
/// the vector's next unmasking. A vector takes a GSI and an eventfd when it is first unmasked, or when its `event` is
/// read. Enabling MSI-X or clearing the function mask makes one push at most, for all vectors.
///
/// Signals on a vector that is not armed stay pending, and show as its pending bit, no matter who wrote them to the
/// eventfd. Unmasking sends one message for all of them.
///
/// A guest may write anything: its accesses never raise. A vector that can't be armed, because its message is
/// invalid or the kernel refuses, stays disarmed, and the others are armed; `faults()` has the reason. Only the
/// device model's own mistakes raise: a closed table or partition, a forked child, an argument of the wrong type.
///
/// Threads may share a table. Close it, or use `with`; closing its partition closes its routes too. In a forked
/// child only `signal()` of a vector with a route works.
///
/// Args:
///     partition: the partition that gets the interrupts.
///     vectors: the number of vectors, 1 to 2048.
///     events: eventfds of the caller's, in a mapping from vectors, or in a sequence from vector 0 up with None for
///         vectors without. Each is an int or an object with `fileno()`. The table duplicates them, and takes a GSI
///         for each at once.
///
/// Raises:
///     ClosedError: the table or its partition is closed. Every method but `close()` raises this.
///     ValueError, TypeError: `vectors` or `events` is invalid; see also `Partition.new_irqfd_route()`.
///     GsiExhaustedError, IrqFdError: no route can be made for an eventfd in `events`.
///
/// Example:
///     >>> partition = open_partition("simulated")
///     >>> table = MsixTable(partition, 4)
///     >>> table.write_table(16 * 2, (0xFEE00000).to_bytes(8, "little"))  # the guest programs vector 2
///     >>> table.write_table(16 * 2 + 8, (0x41).to_bytes(8, "little"))  # data 0x41, and vector control 0: unmasked
///     >>> table.vectors[2].signal()
///     >>> hex(table.read_pba(0, 8))
///     '0x4'
///     >>> table.write_message_control(2, (0x8000).to_bytes(2, "little"))  # the guest enables MSI-X
///     >>> hex(table.read_pba(0, 8))
///     '0x0'
///     >>> table
///     <MsixTable of 4 vectors, 1 with a route, enabled>
///     >>> [hex(interrupt.vector) for interrupt in partition.take_interrupts(timeout=10)]
///     ['0x41']
///     >>> table.close()
///     >>> partition.close()
#[pyclass(frozen, subclass, extends = Device, module = "mshv_irqfd._core")]
pub(crate) struct MsixTable(pub(super) Arc<pci::MsixTable>);

/// A device's MSI capability: the registers of its guest driver, and a route for each vector that is used.
///
/// It has 64-bit addresses and a mask bit for each vector (PCI Local Bus 3.0 section 6.8.1, PCI Express 5.0 section
/// 7.7.1). All its registers are in configuration space. A vector's route is armed while MSI is enabled, the vector is
/// not masked, and the guest has granted that many vectors. Its message is the address and the data, with the vector's
/// number in the lowest bits of the data. It is taken when the vector is armed, and again when the guest writes the
/// data, which drivers write last: half of a new message is never sent.
///
/// Everything else is as with `MsixTable`: signals, pending bits, accesses that never raise, faults, threads.
///
/// Args:
///     partition: the partition that gets the interrupts.
///     vectors: the number of vectors: 1, 2, 4, 8, 16 or 32.
///     events: eventfds of the caller's, as with `MsixTable`.
///
/// Raises:
///     ClosedError: the capability or its partition is closed. Every method but `close()` raises this.
///     ValueError, TypeError: `vectors` or `events` is invalid; see also `Partition.new_irqfd_route()`.
///     GsiExhaustedError, IrqFdError: no route can be made for an eventfd in `events`.
///
/// Example:
///     >>> partition = open_partition("simulated")
///     >>> device = MsiCapability(partition, 2)
///     >>> device.write_config(4, (0xFEE00000).to_bytes(4, "little"))  # the guest sets the address
///     >>> device.write_config(12, (0x40).to_bytes(2, "little"))  # and the data
///     >>> device.write_config(2, (0x11).to_bytes(2, "little"))  # grants two vectors and enables MSI
///     >>> device.vectors[1].signal()
///     >>> [hex(interrupt.vector) for interrupt in partition.take_interrupts(timeout=10)]
///     ['0x41']
///     >>> device.close()
///     >>> partition.close()
#[pyclass(frozen, subclass, extends = Device, module = "mshv_irqfd._core")]
pub(crate) struct MsiCapability(pub(super) Arc<pci::MsiCapability>);

/// The vectors of a device, by number.
#[pyclass(frozen, sequence, module = "mshv_irqfd._core")]
pub(crate) struct Vectors(pub(super) Py<Device>);

/// A vector of a device. It keeps the device alive.
#[pyclass(frozen, subclass, module = "mshv_irqfd._core")]
pub(crate) struct Vector {
    pub(super) device: Py<Device>,
    pub(super) index: usize,
}

/// A vector of an `MsixTable`: `table.vectors[i]`. It keeps the table alive.
///
/// Keep it in a variable where signals must be fast: `signal()` is one write.
#[pyclass(frozen, extends = Vector, module = "mshv_irqfd")]
pub(crate) struct MsixVector;

/// A vector of an `MsiCapability`: `capability.vectors[i]`. It keeps the capability alive.
///
/// Keep it in a variable where signals must be fast: `signal()` is one write.
#[pyclass(frozen, extends = Vector, module = "mshv_irqfd")]
pub(crate) struct MsiVector;
