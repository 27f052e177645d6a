//! `MsiRoute` in Python.

use std::hash::{DefaultHasher, Hash, Hasher};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::errors::bad_integer;
use super::{arguments, values};
use crate::irqfd;

/// An MSI: the address and the data that a device would write there.
///
/// Immutable, comparable and hashable.
///
/// Args:
///     address: 0xFEE00000-0xFEEFFFFF with bits 11:4 and 1:0 clear. Bits 19:12 are the destination APIC id, bit 3
///         the redirection hint, bit 2 the destination mode (Intel SDM volume 3, "Message Signalled Interrupts").
///     data: 16 bits. Bits 7:0 are the vector (16 or more for fixed and lowest-priority delivery), bits 10:8 the
///         delivery mode (3 and 6 are reserved), bit 14 the level, bit 15 the trigger mode.
///
/// Raises:
///     ValueError: a value breaks one of these rules. The message names both.
///     OverflowError: a value is negative, or has more than 64 bits.
///     TypeError: a value is not an int.
///
/// Example:
///     >>> MsiRoute(0xFEE01000, 0x41) == MsiRoute.fixed(0x41, 1)
///     True
#[pyclass(frozen, eq, module = "mshv_irqfd")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MsiRoute(pub(super) irqfd::MsiRoute);

/// An MSI from one `MsiRoute`, or from an address and data.
pub(super) fn from_arguments(
    address: &Bound<'_, PyAny>,
    data: Option<&Bound<'_, PyAny>>,
) -> PyResult<irqfd::MsiRoute> {
    if let Ok(route) = address.cast::<MsiRoute>() {
        return match data {
            None => Ok(route.get().0),
            Some(_) => Err(PyTypeError::new_err("an MsiRoute includes its data; give no second argument")),
        };
    }
    let Some(data) = data else {
        return Err(PyTypeError::new_err("give an MsiRoute, or an MSI address and data"));
    };
    arguments::address_and_data(address, data)
}

#[pymethods]
impl MsiRoute {
    #[new]
    fn new(address: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<Self> {
        arguments::address_and_data(address, data).map(Self)
    }

    /// An edge-triggered interrupt with fixed delivery to one APIC id. Nearly every device sends these.
    ///
    /// Args:
    ///     vector: 16 to 255.
    ///     apic_id: 0 to 255 (255 is all processors).
    #[staticmethod]
    fn fixed(vector: &Bound<'_, PyAny>, apic_id: &Bound<'_, PyAny>) -> PyResult<Self> {
        let byte = |value: &Bound<'_, PyAny>, name: &str, least: i64, range: &str| {
            let number = value.extract::<i64>().map_err(|error| bad_integer(&error, value, name, range))?;
            if (least..=255).contains(&number) {
                Ok(number as u64)
            } else {
                Err(PyValueError::new_err(format!("{name} {number} is out of range; {range}")))
            }
        };
        let vector = byte(vector, "vector", 16, "fixed delivery takes 16 to 255")?;
        let apic_id = byte(apic_id, "apic_id", 0, "APIC ids are 0 to 255")?;
        let msi = irqfd::MsiRoute::new(0xFEE0_0000 | apic_id << 12, vector).map_err(irqfd::Error::from)?;
        Ok(Self(msi))
    }

    /// The address, an int.
    #[getter]
    fn address(&self) -> u32 {
        self.0.raw().address
    }

    /// The data, an int of 16 bits.
    #[getter]
    fn data(&self) -> u32 {
        self.0.raw().data
    }

    /// The vector, data bits 7:0.
    #[getter]
    fn vector(&self) -> u8 {
        self.0.vector()
    }

    /// The destination APIC id (or logical destination), address bits 19:12.
    #[getter]
    fn destination(&self) -> u8 {
        self.0.target().destination
    }

    /// The delivery mode, data bits 10:8.
    #[getter]
    fn delivery_mode<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        values::delivery_mode(py, self.0.target().delivery_mode)
    }

    /// Whether the destination is logical, address bit 2.
    #[getter]
    fn logical(&self) -> bool {
        self.0.target().logical
    }

    /// Whether the interrupt is level-triggered, data bit 15.
    #[getter]
    fn level(&self) -> bool {
        self.0.target().level
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        hasher.finish()
    }

    fn __repr__(&self) -> String {
        format!("MsiRoute(address={:#010x}, data={:#06x})", self.address(), self.data())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let arguments = (slf.get().address(), slf.get().data());
        (slf.get_type(), arguments).into_pyobject(slf.py())
    }
}

/// The text for a route's `repr`.
pub(super) fn describe(msi: irqfd::MsiRoute) -> String {
    let target = msi.target();
    let mode = match target.delivery_mode {
        0 => "",
        1 => " lowest-priority",
        2 => " SMI",
        4 => " NMI",
        5 => " INIT",
        _ => " ExtINT",
    };
    let raw = msi.raw();
    format!(
        "{:#010x}/{:#06x} (vector {:#04x}{mode}{} to {} {})",
        raw.address,
        raw.data,
        msi.vector(),
        if target.level { " level" } else { "" },
        if target.logical { "logical" } else { "APIC" },
        target.destination
    )
}
