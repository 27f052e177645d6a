//! The core's errors and their messages.

use std::ops::Range;

use super::msi::MsiError;
use crate::hypervisor::event::AdoptError;
use crate::hypervisor::trigger::Trigger;
use crate::hypervisor::{CallError, Operation, strerror};

pub type Result<T = ()> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0} is closed")]
    Closed(String),
    #[error(
        "this process is a forked child of the one that opened the partition; only that one may use it (signal() \
         works here)"
    )]
    Forked,
    #[error("all {} GSIs ({}-{}) are taken; close routes or open the partition with more", .0.len(), .0.start, .0.end - 1)]
    Exhausted(Range<u32>),
    #[error(
        "the route of GSI {0} is broken: a failed call left it in an unknown or wrong state in the kernel; close it"
    )]
    Broken(u32),
    #[error(
        "{}no VP has APIC id {destination} (VPs: {vps}); {}. \
         Create it with create_vp(), or open the partition with allow_missing_vp=True",
        .gsi.map_or_else(String::new, |gsi| format!("GSI {gsi}: ")),
        if .gsi.is_some() { "arming the route can bring the host down" } else { "no VP would take the MSI" }
    )]
    MissingVp { gsi: Option<u32>, destination: u8, vps: String },
    #[error(transparent)]
    Msi(#[from] MsiError),
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    #[error("{0}")]
    Invalid(String),
    /// An error about a part of a saved state.
    #[error("{place}: {error}")]
    At { place: String, error: Box<Error> },
    #[error("{0}")]
    Unsupported(String),
    #[error("{device}: {} ({}): {advice}", strerror(error.errno), error.call)]
    Unavailable { device: String, error: CallError, advice: String },
    /// A query that the backend's kernel does not support.
    #[error("{0}")]
    Unobservable(&'static str),
    #[error("{0}")]
    Failed(Box<Failure>),
}

/// A call that the kernel refused, with its GSI or doorbell and the results of the rollback.
#[derive(Debug)]
pub struct Failure {
    pub error: CallError,
    pub gsi: Option<u32>,
    /// Boxed to keep results small.
    pub doorbell: Option<Box<Trigger>>,
    /// GSIs whose routes the rollback left broken.
    pub broken: Vec<u32>,
    /// GSIs whose routes are waiting to be re-armed. Their signals stay pending.
    pub disarmed: Vec<u32>,
    /// Later failures of the same call: closing continues past errors.
    pub further: Vec<Failure>,
}

impl Failure {
    pub fn new(error: CallError, gsi: Option<u32>) -> Self {
        Self { error, gsi, doorbell: None, broken: Vec::new(), disarmed: Vec::new(), further: Vec::new() }
    }

    /// The usual cause of the error, if known.
    pub fn hint(&self) -> Option<&'static str> {
        hint(&self.error)
    }

    pub(super) fn of_doorbell(self, trigger: Trigger) -> Self {
        Self { doorbell: Some(Box::new(trigger)), ..self }
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
        if let Some(trigger) = &self.doorbell {
            write!(f, "doorbell ({trigger}): ")?;
        }
        write!(f, "{}", self.error.call)?;
        if let Some(hint) = self.hint() {
            write!(f, ": {hint}")?;
        }
        for (gsis, result) in [
            (&self.broken, "the rollback failed too and left broken"),
            (
                &self.disarmed,
                "waiting to be re-armed (signals wait; the next push tries again, and so does unmask())",
            ),
        ] {
            if !gsis.is_empty() {
                let gsis: Vec<_> = gsis.iter().map(u32::to_string).collect();
                write!(f, "; {result}: GSI {}", gsis.join(", "))?;
            }
        }
        for further in &self.further {
            write!(f, "; {further}")?;
        }
        Ok(())
    }
}

fn hint(error: &CallError) -> Option<&'static str> {
    match (error.operation, error.errno) {
        (_, libc::EMFILE) => Some(
            "this process has as many open files as RLIMIT_NOFILE allows; raise it (ulimit -n, or \
             resource.setrlimit)",
        ),
        (_, libc::ENFILE) => Some("the system has as many open files as fs.file-max allows"),
        (Operation::AssignIrqfd, libc::EBUSY) => {
            Some("the eventfd is already armed on a GSI, by another partition or program that shares it")
        }
        (Operation::AssignIrqfd | Operation::DeassignIrqfd, libc::EBADF) => {
            Some("the route's eventfd or the partition's descriptor was closed by other code")
        }
        (Operation::SetMsiRouting, libc::EBADF) => Some("the partition's descriptor was closed by other code"),
        (Operation::SetMsiRouting, libc::EINVAL) => Some(
            "the kernel refuses an entry of the table: its GSI is above 4095, is an IOAPIC pin's, or has another entry",
        ),
        (Operation::AssignIrqfd, libc::EINVAL) => {
            Some("the descriptor is not an eventfd, or the VM has no in-kernel interrupt controller")
        }
        (Operation::AssignIoEventFd, libc::EEXIST) => {
            Some("another program that has the partition made a doorbell there")
        }
        (Operation::AssignIoEventFd | Operation::DeassignIoEventFd, libc::EBADF) => {
            Some("the doorbell's eventfd or the partition's descriptor was closed by other code")
        }
        (Operation::DeassignIoEventFd, libc::ENOENT) => {
            Some("other code took the doorbell away, or put another eventfd in the place of the doorbell's")
        }
        (Operation::SignalMsi, libc::EPERM) => Some("the VM has no vCPU that could take it"),
        (Operation::SignalMsi, libc::EBADF) => Some("the partition's descriptor was closed by other code"),
        (_, libc::ENOMEM) => Some("the kernel is out of memory"),
        _ => None,
    }
}
