//! `EventFd` in Python.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::exceptions::PyValueError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyType;

use super::arguments;
use super::errors::{ClosedError, bad_integer};
use super::objects::{IoEventFd, IrqFdRoute};
use super::waiting::{self, Watch};
use crate::hypervisor::event;
use crate::hypervisor::owner::Owner;
use crate::hypervisor::{CallError, Operation};
use crate::irqfd::{Error, Failure};

/// An eventfd: a counter that one side adds to and the other empties.
///
/// `EventFd()` makes a new one, non-blocking and close-on-exec. `EventFd.from_fd()` duplicates a caller's, and
/// `IrqFdRoute.event` and `IoEventFd.event` are views of a route's and a doorbell's.
///
/// To wait for signals in asyncio, use `await event.wait()` or `async for count in event`. In other event loops use
/// `fileno()`, with `selectors` for instance.
///
/// Threads may share it. It works in a forked child, on the same counter as in the parent.
///
/// Raises:
///     IrqFdError: the process has too many open files (EMFILE).
///
/// Example:
///     >>> with EventFd() as event:
///     ...     event.signal()
///     ...     event.signal(2)
///     ...     event.consume()
///     3
#[pyclass(frozen, subclass, weakref, module = "mshv_irqfd._core")]
pub(crate) struct EventFd {
    source: Source,
    closed: AtomicBool,
    /// The process that warns if it is left open.
    owner: Owner,
}

enum Source {
    Own(event::EventFd),
    /// A view of a route's eventfd. It keeps the route alive, and reads under the route's lock.
    View(Py<IrqFdRoute>),
    /// A view of a doorbell's eventfd. It keeps the doorbell alive.
    Doorbell(Py<IoEventFd>),
}

fn failed(call: &'static str, error: &std::io::Error) -> Error {
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    Failure::new(CallError::new(Operation::Event, call, errno), None).into()
}

impl EventFd {
    fn check(&self) -> PyResult<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(ClosedError::new_err("the EventFd is closed"));
        }
        Ok(())
    }
}

#[pymethods]
impl EventFd {
    /// `_source` is for `from_fd`, `IrqFdRoute.event` and `IoEventFd.event`, which make instances of the Python subclass.
    #[new]
    #[pyo3(signature = (_source=None))]
    fn new(_source: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let source = match _source {
            None => Source::Own(event::EventFd::new().map_err(|error| failed("eventfd2", &error))?),
            Some(source) => match (source.cast::<IrqFdRoute>(), source.cast::<IoEventFd>()) {
                (Ok(route), _) => Source::View(route.clone().unbind()),
                (_, Ok(doorbell)) => Source::Doorbell(doorbell.clone().unbind()),
                _ => {
                    let fd = arguments::descriptor(source)?;
                    Source::Own(event::EventFd::adopt(fd).map_err(Error::from)?)
                }
            },
        };
        let owner = Owner::current().map_err(|error| failed("madvise (MADV_WIPEONFORK)", &error))?;
        Ok(Self { source, closed: AtomicBool::new(false), owner })
    }

