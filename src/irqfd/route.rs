//! The handle of a route: one GSI, one eventfd, and the MSI that a signal becomes.

use std::os::fd::RawFd;
use std::sync::Arc;

use super::edit::Edit;
use super::error::{Error, Failure, Result};
use super::events::NewEvent;
use super::gsi::GsiState;
use super::msi::MsiRoute;
use super::partition::Partition;
use super::plan::Change;
use super::shared::{ARMED, CLOSED, HAS_MSI, Intent, MASKED, Route};
use crate::hypervisor::waiters::Watch;
use crate::hypervisor::{CallError, Operation};

/// A route of a partition. Dropping it closes it.
///
/// Reading its state takes no lock and never waits. Changing it takes the route's lock, then the partition's.
#[derive(Debug)]
pub struct IrqFdRoute {
    partition: Arc<Partition>,
    route: Arc<Route>,
}

impl Partition {
    /// Makes a route with the lowest free GSI, unmasked and without an MSI, on a new eventfd or on a duplicate of the
    /// caller's.
    pub fn new_route(self: &Arc<Self>, event: Option<RawFd>) -> Result<IrqFdRoute> {
        let route = self.add_route(event, false)?;
        Ok(IrqFdRoute::on(self, route))
    }

    /// As `new_route`, for a device, which saves the route's state with its own.
    pub fn new_device_route(self: &Arc<Self>, event: Option<RawFd>) -> Result<IrqFdRoute> {
        let route = self.add_route(event, true)?;
        Ok(IrqFdRoute::on(self, route))
    }

    /// Makes a route on a new eventfd. Returns `None` instead of waiting for the partition's lock.
    pub fn try_new_route(self: &Arc<Self>) -> Result<Option<IrqFdRoute>> {
        let route = self.try_add_route()?;
        Ok(route.map(|route| IrqFdRoute::on(self, route)))
    }
}

impl IrqFdRoute {
    pub(super) fn on(partition: &Arc<Partition>, route: Arc<Route>) -> Self {
        Self { partition: Arc::clone(partition), route }
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

    /// The published state. Only the owner may read it: a forked child's copy may be out of date.
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

    /// The GSI where the route is armed: its own, or a spare one whose entry is its MSI. `None` while it is not armed.
    pub fn armed_gsi(&self) -> Result<Option<u32>> {
        self.current()?;
        Ok(self.route.armed_gsi())
    }

    pub fn msi(&self) -> Result<Option<MsiRoute>> {
        let bits = self.current()?;
        Ok((bits & HAS_MSI != 0).then(|| MsiRoute::unpack(bits)))
    }

    pub fn fileno(&self) -> Result<RawFd> {
        self.open().map(|_| self.route.event.fd())
    }

    /// Raises the interrupt if the route is armed; otherwise leaves `n` signals pending. Works in a forked child.
    pub fn signal(&self, n: u64) -> Result {
        self.open()?;
        self.route.event.signal(n).map_err(|error| self.event_error("write", &error))
    }

    /// As `signal`, unless that could block, if only because other code fills the counter just before the write: then it
    /// returns false, and may not have signalled.
    pub fn try_signal(&self, n: u64) -> Result<bool> {
        self.open()?;
        self.route.event.try_signal(n).map_err(|error| self.event_error("write", &error))
    }

    /// Begins a watch for an event loop. Look at the route's state after this; see [`Watch`].
    pub fn watch(&self) -> Result<Watch> {
        self.open()?;
        self.route.event.watch().map_err(|error| self.event_error("fcntl (F_DUPFD_CLOEXEC)", &error))
    }

    /// Ends the watches on the route, so that those who wait look at its state again.
    pub fn wake_waiters(&self) {
        self.route.event.wake_waiters();
    }

    fn event_error(&self, call: &'static str, error: &std::io::Error) -> Error {
        if self.route.event.is_closed() {
            return self.route.closed();
        }
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        Failure::new(CallError::new(Operation::Event, call, errno), Some(self.route.gsi)).into()
    }

    /// Whether a signal waits for the route to be armed. Always false while the route is armed.
    pub fn pending(&self) -> Result<bool> {
        if self.current()? & ARMED != 0 {
            return Ok(false);
        }
        self.route.event.is_pending().map_err(|error| self.event_error("poll", &error))
    }

    /// Takes the pending signals, and returns whether there were any. The route can't be armed meanwhile, so that every
    /// signal is either taken or delivered, and none is both.
    pub fn consume_pending(&self) -> Result<bool> {
        self.take_pending().map(|count| count != 0)
    }

    /// Takes the pending signals and returns their number.
    pub fn take_pending(&self) -> Result<u64> {
        self.partition.check_owner()?;
        let intent = self.route.lock();
        if intent.closed {
            return Err(self.route.closed());
        }
        // If the route is waiting to be re-armed, a push for another route may arm it.
        let _locked = (!intent.is_idle()).then(|| self.partition.lock());
        if self.route.load() & ARMED != 0 {
            return Ok(0);
        }
        self.route.event.consume().map_err(|error| self.event_error("preadv2", &error))
    }

    /// Makes the checks that `set_msi` makes before any call, as if the route were not masked.
    pub fn check_msi(&self, msi: MsiRoute) -> Result {
        self.partition.check_owner()?;
        self.route.check(&self.route.lock())?;
        self.partition.check_msi(self.route.gsi, msi)
    }

    /// Applies `edit` to the intent, in the kernel first. A refused call leaves the intent as it was.
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
            self.partition.count_skipped();
        } else {
            let index = self.partition.index(self.route.gsi);
            self.partition.apply(&mut [Change::to(index, new)])?;
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

    /// Puts a duplicate of the caller's eventfd, or a new one, in the place of the route's. Signals that the old one holds
    /// are carried over. The one that the route has already changes nothing.
    pub fn set_event(&self, event: Option<RawFd>) -> Result {
        self.current()?;
        let edit = Edit { event: Some(NewEvent::make(event)?), ..Edit::default() };
        self.partition.make(vec![(&self.route, &edit)])
    }

    /// Disarms the route, frees its GSI and closes its descriptor. Continues past errors and reports them.
    pub fn close(&self) -> Result {
        self.partition.check_owner()?;
        self.partition.close_route(&self.route).map_err(Error::from)
    }

    /// For finalizers: closes. In a forked child closes only the descriptor.
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
            // A caller who wants to see failures calls `close` first.
            let _ignored = self.abandon();
        }
    }
}
