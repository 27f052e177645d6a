//! What can go wrong, in the words that a caller reads.

use std::ops::Range;

use super::msi::MsiError;
use crate::hypervisor::event::AdoptError;
use crate::hypervisor::{CallError, Operation, strerror};

pub type Result<T = ()> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0} is closed")]
    Closed(String),
    #[error(
        "this process was forked from the one that opened the partition; only that one may use it (signal() \
         works here)"
    )]
    Forked,
    #[error("all {} GSIs ({}-{}) are taken; close routes or open the partition with more", .0.len(), .0.start, .0.end - 1)]
    Exhausted(Range<u32>),
    #[error(
        "the route of GSI {0} is broken: after a failed call the kernel could not be brought back to what was \
         there before; close it"
    )]
    Broken(u32),
    #[error(
        "GSI {gsi}: no VP has APIC id {destination} (VPs: {vps}); arming the route can bring the host down. \
         Create it with create_vp(), or open the partition with allow_missing_vp=True"
    )]
    MissingVp { gsi: u32, destination: u8, vps: String },
    #[error(transparent)]
    Msi(#[from] MsiError),
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Unsupported(String),
    #[error("{device}: {} ({}): {advice}", strerror(error.errno), error.call)]
    Unavailable { device: String, error: CallError, advice: String },
    /// A question that this backend's kernel can't be asked.
    #[error("{0}")]
    Unobservable(&'static str),
    #[error("{0}")]
    Failed(Box<Failure>),
}

/// A call that the kernel refused, and what it was for.
#[derive(Debug)]
pub struct Failure {
    pub error: CallError,
    pub gsi: Option<u32>,
    pub hint: Option<&'static str>,
    /// GSIs that the way back left broken.
    pub broken: Vec<u32>,
    /// GSIs that were armed before and could not be armed again: their signals wait.
    pub disarmed: Vec<u32>,
    /// Further failures on the way (a close goes on past errors).
    pub further: Vec<Failure>,
}

impl Failure {
    pub fn new(error: CallError, gsi: Option<u32>) -> Self {
        let hint = hint(&error);
        Self { error, gsi, hint, broken: Vec::new(), disarmed: Vec::new(), further: Vec::new() }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Failed(Box::new(failure))
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(gsi) = self.gsi {
            write!(f, "GSI {gsi}: ")?;
        }
        write!(f, "{}", self.error.call)?;
        if let Some(hint) = self.hint {
            write!(f, ": {hint}")?;
        }
        for (gsis, what) in [
            (&self.broken, "the way back failed too and left broken"),
            (&self.disarmed, "not armed again (their signals wait; unmask() tries again)"),
        ] {
            if !gsis.is_empty() {
                let gsis: Vec<_> = gsis.iter().map(u32::to_string).collect();
                write!(f, "; {what}: GSI {}", gsis.join(", "))?;
            }
        }
        for further in &self.further {
            write!(f, "; {further}")?;
        }
        Ok(())
    }
}

/// What usually lies behind an error, where that is known.
fn hint(error: &CallError) -> Option<&'static str> {
    match (error.operation, error.errno) {
        (_, libc::EMFILE) => Some(
            "this process has as many files open as RLIMIT_NOFILE allows; raise it (ulimit -n, or \
             resource.setrlimit)",
        ),
        (_, libc::ENFILE) => Some("the system has as many files open as fs.file-max allows"),
        (Operation::AssignIrqfd, libc::EBUSY) => {
            Some("the eventfd is armed on a GSI already, by another partition or program that shares it")
        }
        (Operation::AssignIrqfd | Operation::DeassignIrqfd, libc::EBADF) => {
            Some("the route's eventfd or the partition's descriptor was closed by somebody else")
        }
        (Operation::SetMsiRouting, libc::EBADF) => Some("the partition's descriptor was closed by somebody else"),
        (Operation::SetMsiRouting, libc::EINVAL) => Some(
            "the kernel refuses an entry of the table: a GSI of 4096 or more, one that an IOAPIC pin has, or one twice",
        ),
        (Operation::AssignIrqfd, libc::EINVAL) => {
            Some("the descriptor is no eventfd, or the VM has no interrupt controller in the kernel")
        }
        (_, libc::ENOMEM) => Some("the kernel is out of memory"),
        _ => None,
    }
}
