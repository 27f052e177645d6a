//! Those who wait for an eventfd in an event loop. They look again when it is closed or replaced, which no descriptor
//! tells.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::descriptor;
use super::owner::{Owner, PerProcess};

type List = Mutex<Vec<Weak<Bell>>>;

/// The watches on one eventfd. A forked child has a list of its own, so that it never disturbs its parent.
#[derive(Debug)]
pub(super) struct Waiters(PerProcess<List>);

impl Waiters {
    pub(super) fn new() -> Self {
        Self(PerProcess::new())
    }

    /// Begins a watch. `event` is a duplicate of the eventfd's descriptor, which the watch closes. The caller looks at
    /// the state that it waits for after this: of its look and `wake`, the later one sees the other's work.
    pub(super) fn watch(&self, event: RawFd) -> io::Result<Watch> {
        let bell = Bell::new().map(Arc::new).inspect_err(|_| descriptor::close(event))?;
        let watch = Watch { event, bell, owner: Owner::current().inspect_err(|_| descriptor::close(event))? };
        let mut list = lock(self.0.get()?);
        list.retain(|bell| bell.strong_count() > 0);
        list.push(Arc::downgrade(&watch.bell));
        drop(list);
        fence(Ordering::SeqCst);
        Ok(watch)
    }

    /// Ends all watches of this process: their `changed` descriptors are readable from now on. Call it after the change.
    pub(super) fn wake(&self) {
        fence(Ordering::SeqCst);
        if let Some(list) = self.0.made() {
            lock(list).drain(..).filter_map(|bell| bell.upgrade()).for_each(|bell| bell.ring());
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.made().map_or(0, |list| lock(list).len())
    }
}

fn lock(list: &List) -> MutexGuard<'_, Vec<Weak<Bell>>> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A watch on an eventfd: two descriptors of its own, for an event loop. Dropping it closes them.
#[derive(Debug)]
pub struct Watch {
    event: RawFd,
    bell: Arc<Bell>,
    owner: Owner,
}

impl Watch {
    /// Readable while the eventfd is.
    pub fn signalled(&self) -> RawFd {
        self.event
    }

    /// Readable once the eventfd is closed or replaced. Then look again, and begin another watch if need be.
    pub fn changed(&self) -> RawFd {
        self.bell.0.as_raw_fd()
    }

    /// Whether this process began it. A forked child has a copy of its parent's event loop, whose epoll set is still the
    /// parent's: it must take nothing out of that.
    pub fn is_own(&self) -> bool {
        self.owner.is_current()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        descriptor::close(self.event);
    }
}

/// The eventfd that ends a watch.
#[derive(Debug)]
struct Bell(ManuallyDrop<EventFd>);

impl Bell {
    fn new() -> io::Result<Self> {
        Ok(Self(ManuallyDrop::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
    }

    fn ring(&self) {
        // Fails only if other code has closed the descriptor, which nobody can wait for any more.
        let _gone = self.0.write(1);
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        descriptor::close(self.0.as_raw_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::super::event::EventFd;
    use super::*;

    fn readable(fd: RawFd) -> bool {
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which lives across the call; a timeout of 0 does not wait.
        assert!(unsafe { libc::poll(&mut poll, 1, 0) } >= 0);
        poll.revents & libc::POLLIN != 0
    }

    #[test]
    fn a_watch_shows_signals_and_outlives_the_eventfd() {
        let event = EventFd::new().unwrap();
        let watch = event.watch().unwrap();
        assert!(!readable(watch.signalled()));
        event.signal(1).unwrap();
        assert!(readable(watch.signalled()));
        assert!(!readable(watch.changed()));
        event.close();
        assert!(readable(watch.changed()));
        assert!(readable(watch.signalled()));
        drop(event);
        assert!(readable(watch.changed()));
    }

    #[test]
    fn each_watch_is_ended_and_one_that_begins_later_is_not() {
        let event = EventFd::new().unwrap();
        let watches: Vec<_> = (0..3).map(|_| event.watch().unwrap()).collect();
        event.wake_waiters();
        let later = event.watch().unwrap();
        assert!(watches.iter().all(|watch| readable(watch.changed())));
        assert!(!readable(later.changed()));
    }

    #[test]
    fn watches_that_are_over_are_forgotten() {
        let event = EventFd::new().unwrap();
        for _ in 0..100 {
            event.watch().unwrap();
        }
        let _watch = event.watch().unwrap();
        assert_eq!(event.watches(), 1);
    }

    #[test]
    fn a_closed_eventfd_cannot_be_watched() {
        let event = EventFd::new().unwrap();
        event.close();
        assert_eq!(event.watch().unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn a_forked_child_ends_no_watch_of_its_parent() {
        let event = EventFd::new().unwrap();
        let watch = event.watch().unwrap();
        // SAFETY: the child calls nothing but this and _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            event.close();
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(0) };
        }
        let mut status = -1;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
        assert!(!readable(watch.changed()));
        event.close();
        assert!(readable(watch.changed()));
    }

    #[test]
    fn whoever_begins_to_wait_while_another_thread_closes_is_told() {
        for _ in 0..500 {
            let event = EventFd::new().unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| event.close());
                if let Some(watch) = event.watch().ok().filter(|_| !event.is_closed()) {
                    let mut poll = libc::pollfd { fd: watch.changed(), events: libc::POLLIN, revents: 0 };
                    // SAFETY: one pollfd, which lives across the call.
                    assert_eq!(unsafe { libc::poll(&mut poll, 1, 20_000) }, 1, "never told");
                }
            });
        }
    }
}
