//! What `MsixTable` and `MsiCapability` have in common in Python, and their vectors.

use std::os::fd::RawFd;
use std::sync::{Arc, PoisonError, Weak};

use pyo3::exceptions::PyIndexError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::{MutexExt, PyOnceLock};
use pyo3::types::{PyIterator, PyList, PyTuple, PyType};

use super::errors::exception_of;
use super::log::logged;
use super::objects::{
    Device, DeviceRoutes, IrqFdRoute, MsiVector, MsixTable, MsixVector, Partition, RestoredDevice, TakenRoute,
    Vector, Vectors,
};
use super::waiting::{self, Watch};
use super::{arguments, saved};
use crate::{irqfd, pci};

impl Partition {
    /// The routes of the devices that still exist.
    pub(super) fn device_routes(&self, py: Python<'_>) -> Vec<Arc<DeviceRoutes>> {
        let mut devices = self.devices.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        devices.retain(|device| device.strong_count() > 0);
        devices.iter().filter_map(Weak::upgrade).collect()
    }
}

impl DeviceRoutes {
    /// The Python object of a vector's route.
    fn object<'py>(
        &self,
        partition: &Bound<'py, Partition>,
        index: usize,
        route: &Arc<irqfd::IrqFdRoute>,
    ) -> PyResult<Bound<'py, IrqFdRoute>> {
        static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        let py = partition.py();
        let lock = || self.objects.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        if let Some(object) = lock().get(&index) {
            return Ok(object.bind(py).clone());
        }
        // Not under the lock: making an object may run Python code.
        let class = CLASS.import(py, "mshv_irqfd.handles", "IrqFdRoute")?;
        let taken = TakenRoute { route: Arc::clone(route), of_device: true };
        let object = class.call1((partition, taken))?.cast_into::<IrqFdRoute>()?;
        // Another thread may have been first.
        Ok(lock().entry(index).or_insert_with(|| object.clone().unbind()).bind(py).clone())
    }

    /// The Python objects of the routes that have been taken.
    pub(super) fn all<'py>(&self, partition: &Bound<'py, Partition>) -> PyResult<Vec<Bound<'py, IrqFdRoute>>> {
        self.vectors.taken().map(|(index, route)| self.object(partition, index, route)).collect()
    }
}

impl Device {
    pub(super) fn of(partition: &Bound<'_, Partition>, core: Arc<dyn pci::AnyDevice>) -> Self {
        let vectors = Arc::clone(core.vectors());
        let routes = Arc::new(DeviceRoutes { vectors, objects: Default::default() });
        let devices = partition.get().devices.lock_py_attached(partition.py());
        devices.unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&routes));
        Self { core, routes, partition: partition.clone().unbind() }
    }

    /// The text for `repr`.
    pub(super) fn describe(&self, name: &str, state: irqfd::Result<&str>) -> String {
        let state = match state {
            Ok(state) => state,
            Err(irqfd::Error::Forked) => "of the process that forked this one",
            Err(_) => "closed",
        };
        let (vectors, taken) = (self.routes.vectors.count(), self.routes.vectors.taken().count());
        format!("<{name} of {vectors} vectors, {taken} with a route, {state}>")
    }
}

/// The device of a new Python object: a new one with so many `vectors`, or the restored one that stands in their place.
/// `range` says which numbers are valid.
pub(super) fn core<R: pci::Registers + 'static>(
    py: Python<'_>,
    partition: &Arc<irqfd::Partition>,
    vectors: &Bound<'_, PyAny>,
    events: Option<&Bound<'_, PyAny>>,
    range: &str,
) -> PyResult<Arc<pci::Device<R>>> {
    let restored = vectors.cast::<RestoredDevice>().ok().map(|restored| Arc::clone(&restored.get().0));
    if let Some(Ok(device)) = restored.map(Arc::downcast) {
        return Ok(device);
    }
    let vectors = arguments::number(vectors, "vectors", range)?.try_into().unwrap_or(usize::MAX);
    let events = events.map_or(Ok(Vec::new()), arguments::events)?;
    let device = logged(py, partition, || pci::Device::new(Arc::clone(partition), vectors, &events))?;
    Ok(Arc::new(device))
}

/// Makes the device of a saved state.
fn restored<R: pci::Registers + 'static>(
    py: Python<'_>,
    partition: &Arc<irqfd::Partition>,
    state: &Bound<'_, PyAny>,
    events: &[(usize, RawFd)],
) -> PyResult<RestoredDevice> {
    let state = saved::from_dict(state)?;
    let device = logged(py, partition, || pci::Device::<R>::restore(partition, &state, events))?;
    Ok(RestoredDevice(Arc::new(device)))
}

/// Faults for Python.
fn listed<'py>(py: Python<'py>, faults: &[(usize, Arc<irqfd::Error>)]) -> PyResult<Bound<'py, PyList>> {
    PyList::new(py, faults.iter().map(|(index, error)| (*index, exception_of(error))))
}

#[pymethods]
impl Device {
    /// The partition that gets the interrupts.
    #[getter]
    fn partition(&self, py: Python<'_>) -> Py<Partition> {
        self.partition.clone_ref(py)
    }

