//! The kernels that can hold a routing table and irqfds, each behind [`Hypervisor`].
//!
//! All `unsafe` code is below this module. The trait states the contract once; each kernel's file explains how that
//! kernel meets it.

pub mod calls;
pub mod descriptor;
pub mod event;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod kvm;
pub mod mshv;
pub mod observer;
pub mod owner;
pub mod simulated;
pub mod table;
pub mod trigger;
pub mod waiters;

use std::fmt;
use std::os::fd::RawFd;

use event::{EventFd, Holder};
use trigger::Trigger;

/// Both kernels accept GSIs below this (`MSHV_MAX_GUEST_IRQS`, `KVM_MAX_IRQ_ROUTES`).
pub const MAX_GSIS: u32 = 4096;

/// In a table with an interrupt controller's pins, the GSIs below this are the IOAPIC's.
pub const PIN_GSIS: u32 = 24;

/// The number of table entries for the pins: 16 for the two PICs, 24 for the IOAPIC.
pub const PIN_ENTRIES: usize = 40;

/// The address and data of an MSI, as a routing table holds them.
///
/// The address has 32 bits: the upper half of an MSI address is 0 on x86.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RawMsi {
    pub address: u32,
    pub data: u32,
}

impl fmt::Debug for RawMsi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MSI {:#010x}/{:#06x}", self.address, self.data)
    }
}

/// An interrupt that a guest received. KVM's local APIC reports only its vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    pub vector: u8,
    pub target: Option<Target>,
}

/// The destination and delivery of an interrupt, decoded from an MSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub destination: u8,
    pub delivery_mode: u8,
    pub logical: bool,
    pub level: bool,
}

impl Interrupt {
    /// Decodes an MSI as the mshv driver's `mshv_copy_girq_info()` does (drivers/hv/mshv_irq.c), which ignores all
    /// other bits. Intel SDM volume 3, "Message Signalled Interrupts", defines the fields.
    pub fn decode(msi: RawMsi) -> Self {
        Self { vector: msi.data as u8, target: Some(Target::decode(msi)) }
    }
}

impl Target {
    pub fn decode(msi: RawMsi) -> Self {
        Self {
            destination: (msi.address >> 12) as u8,
            delivery_mode: (msi.data >> 8 & 7) as u8,
            logical: msi.address & 1 << 2 != 0,
            level: msi.data & 1 << 15 != 0,
        }
    }
}

/// The calls into a kernel that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    SetMsiRouting,
    AssignIrqfd,
    DeassignIrqfd,
    AssignIoEventFd,
    DeassignIoEventFd,
    SignalMsi,
    CreateVp,
    Open,
    Event,
    Observe,
}

/// A call that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {}", std::io::Error::from_raw_os_error(*errno))]
pub struct CallError {
    pub operation: Operation,
    /// The name of the ioctl or system call, as its manual has it.
    pub call: &'static str,
    pub errno: i32,
}

impl CallError {
    pub fn new(operation: Operation, call: &'static str, errno: i32) -> Self {
        Self { operation, call, errno }
    }

    /// A system call's error.
    pub fn of(operation: Operation, call: &'static str, error: &std::io::Error) -> Self {
        Self::new(operation, call, error.raw_os_error().unwrap_or(libc::EIO))
    }

    /// The error of the last system call, from `errno`.
    pub fn last(operation: Operation, call: &'static str) -> Self {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Self::new(operation, call, errno)
    }
}

/// The C library's message for an error number.
pub fn strerror(errno: i32) -> String {
    let mut text = std::io::Error::from_raw_os_error(errno).to_string();
    text.truncate(text.rfind(" (os error ").unwrap_or(text.len()));
    text
}

pub type CallResult<T = ()> = Result<T, CallError>;

/// The kernel interface of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    Mshv,
    Kvm,
    Simulated,
}

impl Backend {
    pub const ALL: [Self; 3] = [Self::Mshv, Self::Kvm, Self::Simulated];

