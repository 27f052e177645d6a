//! The workloads of the bench, and the interface of a design that runs them.
//!
//! Each design runs the same workloads on the same routes, on its own partition. The bench times only the workload, not
//! its preparation or clean-up.

use std::time::{Duration, Instant};

use crate::hypervisor::{CallError, CallResult, Operation, RawMsi};

/// The lowest GSI to which both kernels can route an MSI.
pub const FIRST_GSI: u32 = 24;

/// The GSIs that the package hands out at least. Those above them are spare.
pub(super) const OWN_GSIS: usize = 2048;

/// The number of VPs of every design's partition.
pub const VPS: u8 = 4;

/// An operation that the bench times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Routes made, without an MSI.
    Create,
    /// Routes made, routed and armed, one after the other.
    BringUp,
    /// Routes that exist, routed and armed one after the other.
    BringUpMade,
    /// Routes that exist, routed and armed together.
    BringUpBatch,
    /// A device's vectors, set up together by the guest's driver: routes made, routed and armed.
    MsixBringUp,
    /// One vector of a device given another message by the guest's driver: masked, programmed, unmasked.
    MsixRetarget,
    /// One route moved to another vector.
    Retarget,
    /// One route after another, chosen at random, moved to a random vector of a random VP.
    RetargetStorm,
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
    pub const ALL: [Self; 13] = [
        Self::Create,
        Self::BringUp,
        Self::BringUpMade,
        Self::BringUpBatch,
        Self::MsixBringUp,
        Self::MsixRetarget,
        Self::Retarget,
        Self::RetargetStorm,
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
            Self::BringUpMade => "bring-up-made",
            Self::BringUpBatch => "bring-up-batch",
            Self::MsixBringUp => "msix-bring-up",
            Self::MsixRetarget => "msix-retarget",
            Self::Retarget => "retarget",
            Self::RetargetStorm => "retarget-storm",
            Self::RetargetAll => "retarget-all",
            Self::MaskUnmask => "mask-unmask",
            Self::Push => "push",
            Self::Signal => "signal",
            Self::TearDown => "tear-down",
        }
    }

    /// The stage in which a workload begins.
    fn begins_with(self) -> Stage {
        match self {
            Self::Create | Self::BringUp | Self::MsixBringUp => Stage::Nothing,
            Self::BringUpMade | Self::BringUpBatch => Stage::Made,
            Self::Push => Stage::Quiet,
            _ => Stage::Armed,
        }
    }

    /// The stage in which a workload ends.
    fn ends_with(self) -> Stage {
        match self {
            Self::Create => Stage::Made,
            Self::BringUp | Self::BringUpMade | Self::BringUpBatch | Self::MsixBringUp => Stage::Armed,
            Self::TearDown => Stage::Nothing,
            other => other.begins_with(),
        }
    }
}

/// A stage in the life of a design's routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Nothing,
    Made,
    Armed,
    /// All are in the table, but only one is armed.
    Quiet,
}

/// A design's calls on the routes of one partition.
pub(super) trait Steps: Send {
    fn stage(&self) -> Stage;
    fn set_stage(&mut self, stage: Stage);
    /// Moves to another stage. The bench does not time this.
    fn arrange(&mut self, stage: Stage) -> CallResult;
    fn work(&mut self, workload: Workload) -> CallResult;
}

/// A design, on any kernel.
#[derive(Debug)]
pub struct Design(pub(super) Box<dyn Steps>);

impl std::fmt::Debug for dyn Steps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Steps").field("stage", &self.stage()).finish()
    }
}

impl Design {
    /// Runs a workload `calls` times in a row and returns the total time.
    pub fn run(&mut self, workload: Workload, calls: u32) -> CallResult<Duration> {
        let mut total = Duration::ZERO;
        let repeatable = workload.begins_with() == workload.ends_with();
        for _ in 0..if repeatable { 1 } else { calls } {
            if self.0.stage() != workload.begins_with() {
                self.0.arrange(workload.begins_with())?;
                self.0.set_stage(workload.begins_with());
            }
            let start = Instant::now();
            for _ in 0..if repeatable { calls } else { 1 } {
                self.0.work(workload)?;
            }
            total += start.elapsed();
            self.0.set_stage(workload.ends_with());
        }
        Ok(total)
    }
}

/// The MSI of a route. `turn` alternates between two vectors, so that each retargeting changes the MSI.
pub(super) fn msi(index: usize, turn: bool) -> RawMsi {
    let vector = 0x30 + (index % 64) as u32 + if turn { 64 } else { 0 };
    RawMsi { address: 0xFEE0_0000, data: vector }
}

/// Random numbers for [`Workload::RetargetStorm`], the same in every run (xorshift64).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }

    /// A number below `end`.
    pub(super) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % end
    }

    /// The MSI of a random vector of a random VP.
    pub(super) fn msi(&mut self) -> RawMsi {
        let (vp, vector) = (self.below(VPS.into()) as u32, 0x30 + self.below(128) as u32);
        RawMsi { address: 0xFEE0_0000 | vp << 12, data: vector }
    }
}

pub(super) fn event_error(call: &'static str) -> impl Fn(std::io::Error) -> CallError {
    move |error| CallError::new(Operation::Event, call, error.raw_os_error().unwrap_or(libc::EIO))
}