    /// Duplicates a caller's eventfd (an int, or an object with `fileno()`). The caller still closes its own.
    ///
    /// Raises:
    ///     ValueError: `fd` is another kind of file, or an eventfd in semaphore mode.
    ///     IrqFdError: `fd` is not open (EBADF), or the process has too many open files (EMFILE).
    #[classmethod]
    fn from_fd<'py>(class: &Bound<'py, PyType>, fd: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        class.call1((arguments::descriptor(fd)?,))
    }

    /// The descriptor. It is readable while signals are pending.
    ///
    /// Raises:
    ///     ClosedError: it is closed.
    fn fileno(&self) -> PyResult<RawFd> {
        self.check()?;
        match &self.source {
            Source::Own(event) => Ok(event.as_raw_fd()),
            Source::View(route) => Ok(route.get().route.fileno()?),
            Source::Doorbell(doorbell) => Ok(doorbell.get().doorbell.fileno()?),
        }
    }

    /// Adds `n` to the counter. Never waits: a counter without room for `n` stays as it is.
    ///
    /// Args:
    ///     n: 1 to 2**64 - 2.
    ///
    /// Raises:
    ///     ValueError, OverflowError: `n` is out of range.
    ///     ClosedError: it is closed.
    #[pyo3(signature = (n=None))]
    fn signal(&self, py: Python<'_>, n: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.check()?;
        let range = "give 1 to 2**64 - 2";
        let n = match n {
            None => 1,
            Some(value) => match value.extract::<u64>().map_err(|error| bad_integer(&error, value, "n", range))? {
                0 | u64::MAX => return Err(PyValueError::new_err(format!("n {value} is out of range; {range}"))),
                n => n,
            },
        };
        match &self.source {
            Source::Own(event) => {
                let write = || event.signal(n).map_err(|error| failed("write", &error));
                Ok(if event.may_block() { py.detach(write) } else { write() }?)
            }
            Source::View(route) => route.get().signal_times(py, n),
            Source::Doorbell(doorbell) => doorbell.get().signal_times(py, n),
        }
    }

    /// Empties the counter.
    ///
    /// Returns:
    ///     Its value; 0 if no signal was pending. Always 0 on a view of an armed route.
    ///
    /// Raises:
    ///     ClosedError: it is closed.
    fn consume(&self, py: Python<'_>) -> PyResult<u64> {
        self.check()?;
        match &self.source {
            Source::Own(event) => Ok(event.consume().map_err(|error| failed("preadv2", &error))?),
            Source::View(route) => {
                let route = route.get();
                Ok(py.detach(|| route.route.take_pending())?)
            }
            Source::Doorbell(doorbell) => Ok(doorbell.get().doorbell.consume()?),
        }
    }

    /// Waits in asyncio for signals, and takes them.
    ///
    /// Any number of tasks may wait; one of them gets the signals, the others wait on. A task that is cancelled takes
    /// none. Other tasks run before this returns, even if it need not wait, so that signals without pause do not
    /// starve them. A view of a route waits until the route is not armed and a signal is pending.
    ///
    /// Returns:
    ///     Their number, at least 1.
    ///
    /// Raises:
    ///     ClosedError: it is closed, or it was closed while the task waited.
    ///     IrqFdError: the process has too many open files (EMFILE). A waiting task needs two.
    fn wait<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        waiting::signals(slf)
    }

    /// Yields the numbers of signals, as `wait()` returns them. Ends when the eventfd is closed.
    fn __aiter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.get().check()?;
        waiting::iterator(slf)
    }

    /// Begins a watch, for `mshv_irqfd._waiting`.
    fn _watch(&self, py: Python<'_>) -> PyResult<Watch> {
        self.check()?;
        let watch = py.detach(|| match &self.source {
            Source::Own(event) => event.watch().map_err(|error| match self.check() {
                Ok(()) => failed("fcntl (F_DUPFD_CLOEXEC)", &error).into(),
                Err(closed) => closed,
            }),
            Source::View(route) => Ok(route.get().route.watch()?),
            Source::Doorbell(doorbell) => Ok(doorbell.get().doorbell.watch()?),
        })?;
        Ok(Watch::new(watch))
    }

    /// Closes the descriptor. Closing twice is fine. A view leaves the descriptor of its route or doorbell open.
    fn close(&self, py: Python<'_>) {
        self.closed.store(true, Ordering::Release);
        py.detach(|| match &self.source {
            Source::Own(event) => event.close(),
            Source::View(route) => route.get().route.wake_waiters(),
            Source::Doorbell(doorbell) => doorbell.get().doorbell.wake_waiters(),
        });
    }

    /// Whether it is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Whether a finalizer should warn. Always false in a forked child.
    fn _is_left_open(&self) -> bool {
        !self.closed() && matches!(self.source, Source::Own(_)) && self.owner.is_current()
    }

    /// For the garbage collector: an instance of a subclass may be part of a cycle.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.source {
            Source::Own(_) => Ok(()),
            Source::View(route) => visit.call(route),
            Source::Doorbell(doorbell) => visit.call(doorbell),
        }
    }

    /// For finalizers and `with` blocks: closes.
    fn _abandon(&self, py: Python<'_>) {
        self.close(py);
    }

    fn __repr__(&self) -> String {
        match (&self.source, self.closed()) {
            (_, true) => "<EventFd closed>".into(),
            (Source::Own(event), _) => format!("<EventFd fd={}>", event.as_raw_fd()),
            (Source::View(route), _) => match route.get().route.fileno() {
                Ok(fd) => format!("<EventFd fd={fd} of the route of GSI {}>", route.get().route.gsi()),
                Err(_) => "<EventFd of a closed route>".into(),
            },
            (Source::Doorbell(doorbell), _) => match doorbell.get().doorbell.fileno() {
                Ok(fd) => format!("<EventFd fd={fd} of the doorbell ({})>", doorbell.get().doorbell.trigger()),
                Err(_) => "<EventFd of a closed doorbell>".into(),
            },
        }
    }
}
