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
