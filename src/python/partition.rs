//! `Partition` in Python.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::{MutexExt, PyOnceLock};
use pyo3::types::{PyList, PyRange, PyTuple, PyType, PyWeakrefMethods, PyWeakrefReference};

use super::batch::Batch;
use super::errors::{ClosedError, bad_integer, plain_os_error, unavailable};
use super::route::IrqFdRoute;
use super::{arguments, values};
use crate::hypervisor::kvm::{self, KvmPartition, KvmVcpus};
use crate::hypervisor::mshv::{self, MshvPartition};
use crate::hypervisor::simulated::{Driver, SimulatedPartition};
use crate::hypervisor::{Backend, CallError, Hypervisor, Interrupt, Operation, RawMsi, descriptor};
use crate::irqfd::{self, Config, Failure, VpSet, check_gsis};

/// The longest wait between two looks at whether Ctrl-C was pressed.
const SLICE: Duration = Duration::from_millis(20);

/// A partition (virtual machine) of a hypervisor, and the sole owner of its MSI routing table and irqfds.
///
/// Made by `open_partition()` or `Partition.from_fd()`. Threads may share it. Close it, or use `with`; that closes
/// its routes. In a forked child everything that would touch the partition raises `ForkedError`.
///
/// Raises:
///     ClosedError: from nearly everything, once it is closed.
#[pyclass(frozen, subclass, weakref, module = "mshv_irqfd._core")]
pub(crate) struct Partition {
    pub(super) core: Arc<irqfd::Partition>,
    observer: Observer,
    /// The Python objects of the routes, by GSI counted from the first.
    routes: Mutex<Vec<Option<Py<PyWeakrefReference>>>>,
}

/// What can be asked about the interrupts that arrived. Weak, so that a closed partition is gone.
enum Observer {
    None,
    Kvm(Weak<KvmVcpus>),
    Simulated(Weak<Driver>),
}

fn backend(name: &str) -> PyResult<Backend> {
    Backend::ALL.into_iter().find(|backend| backend.name() == name).ok_or_else(|| {
        PyValueError::new_err(format!("backend {name:?} is unknown; give \"mshv\", \"kvm\" or \"simulated\""))
    })
}

fn node(backend: Backend, device: Option<PathBuf>) -> PyResult<PathBuf> {
    match (backend, device) {
        (Backend::Simulated, Some(device)) => Err(PyValueError::new_err(format!(
            "device {device:?}: the simulated backend has no device node; leave it out"
        ))),
        (_, Some(device)) => Ok(device),
        (Backend::Kvm, None) => Ok(kvm::DEVICE.into()),
        (_, None) => Ok(mshv::DEVICE.into()),
    }
}

/// What to do about a device node that gives no partition.
fn advice(backend: Backend, device: &Path, error: &CallError) -> String {
    match (backend, error.errno) {
        (_, libc::EMFILE) => "raise RLIMIT_NOFILE (ulimit -n)".into(),
        (Backend::Simulated, _) => "the simulated partition could not be set up".into(),
        (_, libc::EACCES | libc::EPERM) if error.call == "open" => format!(
            "no permission: run as root, or give this user access to {} (a group, or setfacl)",
            device.display()
        ),
        (Backend::Mshv, libc::ENOENT | libc::ENXIO | libc::ENODEV) => "there is no such device: it appears where \
             Linux is the root partition of the Microsoft Hypervisor and has CONFIG_MSHV_ROOT; without one use \
             \"kvm\" or \"simulated\""
            .into(),
        (_, libc::ENXIO) if error.call == "KVM_GET_IRQCHIP" => {
            "the VM has no interrupt controller in the kernel yet; \
             adopt it after KVM_CREATE_IRQCHIP or KVM_CAP_SPLIT_IRQCHIP"
                .into()
        }
        (Backend::Kvm, libc::EIO) if error.call == "KVM_GET_IRQCHIP" => {
            "another process made the VM, and KVM takes ioctls from its maker only; adopt it there, or make a VM here"
                .into()
        }
        (_, libc::ENOENT | libc::ENXIO | libc::ENODEV) => "there is no such device: load the module (kvm_intel or \
             kvm_amd) and turn virtualization on in the firmware; without it use \"simulated\""
            .into(),
        (_, libc::ENOTTY | libc::EINVAL) => format!("this is no device of {backend}; give another node, or none"),
        _ => format!("{backend} gave no partition; the kernel log may say why"),
    }
}

