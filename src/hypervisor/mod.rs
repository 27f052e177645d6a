//! The kernels that can hold a routing table and irqfds, each behind [`Hypervisor`].
//!
//! Everything that is `unsafe` lives below this module. What a caller may rely on is said here, once;
//! what each kernel does with it is said in its own file.

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

use std::fmt;
use std::os::fd::RawFd;

use event::{EventFd, Holder};

/// Both kernels take GSIs below this (`MSHV_MAX_GUEST_IRQS`, `KVM_MAX_IRQ_ROUTES`).
pub const MAX_GSIS: u32 = 4096;

/// Where an interrupt controller has pins, the GSIs below this are those of its IOAPIC.
pub const PIN_GSIS: u32 = 24;

/// Table entries for the pins: 16 of the two PICs, 24 of the IOAPIC.
pub const PIN_ENTRIES: usize = 40;

/// The address and data of a message-signalled interrupt as a routing table holds them.
///
/// Both kernels keep 32 address bits here: the upper half of an MSI address is 0 on x86.
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

/// What a guest is asked to take. KVM's local APIC can be asked for the vector only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    pub vector: u8,
    pub target: Option<Target>,
}

/// Where and how an interrupt goes, decoded from an MSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub destination: u8,
    pub delivery_mode: u8,
    pub logical: bool,
    pub level: bool,
}

impl Interrupt {
    /// Decodes as `mshv_copy_girq_info()` of the mshv driver does (drivers/hv/mshv_irq.c), which looks at
    /// no other bit of address and data; Intel SDM volume 3, "Message Signalled Interrupts" gives the fields.
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

/// The calls into a kernel that can fail, by the names their documentation uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    SetMsiRouting,
    AssignIrqfd,
    DeassignIrqfd,
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
    /// The ioctl or system call, as its manual names it.
    pub call: &'static str,
    pub errno: i32,
}

impl CallError {
    pub fn new(operation: Operation, call: &'static str, errno: i32) -> Self {
        Self { operation, call, errno }
    }

    /// The error of a system call.
    pub fn of(operation: Operation, call: &'static str, error: &std::io::Error) -> Self {
        Self::new(operation, call, error.raw_os_error().unwrap_or(libc::EIO))
    }

    /// The error that the system call just made has left in `errno`.
    pub fn last(operation: Operation, call: &'static str) -> Self {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Self::new(operation, call, errno)
    }
}

/// The C library's words for an error number.
pub fn strerror(errno: i32) -> String {
    let mut text = std::io::Error::from_raw_os_error(errno).to_string();
    text.truncate(text.rfind(" (os error ").unwrap_or(text.len()));
    text
}

pub type CallResult<T = ()> = Result<T, CallError>;

/// Which kernel interface a partition stands on.
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

    /// Whether the tables of partitions made here start with the pins of an IOAPIC and two PICs.
    pub fn has_pins(self) -> bool {
        matches!(self, Self::Kvm)
    }

    /// Whether a push needs all irqfds disarmed around it. The mshv driver rewrites the decoded route of
    /// every armed irqfd without protection from its wake-up handler, so that a signal meanwhile becomes
    /// vector 0 (drivers/hv/mshv_eventfd.c, `mshv_irqfd_wakeup`); KVM uses its seqcount properly.
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

    /// Whether physical destination 0xFF (all processors) is safe. On the root scheduler the mshv driver
    /// takes it for the index of one VP (`mshv_try_assert_irq_fast`), which does not exist.
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

/// A name that is no backend's.
#[derive(Debug, thiserror::Error)]
#[error("backend {0:?} is unknown; give \"mshv\", \"kvm\" or \"simulated\"")]
pub struct UnknownBackend(String);

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One partition of one kernel: its routing table, its irqfds, its virtual processors.
///
/// The implementation owns an image of the table and changes it in place: `set_entry` and `drop_entry` touch
/// memory only and take constant time, `push` is one ioctl that makes the image the kernel's table. A push
/// that fails leaves the kernel's table as it was.
///
/// The caller keeps the promises that the kernels need: an irqfd is assigned only while the kernel's table
/// has an entry for its GSI, and an event is assigned to one GSI at a time. Implementations do not check.
///
/// `assign` asks for one interrupt if signals were pending; `drain`, called for all that were assigned, takes the
/// signals for which these interrupts stand out of the events' counters, and none that came later. After
/// `deassign` signals stay there.
/// Each may be called for an event whose descriptor was closed behind our back: that is an error (EBADF).
pub trait Hypervisor: Send + fmt::Debug {
    fn set_entry(&mut self, gsi: u32, msi: RawMsi);
    fn drop_entry(&mut self, gsi: u32);
    /// Returns the number of entries pushed.
    fn push(&mut self) -> CallResult<usize>;
    fn assign(&mut self, gsi: u32, event: &dyn Holder) -> CallResult;
    fn deassign(&mut self, gsi: u32, event: &EventFd) -> CallResult;
    /// Both real kernels leave the counter as it was at arming, so it is read here. A signal that comes now is not
    /// taken with it: the kernel's own handler empties the counter under the eventfd's lock before the signaller's
    /// write returns (`mshv_irqfd_wakeup`, `irqfd_wakeup`). Returns the places of those that can't be read, and why.
    fn drain(&mut self, events: &[&EventFd]) -> Vec<(usize, CallError)> {
        let failed = |(place, error)| (place, CallError::of(Operation::Event, "preadv2", &error));
        event::drain(events).into_iter().map(failed).collect()
    }
    /// Creates the virtual processor with this index, which is also its APIC id.
    fn create_vp(&mut self, index: u8) -> CallResult;
    /// Whether the first GSIs and entries of a table are those of an interrupt controller's pins.
    fn has_pins(&self) -> bool {
        false
    }
    /// The partition's own descriptor, where it has one.
    fn fd(&self) -> Option<RawFd>;
}
