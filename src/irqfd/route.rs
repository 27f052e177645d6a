//! A route: one GSI, one eventfd, the MSI that a signal becomes, and whether it may.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::commit::Change;
use super::error::{Error, Failure, Result};
use super::msi::MsiRoute;
use super::partition::{GsiState, Partition};
use super::sync::{AtomicU64, Mutex, MutexGuard};
use crate::hypervisor::event::EventFd;
use crate::hypervisor::{CallError, Operation};

/// What the owner of a route wants of it. Guarded by the route's lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Intent {
    pub(super) masked: bool,
    pub(super) msi: Option<MsiRoute>,
    pub(super) closed: bool,
}

impl Intent {
    /// Whether nothing should be armed for it.
    fn is_idle(self) -> bool {
        self.masked || self.msi.is_none()
    }

    /// What the kernel should hold for this: an armed irqfd, or none, and whether its entry may go.
    pub(super) fn change(self, index: usize) -> Change {
        let wanted = if self.masked { None } else { self.msi };
        Change::new(index, wanted.map(MsiRoute::raw), self.msi.is_none())
    }
}

/// The part of a route that its partition shares.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) gsi: u32,
    pub(super) event: EventFd,
    intent: Mutex<Intent>,
    /// The intent and what became of it, for readers that wait for nobody.
    published: AtomicU64,
}

impl AsRef<EventFd> for Route {
    fn as_ref(&self) -> &EventFd {
        &self.event
    }
}

const ARMED: u64 = 1 << 63;
const BROKEN: u64 = 1 << 62;
const CLOSED: u64 = 1 << 61;
const MASKED: u64 = 1 << 60;
const HAS_MSI: u64 = 1 << 59;
const OF_PARTITION: u64 = ARMED | BROKEN;

