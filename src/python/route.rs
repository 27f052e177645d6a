//! `IrqFdRoute` in Python.

use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use super::log::logged;
use super::objects::{IrqFdRoute, Partition, TakenRoute};
use super::waiting::{self, Watch};
use super::{arguments, msi, values};
use crate::irqfd;

impl IrqFdRoute {
    pub(super) fn signal_times(&self, py: Python<'_>, n: u64) -> PyResult<()> {
        if !self.route.try_signal(n)? {
            py.detach(|| self.route.signal(n))?;
        }
        Ok(())
    }
}

#[pymethods]
impl IrqFdRoute {
    /// `event` may also be a route that exists already, which this makes an object for.
    #[new]
    #[pyo3(signature = (partition, event=None))]
    fn new(py: Python<'_>, partition: &Bound<'_, Partition>, event: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        if let Some(taken) = event.and_then(|event| event.cast::<TakenRoute>().ok()) {
            let TakenRoute { route, of_device } = taken.get();
            let partition = partition.clone().unbind();
            return Ok(Self { route: Arc::clone(route), partition, of_device: *of_device });
        }
        let core = &partition.get().core;
        let route = match event.map(|event| event.extract::<RawFd>()).transpose()? {
            // Detaching from the interpreter takes a tenth of the time of making a route, so this detaches only if it
            // has to wait.
            None => match core.try_new_route()? {
                Some(route) => route,
                None => py.detach(|| core.new_route(None))?,
            },
            Some(fd) => py.detach(|| core.new_route(Some(fd)))?,
        };
        Ok(Self { route: Arc::new(route), partition: partition.clone().unbind(), of_device: false })
    }

    /// The GSI, an int. After this route is closed, another route may have the same GSI.
    #[getter]
    fn gsi(&self) -> u32 {
        self.route.gsi()
    }

    /// The partition that the route belongs to.
    #[getter]
    fn partition(&self, py: Python<'_>) -> Py<Partition> {
        self.partition.clone_ref(py)
    }

