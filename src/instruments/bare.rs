//! The bare calls of each kernel. They keep no table, drain no counter and check nothing.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd as SysEventFd};

use super::null::NullPartition;
use crate::hypervisor::calls::{self, Irqfd};
use crate::hypervisor::event::EventFd;
use crate::hypervisor::kvm::KvmPartition;
use crate::hypervisor::mshv::MshvPartition;
use crate::hypervisor::simulated::SimulatedPartition;
use crate::hypervisor::table::Image;
use crate::hypervisor::{CallError, CallResult, Hypervisor, Operation, RawMsi};

/// A kernel's bare calls, on an open partition.
pub trait Bare: Hypervisor + 'static {
    /// An entry of the routing table, as the kernel reads it.
    type Entry: Copy + Send;
    /// An eventfd.
    type Event: Send;

    fn entry(gsi: u32, msi: RawMsi) -> Self::Entry;
    /// The entries at the start of every table.
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

fn sys_event() -> io::Result<SysEventFd> {
    SysEventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

fn mshv_entry(gsi: u32, msi: RawMsi) -> calls::mshv::Entry {
    calls::mshv::entry(gsi, msi.address.into(), msi.data)
}

fn failed(operation: Operation, call: &'static str) -> impl Fn(io::Error) -> CallError {
    move |error| CallError::of(operation, call, &error)
}

impl Bare for KvmPartition {
    type Entry = calls::kvm::Entry;
    type Event = SysEventFd;

    fn entry(gsi: u32, msi: RawMsi) -> Self::Entry {
        calls::kvm::entry(gsi, msi.address.into(), msi.data)
    }

    fn fixed() -> Vec<Self::Entry> {
        calls::kvm::pins()
    }

    fn event() -> io::Result<SysEventFd> {
        sys_event()
    }

    fn signal(&self, event: &SysEventFd) -> io::Result<()> {
        event.write(1)
    }

    fn push_image(&self, image: &Image<Self::Entry>) -> CallResult {
        calls::kvm::set_gsi_routing(self, image).map_err(failed(Operation::SetMsiRouting, "KVM_SET_GSI_ROUTING"))
    }

    fn register(&self, gsi: u32, event: &SysEventFd) -> CallResult {
        calls::kvm::irqfd(self, Irqfd::assign(event.as_raw_fd(), gsi))
            .map_err(failed(Operation::AssignIrqfd, "KVM_IRQFD"))
    }

    fn unregister(&self, gsi: u32, event: &SysEventFd) -> CallResult {
        calls::kvm::irqfd(self, Irqfd::deassign(event.as_raw_fd(), gsi))
            .map_err(failed(Operation::DeassignIrqfd, "KVM_IRQFD"))
    }
}

impl Bare for MshvPartition {
    type Entry = calls::mshv::Entry;
    type Event = SysEventFd;

    fn entry(gsi: u32, msi: RawMsi) -> Self::Entry {
        mshv_entry(gsi, msi)
    }

    fn event() -> io::Result<SysEventFd> {
        sys_event()
    }

    fn signal(&self, event: &SysEventFd) -> io::Result<()> {
        event.write(1)
    }

    fn push_image(&self, image: &Image<Self::Entry>) -> CallResult {
        calls::mshv::set_msi_routing(self, image).map_err(failed(Operation::SetMsiRouting, "MSHV_SET_MSI_ROUTING"))
    }

    fn register(&self, gsi: u32, event: &SysEventFd) -> CallResult {
        calls::mshv::irqfd(self, Irqfd::assign(event.as_raw_fd(), gsi))
            .map_err(failed(Operation::AssignIrqfd, "MSHV_IRQFD"))
    }

    fn unregister(&self, gsi: u32, event: &SysEventFd) -> CallResult {
        calls::mshv::irqfd(self, Irqfd::deassign(event.as_raw_fd(), gsi))
            .map_err(failed(Operation::DeassignIrqfd, "MSHV_IRQFD"))
    }
}

impl Bare for SimulatedPartition {
    type Entry = calls::mshv::Entry;
    type Event = Arc<EventFd>;

    fn entry(gsi: u32, msi: RawMsi) -> Self::Entry {
        mshv_entry(gsi, msi)
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
    type Entry = calls::mshv::Entry;
    type Event = SysEventFd;

    fn entry(gsi: u32, msi: RawMsi) -> Self::Entry {
        mshv_entry(gsi, msi)
    }

    fn event() -> io::Result<SysEventFd> {
        sys_event()
    }

    fn signal(&self, event: &SysEventFd) -> io::Result<()> {
        event.write(1)
    }

    fn push_image(&self, image: &Image<Self::Entry>) -> CallResult {
        std::hint::black_box(image.entries());
        Ok(())
    }

    fn register(&self, _: u32, _: &SysEventFd) -> CallResult {
        Ok(())
    }

    fn unregister(&self, _: u32, _: &SysEventFd) -> CallResult {
        Ok(())
    }
}
