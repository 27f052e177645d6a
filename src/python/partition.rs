//! `Partition` in Python.

use std::os::fd::{IntoRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::{MutexExt, PyOnceLock};
use pyo3::types::{PyDict, PyList, PyRange, PyTuple, PyType, PyWeakrefMethods, PyWeakrefReference};

use super::errors::bad_integer;
use super::log::{self, logged};
use super::objects::{Batch, IoEventFd, IrqFdRoute, Partition, TakenRoute};
use super::{arguments, msi, saved, values};
use crate::hypervisor::trigger::Trigger;
use crate::hypervisor::{Backend, Operation, UnknownBackend};
use crate::irqfd::{self, AdoptOptions, Options, SavedState};

impl Partition {
    /// Lists a route's object among the partition's.
    fn list(&self, object: &Bound<'_, PyAny>) -> PyResult<()> {
        let route = object.cast::<IrqFdRoute>()?.get();
        let index = (route.route.gsi() - self.core.config().gsis.start) as usize;
        let reference = PyWeakrefReference::new(object)?.unbind();
        let mut routes = self.routes.lock_py_attached(object.py()).unwrap_or_else(PoisonError::into_inner);
        if routes.is_empty() {
            routes.resize_with(self.core.config().gsis.len(), || None);
        }
        let before = routes[index].replace(reference);
        // Dropping an object may run Python code, which might need the lock.
        drop(routes);
        drop(before);
        Ok(())
    }
}

/// The longest wait between two checks for Ctrl-C.
const SLICE: Duration = Duration::from_millis(20);

#[pymethods]
impl Partition {
    #[new]
    #[pyo3(signature = (backend_name, *, device, fd, gsis, keep, spare, vps, quiesce, allow_missing_vp, preload))]
    #[expect(clippy::too_many_arguments)]
    fn open(
        py: Python<'_>,
        backend_name: &str,
        device: Option<PathBuf>,
        fd: Option<&Bound<'_, PyAny>>,
        gsis: &Bound<'_, PyAny>,
        keep: &Bound<'_, PyAny>,
        spare: Option<&Bound<'_, PyAny>>,
        vps: Option<&Bound<'_, PyAny>>,
        quiesce: Option<bool>,
        allow_missing_vp: bool,
        preload: bool,
    ) -> PyResult<Self> {
        let backend: Backend =
            backend_name.parse().map_err(|error: UnknownBackend| PyValueError::new_err(error.to_string()))?;
        let fd = fd.map(arguments::descriptor).transpose()?;
        let gsis = arguments::gsis("gsis", gsis)?;
        let spares = spare.map_or(Ok(0..0), |spare| arguments::gsis("spare", spare))?;
        let keep = arguments::keep(keep)?;
        let vps = vps.map(arguments::vps).transpose()?;
        let core = match fd {
            None => {
                let vps = vps.unwrap_or_default();
                let options = Options { device, gsis, vps, quiesce, allow_missing_vp, preload };
                py.detach(|| irqfd::Partition::open(backend, &options))?
            }
            Some(fd) => {
                let options = AdoptOptions { device, gsis, keep, spares, vps, quiesce };
                py.detach(|| irqfd::Partition::adopt(backend, fd, &options))?
            }
        };
        core.trace().set_calls(log::wants_calls(py));
        Ok(Self::new(core))
    }

    /// The kernel interface: "mshv", "kvm" or "simulated".
    #[getter]
    fn backend(&self) -> &'static str {
        self.core.config().backend.name()
    }

    /// The GSIs that are allocated to routes, a `range`.
    #[getter]
    fn gsis<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyRange>> {
        let gsis = &self.core.config().gsis;
        PyRange::new(py, gsis.start as isize, gsis.end as isize)
    }

    /// Whether irqfds are disarmed around every push.
    #[getter]
    fn quiesce(&self) -> bool {
        self.core.config().quiesce
    }

    /// Whether every push, arming and disarming is logged, with its reason: at DEBUG, by the logger `mshv_irqfd`.
    ///
    /// Set at opening if that logger takes such records by then. Calls that the kernel refused are logged always, at
    /// WARNING. Records are emitted once a call is over and before it returns, unless another thread is emitting them
    /// just then. When the interpreter ends, finalizers log nothing.
    #[getter]
    fn log_calls(&self) -> bool {
        self.core.trace().calls()
    }

    #[setter]
    fn set_log_calls(&self, log_calls: bool) {
        self.core.trace().set_calls(log_calls);
    }

    /// The indexes of the VPs, which are also their APIC ids, in a tuple.
    ///
    /// None if they are unknown: the partition was adopted without `vps`.
    #[getter]
    fn vps<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let vps = py.detach(|| self.core.vps())?;
        vps.map(|vps| PyTuple::new(py, vps)).transpose()
    }

    /// The open routes, those of devices' vectors among them, in a list ordered by GSI.
    #[getter]
    fn routes<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyList>> {
        let (py, this) = (slf.py(), slf.get());
        this.core.check_open()?;
        let routes: Vec<_> = {
            let routes = this.routes.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
            routes.iter().flatten().filter_map(|route| route.bind(py).upgrade()).collect()
        };
        let mut open: Vec<Bound<'_, IrqFdRoute>> =
            routes.into_iter().filter_map(|route| route.cast_into().ok()).collect();
        for device in this.device_routes(py) {
            open.extend(device.all(slf)?);
        }
        open.retain(|route| !route.get().route.is_closed());
        open.sort_by_key(|route| route.get().route.gsi());
        PyList::new(py, open)
    }

    /// Whether it is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.core.is_closed()
    }

    /// The descriptor of the partition (of the VM, for KVM).
    ///
    /// Raises:
    ///     io.UnsupportedOperation: a simulated partition has none.
    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.core.fileno()?)
    }

    /// A new route with the lowest free GSI, unmasked and without an MSI.
    ///
    /// Args:
    ///     event: a caller's eventfd (an int, or an object with `fileno()`), which the route duplicates. By default the
    ///         route makes a new eventfd.
    ///
    /// Raises:
    ///     GsiExhaustedError: every GSI is taken.
    ///     ValueError: `event` is not an eventfd, is in semaphore mode, or belongs to another route of this process.
    ///     IrqFdError: `event` is not open (EBADF), or the process has too many open files (EMFILE; raise
    ///         RLIMIT_NOFILE).
    #[pyo3(signature = (*, event=None))]
    fn new_irqfd_route<'py>(
        slf: &Bound<'py, Self>,
        event: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        let py = slf.py();
        let event = event.map(arguments::descriptor).transpose()?;
        let class = CLASS.import(py, "mshv_irqfd.handles", "IrqFdRoute")?;
        let object = match event {
            None => class.call1((slf,)),
            Some(event) => class.call1((slf, event)),
        }?;
        slf.get().list(&object)?;
        Ok(object)
    }

    /// Raises one MSI now, with no eventfd and no route.
    ///
    /// Takes what `IrqFdRoute.set_msi()` takes, and checks it the same way. Pushes nothing.
    ///
    /// Args:
    ///     address: an `MsiRoute`, or the address of an MSI. `MsiRoute` has the rules for address and data.
    ///     data: the data of the MSI. Omit it with an `MsiRoute`.
    ///
    /// Returns:
    ///     False if the kernel reports that the guest did not take it. Only KVM reports that, for instance while the
    ///     guest's local APIC is off. True otherwise: the kernel or the hypervisor has accepted it.
    ///
    /// Raises:
    ///     ValueError, OverflowError, TypeError: the arguments are not an MSI. The message names the value and the
    ///         rule.
    ///     MissingVpError: no VP has the destination's APIC id.
    ///     InterruptError: the kernel refused.
    #[pyo3(signature = (address, data=None))]
    fn signal_msi(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        data: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<bool> {
        let msi = msi::from_arguments(address, data)?;
        logged(py, &self.core, || self.core.signal_msi(msi))
    }

    /// A new doorbell: the guest's writes to an address signal an eventfd; see `IoEventFd`.
    ///
    /// A write that rings does not leave the kernel: no VMM sees it. On KVM, writes to guest memory never ring.
    ///
    /// No write may ring two doorbells of a partition. So at one address, doorbells differ in length, or in `datamatch`
    /// at one length; a doorbell of length 0 is alone.
    ///
    /// Args:
    ///     address: the guest-physical address (64 bits), or the number of an I/O port. The write must begin there.
    ///     length: the size of the write in bytes: 1, 2, 4 or 8 (not 8 on a port). 0: any size.
    ///     datamatch: the value that rings, at most `length` bytes wide. None: any value.
    ///     event: a caller's eventfd (an int, or an object with `fileno()`), which the doorbell duplicates. Several
    ///         doorbells may share one. It may also be a route's: then the guest's write raises the route's MSI, and
    ///         the signals are the route's to take. By default the doorbell makes a new eventfd.
    ///     port: whether `address` is an I/O port. Only KVM has doorbells there.
    ///
    /// Raises:
    ///     ValueError, OverflowError, TypeError: an argument is invalid, or the doorbell collides with another one of
    ///         this partition. The message names the value and the rule.
    ///     io.UnsupportedOperation: `port` on mshv or a simulated partition.
    ///     IoEventFdError: the kernel refused, and nothing changed.
    ///     IrqFdError: `event` is not open (EBADF), or the process has too many open files (EMFILE).
    #[pyo3(signature = (address, length, *, datamatch=None, event=None, port=false))]
    fn ioeventfd<'py>(
        slf: &Bound<'py, Self>,
        address: &Bound<'py, PyAny>,
        length: &Bound<'py, PyAny>,
        datamatch: Option<&Bound<'py, PyAny>>,
        event: Option<&Bound<'py, PyAny>>,
        port: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        let class = CLASS.import(slf.py(), "mshv_irqfd.handles", "IoEventFd")?;
        let object = class.call1((slf, address, length, datamatch, event, port))?;
        let reference = PyWeakrefReference::new(&object)?.unbind();
        let mut doorbells = slf.get().doorbells.lock_py_attached(slf.py()).unwrap_or_else(PoisonError::into_inner);
        let all = std::mem::take(&mut *doorbells);
        let (mut kept, gone): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|other| other.bind(slf.py()).upgrade().is_some());
        kept.push(reference);
        *doorbells = kept;
        drop(doorbells);
        drop(gone);
        Ok(object)
    }

    /// The open doorbells, in a list ordered by address; those on I/O ports come last.
    #[getter]
    fn ioeventfds<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.core.check_open()?;
        let all: Vec<_> = {
            let doorbells = self.doorbells.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
            doorbells.iter().filter_map(|doorbell| doorbell.bind(py).upgrade()).collect()
        };
        let mut open: Vec<Bound<'_, IoEventFd>> =
            all.into_iter().filter_map(|doorbell| doorbell.cast_into().ok()).collect();
        open.retain(|doorbell| !doorbell.get().doorbell.is_closed());
        open.sort_by_key(|doorbell| {
            let Trigger { address, length, datamatch, port } = doorbell.get().doorbell.trigger();
            (port, address, length, datamatch)
        });
        PyList::new(py, open)
    }

    /// Saves the state of the routes, for a snapshot or a migration.
    ///
    /// The routes of devices are not in it: `MsixTable.save()` and `MsiCapability.save()` have those of theirs. Nor is
    /// any descriptor, nor a VP. The page "Saved state" of the docs describes it, key by key.
    ///
    /// Takes nothing away, and changes no route. Each armed route is disarmed for the moment in which its eventfd is
    /// looked at, so that every signal so far is either in a VP's local APIC or pending in the state: stop the VPs
    /// first, and save their state afterwards. Arming the route again raises the interrupt for the signals since then.
    ///
    /// Returns:
    ///     A dict of values that JSON has.
    ///
    /// Raises:
    ///     RouteBrokenError: a route is broken. Close it.
    ///     IrqFdError: the kernel refused to disarm a route, or to arm it again.
    fn save<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = logged(py, &self.core, || self.core.save()?.to_json())?;
        saved::to_dict(py, state)
    }

    /// Makes the routes of a saved state, with their GSIs, masks, MSIs and pending signals, or changes nothing.
    ///
    /// Makes one push at most. A pending signal is delivered once: now if the route is armed, or when it is. Restore
    /// all states before making other routes, which could take their GSIs. The state may come from another backend.
    ///
    /// Args:
    ///     state: the dict that `save()` returned, as it was or from JSON.
    ///     events: the caller's eventfds, in a mapping from GSIs, each an int or an object with `fileno()`. The routes
    ///         duplicate them, and deliver what is pending in them. By default each route makes a new eventfd.
    ///     ring_doorbells: whether to ring every open doorbell of the partition once, after that, but for those on the
    ///         eventfd of a route, of any partition of this process. No state has the rings that were in flight, so a
    ///         device should look at each of its queues when it resumes.
    ///
    /// Returns:
    ///     The routes by GSI, in a dict ordered by GSI.
    ///
    /// Raises:
    ///     ValueError, TypeError, OverflowError: the state or `events` is invalid, or a GSI is taken or not one of
    ///         `gsis`. The message names the key and the rule.
    ///     MissingVpError: no VP has the destination of a route that is to be armed.
    ///     RoutingError, IrqFdError: the kernel refused, or an eventfd can't be made (EMFILE) or is not open (EBADF).
    #[pyo3(signature = (state, *, events=None, ring_doorbells=false))]
    fn restore<'py>(
        slf: &Bound<'py, Self>,
        state: &Bound<'py, PyAny>,
        events: Option<&Bound<'py, PyAny>>,
        ring_doorbells: bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        let (py, this) = (slf.py(), slf.get());
        let state = saved::from_dict(state)?;
        let events = events.map_or(Ok(Vec::new()), arguments::events_by_gsi)?;
        let restored = logged(py, &this.core, || this.core.restore(&state, &events, ring_doorbells))?;
        let class = py.import("mshv_irqfd.handles")?.getattr("IrqFdRoute")?;
        let routes = PyDict::new(py);
        for (gsi, route) in restored {
            let object = class.call1((slf, TakenRoute { route: Arc::new(route), of_device: false }))?;
            this.list(&object)?;
            routes.set_item(gsi, object)?;
        }
        Ok(routes)
    }

    /// Creates the VP with this index, which is also its APIC id.
    ///
    /// Args:
    ///     index: 0 to 254.
    ///
    /// Raises:
    ///     ValueError: `index` is out of range, or the VP already exists.
    ///     VpError: the kernel refused.
    ///     io.UnsupportedOperation: the partition was adopted. The VMM that made it makes its VPs.
    fn create_vp(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<()> {
        let range = "VP indexes are 0 to 254";
        let number = index.extract::<i64>().map_err(|error| bad_integer(&error, index, "VP index", range))?;
        let number = u8::try_from(number)
            .map_err(|_| PyValueError::new_err(format!("VP index {number} is out of range; {range}")))?;
        logged(py, &self.core, || self.core.create_vp(number))
    }

    /// Begins a batch of changes; see `Batch`.
    fn batch(slf: &Bound<'_, Self>) -> PyResult<Batch> {
        Batch::of(slf)
    }

    /// The state of a GSI, a `GsiState`.
    ///
    /// Raises:
    ///     ValueError: `gsi` is not one of `gsis`.
    fn gsi_state<'py>(&self, py: Python<'py>, gsi: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let gsis = &self.core.config().gsis;
        let range = format!("this partition has GSIs {}-{}", gsis.start, gsis.end - 1);
        let number = gsi.extract::<u32>().map_err(|error| bad_integer(&error, gsi, "GSI", &range))?;
        values::gsi_state(py, py.detach(|| self.core.gsi_state(number))?)
    }

    /// The MSI entries of the last push, in a list ordered by GSI. No kernel can be asked for its table.
    ///
    /// Entries at spare GSIs are among them, and inert ones. The next push drops the entries of closed and cleared
    /// routes, and may replace inert spare ones.
    fn routing_table<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let table = py.detach(|| self.core.routing_table())?;
        let entries: PyResult<Vec<_>> =
            table.into_iter().map(|(gsi, msi)| values::routing_entry(py, gsi, msi)).collect();
        PyList::new(py, entries?)
    }

    /// Counts since the partition was opened. Works on a closed partition too.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let stats = py.detach(|| self.core.stats())?;
        values::partition_stats(py, stats)
    }

    /// Closes the routes, the doorbells and the partition. Closing twice is fine.
    ///
    /// Raises:
    ///     IrqFdError: some irqfds could not be disarmed. Everything is closed nevertheless.
    ///     IoEventFdError: some doorbells could not be taken away. Everything is closed nevertheless.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, &self.core, || self.core.close())
    }

    fn _take_interrupts<'py>(&self, py: Python<'py>, timeout: f64) -> PyResult<Bound<'py, PyList>> {
        let end = Instant::now().checked_add(arguments::timeout(timeout)?);
        loop {
            let left = end.map_or(SLICE, |end| end.saturating_duration_since(Instant::now()));
            let taken = py.detach(|| self.core.take_interrupts(left.min(SLICE)))?;
            if !taken.is_empty() || left.is_zero() {
                let list: PyResult<Vec<_>> =
                    taken.into_iter().map(|interrupt| values::interrupt(py, interrupt)).collect();
                return PyList::new(py, list?);
            }
            py.check_signals()?;
        }
    }

    /// For a program that runs a guest: a new descriptor of a vCPU of KVM. The caller closes it.
    fn _lend_vcpu(&self, py: Python<'_>, index: u8) -> PyResult<RawFd> {
        Ok(py.detach(|| self.core.lend_vcpu(index))?.into_raw_fd())
    }

    /// For a program that ran a guest: nobody runs the lent vCPUs any more.
    fn _take_vcpus_back(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.core.take_vcpus_back())?)
    }

    /// The interrupts that nobody has taken, each with its number. Waits a little for one numbered `known`.
    fn _arrived_interrupts<'py>(&self, py: Python<'py>, timeout: f64, known: u64) -> PyResult<Bound<'py, PyList>> {
        let wait = arguments::timeout(timeout)?.min(SLICE);
        let arrived = py.detach(|| self.core.arrived_interrupts(wait, known))?;
        let list: PyResult<Vec<_>> = arrived
            .into_iter()
            .map(|(number, interrupt)| Ok((number, values::interrupt(py, interrupt)?)))
            .collect();
        PyList::new(py, list?)
    }

    /// Takes the interrupts with these numbers, unless somebody has taken one of them.
    fn _claim_interrupts(&self, py: Python<'_>, numbers: Vec<u64>) -> PyResult<bool> {
        Ok(py.detach(|| self.core.claim_interrupts(&numbers))?)
    }

    fn _settle(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, &self.core, || self.core.settle())
    }

    fn _write_mmio(&self, py: Python<'_>, address: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<bool> {
        let (address, data) = (arguments::address("address", address)?, arguments::bytes(data)?);
        Ok(py.detach(|| self.core.write_mmio(address, &data))?)
    }

    fn _fail(&self, py: Python<'_>, call: &str, errno: i32, after: u32, times: u32) -> PyResult<()> {
        let operation = operation(call)?;
        if !(1..4096).contains(&errno) {
            return Err(PyValueError::new_err(format!(
                "errno {errno} is not an error number; give one from the errno module"
            )));
        }
        let fail = || self.core.simulated().map(|driver| driver.fail(operation, errno, after, times));
        Ok(py.detach(fail)?)
    }

    /// Forgets the faults of a kind. Returns the number of calls that were still to fail.
    fn _clear_faults(&self, py: Python<'_>, call: &str) -> PyResult<u32> {
        let operation = operation(call)?;
        Ok(py.detach(|| self.core.simulated().map(|driver| driver.clear_faults(operation)))?)
    }

    /// Whether a finalizer should warn. Always false in a forked child.
    fn _is_left_open(&self) -> bool {
        self.core.check_open().is_ok()
    }

    /// For finalizers and `with` blocks: closes. In a forked child nothing: the drop closes descriptors.
    fn _abandon(&self, py: Python<'_>) -> PyResult<()> {
        logged(py, &self.core, || self.core.abandon())
    }

    // Here too: the bench's partition has no Python half.
    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self._abandon(py)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let name = slf.get_type().name()?;
        let core = &slf.get().core;
        let (backend, gsis) = (core.config().backend, &core.config().gsis);
        let state = match core.fileno() {
            _ if core.is_closed() => " closed".into(),
            Ok(fd) => format!(" fd={fd}"),
            Err(_) => String::new(),
        };
        let quiesce = if core.config().quiesce { " quiesced" } else { "" };
        Ok(format!("<{name} backend={backend}{state} gsis={}-{}{quiesce}>", gsis.start, gsis.end - 1))
    }
}

/// The call of the simulated kernel that a caller names.
fn operation(call: &str) -> PyResult<Operation> {
    Ok(match call {
        "set_msi_routing" => Operation::SetMsiRouting,
        "assign_irqfd" => Operation::AssignIrqfd,
        "deassign_irqfd" => Operation::DeassignIrqfd,
        "assign_ioeventfd" => Operation::AssignIoEventFd,
        "deassign_ioeventfd" => Operation::DeassignIoEventFd,
        "signal_msi" => Operation::SignalMsi,
        _ => {
            return Err(PyValueError::new_err(format!(
                "call {call:?} is unknown; give \"set_msi_routing\", \"assign_irqfd\", \"deassign_irqfd\", \
                 \"assign_ioeventfd\", \"deassign_ioeventfd\" or \"signal_msi\""
            )));
        }
    })
}
