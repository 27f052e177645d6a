//! Bare ioctls for `mshv-irqfd probe`. Private to the package.

use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use super::errors::{ClosedError, plain_os_error};
use crate::instruments::probe::{self, Irqfd, RawEntry};
use crate::irqfd::{Error, Failure};

/// A partition with VP 0 that makes bare ioctls and checks nothing. For `mshv-irqfd probe` alone.
#[pyclass(frozen, module = "mshv_irqfd._core")]
pub(crate) struct RawPartition(Mutex<Option<std::sync::Arc<probe::RawPartition>>>);

fn entries(entries: Vec<(u32, u64, u32)>) -> Vec<RawEntry> {
    entries.into_iter().map(|(gsi, address, data)| RawEntry { gsi, address, data }).collect()
}

impl RawPartition {
    fn open(&self, py: Python<'_>) -> PyResult<std::sync::Arc<probe::RawPartition>> {
        let partition = self.0.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).clone();
        partition.ok_or_else(|| ClosedError::new_err("the partition is closed"))
    }
}

#[pymethods]
impl RawPartition {
    #[new]
    fn new(py: Python<'_>, backend: &str, device: PathBuf) -> PyResult<Self> {
        let made = py.detach(|| match backend {
            "mshv" => Some(probe::RawPartition::mshv(&device)),
            "kvm" => Some(probe::RawPartition::kvm(&device)),
            _ => None,
        });
        let made = made.ok_or_else(|| PyValueError::new_err(format!("no backend {backend:?} to probe")))?;
        let made = made.map_err(|error| Error::from(Failure::new(error, None)))?;
        Ok(Self(Mutex::new(Some(std::sync::Arc::new(made)))))
    }

    /// Pushes a table of (GSI, address, data). Raises OSError if the kernel refuses.
    fn set_routing(&self, py: Python<'_>, table: Vec<(u32, u64, u32)>) -> PyResult<()> {
        let partition = self.open(py)?;
        py.detach(|| partition.set_routing(&entries(table))).map_err(|error| plain_os_error(&error))
    }

    /// Assigns or deassigns an irqfd. Raises OSError if the kernel refuses.
    #[pyo3(signature = (event, gsi, *, deassign=false, resample=None))]
    fn irqfd(
        &self,
        py: Python<'_>,
        event: RawFd,
        gsi: u32,
        deassign: bool,
        resample: Option<RawFd>,
    ) -> PyResult<()> {
        let partition = self.open(py)?;
        py.detach(|| partition.irqfd(Irqfd { event, gsi, deassign, resample }))
            .map_err(|error| plain_os_error(&error))
    }

    /// Takes the vectors from KVM's local APIC; None on mshv.
    fn take_vectors(&self, py: Python<'_>) -> PyResult<Option<Vec<u32>>> {
        let partition = self.open(py)?;
        let taken = py.detach(|| partition.take_vectors()).map_err(|error| plain_os_error(&error))?;
        Ok(taken.map(|vectors| vectors.into_iter().map(u32::from).collect()))
    }

    /// Pushes a table repeatedly while another thread signals. Returns the numbers of pushes and signals.
    fn push_while_signalling(
        &self,
        py: Python<'_>,
        table: Vec<(u32, u64, u32)>,
        event: RawFd,
        gsi: u32,
        quiesce: bool,
        seconds: f64,
    ) -> PyResult<(u64, u64)> {
        let partition = self.open(py)?;
        let duration = super::arguments::timeout(seconds)?;
        let irqfd = Irqfd { event, gsi, deassign: false, resample: None };
        let run = |duration: Duration| partition.push_while_signalling(&entries(table), irqfd, quiesce, duration);
        py.detach(|| run(duration)).map_err(|error| plain_os_error(&error))
    }

    /// The partition's descriptor.
    fn fileno(&self, py: Python<'_>) -> PyResult<RawFd> {
        Ok(self.open(py)?.as_raw_fd())
    }

    /// Closes the partition.
    fn close(&self, py: Python<'_>) {
        let partition = self.0.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(partition));
    }
}
