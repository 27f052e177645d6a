//! A vector's route, and a signal from before it has one.

use std::sync::atomic::Ordering;

use super::sync::{AtomicBool, OnceLock};

/// A route that is taken when it is first used, and a signal that waits until then. Takes no lock.
///
/// Of a signal's latching and a taker's look at the latch, the later one sees the other's work. So a signal reaches the
/// route, whichever comes first.
#[derive(Debug)]
pub(super) struct Latch<R> {
    /// Kept once it is taken.
    route: OnceLock<R>,
    latched: AtomicBool,
}

impl<R> Default for Latch<R> {
    fn default() -> Self {
        Self { route: OnceLock::new(), latched: AtomicBool::new(false) }
    }
}

impl<R> Latch<R> {
    /// The route, if it has been taken.
    pub(super) fn route(&self) -> Option<&R> {
        self.route.get()
    }

    /// The route, made now if need be. A signal that waits goes to it.
    pub(super) fn take<E>(
        &self,
        make: impl FnOnce() -> Result<R, E>,
        signal: impl FnOnce(&R) -> Result<(), E>,
    ) -> Result<&R, E> {
        let route = match self.route.get() {
            Some(route) => route,
            None => {
                let new = make()?;
                self.route.get_or_init(|| new)
            }
        };
        // After the route is there for all to see.
        if self.clear() {
            signal(route)?;
        }
        Ok(route)
    }

    /// Gives it a route that exists already. Returns the route if it has one.
    pub(super) fn give(&self, route: R) -> Result<(), R> {
        self.route.set(route)
    }

    /// Leaves a signal for the route that is to be taken, or gives it to the one that another thread has just taken.
    pub(super) fn latch<E>(&self, signal: impl FnOnce(&R) -> Result<(), E>) -> Result<(), E> {
        self.latched.swap(true, Ordering::AcqRel);
        match self.route.get() {
            Some(route) if self.clear() => signal(route),
            _ => Ok(()),
        }
    }

    /// Whether a signal waits for the route to be taken.
    pub(super) fn is_latched(&self) -> bool {
        self.latched.load(Ordering::Acquire)
    }

    /// Takes the signal that waits. Returns whether there was one.
    pub(super) fn clear(&self) -> bool {
        self.latched.swap(false, Ordering::AcqRel)
    }
}
