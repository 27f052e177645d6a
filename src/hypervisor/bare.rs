//! The bare calls of each kernel: no table kept, no counter drained, nothing checked. What the calls of the rest of
//! this package are measured against.

use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{kvm_irq_routing_entry, kvm_irqfd};
use mshv_bindings::{MSHV_IRQFD_BIT_DEASSIGN, mshv_user_irq_entry, mshv_user_irqfd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd as SysEventFd};

use super::kvm::{self, KvmPartition};
use super::mshv::{self, MshvPartition};
use super::null::NullPartition;
use super::simulated::SimulatedPartition;
use super::{CallError, CallResult, Hypervisor, Operation, RawMsi};
use crate::hypervisor::event::EventFd;

/// A kernel's calls as a loop of `ioctl(2)` would make them, on a partition that is open already.
pub trait Bare: Hypervisor + 'static {
    /// An entry of the routing table, as the kernel reads it.
    type Entry: Copy + Send;
    /// An eventfd.
    type Event: Send;

    fn entry(gsi: u32, msi: RawMsi) -> Self::Entry;
    /// Entries that every table has in front.
    fn fixed() -> Vec<Self::Entry> {
        Vec::new()
    }
    fn event() -> io::Result<Self::Event>;
    /// Writes the eventfd, and returns when the interrupt is delivered.
    fn signal(&self, event: &Self::Event) -> io::Result<()>;
    fn push_image(&self, image: &Image<Self::Entry>) -> CallResult;
    fn register(&self, gsi: u32, event: &Self::Event) -> CallResult;
    fn unregister(&self, gsi: u32, event: &Self::Event) -> CallResult;
}

/// A routing table as the ioctls read it: a header that says how many entries follow, and those.
#[derive(Debug)]
pub struct Image<E> {
    words: Vec<u64>,
    entries: PhantomData<E>,
}

impl<E: Copy> Image<E> {
    const WORDS: usize = {
        assert!(size_of::<E>().is_multiple_of(8) && align_of::<E>() <= 8);
        size_of::<E>() / 8
    };

    /// One allocation and one copy.
    pub fn copy_of(entries: &[E]) -> Self {
        let size = 1 + entries.len() * Self::WORDS;
        let mut words = Vec::with_capacity(size);
        words.push(entries.len() as u64);
        // SAFETY: the room behind the header was just allocated for as many entries, in words that are aligned for
        // them, and is initialized by the copy before its length says so.
        unsafe {
            std::ptr::copy_nonoverlapping(entries.as_ptr(), words.as_mut_ptr().add(1).cast(), entries.len());
            words.set_len(size);
        }
        Self { words, entries: PhantomData }
    }

    /// Lets the kernel see the first `count` entries only.
    pub fn show(&mut self, count: usize) {
        assert!(count * Self::WORDS < self.words.len());
        self.words[0] = count as u64;
    }

    fn entries(&self) -> &[E] {
        // SAFETY: the words behind the header were copied from entries, of which the header shows no more than
        // there are.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().add(1).cast(), self.words[0] as usize) }
    }
}

