//! Bare ioctls, valid or not, on a separate partition, to show how a kernel reacts.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::hypervisor::calls;
pub use crate::hypervisor::calls::Irqfd;
use crate::hypervisor::event;
use crate::hypervisor::kvm::KvmPartition;
use crate::hypervisor::mshv::MshvPartition;
use crate::hypervisor::table::Image;
use crate::hypervisor::{CallResult, Hypervisor};

/// A partition with VP 0.
#[derive(Debug)]
pub enum RawPartition {
    Mshv(MshvPartition),
    Kvm(KvmPartition),
}

/// An MSI entry, valid or not.
#[derive(Clone, Copy, Debug)]
pub struct RawEntry {
    pub gsi: u32,
    pub address: u64,
    pub data: u32,
}

/// A routing table in a kernel's layout. KVM's starts with the pins.
#[derive(Debug)]
enum RawTable {
    Mshv(Image<calls::mshv::Entry>),
    Kvm(Image<calls::kvm::Entry>),
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

    fn table(&self, entries: &[RawEntry]) -> RawTable {
        match self {
            Self::Mshv(_) => {
                let entry = |entry: &RawEntry| calls::mshv::entry(entry.gsi, entry.address, entry.data);
                RawTable::Mshv(Image::copy_of(&entries.iter().map(entry).collect::<Vec<_>>()))
            }
            Self::Kvm(_) => {
                let entry = |entry: &RawEntry| calls::kvm::entry(entry.gsi, entry.address, entry.data);
                let all: Vec<_> = calls::kvm::pins().into_iter().chain(entries.iter().map(entry)).collect();
                RawTable::Kvm(Image::copy_of(&all))
            }
        }
    }

    pub fn set_routing(&self, entries: &[RawEntry]) -> io::Result<()> {
        self.push(&self.table(entries))
    }

    fn push(&self, table: &RawTable) -> io::Result<()> {
        match table {
            RawTable::Mshv(image) => calls::mshv::set_msi_routing(self, image),
            RawTable::Kvm(image) => calls::kvm::set_gsi_routing(self, image),
        }
    }

    pub fn irqfd(&self, irqfd: Irqfd) -> io::Result<()> {
        match self {
            Self::Mshv(_) => calls::mshv::irqfd(self, irqfd),
            Self::Kvm(_) => calls::kvm::irqfd(self, irqfd),
        }
    }

    /// Takes the vectors from KVM's local APIC; `None` on mshv, which does not report them.
    pub fn take_vectors(&self) -> io::Result<Option<Vec<u8>>> {
        match self {
            Self::Mshv(_) => Ok(None),
            Self::Kvm(partition) => {
                let taken = partition.vcpus().take_interrupts()?;
                Ok(taken.map(|taken| taken.into_iter().map(|interrupt| interrupt.vector).collect()))
            }
        }
    }

    /// Pushes a table repeatedly for `duration`, while another thread signals an armed route. With `quiesce`, disarms
    /// the route around each push. Returns the numbers of pushes and signals.
    pub fn push_while_signalling(
        &self,
        entries: &[RawEntry],
        irqfd: Irqfd,
        quiesce: bool,
        duration: Duration,
    ) -> io::Result<(u64, u64)> {
        let table = self.table(entries);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let signaller = scope.spawn(|| {
                let mut signals = 0;
                while !stop.load(Ordering::Relaxed) {
                    event::write(irqfd.event, 1)?;
                    signals += 1;
                }
                Ok(signals)
            });
            let pusher = || {
                let end = Instant::now() + duration;
                let mut pushes = 0;
                while Instant::now() < end {
                    if quiesce {
                        self.irqfd(Irqfd { deassign: true, ..irqfd })?;
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
