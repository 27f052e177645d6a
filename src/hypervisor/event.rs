//! The eventfd of a route or a doorbell. Device models signal a route's, and the kernel empties it while an irqfd is armed
//! on it. The kernel signals a doorbell's.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
#[cfg(not(all(test, shuttle)))]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

#[cfg(all(test, shuttle))]
use shuttle::sync::atomic::AtomicU64;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd as SysEventFd};

use super::descriptor;
use super::owner::Owner;
use super::waiters::{Waiters, Watch};

/// A new eventfd (non-blocking, close-on-exec) or a duplicate of a caller's.
///
/// It can be closed while other threads use it. The last thread to finish then closes the descriptor, so that no thread
/// writes to a number that belongs to another file by then. Nothing here takes a lock.
#[derive(Debug)]
pub struct EventFd {
    inner: ManuallyDrop<SysEventFd>,
    /// The number of threads that use the descriptor now, with the flags `CLOSED` (no thread may begin to use it) and
    /// `GONE` (the descriptor is closed). The upper half names the process that these threads are of.
    users: AtomicU64,
    /// Whether it is a duplicate of a caller's eventfd, which may be in blocking mode.
    foreign: bool,
    id: OnceLock<Option<u64>>,
    waiters: Waiters,
}

const CLOSED: u64 = 1 << 31;
const GONE: u64 = 1 << 30;
const PROCESS: u64 = u64::MAX << 32;

/// The calling process, where `users` names it.
fn this_process() -> u64 {
    // Where the kernel can't tell a child from its parent, all are one.
    Owner::current().map_or(0, |owner| owner.number() << 32)
}

/// The users as this process has them: a forked child starts without any, because it has none of the parent's threads.
fn own(users: u64, process: u64) -> u64 {
    if users & PROCESS == process { users } else { process | users & (CLOSED | GONE) }
}

/// The reason why a descriptor can't be the eventfd of a route or a doorbell.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    #[error("file descriptor {fd} is not open; give an open eventfd")]
    NotOpen { fd: RawFd },
    #[error("file descriptor {fd} is {kind}, not an eventfd; make one with EventFd() or os.eventfd(0)")]
    NotEventFd { fd: RawFd, kind: String },
    #[error(
        "file descriptor {fd} is an eventfd in semaphore mode, where each read takes only one signal; \
         make it without EFD_SEMAPHORE"
    )]
    Semaphore { fd: RawFd },
    #[error("file descriptor {fd}: {error}")]
    Io { fd: RawFd, error: io::Error },
}

