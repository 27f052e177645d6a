//! irqfd and MSI routing for virtual machines, driven from Python.

pub mod hypervisor;
pub mod instruments;
pub mod irqfd;

#[cfg(feature = "python")]
mod python;

/// The Rust half of the Python package `mshv_irqfd`. Import the package instead.
#[cfg(feature = "python")]
#[pyo3::pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::python::bench::{Baseline, null_partition, signal_latencies};
    #[pymodule_export]
    use crate::python::{
        event::EventFd, msi::MsiRoute, objects::Batch, objects::IrqFdRoute, objects::Partition, probe::RawPartition,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("DEBUG_BUILD", cfg!(debug_assertions))?;
        crate::python::errors::look_up(module.py())
    }
}
