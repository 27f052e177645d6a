//! The workloads that the bench times, and the steps that a design takes through them.
//!
//! Each design brings the same routes through the same workloads on a partition of its own. Only the workload itself is
//! timed, not the calls that prepare it or clean up after it.

use std::time::{Duration, Instant};

use crate::hypervisor::{CallError, CallResult, Operation, RawMsi};

/// The lowest GSI that both kernels give to an MSI.
pub const FIRST_GSI: u32 = 24;

/// One operation that the bench times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Routes made, without an MSI.
    Create,
    /// Routes made, routed and armed, one after the other.
    BringUp,
    /// Routes that exist, routed and armed together.
    BringUpBatch,
    /// One route moved to another vector.
    Retarget,
    /// All routes moved to other vectors together.
    RetargetAll,
    /// One route masked and unmasked.
    MaskUnmask,
    /// The table pushed while one route alone is armed.
    Push,
    /// An armed eventfd written, until the interrupt is delivered.
    Signal,
    /// All routes taken down, one after the other.
    TearDown,
}

impl Workload {
    pub const ALL: [Self; 9] = [
        Self::Create,
        Self::BringUp,
        Self::BringUpBatch,
        Self::Retarget,
        Self::RetargetAll,
        Self::MaskUnmask,
        Self::Push,
        Self::Signal,
        Self::TearDown,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::BringUp => "bring-up",
            Self::BringUpBatch => "bring-up-batch",
            Self::Retarget => "retarget",
            Self::RetargetAll => "retarget-all",
            Self::MaskUnmask => "mask-unmask",
            Self::Push => "push",
            Self::Signal => "signal",
            Self::TearDown => "tear-down",
        }
    }

    /// How far the routes must be brought up when it begins.
    fn begins_with(self) -> Standing {
        match self {
            Self::Create | Self::BringUp => Standing::Nothing,
            Self::BringUpBatch => Standing::Made,
            Self::Retarget | Self::RetargetAll | Self::MaskUnmask | Self::Signal | Self::TearDown => {
                Standing::Armed
            }
            Self::Push => Standing::Quiet,
        }
    }

    /// How far they are brought up when it ends.
    fn ends_with(self) -> Standing {
        match self {
            Self::Create => Standing::Made,
            Self::BringUp | Self::BringUpBatch => Standing::Armed,
            Self::TearDown => Standing::Nothing,
            other => other.begins_with(),
        }
    }
}

/// How far the routes of a design are brought up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Nothing,
    Made,
    Armed,
    /// All are in the table, and one alone is armed.
    Quiet,
}

/// A way to run the routes of one partition.
pub(super) trait Steps: Send {
    fn standing(&self) -> Standing;
    fn set_standing(&mut self, standing: Standing);
    /// Comes from any standing to another, by calls that are not timed.
    fn arrange(&mut self, standing: Standing) -> CallResult;
    fn work(&mut self, workload: Workload) -> CallResult;
}

/// A design, whatever kernel it is on.
#[derive(Debug)]
pub struct Design(pub(super) Box<dyn Steps>);

impl std::fmt::Debug for dyn Steps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Steps").field("standing", &self.standing()).finish()
    }
}

impl Design {
    /// Runs a workload `calls` times in a row and says how long that took.
    pub fn run(&mut self, workload: Workload, calls: u32) -> CallResult<Duration> {
        let mut total = Duration::ZERO;
        let repeatable = workload.begins_with() == workload.ends_with();
        for _ in 0..if repeatable { 1 } else { calls } {
            if self.0.standing() != workload.begins_with() {
                self.0.arrange(workload.begins_with())?;
                self.0.set_standing(workload.begins_with());
            }
            let start = Instant::now();
            for _ in 0..if repeatable { calls } else { 1 } {
                self.0.work(workload)?;
            }
            total += start.elapsed();
            self.0.set_standing(workload.ends_with());
        }
        Ok(total)
    }
}

/// The MSI of a route: `turn` tells the vectors of one retargeting from those of the next.
pub(super) fn msi(index: usize, turn: bool) -> RawMsi {
    let vector = 0x30 + (index % 64) as u32 + if turn { 64 } else { 0 };
    RawMsi { address: 0xFEE0_0000, data: vector }
}

pub(super) fn event_error(call: &'static str) -> impl Fn(std::io::Error) -> CallError {
    move |error| CallError::new(Operation::Event, call, error.raw_os_error().unwrap_or(libc::EIO))
}
