//! `MsiCapability` in Python.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyType};

use super::log::logged;
use super::objects::{Device, MsiCapability, Partition, RestoredCapability};
use super::{arguments, saved};
use crate::pci::{self, AnyDevice};

#[pymethods]
impl MsiCapability {
    #[new]
    #[pyo3(signature = (partition, vectors, *, events=None))]
    fn new(
        py: Python<'_>,
        partition: &Bound<'_, Partition>,
        vectors: &Bound<'_, PyAny>,
        events: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let core = if let Ok(restored) = vectors.cast::<RestoredCapability>() {
            Arc::clone(&restored.get().0)
        } else {
            let vectors = arguments::number(vectors, "vectors", "give 1, 2, 4, 8, 16 or 32")?;
            let events = events.map_or(Ok(Vec::new()), arguments::events)?;
            let core = Arc::clone(&partition.get().core);
            let vectors = vectors.try_into().unwrap_or(usize::MAX);
            Arc::new(py.detach(|| pci::MsiCapability::new(core, vectors, &events))?)
        };
        let device = Device::of(partition, Arc::clone(&core) as Arc<dyn pci::AnyDevice>);
        Ok(PyClassInitializer::from(device).add_subclass(Self(core)))
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
        let state = logged(py, self.0.vectors().partition(), || self.0.save())?;
        saved::to_dict(py, &state)
    }

    /// The capability that was saved, with its registers, GSIs and pending signals, or an error and no change.
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
        let state = saved::from_dict(state)?;
        let events = events.map_or(Ok(Vec::new()), arguments::events)?;
        let core = &partition.get().core;
        let device = class.py().detach(|| pci::MsiCapability::restore(core, &state, &events))?;
        class.call1((partition, RestoredCapability(Arc::new(device))))
    }

    /// Reads the capability in configuration space, for the guest.
    ///
    /// Args:
    ///     offset: the offset from the capability's first byte.
    ///     size: the number of bytes, 1, 2 or 4. The offset must be a multiple of it.
    ///
    /// Returns:
    ///     The value, little-endian. All ones (in eight bytes at most) for any other offset or size.
    fn read_config(&self, py: Python<'_>, offset: &Bound<'_, PyAny>, size: &Bound<'_, PyAny>) -> PyResult<u64> {
        let (offset, size) = (arguments::access(offset, "offset")?, arguments::access(size, "size")?);
        Ok(py.detach(|| self.0.read(offset, size.try_into().unwrap_or(usize::MAX)))?)
    }

    /// Writes the capability in configuration space, for the guest.
    ///
    /// Pass every write on: what is read-only stays as it is.
    ///
    /// Args:
    ///     offset: the offset from the capability's first byte.
    ///     data: 1, 2 or 4 bytes, little-endian. The offset must be a multiple of their number. Any other write is
    ///         ignored.
    fn write_config(&self, py: Python<'_>, offset: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let (offset, data) = (arguments::access(offset, "offset")?, arguments::bytes(data)?);
        logged(py, self.0.vectors().partition(), || self.0.write(offset, &data))
    }

    /// The capability as it is now, 24 bytes, for the device's configuration space.
    ///
    /// The pointer to the next capability is 0.
    fn capability<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = py.detach(|| self.0.capability())?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn __repr__(slf: &Bound<'_, Self>) -> String {
        let core = &slf.get().0;
        let control = slf.py().detach(|| core.read(2, 2));
        let state = control.map(|control| if control & 1 == 0 { "disabled" } else { "enabled" });
        slf.as_super().get().describe("MsiCapability", state)
    }
}
