//! Designs that `mshv-irqfd bench` compares with the package. Private to the bench, and not part of the package's
//! interface.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use super::arguments;
use super::objects::Partition;
use crate::hypervisor::kvm::{self, KvmPartition};
use crate::hypervisor::mshv::{self, MshvPartition};
use crate::hypervisor::simulated::SimulatedPartition;
use crate::hypervisor::{Backend, CallError, CallResult};
use crate::instruments::bare::Bare;
use crate::instruments::null::NullPartition;
use crate::instruments::{Design, Workload, floor, rebuild};
use crate::irqfd::{self, Config};

/// A design of `src/instruments` on a partition of its own, with one VP.
///
/// Args:
///     design: "floor", "floor-quiesced" or "rebuild".
///     backend: "mshv", "kvm", "simulated" or "null".
///     routes: the number of routes.
#[pyclass(frozen, module = "mshv_irqfd._core")]
pub(crate) struct Baseline(Mutex<Option<Design>>);

fn failed(error: CallError) -> PyErr {
    PyOSError::new_err((error.errno, error.to_string()))
}

fn design<K: Bare>(name: &str, kernel: CallResult<K>, routes: usize) -> PyResult<Design> {
    let mut kernel = kernel.map_err(failed)?;
    kernel.create_vp(0).map_err(failed)?;
    match name {
        "floor" => Ok(floor(kernel, routes, false)),
        "floor-quiesced" => Ok(floor(kernel, routes, true)),
        "rebuild" => Ok(rebuild(kernel, routes)),
        _ => Err(PyValueError::new_err(format!("design {name:?} is unknown"))),
    }
}

#[pymethods]
impl Baseline {
    #[new]
    fn new(py: Python<'_>, name: &str, backend: &str, routes: usize) -> PyResult<Self> {
        let design = py.detach(|| match backend {
            "mshv" => design(name, MshvPartition::open(Path::new(mshv::DEVICE)), routes),
            "kvm" => design(name, KvmPartition::open(Path::new(kvm::DEVICE)), routes),
            "simulated" => design(name, SimulatedPartition::open(), routes),
            "null" => design(name, Ok(NullPartition::new()), routes),
            _ => Err(PyValueError::new_err(format!("backend {backend:?} is unknown"))),
        })?;
        Ok(Self(Mutex::new(Some(design))))
    }

    /// Runs a workload a number of times in a row, and returns the total time in nanoseconds.
    fn run(&self, py: Python<'_>, workload: &str, calls: u32) -> PyResult<u64> {
        let workload = Workload::ALL
            .into_iter()
            .find(|known| known.name() == workload)
            .ok_or_else(|| PyValueError::new_err(format!("workload {workload:?} is unknown")))?;
        let mut design = self.0.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        let design = design.as_mut().ok_or_else(|| PyValueError::new_err("the baseline is closed"))?;
        let took = py.detach(|| design.run(workload, calls)).map_err(failed)?;
        Ok(took.as_nanos() as u64)
    }

    /// Closes the partition.
    fn close(&self, py: Python<'_>) {
        let design = self.0.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(design));
    }
}

/// A partition whose kernel does nothing, with one VP.
#[pyfunction]
pub(crate) fn null_partition(py: Python<'_>, gsis: &Bound<'_, PyAny>) -> PyResult<Partition> {
    let config = Config { quiesce: false, ..Config::new(Backend::Simulated, arguments::gsis("gsis", gsis)?) };
    let core = py.detach(|| -> irqfd::Result<_> {
        let core = irqfd::Partition::new(Box::new(NullPartition::new()), config)?;
        core.create_vp(0)?;
        Ok(core)
    })?;
    Ok(Partition::new(core))
}
