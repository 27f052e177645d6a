//! The core: GSIs, MSIs, routes and batches of one partition, and the order of calls that keeps them safe.
//!
//! It knows kernels only through [`Hypervisor`](crate::hypervisor::Hypervisor), and no Python.

mod batch;
mod commit;
mod error;
mod gsi;
#[cfg(test)]
#[cfg(shuttle)]
mod interleavings;
mod msi;
mod partition;
mod route;
mod sync;
#[cfg(test)]
#[cfg(not(shuttle))]
mod tests;

pub use batch::Batch;
pub use error::{Error, Failure, Result};
pub use gsi::GsiAllocator;
pub use msi::{MsiError, MsiRoute};
pub use partition::{Config, GsiState, Partition, PartitionStats, VpSet, check_gsis};
pub use route::IrqFdRoute;
