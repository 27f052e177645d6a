//! `MsiCapability` in Python.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::log::logged;
use super::objects::{Device, MsiCapability, Partition};
use super::{arguments, device};
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
        let core: Arc<pci::MsiCapability> =
            device::core(py, &partition.get().core, vectors, events, "give 1, 2, 4, 8, 16 or 32")?;
        let device = Device::of(partition, Arc::clone(&core) as Arc<dyn pci::AnyDevice>);
        Ok(PyClassInitializer::from(device).add_subclass(Self(core)))
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