    /// The vectors, a sequence.
    #[getter]
    fn vectors(slf: Bound<'_, Self>) -> Vectors {
        Vectors(slf.unbind())
    }

    /// Returns to the state after a reset of the device: disabled; in MSI-X, every vector masked and every entry 0.
    ///
    /// Takes away what is pending, and the faults. The vectors keep their eventfds and GSIs. Never raises for what
    /// the kernel refuses: see `faults()`.
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, &self.partition.get().core, || self.core.reset())
    }

    /// The vectors that are not armed or disarmed as the guest asked.
    ///
    /// Returns:
    ///     Pairs of a vector's number and an exception: the one that the same call on a route would have raised. A
    ///     vector is among them until it is next unmasked with success, `retry_faults()` succeeds for it, or the device
    ///     is reset. A vector that another route's failed call left disarmed is among them (EAGAIN) until a push has
    ///     armed it again.
    fn faults<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let faults = py.detach(|| self.core.faults())?;
        listed(py, &faults)
    }

    /// Tries again to arm and disarm the vectors in `faults()`, with one push at most.
    ///
    /// For a device model that can remove the cause: it creates the missing VP, or frees GSIs or memory. The guest
    /// writes nothing for this. A vector is armed with the message that its entry had when it was unmasked, and sends
    /// what is pending. One whose message is invalid stays as it is until the guest unmasks it with a valid one.
    ///
    /// Returns:
    ///     The vectors that failed again, as `faults()` does.
    fn retry_faults<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let faults = logged(py, &self.partition.get().core, || self.core.retry())?;
        listed(py, &faults)
    }

    /// Saves the registers and the vectors, for a snapshot or a migration.
    ///
    /// Says of each vector whether a signal is pending, as `Partition.save()` does for routes: takes nothing away, and
    /// disarms each vector for a moment. The page "Saved state" of the docs describes it, key by key.
    ///
    /// Returns:
    ///     A dict of values that JSON has.
    ///
    /// Raises:
    ///     RouteBrokenError: a vector's route is broken.
    ///     IrqFdError: the kernel refused to disarm a vector, or to arm it again.
    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = logged(py, &self.partition.get().core, || self.core.save())?;
        saved::to_dict(py, state)
    }

    /// The device that was saved, with its registers, GSIs and pending signals, or an error and no change.
    ///
    /// Arms the vectors that were armed, with the MSIs that they had, by one push at most. A pending signal is
    /// delivered once: now if the vector is armed, or when it is. A vector that had a fault keeps it, as a `ValueError`
    /// with the same text, until the guest unmasks it again.
    ///
    /// Args:
    ///     partition: the partition that gets the interrupts. Restore all states before making routes or other devices,
    ///         which could take their GSIs.
    ///     state: the dict that `save()` returned, as it was or from JSON.
    ///     events: eventfds of the caller's for vectors that have a GSI in the state, as for a new device. By default
    ///         each vector makes a new one.
    ///
    /// Raises:
    ///     ValueError, TypeError, OverflowError: the state or `events` is invalid, or a GSI is taken or not one of
    ///         `partition.gsis`. The message names the key and the rule.
    ///     MissingVpError: no VP has the destination of a vector that is to be armed.
    ///     RoutingError, IrqFdError: the kernel refused, or an eventfd can't be made (EMFILE) or is not open (EBADF).
    #[classmethod]
    #[pyo3(signature = (partition, state, *, events=None))]
    fn restore<'py>(
        class: &Bound<'py, PyType>,
        partition: &Bound<'py, Partition>,
        state: &Bound<'py, PyAny>,
        events: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = class.py();
        let events = events.map_or(Ok(Vec::new()), arguments::events)?;
        let core = &partition.get().core;
        let device = if class.is_subclass_of::<MsixTable>()? {
            restored::<pci::MsixRegisters>(py, core, state, &events)
        } else {
            restored::<pci::MsiRegisters>(py, core, state, &events)
        };
        class.call1((partition, device?))
    }

    /// Disarms the vectors, frees their GSIs and closes their eventfds. Never pushes. Closing twice is fine.
    ///
    /// Raises:
    ///     IrqFdError: some irqfds could not be disarmed. Everything is closed nevertheless.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, &self.partition.get().core, || self.core.close())
    }

    /// Whether it is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.routes.vectors.is_closed()
    }

    /// Whether a finalizer should warn. Always false in a forked child.
    fn _is_left_open(&self) -> bool {
        !self.routes.vectors.is_closed() && self.routes.vectors.partition().check_open().is_ok()
    }

    /// For finalizers and `with` blocks: closes. In a forked child closes only the descriptors.
    fn _abandon(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, &self.partition.get().core, || self.core.abandon())
    }

    /// For the garbage collector: an instance of a subclass may be part of a cycle.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.partition)
    }
}

