//! The process that owns an object. The check needs no system call and detects every kind of fork.

use std::io;
use std::marker::PhantomData;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// The process that made an object. A forked child is another owner, even though it has a copy of the parent's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(u64);

/// The number of the last owner in this line of forks. It is ordinary memory, so a child continues its parent's count,
/// and never takes the number of an object that it inherited.
static LAST: AtomicU64 = AtomicU64::new(0);

/// A page with the owner's number. The kernel wipes it in a forked child (madvise(2), MADV_WIPEONFORK). Unlike a
/// pthread_atfork handler, this also detects forks that bypass the C library.
static PAGE: OnceLock<Result<&'static AtomicU64, i32>> = OnceLock::new();

fn page() -> Result<&'static AtomicU64, i32> {
    *PAGE.get_or_init(|| {
        let errno = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOMEM);
        // SAFETY: a new anonymous mapping of one page, all zeros, which is never unmapped once it is returned: a valid
        // AtomicU64 for the life of the process.
        unsafe {
            let size = libc::sysconf(libc::_SC_PAGESIZE) as usize;
            let address = libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if address == libc::MAP_FAILED {
                return Err(errno());
            }
            if libc::madvise(address, size, libc::MADV_WIPEONFORK) != 0 {
                let error = errno();
                libc::munmap(address, size);
                return Err(error);
            }
            Ok(&*address.cast::<AtomicU64>())
        }
    })
}

impl Owner {
    /// The calling process. Fails where the kernel has no MADV_WIPEONFORK (before Linux 4.14).
    pub fn current() -> io::Result<Self> {
        let page = page().map_err(io::Error::from_raw_os_error)?;
        let known = page.load(Ordering::Acquire);
        if known != 0 {
            return Ok(Self(known));
        }
        let new = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        match page.compare_exchange(0, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(Self(new)),
            Err(winner) => Ok(Self(winner)),
        }
    }

    /// Its number, which no other process in this line of forks has.
    pub fn number(self) -> u64 {
        self.0
    }

    /// Whether the calling process is this owner. One load: no system call, no lock.
    pub fn is_current(self) -> bool {
        page().is_ok_and(|page| page.load(Ordering::Acquire) == self.0)
    }
}

/// A value that each process has for itself. A forked child starts with a new one, because threads that it does not
/// have may hold the locks of the parent's. The child leaves its copy of the parent's value alone.
///
/// Threads may share it if they may share the value and give it to each other: one of them makes it, another drops it.
///
/// ```
/// # use mshv_irqfd::hypervisor::owner::PerProcess;
/// fn shared<T: Send + Sync>() {}
/// shared::<PerProcess<std::sync::Mutex<u8>>>();
/// ```
///
/// ```compile_fail,E0277
/// # use mshv_irqfd::hypervisor::owner::PerProcess;
/// fn shared<T: Sync>() {}
/// shared::<PerProcess<std::cell::Cell<u8>>>(); // threads can't share the value
/// ```
///
/// ```compile_fail,E0277
/// # use mshv_irqfd::hypervisor::owner::PerProcess;
/// fn given<T: Send>() {}
/// given::<PerProcess<std::sync::MutexGuard<'static, u8>>>(); // no other thread can have the value
/// ```
///
/// ```compile_fail,E0599
/// # use mshv_irqfd::hypervisor::owner::PerProcess;
/// #[derive(Default)]
/// struct Shared(std::marker::PhantomData<std::sync::MutexGuard<'static, u8>>); // `Sync`, and not `Send`
/// PerProcess::<Shared>::new().get(); // another thread may drop what this one makes
/// ```
#[derive(Debug)]
pub struct PerProcess<T: 'static>(AtomicPtr<(Owner, T)>, PhantomData<T>);

impl<T: Default + Send + Sync> PerProcess<T> {
    pub const fn new() -> Self {
        Self(AtomicPtr::new(std::ptr::null_mut()), PhantomData)
    }

    /// This process's value, if it has been made.
    pub fn made(&self) -> Option<&T> {
        // SAFETY: null, or made by Box::into_raw below and freed with `self`.
        let (of, value) = unsafe { self.0.load(Ordering::Acquire).as_ref() }?;
        of.is_current().then_some(value)
    }

    /// This process's value, made now if need be.
    pub fn get(&self) -> io::Result<&T> {
        let owner = Owner::current()?;
        loop {
            let current = self.0.load(Ordering::Acquire);
            // SAFETY: null, or made by Box::into_raw below and freed with `self`.
            match unsafe { current.as_ref() } {
                Some((of, value)) if *of == owner => return Ok(value),
                _ => {}
            }
            let new = Box::into_raw(Box::new((owner, T::default())));
            if self.0.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire).is_err() {
                // SAFETY: the pointer was never shared.
                drop(unsafe { Box::from_raw(new) });
            }
        }
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let last = *self.0.get_mut();
        // SAFETY: null, or made by Box::into_raw in `get`.
        let is_own = unsafe { last.as_ref() }.is_some_and(|(of, _)| of.is_current());
        // In a forked child, a thread that it does not have may have been changing the parent's value.
        if is_own {
            // SAFETY: as above; with `self` borrowed mutably, nobody else has it.
            drop(unsafe { Box::from_raw(last) });
        }
    }
}

impl<T: Default + Send + Sync> Default for PerProcess<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forked_child_is_another_owner_and_its_parent_stays_the_same() {
        static VALUES: PerProcess<AtomicU64> = PerProcess::new();
        let owner = Owner::current().unwrap();
        VALUES.get().unwrap().store(7, Ordering::Relaxed);
        // SAFETY: the child calls nothing but atomics, a small allocation and _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let new = Owner::current();
            let ok = !owner.is_current()
                && new.is_ok_and(|new| new != owner && new.is_current())
                && VALUES.get().is_ok_and(|value| value.load(Ordering::Relaxed) == 0);
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(if ok { 0 } else { 1 }) };
        }
        let mut status = -1;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
        assert!(owner.is_current());
        assert_eq!(VALUES.get().unwrap().load(Ordering::Relaxed), 7);
    }

    #[test]
    fn a_forked_child_leaves_its_parents_value_alone_when_it_drops_its_copy() {
        static DROPS: AtomicU64 = AtomicU64::new(0);
        #[derive(Default)]
        struct Counted;
        impl Drop for Counted {
            fn drop(&mut self) {
                DROPS.fetch_add(1, Ordering::Relaxed);
            }
        }
        let value: PerProcess<Counted> = PerProcess::new();
        value.get().unwrap();
        // SAFETY: the child calls nothing but a drop and _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            drop(value);
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(DROPS.load(Ordering::Relaxed) as i32) };
        }
        let mut status = -1;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0, "the child dropped its parent's value");
        drop(value);
        assert_eq!(DROPS.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_check_makes_no_system_call() {
        let owner = Owner::current().unwrap();
        // SAFETY: the child makes only system calls and the check, and ends without unwinding.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: after the first call, any system call but read, write and exit kills the child.
            unsafe {
                let strict = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT);
                let ok = strict == 0 && !owner.is_current();
                libc::syscall(libc::SYS_exit, if ok { 0 } else { 1 });
            }
        }
        let mut status = -1;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0, "killed for a system call, or took itself for the owner");
    }
}