impl EventFd {
    pub fn new() -> io::Result<Self> {
        let inner = SysEventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self::own(inner, false))
    }

    /// Duplicates a caller's eventfd, and checks that an irqfd can use it.
    pub fn adopt(fd: RawFd) -> Result<Self, AdoptError> {
        let own = descriptor::duplicate(fd).map_err(|error| match error.raw_os_error() {
            Some(libc::EBADF) => AdoptError::NotOpen { fd },
            _ => AdoptError::Io { fd, error },
        })?;
        // SAFETY: the duplicate is new and has no other owner.
        let event = Self::own(unsafe { SysEventFd::from_raw_fd(own) }, true);
        let info = event.info().map_err(|error| AdoptError::Io { fd, error })?;
        if info.field("eventfd-count").is_none() {
            let kind = descriptor::link(own).unwrap_or_else(|_| "another kind of file".into());
            return Err(AdoptError::NotEventFd { fd, kind });
        }
        // Read now, while the number is known to be this eventfd's.
        let id = info.field("eventfd-id");
        event.id.get_or_init(|| id);
        // Linux has the field since 6.5. Earlier kernels don't report semaphore mode.
        if info.field("eventfd-semaphore") == Some(1) {
            return Err(AdoptError::Semaphore { fd });
        }
        Ok(event)
    }

    fn own(inner: SysEventFd, foreign: bool) -> Self {
        Self {
            inner: ManuallyDrop::new(inner),
            users: AtomicU64::new(0),
            foreign,
            id: OnceLock::new(),
            waiters: Waiters::new(),
        }
    }

    fn info(&self) -> io::Result<Info> {
        // Once closed, the number may belong to another file.
        self.using(|fd| std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).map(Info))
    }

    /// The kernel's number for this eventfd, the same for every duplicate; `None` before Linux 5.2.
    pub fn id(&self) -> io::Result<Option<u64>> {
        if let Some(id) = self.id.get() {
            return Ok(*id);
        }
        let id = self.info()?.field("eventfd-id");
        Ok(*self.id.get_or_init(|| id))
    }

    /// Whether the other is a duplicate of this one, and both are open.
    pub fn is_same(&self, other: &Self) -> io::Result<bool> {
        if self.is_closed() || other.is_closed() {
            return Ok(false);
        }
        Ok(match (self.id()?, other.id()?) {
            (Some(this), Some(other)) => this == other,
            _ => descriptor::same_file(self.as_raw_fd(), other.as_raw_fd()) == Some(true),
        })
    }

    /// Whether other code has closed the descriptor, whose number may be another file's by now. That other file is told
    /// by the eventfd's number in the kernel, if that was read before.
    pub fn is_gone(&self) -> bool {
        let fd = self.as_raw_fd();
        match (self.info(), self.id.get()) {
            (Ok(info), Some(known)) => info.field("eventfd-id") != *known,
            (Ok(_), None) => false,
            (Err(_), _) => !self.is_closed() && !descriptor::is_open(fd),
        }
    }

    /// Runs `action` on the descriptor unless it is closed. Nothing closes it meanwhile.
    fn using<T>(&self, action: impl FnOnce(RawFd) -> io::Result<T>) -> io::Result<T> {
        let before = self.change_users(|users| users + 1);
        let result = if before & CLOSED == 0 {
            action(self.inner.as_raw_fd())
        } else {
            Err(io::Error::from_raw_os_error(libc::EBADF))
        };
        if self.users.fetch_sub(1, Ordering::Release) & !PROCESS == CLOSED | 1 {
            self.close_if_unused();
        }
        result
    }

    /// Makes a change, and returns the users before it.
    fn change_users(&self, change: impl Fn(u64) -> u64) -> u64 {
        let process = this_process();
        let changed = |users| Some(change(own(users, process)));
        let (Ok(before) | Err(before)) = self.users.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
        own(before, process)
    }

    /// Closes the descriptor, once, unless a thread uses it. The last such thread calls this again.
    fn close_if_unused(&self) {
        let closed = this_process() | CLOSED;
        let gone = self.users.compare_exchange(closed, closed | GONE, Ordering::Acquire, Ordering::Relaxed);
        if gone.is_ok() {
            descriptor::close(self.inner.as_raw_fd());
        }
    }

    /// Closes the descriptor, now or when the last thread that uses it has finished.
    pub fn close(&self) {
        self.change_users(|users| users | CLOSED);
        self.close_if_unused();
        self.wake_waiters();
    }

    /// Begins a watch for an event loop. Look at the eventfd's state after this; see [`Waiters::watch`].
    pub fn watch(&self) -> io::Result<Watch> {
        self.waiters.watch(self.using(descriptor::duplicate)?)
    }

    /// Ends the watches on this eventfd, so that those who wait look at its state again. Closing does this too.
    pub fn wake_waiters(&self) {
        self.waiters.wake();
    }

    #[cfg(test)]
    pub(super) fn watches(&self) -> usize {
        self.waiters.len()
    }

    /// If other code has closed the descriptor, forgets it without a close: the number may belong to another file next.
    pub fn forget_if_closed(&self) {
        if descriptor::is_open(self.inner.as_raw_fd()) {
            self.wake_waiters();
        } else {
            self.forget();
        }
    }

    /// Gives the number up without a close: other code has closed the descriptor.
    pub fn forget(&self) {
        self.change_users(|users| users | CLOSED | GONE);
        self.wake_waiters();
    }

    pub fn is_closed(&self) -> bool {
        self.users.load(Ordering::Relaxed) & CLOSED != 0
    }

    /// Whether it is a duplicate of a caller's eventfd.
    pub fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// Whether `signal` could block: only on a caller's eventfd in blocking mode.
    pub fn may_block(&self) -> bool {
        self.foreign
    }

    /// Adds `n` to the counter. If the counter has no room for `n`, it stays as it is: signals are pending already, and
    /// a kernel does not look at their number. Does not wait for room, even in blocking mode.
    pub fn signal(&self, n: u64) -> io::Result<()> {
        self.using(|fd| {
            if self.foreign && !self.has_room(fd, n)? {
                return Ok(());
            }
            write(fd, n)
                .or_else(|error| if error.kind() == io::ErrorKind::WouldBlock { Ok(()) } else { Err(error) })
        })
    }

    /// Whether the counter has room for `n`. In blocking mode a write would wait for that.
    fn has_room(&self, fd: RawFd, n: u64) -> io::Result<bool> {
        match n {
            1 => ready(fd, libc::POLLOUT),
            _ => Ok(self.info()?.field("eventfd-count").is_none_or(|count| u64::MAX - count > n)),
        }
    }

    /// Empties the counter and returns its value; 0 if no signal is pending. Never waits, even in blocking mode
    /// (RWF_NOWAIT).
    pub fn consume(&self) -> io::Result<u64> {
        self.using(|fd| {
            let mut count = 0u64;
            let into = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: size_of::<u64>() };
            // SAFETY: one buffer of eight bytes, which lives across the call.
            let read = unsafe { libc::preadv2(fd, &into, 1, -1, libc::RWF_NOWAIT) };
            if read >= 0 {
                return Ok(count);
            }
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::WouldBlock { Ok(0) } else { Err(error) }
        })
    }

    /// Whether the counter is not 0.
    pub fn is_readable(&self) -> io::Result<bool> {
        self.using(|fd| ready(fd, libc::POLLIN))
    }
}