    /// A view of the eventfd that the route has at the time of each call: it follows `set_event()`.
    ///
    /// Closing the view does not close the route's descriptor.
    #[getter]
    fn event<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        slf.get().route.fileno()?;
        CLASS.import(slf.py(), "mshv_irqfd.handles", "EventFd")?.call1((slf,))
    }

    /// The descriptor of the eventfd, for `selectors`, asyncio, or a device model that signals.
    ///
    /// It is readable only while the route is not armed: the kernel empties an armed eventfd first. `set_event()`
    /// closes it and gives the route another one. So take it out of selectors before that, and put the new one in.
    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.route.fileno()?)
    }

    /// Raises the interrupt now if the route is armed; otherwise leaves the signal pending.
    ///
    /// Never waits, even if the counter is full. Works in a forked child.
    ///
    /// Raises:
    ///     ClosedError: the route is closed.
    fn signal(&self, py: Python<'_>) -> PyResult<()> {
        self.signal_times(py, 1)
    }

    /// Sets the MSI that a signal becomes, and arms the route unless it is masked.
    ///
    /// Pushes only if the kernel's table lacks the MSI, or if a push is cheaper than moving the irqfd to the GSI that
    /// has it (few routes on KVM). An MSI that is set while the route is masked is kept, and `unmask()` arms it.
    /// Setting the same MSI again does nothing.
    ///
    /// Args:
    ///     address: an `MsiRoute`, or the address of an MSI. `MsiRoute` has the rules for address and data.
    ///     data: the data of the MSI. Omit it with an `MsiRoute`.
    ///
    /// Raises:
    ///     ValueError, OverflowError, TypeError: the arguments are not an MSI. The message names the value and the
    ///         rule.
    ///     MissingVpError: no VP has the destination's APIC id.
    ///     RoutingError, IrqFdError: the kernel refused, and everything was rolled back.
    #[pyo3(signature = (address, data=None))]
    fn set_msi(&self, py: Python<'_>, address: &Bound<'_, PyAny>, data: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let msi = msi::from_arguments(address, data)?;
        logged(py, self.route.partition(), || self.route.set_msi(msi))
    }

    /// Disarms the route and forgets its MSI. The next push drops the entry of its own GSI from the kernel's table.
    ///
    /// Raises:
    ///     IrqFdError: the kernel refused, and nothing changed.
    fn clear_msi(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, self.route.partition(), || self.route.clear_msi())
    }

    /// Disarms the route until `unmask()`, even if an MSI is set meanwhile. Never pushes.
    ///
    /// Raises:
    ///     IrqFdError: the kernel refused, and nothing changed.
    fn mask(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, self.route.partition(), || self.route.mask())
    }

    /// Ends `mask()`: arms the route if it has an MSI, and raises one interrupt if signals are pending.
    ///
    /// Pushes only if the kernel's table lacks the route's MSI, which it may if the MSI changed meanwhile.
    ///
    /// Raises:
    ///     MissingVpError: no VP has the destination's APIC id.
    ///     RoutingError, IrqFdError: the kernel refused, and everything was rolled back.
    fn unmask(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, self.route.partition(), || self.route.unmask())
    }

    /// Whether the route is masked.
    #[getter]
    fn masked(&self) -> PyResult<bool> {
        Ok(self.route.masked()?)
    }

    /// Whether a signal becomes an interrupt now.
    #[getter]
    fn armed(&self) -> PyResult<bool> {
        Ok(self.route.armed()?)
    }

    /// The GSI where the route is armed, an int: its own, or a spare one whose entry is the same MSI.
    ///
    /// None while it is not armed. A kernel's traces name this GSI.
    #[getter]
    fn armed_gsi(&self) -> PyResult<Option<u32>> {
        Ok(self.route.armed_gsi()?)
    }

    /// The MSI, also while masked; None if none is set.
    #[getter]
    fn msi(&self) -> PyResult<Option<msi::MsiRoute>> {
        Ok(self.route.msi()?.map(msi::MsiRoute))
    }

    /// The state of the route's GSI, a `GsiState`.
    ///
    /// `ENABLED` while armed, `DISABLED` while not armed, `BROKEN` after a failed rollback.
    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        values::gsi_state(py, self.route.state()?)
    }

    /// Whether a signal waits for the route to be armed. Always false while the route is armed.
    #[getter]
    fn pending(&self) -> PyResult<bool> {
        Ok(self.route.pending()?)
    }

    /// Waits in asyncio until a signal is pending, and leaves it pending.
    ///
    /// Takes nothing: the caller decides whether the guest still gets the interrupt. `unmask()` raises it, and
    /// `consume_pending()` drops it. So every waiting task returns. While the route is armed nothing is pending, and
    /// this keeps waiting. Other tasks run before this returns, even if it need not wait.
    ///
    /// Raises:
    ///     ClosedError: the route is closed, or it was closed while the task waited.
    ///     IrqFdError: the process has too many open files (EMFILE). A waiting task needs two.
    fn wait_pending<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        waiting::pending(slf)
    }

    /// Begins a watch, for `mshv_irqfd._waiting`.
    fn _watch(&self, py: Python<'_>) -> PyResult<Watch> {
        Ok(Watch::new(py.detach(|| self.route.watch())?))
    }

    /// Takes the pending signals, so that arming raises no interrupt for them.
    ///
    /// Returns:
    ///     Whether a signal was pending. Always false while the route is armed.
    fn consume_pending(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(py.detach(|| self.route.consume_pending())?)
    }

    /// Replaces the route's eventfd, in any state of the route. It needs no push.
    ///
    /// Nothing is lost: signals that the old eventfd holds are carried over to the new one, and those of `signal()`
    /// reach the route before, during and after the call (twice at most if they overlap it). If the route is armed, it
    /// raises one interrupt for what the new eventfd held before. A process that still has the old eventfd no longer
    /// reaches the route. `fileno()` changes: the route closes its descriptor of the old eventfd.
    ///
    /// To give a route the eventfd of another route, change both in a batch; see `Batch.set_event()`.
    ///
    /// Args:
    ///     event: the caller's eventfd, an int or an object with `fileno()`, which is duplicated as in
    ///         `Partition.new_irqfd_route()`. None: a new one, which no other code has. The one that the route has
    ///         already changes nothing.
    ///
    /// Raises:
    ///     ValueError: `event` is not an eventfd, is in semaphore mode, or is the eventfd of another route of this
    ///         process.
    ///     IrqFdError: `event` is not open (EBADF); too many files are open (EMFILE); another process has armed `event`
    ///         on a VM of its own (EBUSY: KVM from Linux 6.17 on); other code has closed the descriptor of an armed
    ///         route (EBADF: close the route). Everything is as before.
    fn set_event(&self, py: Python<'_>, event: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let event = event.map(arguments::descriptor).transpose()?;
        logged(py, self.route.partition(), || self.route.set_event(event))
    }

    /// Disarms the route, frees its GSI and closes its descriptor. Never pushes. Closing twice is fine.
    ///
    /// Raises:
    ///     IrqFdError: the irqfd could not be disarmed. The route is closed nevertheless, and its GSI is quarantined.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, self.route.partition(), || self.route.close())
    }

    /// Whether it is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.route.is_closed()
    }

    /// Whether a finalizer should warn. Always false in a forked child.
    fn _is_left_open(&self) -> bool {
        !self.of_device && !self.route.is_closed() && self.route.partition().check_owner().is_ok()
    }

    /// For finalizers and `with` blocks: closes. In a forked child closes only the descriptor.
    fn _abandon(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, self.route.partition(), || self.route.abandon())
    }

    /// For the garbage collector: an instance of a subclass may be part of a cycle.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.partition)
    }

    fn __repr__(&self) -> String {
        let gsi = self.route.gsi();
        let (Ok(state), Ok(masked), Ok(msi)) = (self.route.state(), self.route.masked(), self.route.msi()) else {
            let why = if self.route.is_closed() { "closed" } else { "of the process that forked this one" };
            return format!("<IrqFdRoute gsi={gsi} {why}>");
        };
        let state = match state {
            irqfd::GsiState::Enabled => "ENABLED",
            irqfd::GsiState::Broken => "BROKEN",
            _ => "DISABLED",
        };
        let elsewhere = self.route.armed_gsi().ok().flatten().filter(|at| *at != gsi);
        format!(
            "<IrqFdRoute gsi={gsi} {state}{}{} {}{}>",
            elsewhere.map_or_else(String::new, |at| format!(" at GSI {at}")),
            if masked { " masked" } else { "" },
            msi.map_or_else(|| "no MSI".into(), msi::describe),
            if self.route.pending().unwrap_or(false) { " pending" } else { "" },
        )
    }
}
