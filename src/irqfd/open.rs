//! Opening partitions: the backend's device node, the checks of a caller's descriptor, and advice on failure.

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::config::{Config, check_gsis, other_gsis};
use super::error::{Error, Result};
use super::partition::Partition;
use super::vps::VpSet;
use crate::hypervisor::kvm::{self, KvmPartition};
use crate::hypervisor::mshv::{self, MshvPartition};
use crate::hypervisor::observer::Observer;
use crate::hypervisor::simulated::SimulatedPartition;
use crate::hypervisor::{Backend, CallError, CallResult, Hypervisor, Operation, RawMsi, descriptor};

/// The first 2048 GSIs above 0-23, which are the IOAPIC's pins by convention.
pub const DEFAULT_GSIS: Range<u32> = 24..2072;

/// Options of [`Partition::open`].
#[derive(Clone, Debug)]
pub struct Options {
    /// The device node, if not the backend's default.
    pub device: Option<PathBuf>,
    /// The GSIs to allocate to routes.
    pub gsis: Range<u32>,
    /// The VPs to create.
    pub vps: VpSet,
    /// Whether irqfds are disarmed around every push. `None` disarms them where the kernel needs it.
    pub quiesce: Option<bool>,
    /// Whether a route may be armed even if no VP has its destination's APIC id.
    pub allow_missing_vp: bool,
    /// Whether the GSIs outside `gsis` are spare: pushes load their entries with messages that routes are likely to want
    /// next.
    pub preload: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            device: None,
            gsis: DEFAULT_GSIS,
            vps: VpSet::from_iter([0]),
            quiesce: None,
            allow_missing_vp: false,
            preload: true,
        }
    }
}

/// Options of [`Partition::adopt`].
#[derive(Clone, Debug)]
pub struct AdoptOptions {
    /// The device node, if not the backend's default.
    pub device: Option<PathBuf>,
    /// The GSIs to allocate to routes. All other GSIs stay the caller's.
    pub gsis: Range<u32>,
    /// The caller's own entries. Every push keeps them.
    pub keep: Vec<(u32, RawMsi)>,
    /// GSIs that are spare: pushes load their entries with messages that routes are likely to want next.
    pub spares: Range<u32>,
    /// The VPs, if known. MSIs are checked against them.
    pub vps: Option<VpSet>,
    /// Whether irqfds are disarmed around every push. `None` disarms them where the kernel needs it.
    pub quiesce: Option<bool>,
}

impl Default for AdoptOptions {
    fn default() -> Self {
        Self { device: None, gsis: DEFAULT_GSIS, keep: Vec::new(), spares: 0..0, vps: None, quiesce: None }
    }
}

impl Partition {
    /// Makes a partition.
    pub fn open(backend: Backend, options: &Options) -> Result<Arc<Self>> {
        let device = node(backend, options.device.as_deref())?;
        check_gsis(backend, backend.has_pins(), &options.gsis, 0)?;
        let opened = match backend {
            Backend::Mshv => MshvPartition::open(&device).map(on_mshv),
            Backend::Kvm => KvmPartition::open(&device).map(on_kvm),
            Backend::Simulated => SimulatedPartition::open().map(on_simulated),
        };
        let (hypervisor, observer) = opened.map_err(|error| unavailable(backend, &device, error))?;
        let config = Config {
            quiesce: options.quiesce.unwrap_or(backend.needs_quiesced_push()),
            allow_missing_vp: options.allow_missing_vp,
            spares: if options.preload { other_gsis(&options.gsis) } else { Vec::new() },
            ..Config::new(backend, options.gsis.clone())
        };
        let partition = Self::observed(hypervisor, observer, config)?;
        options.vps.iter().try_for_each(|index| partition.create_vp(index))?;
        Ok(partition)
    }

