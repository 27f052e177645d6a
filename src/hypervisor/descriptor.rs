//! Operations on file descriptors that the standard library lacks.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Duplicates a descriptor, with close-on-exec set.
pub fn duplicate(fd: RawFd) -> io::Result<RawFd> {
    // SAFETY: takes and returns plain numbers; a bad one is an error.
    match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) } {
        -1 => Err(io::Error::last_os_error()),
        new => Ok(new),
    }
}

/// A duplicate with an owner, for a number that no other code learns.
pub fn owned_duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the duplicate was just made and belongs to nobody else.
    duplicate(fd).map(|own| unsafe { OwnedFd::from_raw_fd(own) })
}

/// Closes a descriptor that other code may have closed. Dropping an `OwnedFd` would end the process in that case, where
/// the standard library checks for it (debug assertions).
pub fn close(fd: RawFd) {
    // SAFETY: takes a number. EBADF is expected, and other errors can't be handled.
    unsafe { libc::close(fd) };
}

/// Drops the owner of a descriptor, if the descriptor still refers to a file that /proc calls `kind`. Otherwise other
/// code has closed it, and its number may belong to another file: the owner is forgotten without a drop.
pub fn drop_unless_closed<T: AsRawFd>(owner: T, kind: &str) {
    if !is_still(owner.as_raw_fd(), kind) {
        std::mem::forget(owner);
    }
}

/// Whether a descriptor refers to a file of this kind. Without /proc: whether it is open.
pub fn is_still(fd: RawFd, kind: &str) -> bool {
    link(fd).map_or_else(|_| is_open(fd), |link| link.starts_with(kind))
}

/// Whether a descriptor is open.
pub fn is_open(fd: RawFd) -> bool {
    // SAFETY: a query on a number.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

/// The name that /proc gives to a descriptor's file ("anon_inode:kvm-vm", "/dev/null").
pub fn link(fd: RawFd) -> io::Result<String> {
    std::fs::read_link(format!("/proc/self/fd/{fd}")).map(|path| path.to_string_lossy().into_owned())
}

/// Opens a device node for reading and writing.
pub fn open_device(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a valid C string. The result is checked and has no other owner.
    unsafe {
        match libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Whether both descriptors refer to one open file (kcmp(2), KCMP_FILE); `None` if the kernel refuses to compare them.
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
    fn a_device_is_opened_read_write_non_blocking_and_close_on_exec() {
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

    /// An owner of a descriptor that records its drop.
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
    fn the_owner_of_a_closed_or_reused_descriptor_is_not_dropped() {
        let open = std::fs::File::open("/dev/null").unwrap();
        for (fd, kind, expected) in
            [(open.as_raw_fd(), "/dev/", true), (open.as_raw_fd(), "pipe:", false), (-1, "/dev/", false)]
        {
            let dropped = std::cell::Cell::new(false);
            drop_unless_closed(Owning(fd, &dropped), kind);
            assert_eq!(dropped.get(), expected);
        }
    }
}
