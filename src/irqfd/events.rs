//! The eventfd of a route. Signallers and readers load it without a lock, and another may take its place meanwhile.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use super::error::{Error, Failure, Result};
use super::sync::Shared;
use crate::hypervisor::event::EventFd;
use crate::hypervisor::waiters::Watch;
use crate::hypervisor::{CallError, Operation};

/// An eventfd to put on a route: a new one, or a duplicate of a caller's.
#[derive(Clone, Debug)]
pub struct NewEvent {
    pub(super) event: Arc<EventFd>,
    /// The caller's descriptor.
    pub(super) of: Option<RawFd>,
}

impl NewEvent {
    /// Makes an eventfd, or duplicates the caller's, if it is one that an irqfd can use.
    pub fn make(of: Option<RawFd>) -> Result<Self> {
        let event = match of {
            Some(fd) => EventFd::adopt(fd)?,
            None => EventFd::new().map_err(|error| failure("eventfd2", &error))?,
        };
        Ok(Self { event: Arc::new(event), of })
    }

    /// Whether it is a duplicate of this eventfd. One that was made just now has no duplicates.
    pub(super) fn is_same(&self, other: &EventFd) -> bool {
        // An eventfd that can't be inspected was closed by other code.
        self.of.is_some() && self.event.is_same(other).unwrap_or(false)
    }
}

/// The eventfd that a route has now.
#[derive(Debug)]
pub(super) struct RouteEvent(Shared<Current>);

#[derive(Debug)]
struct Current {
    event: Arc<EventFd>,
    /// The one before it, until what that held has been carried over.
    before: Option<Arc<EventFd>>,
}

impl Current {
    /// Looks into the one before first: what it holds is in the new one before it is taken from the old one.
    fn is_pending(&self) -> io::Result<bool> {
        let waits = self.before.as_ref().is_some_and(|before| before.is_readable().unwrap_or(false));
        Ok(waits || self.event.is_readable()?)
    }
}

fn is_same(one: &Current, other: &Current) -> bool {
    std::ptr::eq(one, other)
}

impl RouteEvent {
    pub(super) fn new(event: Arc<EventFd>) -> Self {
        Self(Shared::from_pointee(Current { event, before: None }))
    }

    pub(super) fn get(&self) -> Arc<EventFd> {
        Arc::clone(&self.0.load().event)
    }

    /// The descriptor, for other code. That may close it by mistake, and its number be another file's then: this reads what
    /// tells the two apart.
    pub(super) fn fd(&self) -> RawFd {
        let current = self.0.load();
        // Fails if it is closed already.
        let _known = current.event.id();
        current.event.as_raw_fd()
    }

    pub(super) fn signal(&self, n: u64) -> io::Result<()> {
        self.signal_if(n, |_| true).map(drop)
    }

    /// Signals. Returns false, possibly without a signal, where that might block.
    pub(super) fn try_signal(&self, n: u64) -> io::Result<bool> {
        self.signal_if(n, |event| !event.may_block())
    }

    /// Signals the eventfd, and if another takes its place meanwhile, that one too. So nothing is lost: if the old one
    /// is still in place after the write, what it holds has not been carried over yet.
    fn signal_if(&self, n: u64, allowed: impl Fn(&EventFd) -> bool) -> io::Result<bool> {
        let mut current = self.0.load();
        loop {
            if !allowed(&current.event) {
                return Ok(false);
            }
            let written = current.event.signal(n);
            let now = self.0.load();
            if Arc::ptr_eq(&current.event, &now.event) {
                return written.map(|()| true);
            }
            current = now;
        }
    }

    /// Whether a signal waits in it, or is being carried over to it.
    pub(super) fn is_pending(&self) -> io::Result<bool> {
        let mut current = self.0.load();
        loop {
            let pending = current.is_pending();
            let now = self.0.load();
            if is_same(&current, &now) {
                return pending;
            }
            current = now;
        }
    }

    /// Puts another eventfd in its place. If the old one `carries`, `carry_over` must follow.
    pub(super) fn replace(&self, new: &Arc<EventFd>, carries: bool) {
        let old = self.get();
        let before = carries.then(|| Arc::clone(&old));
        self.0.store(Arc::new(Current { event: Arc::clone(new), before }));
        old.wake_waiters();
    }

    /// Carries over what the eventfd before held: all of it, or if the route is armed, one signal for all.
    pub(super) fn carry_over(&self, armed: bool) {
        let current = self.0.load();
        let Some(before) = &current.before else { return };
        // After a write that comes later, its signaller finds the new eventfd in place, and signals that too.
        let carried = match before.is_readable() {
            Ok(true) => carry(before, &current.event, armed),
            seen => seen.map(drop),
        };
        if carried.is_err() {
            // If other code has closed it, its number may belong to another file by now.
            before.forget_if_closed();
        }
        self.0.store(Arc::new(Current { event: Arc::clone(&current.event), before: None }));
    }

    /// Begins a watch on the eventfd. A replacement ends it, as closing does.
    pub(super) fn watch(&self) -> io::Result<Watch> {
        let mut current = self.0.load();
        loop {
            let watch = current.event.watch();
            let now = self.0.load();
            if Arc::ptr_eq(&current.event, &now.event) {
                return watch;
            }
            current = now;
        }
    }

    pub(super) fn wake_waiters(&self) {
        self.0.load().event.wake_waiters();
    }

    pub(super) fn consume(&self) -> io::Result<u64> {
        self.0.load().event.consume()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.load().event.is_closed()
    }

    pub(super) fn close(&self) {
        let current = self.0.load();
        current.event.close();
        current.before.iter().for_each(|before| before.close());
    }

    pub(super) fn forget_if_closed(&self) {
        self.0.load().event.forget_if_closed();
    }
}

/// Carries signals over. If other code has closed either descriptor there is nothing left to carry, or nowhere to: the
/// next call about the route says so.
fn carry(from: &EventFd, to: &EventFd, armed: bool) -> io::Result<()> {
    if armed {
        // The interrupt comes after all that it stands for.
        return if from.consume()? > 0 { to.signal(1) } else { Ok(()) };
    }
    // A reader finds the signals in one of the two at any time.
    to.signal(1)?;
    match from.consume()? {
        count @ 2.. => to.signal(count - 1),
        _ => Ok(()),
    }
}

pub(super) fn failure(call: &'static str, error: &io::Error) -> Error {
    Failure::new(CallError::of(Operation::Event, call, error), None).into()
}
