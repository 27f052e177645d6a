//! The faces of the core in Python: arguments are converted, the interpreter is let go, the core is called, errors
//! become exceptions. No rule of the package is decided here.

mod arguments;
mod batch;
pub(crate) mod bench;
pub(crate) mod errors;
pub(crate) mod event;
pub(crate) mod msi;
pub(crate) mod objects;
mod partition;
pub(crate) mod probe;
mod route;
mod values;
