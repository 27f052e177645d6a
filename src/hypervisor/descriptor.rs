//! Small questions about file descriptors that the standard library has no name for.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Duplicates with close-on-exec set.
pub fn duplicate(fd: RawFd) -> io::Result<RawFd> {
    // SAFETY: takes and returns plain numbers; a bad one is an error.
    match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) } {
        -1 => Err(io::Error::last_os_error()),
        new => Ok(new),
    }
}

/// A duplicate with an owner, for a descriptor that nobody else learns of.
pub fn owned_duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the duplicate was just made and belongs to nobody else.
    duplicate(fd).map(|own| unsafe { OwnedFd::from_raw_fd(own) })
}

/// Closes, unless somebody else has: a descriptor closed behind our back must not end the process, which
/// dropping an `OwnedFd` does where the standard library checks (debug assertions).
pub fn close(fd: RawFd) {
    // SAFETY: takes a number; EBADF is what we allow for, and nothing can be done about other errors.
    unsafe { libc::close(fd) };
}

/// Drops something that owns a descriptor of a file that /proc calls `kind`, or, where that was closed behind our back,
/// lets go of it without closing what may have its number by now.
pub fn drop_if_still<T: AsRawFd>(owner: T, kind: &str) {
    if !is_still(owner.as_raw_fd(), kind) {
        std::mem::forget(owner);
    }
}

/// Whether a number stands for a file of this kind, or, where there is no /proc to say, for any.
pub fn is_still(fd: RawFd, kind: &str) -> bool {
    link(fd).map_or_else(|_| is_open(fd), |link| link.starts_with(kind))
}

/// Whether a number stands for an open file.
pub fn is_open(fd: RawFd) -> bool {
    // SAFETY: a query on a number.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

/// What the descriptor refers to, as /proc names it ("anon_inode:kvm-vm", "/dev/null").
pub fn link(fd: RawFd) -> io::Result<String> {
    std::fs::read_link(format!("/proc/self/fd/{fd}")).map(|path| path.to_string_lossy().into_owned())
}

/// Opens a device node for reading and writing.
pub fn open_device(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a valid C string; the result is checked and owned by nobody else.
    unsafe {
        match libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Whether both descriptors refer to one open file (kcmp(2), KCMP_FILE); `None` where the kernel won't say.
pub fn same_file(a: RawFd, b: RawFd) -> Option<bool> {
    const KCMP_FILE: libc::c_int = 0;
    // SAFETY: numbers in, a number out.
    let order = unsafe {
        let this = libc::getpid();
        libc::syscall(libc::SYS_kcmp, this, this, KCMP_FILE, a as libc::c_ulong, b as libc::c_ulong)
    };
    (order >= 0).then_some(order == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_opened_for_both_ways_and_neither_blocks_nor_is_inherited() {
        let file = open_device(Path::new("/dev/null")).unwrap();
        // SAFETY: queries on an open descriptor.
        let (mode, flags) =
            unsafe { (libc::fcntl(file.as_raw_fd(), libc::F_GETFL), libc::fcntl(file.as_raw_fd(), libc::F_GETFD)) };
        assert_eq!(mode & (libc::O_ACCMODE | libc::O_NONBLOCK), libc::O_RDWR | libc::O_NONBLOCK);
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }

    #[test]
    fn duplicates_are_one_file_and_two_openings_are_two() {
        let [one, two] = [0, 1].map(|_| std::fs::File::open("/dev/null").unwrap());
        let twin = owned_duplicate(one.as_raw_fd()).unwrap();
        assert_eq!(same_file(one.as_raw_fd(), twin.as_raw_fd()), Some(true));
        assert_eq!(same_file(one.as_raw_fd(), two.as_raw_fd()), Some(false));
        assert_eq!(same_file(one.as_raw_fd(), -1), None);
    }

    /// Something that owns a number, and says when it is dropped.
    struct Owning<'a>(RawFd, &'a std::cell::Cell<bool>);

    impl AsRawFd for Owning<'_> {
        fn as_raw_fd(&self) -> RawFd {
            self.0
        }
    }

    impl Drop for Owning<'_> {
        fn drop(&mut self) {
            self.1.set(true);
        }
    }

    #[test]
    fn what_owns_a_number_that_means_nothing_or_another_file_is_let_go_and_not_dropped() {
        let open = std::fs::File::open("/dev/null").unwrap();
        for (fd, kind, expected) in
            [(open.as_raw_fd(), "/dev/", true), (open.as_raw_fd(), "pipe:", false), (-1, "/dev/", false)]
        {
            let dropped = std::cell::Cell::new(false);
            drop_if_still(Owning(fd, &dropped), kind);
            assert_eq!(dropped.get(), expected);
        }
    }
}
