//! `MsixTable` and its vectors in Python.

use std::sync::{Arc, PoisonError};

use pyo3::exceptions::PyIndexError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::{MutexExt, PyOnceLock};
use pyo3::types::{PyBytes, PyIterator, PyList, PyTuple, PyType};

use super::arguments;
use super::errors::exception_of;
use super::objects::{Device, IrqFdRoute, MsixTable, MsixVector, MsixVectors, Partition, TakenRoute};
use crate::{irqfd, pci};

impl Partition {
    /// The devices that still exist.
    pub(super) fn devices(&self, py: Python<'_>) -> Vec<Arc<Device>> {
        let mut devices = self.devices.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        devices.retain(|device| device.strong_count() > 0);
        devices.iter().filter_map(std::sync::Weak::upgrade).collect()
    }
}

impl Device {
    /// The Python object of a vector's route.
    fn route<'py>(
        &self,
        partition: &Bound<'py, Partition>,
        index: usize,
        route: &Arc<irqfd::IrqFdRoute>,
    ) -> PyResult<Bound<'py, IrqFdRoute>> {
        static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        let py = partition.py();
        let known = |object: Option<&Py<IrqFdRoute>>| object.map(|object| object.bind(py).clone());
        let lock = || self.routes.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        if let Some(object) = known(lock().get(&index)) {
            return Ok(object);
        }
        // Not under the lock: making an object may run Python code.
        let class = CLASS.import(py, "mshv_irqfd.handles", "IrqFdRoute")?;
        let object = class.call1((partition, TakenRoute(Arc::clone(route))))?.cast_into::<IrqFdRoute>()?;
        let first = known(Some(lock().entry(index).or_insert_with(|| object.clone().unbind())));
        Ok(first.unwrap_or(object))
    }

    /// The Python objects of the routes that have been taken.
    pub(super) fn routes<'py>(&self, partition: &Bound<'py, Partition>) -> PyResult<Vec<Bound<'py, IrqFdRoute>>> {
        self.core.taken().map(|(index, route)| self.route(partition, index, route)).collect()
    }
}

impl MsixTable {
    fn core(&self) -> &pci::MsixTable {
        &self.device.core
    }
}

