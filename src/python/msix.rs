//! `MsixTable` in Python.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::log::logged;
use super::objects::{Device, MsixTable, Partition};
use super::{arguments, device};
use crate::pci::{self, AnyDevice};

#[pymethods]
impl MsixTable {
    #[new]
    #[pyo3(signature = (partition, vectors, *, events=None))]
    fn new(
        py: Python<'_>,
        partition: &Bound<'_, Partition>,
        vectors: &Bound<'_, PyAny>,
        events: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let core: Arc<pci::MsixTable> =
            device::core(py, &partition.get().core, vectors, events, "an MSI-X table has 1 to 2048")?;
        let device = Device::of(partition, Arc::clone(&core) as Arc<dyn pci::AnyDevice>);
        Ok(PyClassInitializer::from(device).add_subclass(Self(core)))
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
        Ok(py.detach(|| self.0.read_table(offset, size.try_into().unwrap_or(usize::MAX)))?)
    }

    /// Writes the table, for the guest.
    ///
    /// Makes a call into the kernel only if it unmasks or masks a vector. A message that is written to an unmasked
    /// entry takes effect when the vector is next unmasked.
    ///
    /// Args:
    ///     offset: the offset from the table's first byte.
    ///     data: 4 or 8 bytes, little-endian. The offset must be a multiple of their number. Any other write is
    ///         ignored.
    fn write_table(&self, py: Python<'_>, offset: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let (offset, data) = (arguments::access(offset, "offset")?, arguments::bytes(data)?);
        if self.0.try_write_table(offset, &data)? {
            return Ok(());
        }
        logged(py, self.0.vectors().partition(), || self.0.write_table(offset, &data))
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
        Ok(py.detach(|| self.0.read_pba(offset, size.try_into().unwrap_or(usize::MAX)))?)
    }

    /// The message control register, an int of 16 bits.
    ///
    /// Bit 15 enables MSI-X, bit 14 masks all vectors, bits 10:0 are the number of vectors less one.
    #[getter]
    fn message_control(&self, py: Python<'_>) -> PyResult<u16> {
        Ok(py.detach(|| self.0.message_control())?)
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
        logged(py, self.0.vectors().partition(), || self.0.write_message_control(offset, &data))
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
        let bytes = py.detach(|| self.0.capability(table, pba))?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn __repr__(slf: &Bound<'_, Self>) -> String {
        let core = &slf.get().0;
        let control = slf.py().detach(|| core.message_control());
        slf.as_super().get().describe(
            "MsixTable",
            control.map(|control| match control >> 14 {
                0 => "disabled",
                1 => "disabled, function mask",
                2 => "enabled",
                _ => "enabled, function mask",
            }),
        )
    }
}
