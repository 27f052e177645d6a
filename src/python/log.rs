//! What goes to Python's `logging`, under the name `mshv_irqfd`: calls at DEBUG, refused ones at WARNING.
//!
//! Records are emitted after a call, attached and with no lock held, but before it returns. So whatever may make a call
//! into the kernel goes through `logged`. A program that has not imported `logging` logs nothing, and is spared the
//! import. Once the interpreter ends, nothing is logged: `logging` may have lost its names before the last finalizer runs.

use pyo3::exceptions::PyException;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::irqfd::{self, Event, Partition};

const DEBUG: i32 = 10;
const WARNING: i32 = 30;

/// The logger, if the program has imported `logging`.
fn logger(py: Python<'_>) -> PyResult<Option<&Bound<'_, PyAny>>> {
    static LOGGER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if let Some(logger) = LOGGER.get(py) {
        return Ok(Some(logger.bind(py)));
    }
    let modules = py.import(intern!(py, "sys"))?.getattr(intern!(py, "modules"))?;
    let logging = modules.call_method1(intern!(py, "get"), (intern!(py, "logging"),))?;
    if logging.is_none() {
        return Ok(None);
    }
    let logger = logging.call_method1(intern!(py, "getLogger"), ("mshv_irqfd",))?;
    // A library's logger writes nowhere until the program says where.
    logger.call_method1(intern!(py, "addHandler"), (logging.call_method0(intern!(py, "NullHandler"))?,))?;
    Ok(Some(LOGGER.get_or_init(py, || logger.unbind()).bind(py)))
}

/// Whether the interpreter ends.
fn is_finalizing(py: Python<'_>) -> PyResult<bool> {
    // Looked up when a partition is opened: in the end, modules can't be imported.
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    FUNCTION.import(py, "sys", "is_finalizing")?.call0()?.is_truthy()
}

/// Whether the logger takes records of calls.
pub(super) fn wants_calls(py: Python<'_>) -> bool {
    let wants = is_finalizing(py).and_then(|_| logger(py)).and_then(|logger| match logger {
        Some(logger) => logger.call_method1(intern!(py, "isEnabledFor"), (DEBUG,))?.is_truthy(),
        None => Ok(false),
    });
    // Another thread may be importing `logging` just now.
    wants.unwrap_or_else(|error| {
        error.write_unraisable(py, None);
        false
    })
}

/// Makes a call into the core with the interpreter detached, and then logs what was done.
pub(super) fn logged<T: Send>(
    py: Python<'_>,
    partition: &Partition,
    call: impl FnOnce() -> irqfd::Result<T> + Send,
) -> PyResult<T> {
    let result = py.detach(call);
    if let Err(interrupt) = emit(py, partition) {
        // What the call has made goes unseen, and waits for locks when it is dropped.
        py.detach(move || drop(result));
        return Err(interrupt);
    }
    Ok(result?)
}

/// Logs the events of a partition. A log that fails is no failure of the call, but Ctrl-C meanwhile is.
fn emit(py: Python<'_>, partition: &Partition) -> PyResult<()> {
    if !partition.trace().is_waiting() || partition.check_owner().is_err() {
        return Ok(());
    }
    let events = py.detach(|| partition.trace().take());
    match write(py, partition, &events) {
        Err(error) if error.is_instance_of::<PyException>(py) => error.write_unraisable(py, None),
        other => return other,
    }
    Ok(())
}

fn write(py: Python<'_>, partition: &Partition, events: &[Event]) -> PyResult<()> {
    if is_finalizing(py)? {
        return Ok(());
    }
    let Some(logger) = logger(py)? else { return Ok(()) };
    let name = match partition.fileno() {
        Ok(fd) => format!("{} fd={fd}", partition.config().backend),
        Err(_) => partition.config().backend.to_string(),
    };
    for event in events {
        let level = if event.is_failure() { WARNING } else { DEBUG };
        logger.call_method1(intern!(py, "log"), (level, intern!(py, "%s: %s"), &name, event.to_string()))?;
    }
    Ok(())
}
