//! The core's errors as the exceptions that `mshv_irqfd.errors` defines.

use pyo3::exceptions::{PyOSError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::hypervisor::Operation;
use crate::irqfd::{Error, Failure};

pyo3::import_exception!(mshv_irqfd.errors, ClosedError);
pyo3::import_exception!(mshv_irqfd.errors, ForkedError);
pyo3::import_exception!(mshv_irqfd.errors, GsiExhaustedError);
pyo3::import_exception!(mshv_irqfd.errors, MissingVpError);
pyo3::import_exception!(mshv_irqfd.errors, RouteBrokenError);
pyo3::import_exception!(io, UnsupportedOperation);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Closed(_) => ClosedError::new_err(text),
            Error::Forked => ForkedError::new_err(text),
            Error::Exhausted(_) => GsiExhaustedError::new_err(text),
            Error::Broken(_) => RouteBrokenError::new_err(text),
            Error::MissingVp { .. } => MissingVpError::new_err(text),
            Error::Unsupported(_) => UnsupportedOperation::new_err(text),
            Error::Failed(failure) => Python::attach(|py| call_error(py, &failure).unwrap_or_else(|error| error)),
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
}

/// An `OSError` of an errno, which the conversion that comes with PyO3 would leave out.
pub(super) fn plain_os_error(error: &std::io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(errno) => PyOSError::new_err((errno, std::io::Error::from_raw_os_error(errno).to_string())),
        None => PyOSError::new_err(error.to_string()),
    }
}

/// What duplicating or looking at a caller's eventfd ran into.
fn os_error(py: Python<'_>, errno: i32, text: &str) -> PyResult<PyErr> {
    use crate::hypervisor::CallError;
    let error = CallError::new(Operation::Event, "fcntl (F_DUPFD_CLOEXEC)", errno);
    exception(py, "IrqFdError", &Failure::new(error, None), text)
}

fn call_error(py: Python<'_>, failure: &Failure) -> PyResult<PyErr> {
    let class = match failure.error.operation {
        Operation::SetMsiRouting => "RoutingError",
        Operation::AssignIrqfd | Operation::DeassignIrqfd | Operation::Event => "IrqFdError",
        Operation::CreateVp => "VpError",
        Operation::Open => "HypervisorUnavailableError",
    };
    exception(py, class, failure, &failure.to_string())
}

fn exception(py: Python<'_>, class: &str, failure: &Failure, text: &str) -> PyResult<PyErr> {
    let errno = failure.error.errno;
    let strerror: String = py.import("os")?.call_method1("strerror", (errno,))?.extract()?;
    let attributes = PyDict::new(py);
    attributes.set_item("ioctl", failure.error.call)?;
    attributes.set_item("gsi", failure.gsi)?;
    attributes.set_item("hint", failure.hint)?;
    let class = py.import("mshv_irqfd.errors")?.getattr(class)?;
    Ok(PyErr::from_value(class.call((errno, format!("{strerror}: {text}")), Some(&attributes))?))
}

/// A device node that gives no partition: what was tried, and what to do.
pub(super) fn unavailable(py: Python<'_>, device: &str, failure: &Failure, advice: &str) -> PyErr {
    let make = || -> PyResult<PyErr> {
        let errno = failure.error.errno;
        let strerror: String = py.import("os")?.call_method1("strerror", (errno,))?.extract()?;
        let attributes = PyDict::new(py);
        attributes.set_item("ioctl", failure.error.call)?;
        attributes.set_item("hint", advice)?;
        let class = py.import("mshv_irqfd.errors")?.getattr("HypervisorUnavailableError")?;
        let text = format!("{device}: {strerror} ({}): {advice}", failure.error.call);
        Ok(PyErr::from_value(class.call((errno, text), Some(&attributes))?))
    };
    make().unwrap_or_else(|error| error)
}

/// An argument of the wrong type, or an integer too large or too small for any kernel, named in the words of the caller.
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