    /// Takes over the MSI routing of a partition that another VMM made. Keeps a duplicate of its descriptor.
    pub fn adopt(backend: Backend, fd: RawFd, options: &AdoptOptions) -> Result<Arc<Self>> {
        let device = node(backend, options.device.as_deref())?;
        let own = duplicate(backend, fd)?;
        let (hypervisor, observer) = take_over(backend, &device, own, &options.keep)
            .map_err(|error| unavailable(backend, &device, error))?;
        let config = Config {
            vps: options.vps,
            adopted: true,
            quiesce: options.quiesce.unwrap_or(backend.needs_quiesced_push()),
            keep: options.keep.clone(),
            spares: vec![options.spares.clone()],
            ..Config::new(backend, options.gsis.clone())
        };
        Self::observed(hypervisor, observer, config)
    }
}

type Opened = (Box<dyn Hypervisor>, Observer);

fn on_mshv(partition: MshvPartition) -> Opened {
    (Box::new(partition), Observer::None)
}

fn on_kvm(partition: KvmPartition) -> Opened {
    let observer = Observer::of_kvm(&partition);
    (Box::new(partition), observer)
}

fn on_simulated(partition: SimulatedPartition) -> Opened {
    let observer = Observer::of_simulated(&partition);
    (Box::new(partition), observer)
}

fn take_over(backend: Backend, device: &Path, fd: OwnedFd, keep: &[(u32, RawMsi)]) -> CallResult<Opened> {
    match backend {
        Backend::Mshv => Ok(on_mshv(MshvPartition::adopt(fd, keep))),
        Backend::Kvm => KvmPartition::adopt(device, fd, keep).map(on_kvm),
        // `duplicate` has refused it already.
        Backend::Simulated => Err(CallError::new(Operation::Open, "adopt", libc::EINVAL)),
    }
}

fn node(backend: Backend, device: Option<&Path>) -> Result<PathBuf> {
    match (backend, device) {
        (Backend::Simulated, Some(device)) => Err(Error::Invalid(format!(
            "device {device:?}: the simulated backend has no device node; leave it out"
        ))),
        (_, Some(device)) => Ok(device.into()),
        (Backend::Mshv, None) => Ok(mshv::DEVICE.into()),
        (Backend::Kvm, None) => Ok(kvm::DEVICE.into()),
        (Backend::Simulated, None) => Ok("simulated".into()),
    }
}

/// Duplicates a caller's descriptor, and checks that it is a partition of this backend.
fn duplicate(backend: Backend, fd: RawFd) -> Result<OwnedFd> {
    let expected = match backend {
        Backend::Mshv => mshv::LINK,
        Backend::Kvm => kvm::LINK,
        Backend::Simulated => {
            return Err(Error::Invalid(
                "a simulated partition lives in this process and has no file descriptor".into(),
            ));
        }
    };
    let own = descriptor::owned_duplicate(fd).map_err(|error| match error.raw_os_error() {
        Some(libc::EBADF) => Error::Invalid(format!("file descriptor {fd} is not open")),
        _ => {
            let error = CallError::of(Operation::Open, "fcntl (F_DUPFD_CLOEXEC)", &error);
            unavailable(backend, Path::new(expected), error)
        }
    })?;
    match descriptor::link(own.as_raw_fd()) {
        Ok(link) if link == expected => Ok(own),
        Ok(link) => Err(Error::Invalid(format!(
            "file descriptor {fd} is {link}, not a partition of {backend} ({expected})"
        ))),
        Err(error) => Err(Error::Invalid(format!("file descriptor {fd} can't be inspected: {error}"))),
    }
}

fn unavailable(backend: Backend, device: &Path, error: CallError) -> Error {
    let advice = advice(backend, device, &error);
    Error::Unavailable { device: device.display().to_string(), error, advice }
}

/// Advice for a device node that yields no partition.
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
            "another process made the VM, and KVM takes ioctls from that one only; adopt it there, or make a VM here"
                .into()
        }
        (_, libc::ENOENT | libc::ENXIO | libc::ENODEV) => "there is no such device: load the module (kvm_intel or \
             kvm_amd) and turn virtualization on in the firmware; without it use \"simulated\""
            .into(),
        (_, libc::ENOTTY | libc::EINVAL) => format!("this is not a device of {backend}; give another node, or none"),
        _ => format!("{backend} could not make a partition; the kernel log may say why"),
    }
}