#[pymethods]
impl Vectors {
    fn __len__(&self) -> usize {
        self.0.get().routes.vectors.count()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, index: isize) -> PyResult<Bound<'py, Vector>> {
        let count = self.__len__();
        let place = if index < 0 { index.checked_add_unsigned(count) } else { Some(index) };
        match place.and_then(|place| usize::try_from(place).ok()).filter(|place| *place < count) {
            Some(index) => self.at(py, index),
            None => Err(PyIndexError::new_err(format!(
                "vector {index} is out of range; this device has vectors 0 to {}",
                count - 1
            ))),
        }
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        let vectors: PyResult<Vec<_>> = (0..self.__len__()).map(|index| self.at(py, index)).collect();
        PyTuple::new(py, vectors?)?.try_iter()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }

    fn __repr__(&self) -> String {
        format!("<vectors 0 to {}>", self.__len__() - 1)
    }
}

impl Vectors {
    fn at<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, Vector>> {
        let vector = PyClassInitializer::from(Vector { device: self.0.clone_ref(py), index });
        Ok(if self.0.bind(py).is_instance_of::<MsixTable>() {
            Bound::new(py, vector.add_subclass(MsixVector))?.into_super()
        } else {
            Bound::new(py, vector.add_subclass(MsiVector))?.into_super()
        })
    }
}

impl Vector {
    fn vectors(&self) -> &pci::Vectors {
        &self.device.get().routes.vectors
    }

    fn object<'py>(&self, py: Python<'py>, route: &Arc<irqfd::IrqFdRoute>) -> PyResult<Bound<'py, IrqFdRoute>> {
        let device = self.device.get();
        device.routes.object(device.partition.bind(py), self.index, route)
    }
}

#[pymethods]
impl Vector {
    /// The number of the vector.
    #[getter]
    fn index(&self) -> usize {
        self.index
    }

    /// The `MsixTable` or `MsiCapability` that it is a vector of.
    #[getter]
    fn device(&self, py: Python<'_>) -> Py<Device> {
        self.device.clone_ref(py)
    }

    /// A view of the vector's eventfd, for VFIO, vhost, or a device model. Takes the vector's route if it has none.
    ///
    /// It follows `vectors[i].route.set_event()`, and works as long as the device is open.
    ///
    /// Raises:
    ///     GsiExhaustedError, IrqFdError: the vector has no route, and none can be made.
    #[getter]
    fn event<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let route = py.detach(|| self.device.get().core.take_route(self.index))?;
        self.object(py, route)?.getattr(pyo3::intern!(py, "event"))
    }

    /// Sends the vector's message now if it is armed; otherwise leaves the signal pending.
    ///
    /// Never waits. In a forked child it works if the vector has a route.
    ///
    /// Raises:
    ///     ClosedError: the device, its partition or the vector's route is closed.
    fn signal(&self, py: Python<'_>) -> PyResult<()> {
        let vectors = self.vectors();
        if !vectors.try_signal(self.index)? {
            py.detach(|| vectors.signal(self.index))?;
        }
        Ok(())
    }

    /// Whether the vector is masked, by its own mask bit or, of MSI-X, by the function mask.
    #[getter]
    fn masked(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(py.detach(|| self.device.get().core.masked(self.index))?)
    }

    /// Whether a signal waits for the vector to be armed: its pending bit.
    #[getter]
    fn pending(&self) -> PyResult<bool> {
        Ok(self.vectors().pending(self.index)?)
    }

    /// Waits in asyncio until a signal is pending, and leaves it pending: see `IrqFdRoute.wait_pending()`.
    ///
    /// Takes the vector's route if it has none and must wait, as `event` does.
    ///
    /// Raises:
    ///     ClosedError: the device is closed, or it was closed while the task waited.
    ///     GsiExhaustedError, IrqFdError: the vector has no route, and none can be made; or the process has too many
    ///         open files (EMFILE). A waiting task needs two.
    fn wait_pending<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        waiting::pending(slf)
    }

    /// Begins a watch, for `mshv_irqfd._waiting`.
    fn _watch(&self, py: Python<'_>) -> PyResult<Watch> {
        Ok(Watch::new(py.detach(|| self.device.get().core.take_route(self.index)?.watch())?))
    }

    /// Takes the pending signals, so that unmasking sends no message for them.
    ///
    /// For a device that no longer has a reason to interrupt (PCI Local Bus 3.0 section 6.8.3.5, PCI Express 5.0
    /// section 6.1.4.5).
    ///
    /// Returns:
    ///     Whether a signal was pending. Always false while the vector is armed.
    fn consume_pending(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(py.detach(|| self.vectors().consume_pending(self.index))?)
    }

    /// The vector's route; None if it has not been taken yet.
    ///
    /// The device sets, masks and closes it: read it, and do not change it.
    #[getter]
    fn route<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, IrqFdRoute>>> {
        self.vectors().route(self.index).map(|route| self.object(py, route)).transpose()
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.device.is(&other.device) && self.index == other.index
    }

    fn __hash__(&self) -> isize {
        (self.device.as_ptr() as isize >> 4).wrapping_add(self.index as isize)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.device)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let index = slf.get().index;
        let gsi = slf.get().vectors().route(index).map(|route| format!(" GSI {}", route.gsi()));
        Ok(format!("<{} {index}{}>", slf.get_type().name()?, gsi.unwrap_or_default()))
    }
}