fn sys_event() -> io::Result<SysEventFd> {
    SysEventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

fn kvm_irqfd(vm: &KvmPartition, gsi: u32, event: &SysEventFd, flags: u32, operation: Operation) -> CallResult {
    let argument = kvm_irqfd { fd: event.as_raw_fd() as u32, gsi, flags, ..Default::default() };
    kvm::irqfd(vm, &argument).map_err(|error| CallError::of(operation, "KVM_IRQFD", &error))
}

impl Bare for KvmPartition {
    type Entry = kvm_irq_routing_entry;
    type Event = SysEventFd;

    fn entry(gsi: u32, msi: RawMsi) -> Self::Entry {
        kvm::msi_entry(gsi, msi)
    }

    fn fixed() -> Vec<Self::Entry> {
        kvm::pins()
    }

    fn event() -> io::Result<SysEventFd> {
        sys_event()
    }

    fn signal(&self, event: &SysEventFd) -> io::Result<()> {
        event.write(1)
    }

    fn push_image(&self, image: &Image<Self::Entry>) -> CallResult {
        // SAFETY: an image of this kernel's entries has the layout of the ioctl's argument.
        unsafe { kvm::set_routing(self, image.words.as_ptr()) }
            .map_err(|error| CallError::of(Operation::SetMsiRouting, "KVM_SET_GSI_ROUTING", &error))
    }

    fn register(&self, gsi: u32, event: &SysEventFd) -> CallResult {
        kvm_irqfd(self, gsi, event, 0, Operation::AssignIrqfd)
    }

    fn unregister(&self, gsi: u32, event: &SysEventFd) -> CallResult {
        kvm_irqfd(self, gsi, event, kvm_bindings::KVM_IRQFD_FLAG_DEASSIGN, Operation::DeassignIrqfd)
    }
}

fn mshv_irqfd(vm: &MshvPartition, gsi: u32, event: &SysEventFd, flags: u32, operation: Operation) -> CallResult {
    let argument = mshv_user_irqfd { fd: event.as_raw_fd(), resamplefd: 0, gsi, flags };
    mshv::irqfd(vm, &argument).map_err(|error| CallError::of(operation, "MSHV_IRQFD", &error))
}

impl Bare for MshvPartition {
    type Entry = mshv_user_irq_entry;
    type Event = SysEventFd;

    fn entry(gsi: u32, msi: RawMsi) -> Self::Entry {
        mshv::entry(gsi, msi)
    }

    fn event() -> io::Result<SysEventFd> {
        sys_event()
    }

    fn signal(&self, event: &SysEventFd) -> io::Result<()> {
        event.write(1)
    }

    fn push_image(&self, image: &Image<Self::Entry>) -> CallResult {
        // SAFETY: an image of this kernel's entries has the layout of the ioctl's argument.
        unsafe { mshv::set_routing(self, image.words.as_ptr()) }
            .map_err(|error| CallError::of(Operation::SetMsiRouting, "MSHV_SET_MSI_ROUTING", &error))
    }

    fn register(&self, gsi: u32, event: &SysEventFd) -> CallResult {
        mshv_irqfd(self, gsi, event, 0, Operation::AssignIrqfd)
    }

    fn unregister(&self, gsi: u32, event: &SysEventFd) -> CallResult {
        mshv_irqfd(self, gsi, event, 1 << MSHV_IRQFD_BIT_DEASSIGN, Operation::DeassignIrqfd)
    }
}

impl Bare for SimulatedPartition {
    type Entry = mshv_user_irq_entry;
    type Event = Arc<EventFd>;

    fn entry(gsi: u32, msi: RawMsi) -> Self::Entry {
        mshv::entry(gsi, msi)
    }

    fn event() -> io::Result<Arc<EventFd>> {
        EventFd::new().map(Arc::new)
    }

    fn signal(&self, event: &Arc<EventFd>) -> io::Result<()> {
        event.signal(1)?;
        match self.driver().take_interrupts(Duration::from_secs(60)).is_empty() {
            false => Ok(()),
            true => Err(io::Error::from(io::ErrorKind::TimedOut)),
        }
    }

    fn push_image(&self, image: &Image<Self::Entry>) -> CallResult {
        self.driver().set_msi_routing(image.entries())
    }

    fn register(&self, gsi: u32, event: &Arc<EventFd>) -> CallResult {
        self.driver().assign_irqfd(gsi, event)
    }

    fn unregister(&self, gsi: u32, event: &Arc<EventFd>) -> CallResult {
        self.driver().deassign_irqfd(gsi, event)
    }
}

impl Bare for NullPartition {
    type Entry = mshv_user_irq_entry;
    type Event = SysEventFd;

    fn entry(gsi: u32, msi: RawMsi) -> Self::Entry {
        mshv::entry(gsi, msi)
    }

    fn event() -> io::Result<SysEventFd> {
        sys_event()
    }

    fn signal(&self, event: &SysEventFd) -> io::Result<()> {
        event.write(1)
    }

    fn push_image(&self, image: &Image<Self::Entry>) -> CallResult {
        std::hint::black_box(image.words.as_ptr());
        Ok(())
    }

    fn register(&self, _: u32, _: &SysEventFd) -> CallResult {
        Ok(())
    }

    fn unregister(&self, _: u32, _: &SysEventFd) -> CallResult {
        Ok(())
    }
}
