//! The core's Python interface. It converts arguments, detaches from the interpreter, calls the core and turns errors
//! into exceptions. It makes no decision of its own.

mod arguments;
mod batch;
pub(crate) mod bench;
mod device;
mod doorbell;
pub(crate) mod errors;
pub(crate) mod event;
mod log;
pub(crate) mod msi;
mod msi_capability;
mod msix;
pub(crate) mod objects;
mod partition;
pub(crate) mod probe;
mod route;
mod saved;
mod values;
pub(crate) mod waiting;
