//! Device-side interrupt capabilities, as a guest driver sees them: registers above the core's routes.
//!
//! A guest may write anything. Its writes never fail: what the kernel refuses leaves the vector disarmed, and is
//! recorded as the vector's fault.

mod access;
mod msix;
#[cfg(test)]
mod tests;
mod vectors;

pub use msix::{MAX_VECTORS, MsixTable};
