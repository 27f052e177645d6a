//! `IoEventFd` in Python.

use std::os::fd::RawFd;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use super::arguments;
use super::log::logged;
use super::objects::{IoEventFd, Partition};
use super::waiting::{self, Watch};

impl IoEventFd {
    pub(super) fn signal_times(&self, py: Python<'_>, n: u64) -> PyResult<()> {
        let write = || self.doorbell.signal(n);
        Ok(if self.doorbell.signal_may_block() { py.detach(write) } else { write() }?)
    }
}

#[pymethods]
impl IoEventFd {
    #[new]
    #[pyo3(signature = (partition, address, length, datamatch=None, event=None, port=false))]
    fn new(
        py: Python<'_>,
        partition: &Bound<'_, Partition>,
        address: &Bound<'_, PyAny>,
        length: &Bound<'_, PyAny>,
        datamatch: Option<&Bound<'_, PyAny>>,
        event: Option<&Bound<'_, PyAny>>,
        port: bool,
    ) -> PyResult<Self> {
        let trigger = arguments::trigger(address, length, datamatch, port)?;
        let event = event.map(arguments::descriptor).transpose()?;
        let core = &partition.get().core;
        let doorbell = logged(py, core, || core.new_ioeventfd(trigger, event))?;
        Ok(Self { doorbell, partition: partition.clone().unbind() })
    }

    /// The guest-physical address, or the number of the I/O port.
    #[getter]
    fn address(&self) -> u64 {
        self.doorbell.trigger().address
    }

    /// The size in bytes of the writes that ring; 0: any size.
    #[getter]
    fn length(&self) -> u32 {
        self.doorbell.trigger().length
    }

    /// The value that rings; None: any value.
    #[getter]
    fn datamatch(&self) -> Option<u64> {
        self.doorbell.trigger().datamatch
    }

    /// Whether `address` is an I/O port.
    #[getter]
    fn port(&self) -> bool {
        self.doorbell.trigger().port
    }

    /// The partition that the doorbell belongs to.
    #[getter]
    fn partition(&self, py: Python<'_>) -> Py<Partition> {
        self.partition.clone_ref(py)
    }

    /// A view of the doorbell's eventfd. Closing the view does not close the doorbell's descriptor.
    #[getter]
    fn event<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        slf.get().doorbell.fileno()?;
        CLASS.import(slf.py(), "mshv_irqfd.handles", "EventFd")?.call1((slf,))
    }

    /// The descriptor of the eventfd. It is readable once the guest has rung.
    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.doorbell.fileno()?)
    }

    /// Rings, as the guest does. Never waits. Works in a forked child.
    ///
    /// Device models ring once when they resume from a saved state, because it does not have the rings in flight.
    ///
    /// Raises:
    ///     ClosedError: the doorbell is closed.
    fn signal(&self, py: Python<'_>) -> PyResult<()> {
        self.signal_times(py, 1)
    }

    /// Takes the rings so far. Never waits. Works in a forked child.
    ///
    /// Returns:
    ///     Their number; 0 if there are none. Always 0 on the eventfd of an armed route: the kernel takes them.
    ///
    /// Raises:
    ///     ClosedError: the doorbell is closed.
    fn consume(&self) -> PyResult<u64> {
        Ok(self.doorbell.consume()?)
    }

    /// Waits in asyncio for the guest to ring, and takes the rings.
    ///
    /// Any number of tasks may wait; one of them gets the rings, the others wait on. A task that is cancelled takes
    /// none. Other tasks run before this returns, even if it need not wait, so that a guest that rings without pause
    /// does not starve them.
    ///
    /// Returns:
    ///     Their number, at least 1.
    ///
    /// Raises:
    ///     ClosedError: the doorbell is closed, or it was closed while the task waited.
    ///     IrqFdError: the process has too many open files (EMFILE). A waiting task needs two.
    fn wait<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        waiting::signals(slf)
    }

    /// Yields the numbers of rings, as `wait()` returns them. Ends when the doorbell is closed.
    fn __aiter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.get().doorbell.fileno()?;
        waiting::iterator(slf)
    }

    /// Begins a watch, for `mshv_irqfd._waiting`.
    fn _watch(&self, py: Python<'_>) -> PyResult<Watch> {
        Ok(Watch::new(py.detach(|| self.doorbell.watch())?))
    }

    /// Takes the doorbell away from the guest and closes its descriptor. Closing twice is fine.
    ///
    /// Raises:
    ///     IoEventFdError: the kernel refused. The doorbell is closed nevertheless. Its address stays taken, and
    ///         closing the partition tries once more.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, self.doorbell.partition(), || self.doorbell.close())
    }

    /// Whether it is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.doorbell.is_closed()
    }

    /// Whether a finalizer should warn. Always false in a forked child.
    fn _is_left_open(&self) -> bool {
        !self.doorbell.is_closed() && self.doorbell.partition().check_owner().is_ok()
    }

    /// For finalizers and `with` blocks: closes. In a forked child closes only the descriptor.
    fn _abandon(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, self.doorbell.partition(), || self.doorbell.abandon())
    }

    /// For the garbage collector: an instance of a subclass may be part of a cycle.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.partition)
    }

    fn __repr__(&self) -> String {
        let closed = if self.doorbell.is_closed() { " closed" } else { "" };
        format!("<IoEventFd {}{closed}>", self.doorbell.trigger())
    }
}
