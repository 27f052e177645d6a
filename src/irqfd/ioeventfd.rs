//! The handle of a doorbell: guest writes that signal an eventfd.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use super::doorbell::{self, Doorbell};
use super::error::{Error, Failure, Result};
use super::partition::Partition;
use crate::hypervisor::event::EventFd;
use crate::hypervisor::trigger::Trigger;
use crate::hypervisor::waiters::Watch;
use crate::hypervisor::{CallError, Operation};

/// A doorbell of a partition. Dropping it takes it away.
#[derive(Debug)]
pub struct IoEventFd {
    partition: Arc<Partition>,
    doorbell: Arc<Doorbell>,
}

impl Partition {
    /// Makes a doorbell on a new eventfd, or on a duplicate of the caller's.
    pub fn new_ioeventfd(self: &Arc<Self>, trigger: Trigger, event: Option<RawFd>) -> Result<IoEventFd> {
        self.check_open()?;
        doorbell::check(self.config().backend, trigger)?;
        let event = match event {
            Some(fd) => EventFd::adopt(fd)?,
            None => EventFd::new().map_err(|error| event_failure("eventfd2", &error))?,
        };
        let doorbell = self.doorbells().add(&mut *self.lock_open()?, trigger, event)?;
        Ok(IoEventFd { partition: Arc::clone(self), doorbell })
    }

    /// A guest's write to a simulated partition. Returns whether it rang a doorbell.
    pub fn write_mmio(&self, address: u64, data: &[u8]) -> Result<bool> {
        let driver = self.simulated()?;
        if !matches!(data.len(), 1 | 2 | 4 | 8) {
            return Err(Error::Invalid(format!("data has {} bytes; a guest writes 1, 2, 4 or 8", data.len())));
        }
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        Ok(driver.write_mmio(address, data.len() as u32, u64::from_le_bytes(value)))
    }
}

impl IoEventFd {
    pub fn partition(&self) -> &Arc<Partition> {
        &self.partition
    }

    pub fn trigger(&self) -> Trigger {
        self.doorbell.trigger
    }

    pub fn is_closed(&self) -> bool {
        self.doorbell.is_closed()
    }

    fn check(&self) -> Result {
        if self.is_closed() { Err(self.closed()) } else { Ok(()) }
    }

    fn closed(&self) -> Error {
        Error::Closed(format!("the doorbell ({})", self.doorbell.trigger))
    }

    pub fn fileno(&self) -> Result<RawFd> {
        self.check()?;
        Ok(self.doorbell.event.as_raw_fd())
    }

    /// Rings `n` times, as the guest does. Works in a forked child.
    pub fn signal(&self, n: u64) -> Result {
        self.check()?;
        self.doorbell.event.signal(n).map_err(|error| self.event_error("write", &error))
    }

    /// Whether `signal` could block, if only because other code fills the counter just before the write.
    pub fn signal_may_block(&self) -> bool {
        self.doorbell.event.may_block()
    }

    /// Takes the rings, and returns their number. Works in a forked child.
    pub fn consume(&self) -> Result<u64> {
        self.check()?;
        self.doorbell.event.consume().map_err(|error| self.event_error("preadv2", &error))
    }

    /// Begins a watch for an event loop. Look at the doorbell's state after this; see [`Watch`].
    pub fn watch(&self) -> Result<Watch> {
        self.check()?;
        self.doorbell.event.watch().map_err(|error| self.event_error("fcntl (F_DUPFD_CLOEXEC)", &error))
    }

    /// Ends the watches on the doorbell, so that those who wait look at its state again.
    pub fn wake_waiters(&self) {
        self.doorbell.event.wake_waiters();
    }

    fn event_error(&self, call: &'static str, error: &std::io::Error) -> Error {
        // Another thread may have closed it meanwhile.
        if self.is_closed() { self.closed() } else { event_failure(call, error) }
    }

    /// Takes the doorbell away and closes its descriptor.
    pub fn close(&self) -> Result {
        self.partition.check_owner()?;
        let mut state = self.partition.lock();
        self.partition.doorbells().remove(&mut state, &self.doorbell).map_err(Error::from)
    }

    /// For finalizers: closes. In a forked child closes only the descriptor.
    pub fn abandon(&self) -> Result {
        if self.partition.check_owner().is_ok() {
            return self.close();
        }
        self.doorbell.forget();
        Ok(())
    }
}

impl Drop for IoEventFd {
    fn drop(&mut self) {
        if !self.is_closed() {
            // A caller who wants to see failures calls `close` first.
            let _ignored = self.abandon();
        }
    }
}

fn event_failure(call: &'static str, error: &std::io::Error) -> Error {
    Failure::new(CallError::of(Operation::Event, call, error), None).into()
}