    pub fn name(self) -> &'static str {
        match self {
            Self::Mshv => "mshv",
            Self::Kvm => "kvm",
            Self::Simulated => "simulated",
        }
    }

    /// Whether the routing table of a new partition starts with the pins of an IOAPIC and two PICs.
    pub fn has_pins(self) -> bool {
        matches!(self, Self::Kvm)
    }

    /// Whether pushes must be quiesced. At a push the mshv driver rewrites the decoded route of every armed irqfd
    /// without excluding its wake-up handler, so that a concurrent signal can become vector 0
    /// (drivers/hv/mshv_eventfd.c, `mshv_irqfd_wakeup`). KVM protects the route with a seqcount.
    pub fn needs_quiesced_push(self) -> bool {
        !matches!(self, Self::Kvm)
    }

    /// Where a push needs no irqfd disarmed: the number of entries in a table whose push takes as long as moving one
    /// irqfd to another GSI. Measured; see docs/benchmarks.md.
    pub fn entries_per_move(self) -> usize {
        match self {
            Self::Kvm => 64,
            Self::Mshv | Self::Simulated => 0,
        }
    }

    /// Whether writes to I/O ports can ring doorbells. The mshv driver refuses them (`mshv_set_unset_ioeventfd`).
    pub fn has_port_doorbells(self) -> bool {
        matches!(self, Self::Kvm)
    }

    /// Whether physical destination 0xFF (all processors) is safe. On the root scheduler the mshv driver takes it for
    /// the index of a VP (`mshv_try_assert_irq_fast`), and that VP does not exist.
    pub fn takes_broadcast(self) -> bool {
        matches!(self, Self::Kvm)
    }
}

impl std::str::FromStr for Backend {
    type Err = UnknownBackend;

    fn from_str(name: &str) -> Result<Self, UnknownBackend> {
        Self::ALL.into_iter().find(|backend| backend.name() == name).ok_or_else(|| UnknownBackend(name.into()))
    }
}

/// An unknown backend name.
#[derive(Debug, thiserror::Error)]
#[error("backend {0:?} is unknown; give \"mshv\", \"kvm\" or \"simulated\"")]
pub struct UnknownBackend(String);

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One partition of one kernel: its routing table, its irqfds, its doorbells, its virtual processors.
///
/// An implementation owns an image of the table and changes it in place. `set_entry` and `drop_entry` change memory
/// only, in constant time. `push` is one ioctl, which replaces the kernel's table with the image. If it fails, the
/// kernel's table stays as it was.
///
/// The caller must assign an irqfd only while the kernel's table has an entry for its GSI, and an event to one GSI at a
/// time. Implementations do not check this.
///
/// `assign` raises one interrupt if signals are pending. `drain`, called afterwards for all assigned events, removes
/// those signals from the counters, and no later ones. After `deassign`, signals stay in the counter. If other code has
/// closed an event's descriptor, the calls fail with EBADF.
///
/// The caller must assign no doorbell whose trigger collides with another's: not every kernel checks this. Once
/// `deassign_ioeventfd` has returned, the guest's writes no longer signal the event.
pub trait Hypervisor: Send + fmt::Debug {
    fn set_entry(&mut self, gsi: u32, msi: RawMsi);
    fn drop_entry(&mut self, gsi: u32);
    /// Returns the number of entries pushed.
    fn push(&mut self) -> CallResult<usize>;
    fn assign(&mut self, gsi: u32, event: &dyn Holder) -> CallResult;
    fn deassign(&mut self, gsi: u32, event: &EventFd) -> CallResult;
    /// Reads the counters: at arming, both real kernels leave them as they were. This takes no later signal: the
    /// kernel's handler empties the counter under the eventfd's lock before the signaller's write returns
    /// (`mshv_irqfd_wakeup`, `irqfd_wakeup`). Returns the index and the error of each event that can't be read.
    fn drain(&mut self, events: &[&EventFd]) -> Vec<(usize, CallError)> {
        let failed = |(place, error)| (place, CallError::of(Operation::Event, "preadv2", &error));
        event::drain(events).into_iter().map(failed).collect()
    }
    /// Makes the guest's matching writes signal an event.
    fn assign_ioeventfd(&mut self, trigger: Trigger, event: &dyn Holder) -> CallResult;
    fn deassign_ioeventfd(&mut self, trigger: Trigger, event: &EventFd) -> CallResult;
    /// Raises an MSI now, without an eventfd and without the table. Returns false if the kernel reports that the guest
    /// did not take it.
    fn signal_msi(&mut self, msi: RawMsi) -> CallResult<bool>;
    /// Creates the virtual processor with this index, which is also its APIC id.
    fn create_vp(&mut self, index: u8) -> CallResult;
    /// Whether the table starts with the entries of an interrupt controller's pins, which own the first GSIs.
    fn has_pins(&self) -> bool {
        false
    }
    /// The partition's descriptor, if it has one.
    fn fd(&self) -> Option<RawFd>;
}