impl Partition {
    /// One that does not tell which interrupts arrived.
    pub(super) fn unobserved(core: Arc<irqfd::Partition>) -> Self {
        Self { core, observer: Observer::None, routes: Mutex::default() }
    }

    fn open(
        py: Python<'_>,
        backend: Backend,
        device: &Path,
        fd: Option<OwnedFd>,
        keep: &[(u32, RawMsi)],
    ) -> PyResult<(Box<dyn Hypervisor>, Observer)> {
        type Opened = (Box<dyn Hypervisor>, Observer);
        let kvm = |partition: KvmPartition| -> Opened {
            let observer = Observer::Kvm(Arc::downgrade(&partition.vcpus()));
            (Box::new(partition), observer)
        };
        let opened = py.detach(|| match (backend, fd) {
            (Backend::Mshv, None) => {
                MshvPartition::open(device).map(|made| -> Opened { (Box::new(made), Observer::None) })
            }
            (Backend::Mshv, Some(fd)) => Ok((Box::new(MshvPartition::adopt(fd, keep)) as _, Observer::None)),
            (Backend::Kvm, None) => KvmPartition::open(device).map(kvm),
            (Backend::Kvm, Some(fd)) => KvmPartition::adopt(device, fd, keep).map(kvm),
            (Backend::Simulated, _) => SimulatedPartition::open().map(|made| -> Opened {
                let observer = Observer::Simulated(Arc::downgrade(&made.driver()));
                (Box::new(made), observer)
            }),
        });
        opened.map_err(|error| {
            let (device, advice) = match backend {
                Backend::Simulated => ("simulated".into(), advice(backend, device, &error)),
                _ => (device.display().to_string(), advice(backend, device, &error)),
            };
            unavailable(py, &device, &Failure::new(error, None), &advice)
        })
    }

    fn driver(&self) -> PyResult<Arc<Driver>> {
        self.core.check_open()?;
        match &self.observer {
            Observer::Simulated(driver) => driver.upgrade().ok_or_else(closed),
            _ => Err(PyTypeError::new_err("only a simulated partition can do that")),
        }
    }
}

fn closed() -> PyErr {
    ClosedError::new_err("the partition is closed")
}

/// Duplicates a caller's descriptor, and sees that it is a partition of the kind that it is said to be.
fn duplicate(backend: Backend, fd: RawFd) -> PyResult<OwnedFd> {
    let expected = match backend {
        Backend::Mshv => mshv::LINK,
        Backend::Kvm => kvm::LINK,
        Backend::Simulated => {
            return Err(PyValueError::new_err(
                "a simulated partition lives in this process and has no file descriptor",
            ));
        }
    };
    let own = descriptor::owned_duplicate(fd).map_err(|error| match error.raw_os_error() {
        Some(libc::EBADF) => PyValueError::new_err(format!("file descriptor {fd} is not open")),
        _ => plain_os_error(&error),
    })?;
    match descriptor::link(own.as_raw_fd()) {
        Ok(link) if link == expected => Ok(own),
        Ok(link) => Err(PyValueError::new_err(format!(
            "file descriptor {fd} is {link}, not a partition of {backend} ({expected})"
        ))),
        Err(error) => Err(PyValueError::new_err(format!("file descriptor {fd} can't be looked at: {error}"))),
    }
}

