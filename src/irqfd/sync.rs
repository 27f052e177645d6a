//! The locks and shared words of the core: the standard library's, or, where interleavings are tried, shuttle's.

#[cfg(not(all(test, shuttle)))]
pub(super) use std::sync::atomic::{AtomicBool, AtomicU64};
#[cfg(not(all(test, shuttle)))]
pub(super) use std::sync::{Mutex, MutexGuard};

#[cfg(all(test, shuttle))]
pub(super) use shuttle::sync::atomic::{AtomicBool, AtomicU64};
#[cfg(all(test, shuttle))]
pub(super) use shuttle::sync::{Mutex, MutexGuard};
