//! The doorbells of a partition, and the rules that a new one must meet.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::error::{Error, Failure, Result};
use super::state::State;
use super::sync::{AtomicBool, Mutex, MutexGuard};
use crate::hypervisor::event::EventFd;
use crate::hypervisor::trigger::Trigger;
use crate::hypervisor::{Backend, CallError, Operation};

/// The part of a doorbell that its handle and its partition share.
#[derive(Debug)]
pub(super) struct Doorbell {
    pub(super) trigger: Trigger,
    pub(super) event: EventFd,
    closed: AtomicBool,
}

impl AsRef<EventFd> for Doorbell {
    fn as_ref(&self) -> &EventFd {
        &self.event
    }
}

impl Doorbell {
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// For a forked child: closes its copy of the descriptor, and leaves the parent's doorbell alone.
    pub(super) fn forget(&self) {
        self.closed.store(true, Ordering::Release);
        self.event.close();
    }

    /// Takes the doorbell away and closes its eventfd, which stays open if the kernel refuses: another try needs it.
    fn take_away(&self, state: &mut State) -> std::result::Result<(), Failure> {
        self.closed.store(true, Ordering::Release);
        let taken = state.call(|hypervisor| hypervisor.deassign_ioeventfd(self.trigger, &self.event));
        match &taken {
            Ok(()) => self.event.close(),
            // Closed by other code: the number may belong to another file by now.
            Err(failure) if failure.error.errno == libc::EBADF => self.event.forget_if_closed(),
            Err(_) => self.event.wake_waiters(),
        }
        taken.map_err(|failure| failure.of_doorbell(self.trigger))
    }
}

/// The doorbells that the kernel has: the open ones, and those that it refused to take away when they were closed.
///
/// Every method is called with the partition's lock, as the state shows; their own is taken within it.
#[derive(Debug, Default)]
pub(super) struct Doorbells(Mutex<Vec<Arc<Doorbell>>>);

impl Doorbells {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Doorbell>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, state: &mut State, trigger: Trigger, event: EventFd) -> Result<Arc<Doorbell>> {
        let mut all = self.lock();
        if let Some(other) = all.iter().find(|other| other.trigger.collides(&trigger)) {
            let left = if other.is_closed() {
                ", which was closed, but which the kernel refused to take away: it stays until the partition is closed"
            } else {
                ""
            };
            return Err(Error::Invalid(format!(
                "doorbell ({trigger}) collides with the partition's doorbell ({}){left}; no write may ring both",
                other.trigger
            )));
        }
        let doorbell = Arc::new(Doorbell { trigger, event, closed: AtomicBool::new(false) });
        state
            .call(|hypervisor| hypervisor.assign_ioeventfd(trigger, &doorbell))
            .map_err(|failure| failure.of_doorbell(trigger))?;
        all.push(Arc::clone(&doorbell));
        Ok(doorbell)
    }

    /// The open doorbells.
    pub(super) fn open(&self, _state: &State) -> Vec<Arc<Doorbell>> {
        self.lock().iter().filter(|doorbell| !doorbell.is_closed()).cloned().collect()
    }

    /// Rings doorbells, as the guest does, but for those that have been closed meanwhile.
    pub(super) fn ring(&self, _state: &State, doorbells: &[Arc<Doorbell>]) -> Result {
        for doorbell in doorbells.iter().filter(|doorbell| !doorbell.is_closed()) {
            let failed = |error| Failure::new(CallError::of(Operation::Event, "write", &error), None);
            doorbell.event.signal(1).map_err(|error| failed(error).of_doorbell(doorbell.trigger))?;
        }
        Ok(())
    }

    /// Takes a doorbell away. If the kernel refuses, the doorbell is closed nevertheless, and `remove_all` tries again.
    pub(super) fn remove(&self, state: &mut State, doorbell: &Arc<Doorbell>) -> std::result::Result<(), Failure> {
        let mut all = self.lock();
        if doorbell.is_closed() {
            return Ok(());
        }
        doorbell.take_away(state)?;
        all.retain(|other| !Arc::ptr_eq(other, doorbell));
        Ok(())
    }

    /// Takes all doorbells away, and returns the refusals.
    pub(super) fn remove_all(&self, state: &mut State) -> Vec<Failure> {
        let mut all = self.lock();
        // Without its descriptor a doorbell can't be taken away; closing it has said so.
        let left = all.iter().filter(|doorbell| !doorbell.event.is_closed());
        let failures = left.filter_map(|doorbell| doorbell.take_away(state).err()).collect();
        all.drain(..).for_each(|doorbell| doorbell.event.close());
        failures
    }
}

/// Checks the rules for a doorbell's trigger.
pub(super) fn check(backend: Backend, trigger: Trigger) -> Result {
    let Trigger { address, length, datamatch, port } = trigger;
    let refuse = |text| Err(Error::Invalid(text));
    if port && !backend.has_port_doorbells() {
        return Err(Error::Unsupported(format!(
            "port {address:#x}: {backend} has doorbells at MMIO addresses only; KVM has them on I/O ports too"
        )));
    }
    if !matches!(length, 0 | 1 | 2 | 4 | 8) {
        return refuse(format!("doorbell length {length} is not 1, 2, 4 or 8 bytes, or 0 for writes of any size"));
    }
    if port && length == 8 {
        return refuse("doorbell length 8 on an I/O port: port writes have 1, 2 or 4 bytes".into());
    }
    if port && address.saturating_add(length.max(1).into()) > 1 << 16 {
        return refuse(format!("doorbell ({trigger}) reaches beyond port 0xffff"));
    }
    if address.checked_add(length.into()).is_none() {
        return refuse(format!("doorbell ({trigger}) reaches beyond address {:#x}", u64::MAX));
    }
    match datamatch {
        Some(value) if length == 0 => refuse(format!(
            "datamatch {value:#x} needs a length of 1, 2, 4 or 8: at length 0 only the address is compared"
        )),
        Some(value) if length < 8 && value >> (8 * length) != 0 => refuse(format!(
            "datamatch {value:#x} is wider than the doorbell's length of {length}: no write can match"
        )),
        _ => Ok(()),
    }
}
