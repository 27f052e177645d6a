//! Waiting in an event loop: watches for `mshv_irqfd._waiting`, which has the coroutines.

use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::sync::{MutexExt, PyOnceLock};

use super::errors::ClosedError;
use crate::hypervisor::waiters;

/// A watch on an eventfd, for an event loop. For `mshv_irqfd._waiting` alone.
#[pyclass(frozen, module = "mshv_irqfd._core")]
pub(crate) struct Watch(Mutex<Option<waiters::Watch>>);

impl Watch {
    pub(super) fn new(watch: waiters::Watch) -> Self {
        Self(Mutex::new(Some(watch)))
    }

    fn look<T>(&self, py: Python<'_>, look: fn(&waiters::Watch) -> T) -> PyResult<T> {
        let watch = self.0.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        watch.as_ref().map(look).ok_or_else(|| ClosedError::new_err("the watch is closed"))
    }
}

#[pymethods]
impl Watch {
    /// A descriptor that is readable while the eventfd is.
    #[getter]
    fn signalled(&self, py: Python<'_>) -> PyResult<RawFd> {
        self.look(py, waiters::Watch::signalled)
    }

    /// A descriptor that is readable once the eventfd is closed or replaced.
    #[getter]
    fn changed(&self, py: Python<'_>) -> PyResult<RawFd> {
        self.look(py, waiters::Watch::changed)
    }

    /// Whether this process began it. A forked child has a copy of the loop, and the parent's epoll set.
    #[getter]
    fn is_own(&self, py: Python<'_>) -> PyResult<bool> {
        self.look(py, waiters::Watch::is_own)
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// Closes both descriptors.
    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) {
        let watch = self.0.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).take();
        drop(watch);
    }
}

/// Calls a function of `mshv_irqfd._waiting`, which is imported at the first wait: it imports asyncio.
fn call<'py>(
    cell: &'static PyOnceLock<Py<PyAny>>,
    function: &str,
    source: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    cell.import(source.py(), "mshv_irqfd._waiting", function)?.call1((source,))
}

/// A coroutine that waits for signals and takes them.
pub(super) fn signals<'py>(source: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    call(&FUNCTION, "signals", source)
}

/// An asynchronous iterator over signals.
pub(super) fn iterator<'py>(source: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    call(&CLASS, "Signals", source)
}

/// A coroutine that waits until a signal is pending.
pub(super) fn pending<'py>(source: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    call(&FUNCTION, "pending", source)
}