impl Route {
    pub(super) fn new(gsi: u32, event: EventFd) -> Self {
        Self { gsi, event, intent: Mutex::default(), published: AtomicU64::new(0) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Intent> {
        self.intent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    fn update(&self, clear: u64, set: u64) {
        // Two writers, under different locks, own different bits.
        let _before =
            self.published.fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| Some(bits & !clear | set));
    }

    /// Called under the partition's lock.
    pub(super) fn publish_kernel(&self, armed: bool, broken: bool) {
        let set = if armed { ARMED } else { 0 } | if broken { BROKEN } else { 0 };
        if self.load() & OF_PARTITION != set {
            self.update(OF_PARTITION, set);
        }
    }

    /// Stores a new intent. Called with the route's lock, which `intent` shows.
    pub(super) fn set_intent(&self, intent: &mut Intent, new: Intent) {
        *intent = new;
        let flag = |condition, bit| if condition { bit } else { 0 };
        let bits =
            flag(new.closed, CLOSED) | flag(new.masked, MASKED) | new.msi.map_or(0, |msi| HAS_MSI | msi.pack());
        self.update(!OF_PARTITION, bits);
    }

    /// Whether the kernel holds what this intent asks for.
    pub(super) fn is_settled(&self, intent: Intent) -> bool {
        (self.load() & ARMED != 0) == (!intent.masked && intent.msi.is_some())
    }

    pub(super) fn check(&self, intent: &Intent) -> Result {
        if intent.closed {
            return Err(self.closed());
        }
        if self.load() & BROKEN != 0 {
            return Err(Error::Broken(self.gsi));
        }
        Ok(())
    }

    pub(super) fn closed(&self) -> Error {
        Error::Closed(format!("the route that had GSI {} (unallocated by now, or another route's)", self.gsi))
    }

    fn state(&self) -> GsiState {
        let bits = self.load();
        if bits & BROKEN != 0 {
            GsiState::Broken
        } else if bits & ARMED != 0 {
            GsiState::Enabled
        } else {
            GsiState::Disabled
        }
    }
}

/// A route of a partition. Dropping it closes it.
///
/// Reading its state takes no lock and waits for nobody; changing it takes the route's lock and then the
/// partition's.
#[derive(Debug)]
pub struct IrqFdRoute {
    partition: Arc<Partition>,
    route: Arc<Route>,
}

impl IrqFdRoute {
    pub(super) fn new(partition: Arc<Partition>, route: Arc<Route>) -> Self {
        Self { partition, route }
    }

    pub(super) fn is_of(&self, partition: &Arc<Partition>) -> bool {
        Arc::ptr_eq(&self.partition, partition)
    }

    pub(super) fn shared(&self) -> &Arc<Route> {
        &self.route
    }

    pub fn partition(&self) -> &Arc<Partition> {
        &self.partition
    }

    pub fn gsi(&self) -> u32 {
        self.route.gsi
    }

    pub fn is_closed(&self) -> bool {
        self.route.load() & CLOSED != 0
    }

    fn open(&self) -> Result<u64> {
        match self.route.load() {
            bits if bits & CLOSED != 0 => Err(self.route.closed()),
            bits => Ok(bits),
        }
    }

    /// For what is true of the owner's route and may be long past in a forked child.
    fn current(&self) -> Result<u64> {
        self.partition.check_owner()?;
        self.open()
    }

    pub fn state(&self) -> Result<GsiState> {
        self.current().map(|_| self.route.state())
    }

    pub fn masked(&self) -> Result<bool> {
        Ok(self.current()? & MASKED != 0)
    }

    pub fn armed(&self) -> Result<bool> {
        Ok(self.state()? == GsiState::Enabled)
    }

    pub fn msi(&self) -> Result<Option<MsiRoute>> {
        let bits = self.current()?;
        Ok((bits & HAS_MSI != 0).then(|| MsiRoute::unpack(bits)))
    }

    pub fn fileno(&self) -> Result<RawFd> {
        self.open().map(|_| self.route.event.as_raw_fd())
    }

    /// Raises the route's interrupt now if it is armed, else leaves `n` signals pending. Works in a forked child.
    pub fn signal(&self, n: u64) -> Result {
        self.open()?;
        self.route.event.signal(n).map_err(|error| self.event_error("write", &error))
    }

    /// Whether `signal` could wait, if only for the moment between seeing room in the counter and using it.
    pub fn signal_may_block(&self) -> bool {
        self.route.event.may_block()
    }

    fn event_error(&self, call: &'static str, error: &std::io::Error) -> Error {
        if self.route.event.is_closed() {
            return self.route.closed();
        }
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        Failure::new(CallError::new(Operation::Event, call, errno), Some(self.route.gsi)).into()
    }

    /// Whether a signal waits for the route to be armed. While it is armed, none does.
    pub fn pending(&self) -> Result<bool> {
        if self.current()? & ARMED != 0 {
            return Ok(false);
        }
        self.route.event.is_readable().map_err(|error| self.event_error("poll", &error))
    }

    /// Takes what is pending, and says whether anything was. It can't be armed meanwhile, so that no signal is both
    /// taken here and delivered, or neither.
    pub fn consume_pending(&self) -> Result<bool> {
        self.take_pending().map(|count| count != 0)
    }

    /// Takes what is pending, and says how often it was signalled.
    pub fn take_pending(&self) -> Result<u64> {
        self.partition.check_owner()?;
        let intent = self.route.lock();
        if intent.closed {
            return Err(self.route.closed());
        }
        // A route that should be armed and could not be armed again may be, with any other route's push.
        let _lapsed = (!intent.is_idle()).then(|| self.partition.lock());
        if self.route.load() & ARMED != 0 {
            return Ok(0);
        }
        self.route.event.consume().map_err(|error| self.event_error("preadv2", &error))
    }

    /// Brings the kernel to what `edit` makes of the intent, and keeps the new intent if that worked.
    fn change(&self, edit: impl FnOnce(&mut Intent)) -> Result {
        self.partition.check_owner()?;
        let mut intent = self.route.lock();
        self.route.check(&intent)?;
        let mut new = *intent;
        edit(&mut new);
        if new == *intent && self.route.is_settled(new) {
            return Ok(());
        }
        if intent.is_idle() && new.is_idle() && new.msi.is_some() {
            self.partition.count_unheard();
        } else {
            self.partition.apply(&mut [new.change(self.partition.index(self.route.gsi))])?;
        }
        self.route.set_intent(&mut intent, new);
        Ok(())
    }

    pub fn set_msi(&self, msi: MsiRoute) -> Result {
        self.change(|intent| intent.msi = Some(msi))
    }

    pub fn clear_msi(&self) -> Result {
        self.change(|intent| intent.msi = None)
    }

    pub fn mask(&self) -> Result {
        self.change(|intent| intent.masked = true)
    }

    pub fn unmask(&self) -> Result {
        self.change(|intent| intent.masked = false)
    }

    /// Disarms, gives the GSI back and closes the descriptor. Goes on past errors and reports them.
    pub fn close(&self) -> Result {
        self.partition.check_owner()?;
        self.partition.close_route(&self.route).map_err(Error::from)
    }

    /// What a finalizer does: closes, or in a forked child gives up the descriptor and touches nothing else.
    pub fn abandon(&self) -> Result {
        if self.partition.check_owner().is_ok() {
            return self.close();
        }
        self.route.event.close();
        Ok(())
    }
}

impl AsRef<IrqFdRoute> for IrqFdRoute {
    fn as_ref(&self) -> &IrqFdRoute {
        self
    }
}

impl Drop for IrqFdRoute {
    fn drop(&mut self) {
        if !self.is_closed() {
            // Whoever wants to know of failures closes before dropping.
            let _unheard = self.abandon();
        }
    }
}
