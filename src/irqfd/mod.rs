//! The core: GSIs, MSIs, routes and batches of one partition, and the order of calls that keeps them safe.
//!
//! It calls kernels through [`Hypervisor`](crate::hypervisor::Hypervisor) alone, and does not depend on Python.

mod balance;
mod batch;
mod commit;
mod config;
mod doorbell;
mod edit;
mod entries;
mod error;
mod events;
mod format;
mod gsi;
#[cfg(test)]
#[cfg(shuttle)]
mod interleavings;
mod ioeventfd;
mod msi;
mod open;
mod partition;
mod plan;
mod preload;
mod route;
mod saved;
mod shared;
mod state;
mod stats;
mod sync;
#[cfg(test)]
#[cfg(not(shuttle))]
mod tests;
mod trace;
mod vps;

pub use batch::Batch;
pub use config::Config;
pub use error::{Error, Failure, Result};
pub use events::NewEvent;
pub use format::{SavedState, dicts, nullable, nullable_dict};
pub use gsi::{GsiAllocator, GsiState};
pub use ioeventfd::IoEventFd;
pub use msi::{MsiError, MsiRoute};
pub use open::{AdoptOptions, DEFAULT_GSIS, Options};
pub use partition::Partition;
pub use route::IrqFdRoute;
pub use saved::{Message, PartitionState, RouteState, Wanted};
pub use stats::PartitionStats;
pub use trace::{Event, Reason, Trace};
pub use vps::VpSet;