#[pymethods]
impl Partition {
    #[new]
    #[pyo3(signature = (backend_name, *, device, fd, gsis, keep, vps, quiesce, allow_missing_vp))]
    #[expect(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        backend_name: &str,
        device: Option<PathBuf>,
        fd: Option<&Bound<'_, PyAny>>,
        gsis: &Bound<'_, PyAny>,
        keep: &Bound<'_, PyAny>,
        vps: Option<&Bound<'_, PyAny>>,
        quiesce: Option<bool>,
        allow_missing_vp: bool,
    ) -> PyResult<Self> {
        let backend = backend(backend_name)?;
        let device = node(backend, device)?;
        let fd = fd.map(arguments::descriptor).transpose()?;
        let gsis = arguments::gsis(gsis)?;
        let keep = arguments::keep(keep)?;
        let vps = vps.map(arguments::vps).transpose()?;
        let fd = fd.map(|fd| duplicate(backend, fd)).transpose()?;
        let adopted = fd.is_some();
        if !adopted {
            // Of a partition that somebody else made, it is known which GSIs it takes once it is adopted.
            check_gsis(backend, backend.has_pins(), &gsis, keep.len())?;
        }
        let (hypervisor, observer) = Self::open(py, backend, &device, fd, &keep)?;
        let set = vps.as_ref().map(|vps| {
            let mut set = VpSet::default();
            vps.iter().for_each(|index| set.insert(*index));
            set
        });
        let config = Config {
            backend,
            gsis,
            vps: set,
            adopted,
            quiesce: quiesce.unwrap_or(backend.needs_quiesced_push()),
            allow_missing_vp,
            keep,
        };
        let core = py.detach(|| -> irqfd::Result<_> {
            let core = irqfd::Partition::new(hypervisor, config)?;
            if !adopted {
                for index in vps.into_iter().flatten() {
                    core.create_vp(index)?;
                }
            }
            Ok(core)
        })?;
        Ok(Self { core, observer, routes: Mutex::default() })
    }

    /// Which kernel it stands on: "mshv", "kvm" or "simulated".
    #[getter]
    fn backend(&self) -> &'static str {
        self.core.config().backend.name()
    }

    /// The GSIs that are handed out, a `range`.
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

    /// The indexes of the VPs, which are their APIC ids, in a tuple.
    ///
    /// None if they are not known: an adopted partition whose VPs were not named.
    #[getter]
    fn vps<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let vps = py.detach(|| self.core.vps())?;
        vps.map(|vps| PyTuple::new(py, vps)).transpose()
    }

    /// The open routes, in a list, by GSI.
    #[getter]
    fn routes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.core.check_open()?;
        let routes: Vec<_> = {
            let routes = self.routes.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
            routes.iter().flatten().filter_map(|route| route.bind(py).upgrade()).collect()
        };
        let open = routes
            .into_iter()
            .filter(|route| route.cast::<IrqFdRoute>().is_ok_and(|route| !route.get().route.is_closed()));
        PyList::new(py, open.collect::<Vec<_>>())
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
    ///     event: an eventfd of the caller's (an int, or an object with `fileno()`), which is duplicated; by default
    ///         the route gets one of its own.
    ///
    /// Raises:
    ///     GsiExhaustedError: every GSI is taken.
    ///     ValueError: `event` is no eventfd, one in semaphore mode, or the eventfd of another route of this process.
    ///     IrqFdError: `event` is not open (EBADF), or no descriptor is left (EMFILE, which RLIMIT_NOFILE sets).
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
        let route = object.cast::<IrqFdRoute>()?.get();
        let index = (route.route.gsi() - slf.get().core.config().gsis.start) as usize;
        let reference = PyWeakrefReference::new(&object)?.unbind();
        let mut routes = slf.get().routes.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        if routes.is_empty() {
            routes.resize_with(slf.get().core.config().gsis.len(), || None);
        }
        let before = routes[index].replace(reference);
        // Dropping an object may run Python, which must not find the lock held.
        drop(routes);
        drop(before);
        Ok(object)
    }

    /// Creates the VP with this index, which is also its APIC id.
    ///
    /// Args:
    ///     index: 0 to 254.
    ///
    /// Raises:
    ///     ValueError: out of range, or there already.
    ///     VpError: the kernel refused.
    ///     io.UnsupportedOperation: the partition was adopted; its VPs are made by whoever made it.
    fn create_vp(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<()> {
        let range = "VP indexes are 0 to 254";
        let number = index.extract::<i64>().map_err(|error| bad_integer(&error, index, "VP index", range))?;
        let number = u8::try_from(number)
            .map_err(|_| PyValueError::new_err(format!("VP index {number} is out of range; {range}")))?;
        Ok(py.detach(|| self.core.create_vp(number))?)
    }

    /// Begins a batch of changes; see `Batch`.
    fn batch(slf: &Bound<'_, Self>) -> PyResult<Batch> {
        Batch::of(slf)
    }

    /// What a GSI is used for.
    ///
    /// Raises:
    ///     ValueError: it is not one of `gsis`.
    fn gsi_state<'py>(&self, py: Python<'py>, gsi: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let gsis = &self.core.config().gsis;
        let range = format!("this partition has GSIs {}-{}", gsis.start, gsis.end - 1);
        let number = gsi.extract::<u32>().map_err(|error| bad_integer(&error, gsi, "GSI", &range))?;
        values::gsi_state(py, py.detach(|| self.core.gsi_state(number))?)
    }

    /// Our record of the MSI entries that the kernel holds, by GSI: no kernel can be asked.
    ///
    /// Entries on which nothing is armed may be among them; the next push takes those out that no route has.
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

    /// Closes the routes and gives up the partition. Closing twice is fine.
    ///
    /// Raises:
    ///     IrqFdError: some irqfds could not be disarmed; all is closed all the same.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.core.close())?)
    }

    fn _take_interrupts<'py>(&self, py: Python<'py>, timeout: f64) -> PyResult<Bound<'py, PyList>> {
        let end = Instant::now().checked_add(arguments::timeout(timeout)?);
        loop {
            let left = end.map_or(SLICE, |end| end.saturating_duration_since(Instant::now()));
            let taken = self.take_some(py, left.min(SLICE))?;
            if !taken.is_empty() || left.is_zero() {
                let list: PyResult<Vec<_>> =
                    taken.into_iter().map(|interrupt| values::interrupt(py, interrupt)).collect();
                return PyList::new(py, list?);
            }
            py.check_signals()?;
        }
    }

    fn _settle(&self, py: Python<'_>) -> PyResult<()> {
        let driver = self.driver()?;
        py.detach(move || driver.settle());
        Ok(())
    }

    fn _fail(&self, py: Python<'_>, call: &str, errno: i32, after: u32, times: u32) -> PyResult<()> {
        let operation = match call {
            "set_msi_routing" => Operation::SetMsiRouting,
            "assign_irqfd" => Operation::AssignIrqfd,
            "deassign_irqfd" => Operation::DeassignIrqfd,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "call {call:?} is unknown; give \"set_msi_routing\", \"assign_irqfd\" or \"deassign_irqfd\""
                )));
            }
        };
        if !(1..4096).contains(&errno) {
            return Err(PyValueError::new_err(format!("errno {errno} is no error number; give one of errno's")));
        }
        let driver = self.driver()?;
        py.detach(move || driver.fail(operation, errno, after, times));
        Ok(())
    }

    /// Whether a finalizer has something to warn of: not in a forked child.
    fn _is_left_open(&self) -> bool {
        self.core.check_open().is_ok()
    }

    /// What a finalizer does: closes, or in a forked child nothing; the descriptors go with the memory.
    fn _abandon(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.core.abandon())?)
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// Closes; in a forked child, where close() is refused, does nothing.
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

impl Partition {
    fn take_some(&self, py: Python<'_>, wait: Duration) -> PyResult<Vec<Interrupt>> {
        match &self.observer {
            Observer::Simulated(_) => {
                let driver = self.driver()?;
                Ok(py.detach(move || driver.take_interrupts(wait)))
            }
            Observer::Kvm(vcpus) => {
                self.core.check_open()?;
                let vcpus = vcpus.upgrade().ok_or_else(closed)?;
                // The last share of the vCPUs may go with this one, if the partition is closed meanwhile.
                let taken = py.detach(move || {
                    let taken = vcpus.take_interrupts();
                    if taken.as_ref().is_ok_and(Vec::is_empty) {
                        // Nothing tells of a bit set in a register, so it is looked at again.
                        std::thread::sleep(wait.min(Duration::from_micros(200)));
                    }
                    taken
                });
                taken.map_err(|error| plain_os_error(&error))
            }
            Observer::None => Err(PyTypeError::new_err("the mshv driver does not tell which interrupts arrived")),
        }
    }
}
