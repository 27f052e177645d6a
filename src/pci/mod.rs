//! Device-side interrupt capabilities, as a guest driver sees them: registers above the core's routes.
//!
//! A guest may write anything. Its writes never fail: what the kernel refuses leaves the vector disarmed, and is
//! recorded as the vector's fault.

mod access;
mod device;
#[cfg(test)]
#[cfg(shuttle)]
mod interleavings;
mod latch;
mod msi;
mod msix;
mod saved;
mod sync;
#[cfg(test)]
mod tests;
mod vector_state;
mod vectors;

pub use device::{AnyDevice, Device, Registers};
pub use msi::{MSI_VECTORS, MsiCapability, MsiRegisters, MsiState};
pub use msix::{EntryState, MSIX_VECTORS, MsixRegisters, MsixState, MsixTable};
pub use vector_state::VectorState;
pub use vectors::Vectors;
