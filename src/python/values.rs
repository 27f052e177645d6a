//! Conversions to the enumerations and named tuples of `mshv_irqfd.values`.

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use crate::hypervisor::{Interrupt, RawMsi};
use crate::irqfd::{GsiState, PartitionStats};

const MODULE: &str = "mshv_irqfd.values";

pub(super) fn gsi_state(py: Python<'_>, state: GsiState) -> PyResult<Bound<'_, PyAny>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    // The interpreter's attribute cache keeps every name that it is given, so each name is interned: one object.
    let name = match state {
        GsiState::Unallocated => intern!(py, "UNALLOCATED"),
        GsiState::Disabled => intern!(py, "DISABLED"),
        GsiState::Enabled => intern!(py, "ENABLED"),
        GsiState::Broken => intern!(py, "BROKEN"),
    };
    CLASS.import(py, MODULE, "GsiState")?.getattr(name)
}

pub(super) fn delivery_mode(py: Python<'_>, mode: u8) -> PyResult<Bound<'_, PyAny>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    CLASS.import(py, MODULE, "DeliveryMode")?.call1((mode,))
}

pub(super) fn interrupt(py: Python<'_>, interrupt: Interrupt) -> PyResult<Bound<'_, PyAny>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let class = CLASS.import(py, MODULE, "Interrupt")?;
    match interrupt.target {
        Some(to) => {
            let mode = delivery_mode(py, to.delivery_mode)?;
            class.call1((interrupt.vector, to.destination, mode, to.logical, to.level))
        }
        None => class.call1((interrupt.vector, py.None(), py.None(), py.None(), py.None())),
    }
}

pub(super) fn routing_entry(py: Python<'_>, gsi: u32, msi: RawMsi) -> PyResult<Bound<'_, PyAny>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    CLASS.import(py, MODULE, "RoutingEntry")?.call1((gsi, msi.address, msi.data))
}

pub(super) fn partition_stats(py: Python<'_>, stats: PartitionStats) -> PyResult<Bound<'_, PyAny>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    CLASS.import(py, MODULE, "PartitionStats")?.call1((
        stats.pushes,
        stats.entries_pushed,
        stats.pushes_skipped,
        stats.arms,
        stats.disarms,
        stats.failures,
        stats.hits,
        stats.misses,
        stats.entries_loaded,
    ))
}