#[pymethods]
impl MsixTable {
    #[new]
    #[pyo3(signature = (partition, vectors, *, events=None))]
    fn new(
        py: Python<'_>,
        partition: &Bound<'_, Partition>,
        vectors: &Bound<'_, PyAny>,
        events: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let vectors = arguments::number(vectors, "vectors", "an MSI-X table has 1 to 2048")?;
        let events = events.map_or(Ok(Vec::new()), arguments::events)?;
        let core = Arc::clone(&partition.get().core);
        let core = py.detach(|| pci::MsixTable::new(core, vectors.try_into().unwrap_or(usize::MAX), &events))?;
        let device = Arc::new(Device { core, routes: Default::default() });
        partition
            .get()
            .devices
            .lock_py_attached(py)
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::downgrade(&device));
        Ok(Self { device, partition: partition.clone().unbind() })
    }

    /// The partition that gets the interrupts.
    #[getter]
    fn partition(&self, py: Python<'_>) -> Py<Partition> {
        self.partition.clone_ref(py)
    }

    /// The vectors, a sequence of `MsixVector`.
    #[getter]
    fn vectors(slf: Bound<'_, Self>) -> MsixVectors {
        MsixVectors(slf.unbind())
    }

    /// Reads the table, for the guest.
    ///
    /// An entry has 16 bytes: the message's address, its upper address, its data, and vector control, whose bit 0
    /// is the mask bit. The other bits of vector control are read-only and 0.
    ///
    /// Args:
    ///     offset: the offset from the table's first byte.
    ///     size: the number of bytes, 4 or 8. The offset must be a multiple of it.
    ///
    /// Returns:
    ///     The value, little-endian. All ones (in eight bytes at most) for any other offset or size, which the
    ///     specification leaves undefined.
    fn read_table(&self, py: Python<'_>, offset: &Bound<'_, PyAny>, size: &Bound<'_, PyAny>) -> PyResult<u64> {
        let (offset, size) = (arguments::access(offset, "offset")?, arguments::access(size, "size")?);
        Ok(py.detach(|| self.core().read_table(offset, size.try_into().unwrap_or(usize::MAX)))?)
    }

    /// Writes the table, for the guest.
    ///
    /// Makes a call into the kernel only if it unmasks or masks a vector. A message that is written to an unmasked
    /// entry takes effect when the vector is next unmasked.
    ///
    /// Args:
    ///     offset: the offset from the table's first byte.
    ///     data: 4 or 8 bytes, little-endian. The offset must be a multiple of their number. Any other write is
    ///     ignored.
    fn write_table(&self, py: Python<'_>, offset: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let (offset, data) = (arguments::access(offset, "offset")?, arguments::bytes(data)?);
        Ok(py.detach(|| self.core().write_table(offset, &data))?)
    }

    /// Reads the pending bits, for the guest: one for each vector, set while a signal waits for it to be armed.
    ///
    /// A guest can't write them: ignore its writes.
    ///
    /// Args:
    ///     offset: the offset from the first byte of the pending bits.
    ///     size: the number of bytes, 4 or 8. The offset must be a multiple of it.
    ///
    /// Returns:
    ///     The value, little-endian. All ones (in eight bytes at most) for any other offset or size.
    fn read_pba(&self, py: Python<'_>, offset: &Bound<'_, PyAny>, size: &Bound<'_, PyAny>) -> PyResult<u64> {
        let (offset, size) = (arguments::access(offset, "offset")?, arguments::access(size, "size")?);
        Ok(py.detach(|| self.core().read_pba(offset, size.try_into().unwrap_or(usize::MAX)))?)
    }

    /// The message control register, an int of 16 bits.
    ///
    /// Bit 15 enables MSI-X, bit 14 masks all vectors, bits 10:0 are the number of vectors less one.
    #[getter]
    fn message_control(&self, py: Python<'_>) -> PyResult<u16> {
        Ok(py.detach(|| self.core().message_control())?)
    }

    /// Takes a write to the capability in configuration space, for the guest.
    ///
    /// Pass every write on: only bits 15 and 14 of message control take effect, and the rest of the capability is
    /// read-only. Guests write them as a byte, as a word, or as the dword that starts with the capability's id.
    ///
    /// Args:
    ///     offset: the offset from the capability's first byte. Message control is at 2.
    ///     data: 1, 2 or 4 bytes, little-endian. The offset must be a multiple of their number. Any other write is
    ///         ignored.
    fn write_message_control(
        &self,
        py: Python<'_>,
        offset: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (offset, data) = (arguments::access(offset, "offset")?, arguments::bytes(data)?);
        Ok(py.detach(|| self.core().write_message_control(offset, &data))?)
    }

    /// The capability for the device's configuration space, 12 bytes.
    ///
    /// The pointer to the next capability is 0. Message control is as the register is now.
    ///
    /// Args:
    ///     table_bar: the BAR with the table, 0 to 5.
    ///     table_offset: the offset of the table in it, a multiple of 8.
    ///     pba_bar: the BAR with the pending bits, 0 to 5.
    ///     pba_offset: the offset of the pending bits in it, a multiple of 8.
    ///
    /// Raises:
    ///     ValueError: a value breaks one of these rules, or the pending bits overlap the table.
    #[pyo3(signature = (*, table_bar, table_offset, pba_bar, pba_offset))]
    fn capability<'py>(
        &self,
        py: Python<'py>,
        table_bar: &Bound<'_, PyAny>,
        table_offset: &Bound<'_, PyAny>,
        pba_bar: &Bound<'_, PyAny>,
        pba_offset: &Bound<'_, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let bar = |value, name| arguments::number(value, name, "a device has BARs 0 to 5");
        let offset = |value, name| arguments::number(value, name, "offsets are 32-bit multiples of 8");
        let table = (bar(table_bar, "table_bar")?, offset(table_offset, "table_offset")?);
        let pba = (bar(pba_bar, "pba_bar")?, offset(pba_offset, "pba_offset")?);
        let bytes = py.detach(|| self.core().capability(table, pba))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Returns to the state after a reset of the device: MSI-X disabled, every vector masked, every entry 0.
    ///
    /// Takes away what is pending, and the faults. The vectors keep their eventfds and GSIs. Never raises for what
    /// the kernel refuses: see `faults()`.
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.core().reset())?)
    }

    /// The vectors that are not armed or disarmed as the guest asked.
    ///
    /// Returns:
    ///     Pairs of a vector's number and an exception: the one that the same call on a route would have raised. A
    ///     vector is among them until it is next unmasked with success, or the device is reset. A vector that another
    ///     route's failed call left disarmed is among them (EAGAIN) until a push has armed it again.
    fn faults<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let faults = py.detach(|| self.core().faults())?;
        PyList::new(py, faults.iter().map(|(index, error)| (*index, exception_of(error))))
    }

    /// Disarms the vectors, frees their GSIs and closes their eventfds. Never pushes. Closing twice is fine.
    ///
    /// Raises:
    ///     IrqFdError: some irqfds could not be disarmed. Everything is closed nevertheless.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.core().close())?)
    }

    /// Whether it is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.core().is_closed()
    }

    /// Whether a finalizer should warn. Always false in a forked child.
    fn _is_left_open(&self) -> bool {
        !self.core().is_closed() && self.core().partition().check_open().is_ok()
    }

    /// For finalizers: closes. In a forked child closes only the descriptors.
    fn _abandon(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.core().abandon())?)
    }

    /// For the garbage collector: an instance of a subclass may be part of a cycle.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.partition)
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// Closes. In a forked child, where close() would raise, closes only the descriptors.
    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self._abandon(py)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let core = self.core();
        let (vectors, taken) = (core.vectors(), core.taken().count());
        let state = match py.detach(|| core.message_control()) {
            Ok(control) => match control >> 14 {
                0 => "disabled",
                1 => "disabled, function mask",
                2 => "enabled",
                _ => "enabled, function mask",
            },
            Err(irqfd::Error::Forked) => "of the process that forked this one",
            Err(_) => "closed",
        };
        format!("<MsixTable of {vectors} vectors, {taken} with a route, {state}>")
    }
}

