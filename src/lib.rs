//! irqfd and MSI routing for virtual machines: the Rust core of the Python package `mshv_irqfd`.
//!
//! [`irqfd`] is the core: [`Partition::open`](irqfd::Partition::open) or [`adopt`](irqfd::Partition::adopt) a
//! partition, make routes, change them one by one or in a [`Batch`](irqfd::Batch), and observe the interrupts where the
//! kernel reports them. [`pci`] has what a guest's driver sees of them: MSI-X tables. [`hypervisor`] has the kernels
//! behind it, [`instruments`] measures and probes them.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use mshv_irqfd::hypervisor::Backend;
//! use mshv_irqfd::irqfd::{Batch, MsiRoute, Options, Partition};
//!
//! # fn main() -> mshv_irqfd::irqfd::Result {
//! let partition = Partition::open(Backend::Simulated, &Options::default())?;
//! let routes = [partition.new_route(None)?, partition.new_route(None)?];
//! let mut batch = Batch::new(Arc::clone(&partition))?;
//! for (route, vector) in routes.iter().zip(0x40..) {
//!     batch.set_msi(route, MsiRoute::new(0xFEE0_0000, vector)?);
//! }
//! batch.commit()?; // one push for both
//!
//! routes[0].signal(1)?; // or a write to the eventfd, by VFIO or vhost
//! let interrupts = partition.take_interrupts(Duration::from_secs(10))?;
//! assert_eq!(interrupts[0].vector, 0x40);
//!
//! routes[1].mask()?;
//! routes[1].signal(1)?; // waits in the eventfd
//! assert!(routes[1].pending()?);
//! # Ok(())
//! # }
//! ```

pub mod hypervisor;
pub mod instruments;
pub mod irqfd;
pub mod pci;

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
        event::EventFd, msi::MsiRoute, objects::Batch, objects::Device, objects::IoEventFd, objects::IrqFdRoute,
        objects::MsiCapability, objects::MsiVector, objects::MsixTable, objects::MsixVector, objects::Partition,
        objects::Vector, objects::Vectors, probe::RawPartition, waiting::Watch,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("DEBUG_BUILD", cfg!(debug_assertions))?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        crate::python::errors::look_up(module.py())
    }
}
