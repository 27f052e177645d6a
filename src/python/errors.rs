//! The conversion of the core's errors to the exceptions of `mshv_irqfd.errors`.

use pyo3::exceptions::{PyOSError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyType};

use crate::hypervisor::{CallError, Operation, strerror};
use crate::irqfd::{Error, Failure};

/// Exceptions that Python defines, and the function that looks them all up when the module is imported. Finalizers call
/// this module even while the interpreter ends. Imports then fail, and a first look-up would panic.
macro_rules! exceptions {
    ($($module:ident $(. $inner:ident)*, $name:ident;)+) => {
        $(pyo3::import_exception!($module $(. $inner)*, $name);)+

        pub(crate) fn look_up(py: Python<'_>) -> PyResult<()> {
            $(
                // Returns an error where `get_type` would panic.
                py.import(concat!(stringify!($module) $(, ".", stringify!($inner))*))?.getattr(stringify!($name))?;
                py.get_type::<$name>();
            )+
            Ok(())
        }
    };
}

exceptions! {
    mshv_irqfd.errors, ClosedError;
    mshv_irqfd.errors, ForkedError;
    mshv_irqfd.errors, GsiExhaustedError;
    mshv_irqfd.errors, HypervisorUnavailableError;
    mshv_irqfd.errors, InterruptError;
    mshv_irqfd.errors, IoEventFdError;
    mshv_irqfd.errors, IrqFdError;
    mshv_irqfd.errors, MissingVpError;
    mshv_irqfd.errors, RouteBrokenError;
    mshv_irqfd.errors, RoutingError;
    mshv_irqfd.errors, VpError;
    io, UnsupportedOperation;
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        exception_of(&error)
    }
}

/// The exception for an error, of which the core may keep a record.
pub(super) fn exception_of(error: &Error) -> PyErr {
    let text = error.to_string();
    let error = if let Error::At { error, .. } = error { error } else { error };
    match error {
        // A part of a state has no parts that are named.
        Error::At { .. } => PyValueError::new_err(text),
        Error::Closed(_) => ClosedError::new_err(text),
        Error::Forked => ForkedError::new_err(text),
        Error::Exhausted(_) => GsiExhaustedError::new_err(text),
        Error::Broken(_) => RouteBrokenError::new_err(text),
        Error::MissingVp { .. } => MissingVpError::new_err(text),
        Error::Unobservable(_) => PyTypeError::new_err(text),
        Error::Unavailable { error, advice, .. } => {
            Python::attach(|py| unavailable(py, error, advice, &text).unwrap_or_else(|error| error))
        }
        Error::Unsupported(_) => UnsupportedOperation::new_err(text),
        Error::Failed(failure) => Python::attach(|py| call_error(py, failure).unwrap_or_else(|error| error)),
        Error::Adopt(crate::hypervisor::event::AdoptError::NotOpen { .. }) => {
            Python::attach(|py| os_error(py, libc::EBADF, &text).unwrap_or_else(|error| error))
        }
        Error::Adopt(crate::hypervisor::event::AdoptError::Io { error, .. }) => {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            Python::attach(|py| os_error(py, errno, &text).unwrap_or_else(|error| error))
        }
        Error::Msi(_) | Error::Adopt(_) | Error::Invalid(_) => PyValueError::new_err(text),
    }
}

/// An `OSError` with its errno, which PyO3's own conversion leaves out.
pub(super) fn plain_os_error(error: &std::io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(errno) => os_error_of(errno),
        None => PyOSError::new_err(error.to_string()),
    }
}

fn os_error_of(errno: i32) -> PyErr {
    PyOSError::new_err((errno, strerror(errno)))
}

/// An error of duplicating or inspecting a caller's eventfd.
fn os_error(py: Python<'_>, errno: i32, text: &str) -> PyResult<PyErr> {
    let error = CallError::new(Operation::Event, "fcntl (F_DUPFD_CLOEXEC)", errno);
    exception(&py.get_type::<IrqFdError>(), &Failure::new(error, None), text)
}

fn call_error(py: Python<'_>, failure: &Failure) -> PyResult<PyErr> {
    let class = match failure.error.operation {
        Operation::SetMsiRouting => py.get_type::<RoutingError>(),
        Operation::AssignIrqfd | Operation::DeassignIrqfd | Operation::Event => py.get_type::<IrqFdError>(),
        Operation::AssignIoEventFd | Operation::DeassignIoEventFd => py.get_type::<IoEventFdError>(),
        Operation::SignalMsi => py.get_type::<InterruptError>(),
        Operation::CreateVp => py.get_type::<VpError>(),
        Operation::Open => py.get_type::<HypervisorUnavailableError>(),
        Operation::Observe => return Ok(os_error_of(failure.error.errno)),
    };
    exception(&class, failure, &failure.to_string())
}

fn exception(class: &Bound<'_, PyType>, failure: &Failure, text: &str) -> PyResult<PyErr> {
    let errno = failure.error.errno;
    let attributes = PyDict::new(class.py());
    attributes.set_item("ioctl", failure.error.call)?;
    attributes.set_item("gsi", failure.gsi)?;
    attributes.set_item("hint", failure.hint())?;
    Ok(PyErr::from_value(class.call((errno, format!("{}: {text}", strerror(errno))), Some(&attributes))?))
}

fn unavailable(py: Python<'_>, error: &CallError, advice: &str, text: &str) -> PyResult<PyErr> {
    let attributes = PyDict::new(py);
    attributes.set_item("ioctl", error.call)?;
    attributes.set_item("hint", advice)?;
    let class = py.get_type::<HypervisorUnavailableError>();
    Ok(PyErr::from_value(class.call((error.errno, text), Some(&attributes))?))
}

/// The error for an argument of the wrong type, or for an integer too large or too small for any kernel.
pub(super) fn bad_integer(error: &PyErr, value: &Bound<'_, PyAny>, name: &str, range: &str) -> PyErr {
    let py = value.py();
    let shown = value.repr().map_or_else(|_| "?".into(), |text| text.to_string());
    if error.is_instance_of::<PyOverflowError>(py) {
        PyOverflowError::new_err(format!("{name} {shown} is out of range; {range}"))
    } else if error.is_instance_of::<PyTypeError>(py) {
        PyTypeError::new_err(format!("{name} must be an int, not {shown}; {range}"))
    } else {
        error.clone_ref(py)
    }
}
