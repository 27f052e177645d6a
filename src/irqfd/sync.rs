//! The core's locks and atomics: the standard library's and arc-swap's, or shuttle's in the tests of interleavings.

#[cfg(not(all(test, shuttle)))]
pub(super) use std::sync::atomic::{AtomicBool, AtomicU64};
#[cfg(not(all(test, shuttle)))]
pub(super) use std::sync::{Mutex, MutexGuard};

#[cfg(not(all(test, shuttle)))]
pub(super) use arc_swap::ArcSwap as Shared;

#[cfg(all(test, shuttle))]
pub(super) use shuttle::sync::atomic::{AtomicBool, AtomicU64};
#[cfg(all(test, shuttle))]
pub(super) use shuttle::sync::{Mutex, MutexGuard};

/// A stand-in for `ArcSwap`, each of whose calls is a point at which another thread may come in.
#[cfg(all(test, shuttle))]
#[derive(Debug)]
pub(super) struct Shared<T>(Mutex<std::sync::Arc<T>>);

#[cfg(all(test, shuttle))]
impl<T> Shared<T> {
    pub(super) fn from_pointee(value: T) -> Self {
        Self(Mutex::new(std::sync::Arc::new(value)))
    }

    fn lock(&self) -> MutexGuard<'_, std::sync::Arc<T>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn load(&self) -> std::sync::Arc<T> {
        std::sync::Arc::clone(&self.lock())
    }

    pub(super) fn store(&self, value: std::sync::Arc<T>) {
        *self.lock() = value;
    }
}
