//! Bare ioctls on a partition of its own, with no rule kept: for finding out what a kernel does.
//!
//! Nothing of the package stands on this. It makes what the rest of the package never makes.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_irqfd};
use mshv_bindings::{MSHV_IRQFD_BIT_DEASSIGN, MSHV_IRQFD_BIT_RESAMPLE, mshv_user_irq_entry, mshv_user_irqfd};

use super::kvm::{self, KvmPartition};
use super::mshv::{self, MshvPartition};
use super::{CallResult, Hypervisor};

/// A partition with VP 0.
#[derive(Debug)]
pub enum RawPartition {
    Mshv(MshvPartition),
    Kvm(KvmPartition),
}

/// An MSI entry as a kernel takes it, right or wrong.
#[derive(Clone, Copy, Debug)]
pub struct RawEntry {
    pub gsi: u32,
    pub address: u64,
    pub data: u32,
}

/// What the ioctl for irqfds is to do.
#[derive(Clone, Copy, Debug)]
pub struct RawIrqfd {
    pub event: RawFd,
    pub gsi: u32,
    pub deassign: bool,
    pub resample: Option<RawFd>,
}

impl RawPartition {
    pub fn mshv(device: &Path) -> CallResult<Self> {
        let mut partition = MshvPartition::open(device)?;
        partition.create_vp(0)?;
        Ok(Self::Mshv(partition))
    }

    pub fn kvm(device: &Path) -> CallResult<Self> {
        let mut partition = KvmPartition::open(device)?;
        partition.create_vp(0)?;
        Ok(Self::Kvm(partition))
    }

    /// A routing table in the kernel's layout, KVM's pins in front.
    fn table(&self, entries: &[RawEntry]) -> Vec<u64> {
        match self {
            Self::Mshv(_) => {
                let entries: Vec<_> = entries
                    .iter()
                    .map(|entry| mshv_user_irq_entry {
                        gsi: entry.gsi,
                        address_lo: entry.address as u32,
                        address_hi: (entry.address >> 32) as u32,
                        data: entry.data,
                    })
                    .collect();
                super::table::image(&entries)
            }
            Self::Kvm(_) => {
                let mut all = kvm::pins();
                all.extend(entries.iter().map(|entry| kvm::wide_msi_entry(entry.gsi, entry.address, entry.data)));
                super::table::image(&all)
            }
        }
    }

    pub fn set_routing(&self, entries: &[RawEntry]) -> io::Result<()> {
        self.push(&self.table(entries))
    }

    fn push(&self, table: &[u64]) -> io::Result<()> {
        // SAFETY: a table made by `table` has the layout of the ioctl's argument and the length it says.
        unsafe {
            match self {
                Self::Mshv(partition) => mshv::set_routing(partition, table.as_ptr()),
                Self::Kvm(partition) => kvm::set_routing(partition, table.as_ptr()),
            }
        }
    }

    pub fn irqfd(&self, irqfd: RawIrqfd) -> io::Result<()> {
        let RawIrqfd { event, gsi, deassign, resample } = irqfd;
        let flag = |condition, bit: u32| if condition { bit } else { 0 };
        match self {
            Self::Mshv(_) => {
                let flags = flag(deassign, 1 << MSHV_IRQFD_BIT_DEASSIGN)
                    | flag(resample.is_some(), 1 << MSHV_IRQFD_BIT_RESAMPLE);
                mshv::irqfd(self, &mshv_user_irqfd { fd: event, resamplefd: resample.unwrap_or(0), gsi, flags })
            }
            Self::Kvm(_) => {
                let flags =
                    flag(deassign, KVM_IRQFD_FLAG_DEASSIGN) | flag(resample.is_some(), KVM_IRQFD_FLAG_RESAMPLE);
                let resamplefd = resample.unwrap_or(0) as u32;
                kvm::irqfd(self, &kvm_irqfd { fd: event as u32, gsi, flags, resamplefd, ..Default::default() })
            }
        }
    }

    /// The vectors in KVM's local APIC, which are cleared; `None` on mshv, which does not tell.
    pub fn take_vectors(&self) -> io::Result<Option<Vec<u8>>> {
        match self {
            Self::Mshv(_) => Ok(None),
            Self::Kvm(partition) => {
                let taken = partition.vcpus().take_interrupts()?;
                Ok(Some(taken.into_iter().map(|interrupt| interrupt.vector).collect()))
            }
        }
    }

    /// One thread pushes a table again and again, another signals an armed route, for as long as `duration`; with
    /// `quiesce` the route is disarmed around each push. Returns the numbers of pushes and of signals.
    pub fn push_while_signalling(
        &self,
        entries: &[RawEntry],
        irqfd: RawIrqfd,
        quiesce: bool,
        duration: Duration,
    ) -> io::Result<(u64, u64)> {
        let table = self.table(entries);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let signaller = scope.spawn(|| {
                let mut signals = 0;
                while !stop.load(Ordering::Relaxed) {
                    let one = 1u64;
                    // SAFETY: eight bytes of a live value.
                    if unsafe { libc::write(irqfd.event, (&raw const one).cast(), 8) } != 8 {
                        return Err(io::Error::last_os_error());
                    }
                    signals += 1;
                }
                Ok(signals)
            });
            let pusher = || {
                let end = Instant::now() + duration;
                let mut pushes = 0;
                while Instant::now() < end {
                    if quiesce {
                        self.irqfd(RawIrqfd { deassign: true, ..irqfd })?;
                    }
                    self.push(&table)?;
                    if quiesce {
                        self.irqfd(irqfd)?;
                    }
                    pushes += 1;
                }
                Ok(pushes)
            };
            let pushes: io::Result<u64> = pusher();
            stop.store(true, Ordering::Relaxed);
            let signals =
                signaller.join().unwrap_or_else(|_| Err(io::Error::other("the signalling thread panicked")));
            Ok((pushes?, signals?))
        })
    }
}

impl AsRawFd for RawPartition {
    fn as_raw_fd(&self) -> RawFd {
        let fd = match self {
            Self::Mshv(partition) => partition.fd(),
            Self::Kvm(partition) => partition.fd(),
        };
        fd.unwrap_or(-1)
    }
}