#[pymethods]
impl MsixVectors {
    fn __len__(&self) -> usize {
        self.0.get().core().vectors()
    }

    fn __getitem__(&self, py: Python<'_>, index: isize) -> PyResult<MsixVector> {
        let count = self.__len__();
        let place = if index < 0 { index.checked_add_unsigned(count) } else { Some(index) };
        match place.and_then(|place| usize::try_from(place).ok()).filter(|place| *place < count) {
            Some(index) => Ok(MsixVector { table: self.0.clone_ref(py), index }),
            None => Err(PyIndexError::new_err(format!(
                "vector {index} is out of range; this table has vectors 0 to {}",
                count - 1
            ))),
        }
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        let vectors = (0..self.__len__()).map(|index| MsixVector { table: self.0.clone_ref(py), index });
        PyTuple::new(py, vectors.collect::<Vec<_>>())?.try_iter()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }

    fn __repr__(&self) -> String {
        format!("<MsixVectors 0 to {}>", self.__len__() - 1)
    }
}

impl MsixVector {
    fn core(&self) -> &pci::MsixTable {
        self.table.get().core()
    }

    fn object<'py>(&self, py: Python<'py>, route: &Arc<irqfd::IrqFdRoute>) -> PyResult<Bound<'py, IrqFdRoute>> {
        let table = self.table.get();
        table.device.route(table.partition.bind(py), self.index, route)
    }
}

#[pymethods]
impl MsixVector {
    /// The number of the vector.
    #[getter]
    fn index(&self) -> usize {
        self.index
    }

    /// The table that it is a vector of.
    #[getter]
    fn table(&self, py: Python<'_>) -> Py<MsixTable> {
        self.table.clone_ref(py)
    }

    /// A view of the vector's eventfd, for VFIO, vhost, or a device model. Takes the vector's route if it has none.
    ///
    /// It stays the same as long as the table is open.
    ///
    /// Raises:
    ///     GsiExhaustedError, IrqFdError: the vector has no route, and none can be made.
    #[getter]
    fn event<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let route = py.detach(|| self.core().take_route(self.index))?;
        self.object(py, route)?.getattr(pyo3::intern!(py, "event"))
    }

    /// Sends the vector's message now if it is armed; otherwise leaves the signal pending.
    ///
    /// Never waits. In a forked child it works if the vector has a route.
    ///
    /// Raises:
    ///     ClosedError: the table, its partition or the vector's route is closed.
    fn signal(&self, py: Python<'_>) -> PyResult<()> {
        let core = self.core();
        let signal = || core.signal(self.index);
        let may_block = core.route(self.index).is_some_and(|route| route.signal_may_block());
        Ok(if may_block { py.detach(signal) } else { signal() }?)
    }

    /// Whether the vector is masked, by its own mask bit or by the function mask.
    #[getter]
    fn masked(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(py.detach(|| self.core().masked(self.index))?)
    }

    /// Whether a signal waits for the vector to be armed: its pending bit.
    #[getter]
    fn pending(&self) -> PyResult<bool> {
        Ok(self.core().pending(self.index)?)
    }

    /// Takes the pending signals, so that unmasking sends no message for them.
    ///
    /// For a device whose reason to interrupt has gone (PCI Local Bus 3.0 section 6.8.3.5).
    ///
    /// Returns:
    ///     Whether a signal was pending. Always false while the vector is armed.
    fn consume_pending(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(py.detach(|| self.core().consume_pending(self.index))?)
    }

    /// The vector's route; None if it has not been taken yet.
    ///
    /// The table sets, masks and closes it: look at it only.
    #[getter]
    fn route<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, IrqFdRoute>>> {
        self.core().route(self.index).map(|route| self.object(py, route)).transpose()
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.table.is(&other.table) && self.index == other.index
    }

    fn __hash__(&self) -> isize {
        (self.table.as_ptr() as isize >> 4).wrapping_add(self.index as isize)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.table)
    }

    fn __repr__(&self) -> String {
        let gsi = self.core().route(self.index).map(|route| format!(" GSI {}", route.gsi()));
        format!("<MsixVector {}{}>", self.index, gsi.unwrap_or_default())
    }
}