/// Empties the counters that are not 0. After an arming they are few, and poll(2) finds them in a fraction of the time
/// that reading every counter takes. Returns the index and the error of each that can't be read.
pub fn drain(events: &[&EventFd]) -> Vec<(usize, io::Error)> {
    /// poll(2) takes no more descriptors than RLIMIT_NOFILE.
    const AT_ONCE: usize = 256;
    if let [event] = events {
        return event.consume().err().map(|error| (0, error)).into_iter().collect();
    }
    let poll = |event: &&EventFd| libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let mut polls: Vec<_> = events.iter().map(poll).collect();
    for some in polls.chunks_mut(AT_ONCE) {
        // SAFETY: the pointer and the length of a live slice; a timeout of 0 does not wait.
        if unsafe { libc::poll(some.as_mut_ptr(), some.len() as libc::nfds_t, 0) } < 0 {
            some.iter_mut().for_each(|poll| poll.revents = libc::POLLIN);
        }
    }
    let found = events.iter().enumerate().zip(&polls).filter(|(_, poll)| poll.revents != 0);
    found.filter_map(|((place, event), _)| event.consume().err().map(|error| (place, error))).collect()
}

/// Adds to the counter of an eventfd.
pub fn write(fd: RawFd, n: u64) -> io::Result<()> {
    // SAFETY: eight bytes of a live value.
    match unsafe { libc::write(fd, (&raw const n).cast(), size_of::<u64>()) } {
        8 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn ready(fd: RawFd, events: libc::c_short) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: one pollfd, which lives across the call; a timeout of 0 does not wait.
    while unsafe { libc::poll(&mut poll, 1, 0) } < 0 {
        let error = io::Error::last_os_error();
        // Although it does not wait: if nothing is ready, poll(2) fails when a signal comes in just then.
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if poll.revents & libc::POLLNVAL != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    Ok(poll.revents & events != 0)
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}

impl AsRef<EventFd> for EventFd {
    fn as_ref(&self) -> &EventFd {
        self
    }
}

/// The owner of an eventfd, which can be shared. A kernel keeps the file of an irqfd open; the simulated kernel keeps a
/// share of the owner instead.
pub trait Holder {
    fn event(&self) -> &EventFd;
    fn share(&self) -> Share;
}

/// A share of an eventfd's owner.
pub type Share = Arc<dyn AsRef<EventFd> + Send + Sync>;

impl<T: AsRef<EventFd> + Send + Sync + 'static> Holder for Arc<T> {
    fn event(&self) -> &EventFd {
        (**self).as_ref()
    }

    fn share(&self) -> Share {
        Arc::clone(self) as Share
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        self.close();
    }
}

/// The text of /proc/self/fdinfo/N (proc_pid_fdinfo(5)): a name, a colon and a value on each line.
pub(super) struct Info(pub(super) String);

impl Info {
    pub(super) fn field(&self, name: &str) -> Option<u64> {
        let (_, value) = self.0.lines().filter_map(|line| line.split_once(':')).find(|(key, _)| *key == name)?;
        // The counter is hexadecimal, the other fields are decimal.
        let value = value.trim();
        if name == "eventfd-count" { u64::from_str_radix(value, 16).ok() } else { value.parse().ok() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(flags: i32) -> RawFd {
        // SAFETY: makes a descriptor.
        let fd = unsafe { libc::eventfd(0, flags) };
        assert!(fd >= 0);
        fd
    }

    #[test]
    fn consume_takes_all_signals_once() {
        let event = EventFd::new().unwrap();
        assert_eq!(event.consume().unwrap(), 0);
        event.signal(1).unwrap();
        event.signal(2).unwrap();
        assert!(event.is_readable().unwrap());
        assert_eq!(event.consume().unwrap(), 3);
        assert!(!event.is_readable().unwrap());
    }

    #[test]
    fn a_blocking_eventfd_blocks_neither_signal_nor_consume() {
        let fd = raw(0);
        let event = EventFd::adopt(fd).unwrap();
        let (done, over) = std::sync::mpsc::channel();
        // A thread of its own: if it blocks, the test goes on without it.
        std::thread::spawn(move || {
            let empty = event.consume().unwrap();
            event.signal(u64::MAX - 1).unwrap();
            event.signal(1).unwrap();
            let full = event.consume().unwrap();
            event.signal(u64::MAX - 100).unwrap();
            event.signal(200).unwrap();
            done.send([empty, full, event.consume().unwrap()])
        });
        let taken = over.recv_timeout(std::time::Duration::from_secs(20));
        assert_eq!(taken, Ok([0, u64::MAX - 1, u64::MAX - 100]));
        descriptor::close(fd);
    }

    #[test]
    fn a_unix_signal_that_comes_during_a_look_fails_nothing() {
        static CAUGHT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        extern "C" fn caught(_: libc::c_int) {
            CAUGHT.fetch_add(1, Ordering::Relaxed);
        }
        let handler: extern "C" fn(libc::c_int) = caught;
        // SAFETY: the handler only adds to an atomic; the zeros are an empty mask and no flags.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            assert_eq!(libc::sigaction(libc::SIGUSR2, &action, std::ptr::null_mut()), 0);
        }
        let event = EventFd::new().unwrap();
        // SAFETY: a query.
        let looks = unsafe { libc::pthread_self() };
        let over = std::sync::atomic::AtomicBool::new(false);
        let found = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // SAFETY: this thread is joined before the other one ends.
                    unsafe { libc::pthread_kill(looks, libc::SIGUSR2) };
                    std::thread::yield_now();
                }
            });
            let mut found = Ok(false);
            while found.is_ok() && CAUGHT.load(Ordering::Relaxed) < 2000 {
                found = event.is_readable();
            }
            over.store(true, Ordering::Relaxed);
            found
        });
        assert!(!found.unwrap());
    }

    #[test]
    fn signalling_a_full_counter_succeeds() {
        let event = EventFd::new().unwrap();
        event.signal(u64::MAX - 1).unwrap();
        event.signal(1).unwrap();
        assert_eq!(event.consume().unwrap(), u64::MAX - 1);
    }

    #[test]
    fn a_semaphore_a_pipe_and_a_closed_number_are_refused() {
        let semaphore = raw(libc::EFD_SEMAPHORE);
        assert!(matches!(EventFd::adopt(semaphore), Err(AdoptError::Semaphore { .. })));
        descriptor::close(semaphore);
        assert!(matches!(EventFd::adopt(semaphore), Err(AdoptError::NotOpen { .. })));
        let file = std::fs::File::open("/dev/null").unwrap();
        match EventFd::adopt(file.as_raw_fd()) {
            Err(AdoptError::NotEventFd { kind, .. }) => assert_eq!(kind, "/dev/null"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn duplicates_have_one_id() {
        let event = EventFd::new().unwrap();
        let twin = EventFd::adopt(event.as_raw_fd()).unwrap();
        assert_eq!(event.id().unwrap(), twin.id().unwrap());
        assert_ne!(event.id().unwrap(), EventFd::new().unwrap().id().unwrap());
    }

    #[test]
    fn a_closed_event_is_not_the_same_as_a_file_with_its_number_or_a_duplicate() {
        let (event, looked_at) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        looked_at.id().unwrap();
        let twin = EventFd::adopt(looked_at.as_raw_fd()).unwrap();
        event.close();
        looked_at.close();
        let others: Vec<_> = (0..8).map(|_| EventFd::new().unwrap()).collect();
        assert!(others.iter().all(|other| !event.is_same(other).unwrap()));
        assert!(!looked_at.is_same(&twin).unwrap());
        assert!(event.id().is_err());
    }

    #[test]
    fn a_closed_event_gives_ebadf_and_closing_twice_closes_once() {
        let event = EventFd::new().unwrap();
        event.close();
        let taken = descriptor::duplicate(0).unwrap();
        event.close();
        assert!(descriptor::link(taken).is_ok());
        assert_eq!(event.signal(1).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(event.consume().unwrap_err().raw_os_error(), Some(libc::EBADF));
        descriptor::close(taken);
    }

    #[test]
    fn a_descriptor_closed_by_other_code_is_not_closed_again() {
        let event = EventFd::new().unwrap();
        event.forget_if_closed();
        assert!(!event.is_closed());
        // A number that no other test can have.
        let number = 1 << 30;
        // SAFETY: it is never read, written or closed, as the test shows.
        let gone = EventFd::own(unsafe { SysEventFd::from_raw_fd(number) }, false);
        gone.forget_if_closed();
        assert!(gone.is_closed());
    }

    #[test]
    fn closing_while_other_threads_signal_closes_the_descriptor_once() {
        for _ in 0..200 {
            let event = EventFd::new().unwrap();
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| while event.signal(1).is_ok() {});
                }
                event.close();
            });
            assert_eq!(event.users.load(Ordering::Relaxed) & !PROCESS, CLOSED | GONE);
        }
    }

    #[test]
    fn a_forked_child_closes_its_copy_although_a_thread_of_its_parent_uses_the_descriptor() {
        let event = EventFd::new().unwrap();
        let child = event
            .using(|fd| {
                // SAFETY: the child calls nothing but this, a query and _exit.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    // For the child, this thread of the parent is another one.
                    event.close();
                    // SAFETY: ends the child without running the parent's exit handlers.
                    unsafe { libc::_exit(i32::from(descriptor::is_open(fd))) };
                }
                Ok(child)
            })
            .unwrap();
        let mut status = -1;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0, "the child's descriptor stays open");
        event.signal(1).unwrap();
        assert_eq!(event.consume().unwrap(), 1);
        event.close();
        assert_eq!(event.users.load(Ordering::Relaxed) & !PROCESS, CLOSED | GONE);
    }
}
