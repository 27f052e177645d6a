//! Designs that `mshv-irqfd bench` compares with the package. Private to the bench, and not part of the package's
//! interface.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use super::arguments;
use super::msi::MsiRoute;
use super::objects::{IrqFdRoute, Partition};
use crate::hypervisor::event::EventFd;
use crate::hypervisor::kvm::{self, KvmPartition};
use crate::hypervisor::mshv::{self, MshvPartition};
use crate::hypervisor::simulated::SimulatedPartition;
use crate::hypervisor::{Backend, CallError, CallResult, MAX_GSIS, Operation};
use crate::instruments::bare::Bare;
use crate::instruments::latency::{Delivery, latencies};
use crate::instruments::null::NullPartition;
use crate::instruments::{Design, VPS, Way, Workload, floor, rebuild};
use crate::irqfd::{self, Config, Failure};

/// The longest wait for the delivery of a signal.
const PATIENCE: Duration = Duration::from_secs(60);

/// A design of `src/instruments` on a partition of its own, with four VPs.
///
/// Args:
///     design: "floor", "floor-quiesced", "floor-move" or "rebuild".
///     backend: "mshv", "kvm", "simulated" or "null".
///     routes: the number of routes.
#[pyclass(frozen, module = "mshv_irqfd._core")]
pub(crate) struct Baseline(Mutex<Option<Design>>);

fn failed(error: CallError) -> PyErr {
    PyOSError::new_err((error.errno, error.to_string()))
}

fn design<K: Bare>(name: &str, kernel: CallResult<K>, routes: usize) -> PyResult<Design> {
    let mut kernel = kernel.map_err(failed)?;
    (0..VPS).try_for_each(|index| kernel.create_vp(index)).map_err(failed)?;
    match name {
        "floor" => Ok(floor(kernel, routes, Way::Push)),
        "floor-quiesced" => Ok(floor(kernel, routes, Way::QuiescedPush)),
        "floor-move" => Ok(floor(kernel, routes, Way::Move)),
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

/// A partition whose kernel does nothing, with four VPs.
#[pyfunction]
#[pyo3(signature = (gsis, *, preload))]
pub(crate) fn null_partition(py: Python<'_>, gsis: &Bound<'_, PyAny>, preload: bool) -> PyResult<Partition> {
    let gsis = arguments::gsis("gsis", gsis)?;
    let above = gsis.end..MAX_GSIS;
    let config = Config {
        quiesce: false,
        spares: if preload { vec![above] } else { Vec::new() },
        ..Config::new(Backend::Simulated, gsis)
    };
    let core = py.detach(|| -> irqfd::Result<_> {
        let core = irqfd::Partition::new(Box::new(NullPartition::new()), config)?;
        (0..VPS).try_for_each(|index| core.create_vp(index))?;
        Ok(core)
    })?;
    Ok(Partition::new(core))
}

/// Signals routes in turn, without pause, and times each signal until its delivery. Meanwhile another thread sets the
/// MSIs in turn on another route, without pause. Both run without Python.
///
/// The simulated kernel reports each delivery. In the real ones a signal on an armed route is delivered before its
/// write returns. If it is pending then, the route was not armed: the signal is late, and its time ends when its eventfd
/// is drained, a moment after its delivery.
///
/// Args:
///     routes: the routes to signal, all armed.
///     moved: the other route, or None for no other thread.
///     msis: the MSIs to set on it.
///     seconds: the duration of the measurement.
///
/// Returns:
///     The nanoseconds of each signal, the number of late ones, and the number of MSIs set.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "pyo3 converts a list to a vector")]
pub(crate) fn signal_latencies(
    py: Python<'_>,
    routes: Vec<Py<IrqFdRoute>>,
    moved: Option<Py<IrqFdRoute>>,
    msis: Vec<Py<MsiRoute>>,
    seconds: f64,
) -> PyResult<(Vec<u64>, u64, u64)> {
    let time = arguments::timeout(seconds)?;
    if routes.is_empty() || (moved.is_some() && msis.is_empty()) {
        return Err(PyValueError::new_err("give at least one route, and with moved at least one MSI"));
    }
    let found = py.detach(|| -> irqfd::Result<_> {
        let routes: Vec<_> = routes.iter().map(|route| &route.get().route).collect();
        let events = routes.iter().map(|route| Ok(EventFd::adopt(route.fileno()?)?));
        let events = events.collect::<irqfd::Result<Vec<_>>>()?;
        let signal = |number: usize| {
            let index = number % routes.len();
            deliver(routes[index], &events[index])
        };
        let work = moved.as_ref().map(|moved| {
            let (route, msis) = (&moved.get().route, &msis);
            move |number: u64| route.set_msi(msis[number as usize % msis.len()].get().0)
        });
        latencies(time, signal, work)
    })?;
    Ok((found.nanoseconds, found.late, found.worked))
}

/// Signals a route and waits for the delivery. `event` is a duplicate of the route's.
fn deliver(route: &irqfd::IrqFdRoute, event: &EventFd) -> irqfd::Result<Delivery> {
    let polled = |error| Failure::new(CallError::of(Operation::Event, "poll", &error), Some(route.gsi()));
    let missing = || {
        let error = CallError::new(Operation::Observe, "wait for the delivery", libc::ETIMEDOUT);
        Failure::new(error, Some(route.gsi()))
    };
    let begun = Instant::now();
    route.signal(1)?;
    let mut took = begun.elapsed();
    let mut late = false;
    if route.partition().config().backend == Backend::Simulated {
        if route.partition().take_interrupts(PATIENCE)?.is_empty() {
            return Err(missing().into());
        }
        took = begun.elapsed();
    } else {
        while event.is_readable().map_err(polled)? {
            late = true;
            if begun.elapsed() > PATIENCE {
                return Err(missing().into());
            }
        }
        if late {
            took = begun.elapsed();
        }
    }
    Ok(Delivery { took, late })
}
