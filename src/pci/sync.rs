//! What a latch is made of: the standard library's, or shuttle's in the tests of interleavings.

#[cfg(not(all(test, shuttle)))]
pub(super) use std::sync::OnceLock;
#[cfg(not(all(test, shuttle)))]
pub(super) use std::sync::atomic::AtomicBool;

#[cfg(all(test, shuttle))]
pub(super) use shuttle::sync::atomic::AtomicBool;

/// A stand-in for the standard library's, each of whose calls is a point at which another thread may come in.
#[cfg(all(test, shuttle))]
#[derive(Debug)]
pub(super) struct OnceLock<T>(AtomicBool, std::sync::OnceLock<T>);

#[cfg(all(test, shuttle))]
impl<T> OnceLock<T> {
    pub(super) fn new() -> Self {
        Self(AtomicBool::new(false), std::sync::OnceLock::new())
    }

    fn point(&self) -> &std::sync::OnceLock<T> {
        self.0.load(std::sync::atomic::Ordering::SeqCst);
        &self.1
    }

    pub(super) fn get(&self) -> Option<&T> {
        self.point().get()
    }

    pub(super) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        self.point().get_or_init(make)
    }

    pub(super) fn set(&self, value: T) -> Result<(), T> {
        self.point().set(value)
    }
}
