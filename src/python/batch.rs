//! `Batch` in Python.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use super::errors::ClosedError;
use super::log::logged;
use super::objects::{Batch, Edits, IrqFdRoute, Kept, Partition};
use super::{arguments, msi};
use crate::irqfd;

impl Batch {
    pub(super) fn of(partition: &Bound<'_, Partition>) -> PyResult<Self> {
        let edits = irqfd::Batch::new(Arc::clone(&partition.get().core))?;
        Ok(Self { open: Mutex::new(Some(edits)), partition: partition.clone().unbind() })
    }

    fn edit(&self, route: &Bound<'_, IrqFdRoute>, edit: impl FnOnce(&mut Edits, Kept)) -> PyResult<()> {
        let mut open = self.open.lock_py_attached(route.py()).unwrap_or_else(PoisonError::into_inner);
        edit(open.as_mut().ok_or_else(spent)?, Kept(route.clone().unbind()));
        Ok(())
    }

    fn take(&self, py: Python<'_>) -> Option<Edits> {
        self.open.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn spent() -> PyErr {
    ClosedError::new_err(
        "the batch is closed: it was committed or left by an exception; begin another with batch()",
    )
}

#[pymethods]
impl Batch {
    /// Sets a route's MSI, as `IrqFdRoute.set_msi()` does.
    ///
    /// Raises:
    ///     ValueError, OverflowError, TypeError: the arguments are not a route and an MSI.
    ///     ClosedError: the batch is closed.
    #[pyo3(signature = (route, address, data=None))]
    fn set_msi(
        &self,
        route: &Bound<'_, IrqFdRoute>,
        address: &Bound<'_, PyAny>,
        data: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let msi = msi::from_arguments(address, data)?;
        self.edit(route, |edits, route| edits.set_msi(route, msi))
    }

    /// Clears a route's MSI, as `IrqFdRoute.clear_msi()` does.
    fn clear_msi(&self, route: &Bound<'_, IrqFdRoute>) -> PyResult<()> {
        self.edit(route, Edits::clear_msi)
    }

    /// Masks a route, as `IrqFdRoute.mask()` does.
    fn mask(&self, route: &Bound<'_, IrqFdRoute>) -> PyResult<()> {
        self.edit(route, Edits::mask)
    }

    /// Unmasks a route, as `IrqFdRoute.unmask()` does.
    fn unmask(&self, route: &Bound<'_, IrqFdRoute>) -> PyResult<()> {
        self.edit(route, Edits::unmask)
    }

    /// Replaces a route's eventfd, as `IrqFdRoute.set_event()` does.
    ///
    /// In one batch, routes may also give their eventfds to one another: in a chain, or in exchange. A moved eventfd
    /// takes the signals that it holds along to its new route, and keeps those that arrive meanwhile; what the new
    /// route's old eventfd holds is carried over to it. A route that is unmasked in the same batch raises one interrupt
    /// for what its new eventfd holds, and one for what is carried over.
    ///
    /// Args:
    ///     route: the route.
    ///     event: an eventfd, an int or an object with `fileno()`, which is duplicated at once; None: a new one.
    ///
    /// Raises:
    ///     ValueError: `event` is not an eventfd, or is in semaphore mode. `commit()` raises ValueError if another
    ///         route of this process has it, and does not give it up in this batch.
    ///     IrqFdError: `event` is not open (EBADF), or too many files are open (EMFILE).
    ///     ClosedError: the batch is closed.
    ///
    /// Example:
    ///     >>> partition = open_partition("simulated")
    ///     >>> old, new = partition.new_irqfd_route(), partition.new_irqfd_route()
    ///     >>> old.signal()
    ///     >>> with partition.batch() as batch:  # the queue of `old` interrupts through `new` from now on
    ///     ...     batch.set_event(new, old)
    ///     ...     batch.set_event(old, None)
    ///     >>> old.pending, new.pending
    ///     (False, True)
    ///     >>> partition.close()
    fn set_event(&self, route: &Bound<'_, IrqFdRoute>, event: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let event = event.map(arguments::descriptor).transpose()?;
        let new = route.py().detach(|| irqfd::NewEvent::make(event))?;
        self.edit(route, |edits, route| edits.set_event(route, new))
    }

    /// Makes the changes: disarms, pushes once if the kernel's table lacks a message, arms.
    ///
    /// If a call fails, everything is rolled back. The batch is closed either way.
    ///
    /// Raises:
    ///     ClosedError: the batch, its partition or one of its routes is closed.
    ///     ValueError: a route belongs to another partition, or an eventfd to another route.
    ///     RouteBrokenError: a route is broken.
    ///     MissingVpError: no VP has a destination's APIC id.
    ///     RoutingError, IrqFdError: the kernel refused.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        let edits = self.take(py).ok_or_else(spent)?;
        logged(py, &self.partition.get().core, || edits.commit())
    }

    /// The partition that the routes belong to.
    #[getter]
    fn partition(&self, py: Python<'_>) -> Py<Partition> {
        self.partition.clone_ref(py)
    }

    /// For the garbage collector: an instance of a subclass, which a route may be of, may be part of a cycle.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // A thread that has the lock just now has the batch too, so it is no garbage.
        if let Ok(open) = self.open.try_lock() {
            open.iter().flat_map(Edits::routes).try_for_each(|Kept(route)| visit.call(route))?;
        }
        visit.call(&self.partition)
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        exception_type: &Bound<'_, PyAny>,
        _exception: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let committed = self.open.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).is_none();
        if !exception_type.is_none() {
            drop(self.take(py));
        } else if !committed {
            self.commit(py)?;
        }
        Ok(())
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        match &*self.open.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner) {
            Some(edits) => format!("<Batch of {} routes>", edits.len()),
            None => "<Batch closed>".into(),
        }
    }
}
