//! A kernel that takes every call and does nothing: what is left of a call's time is user space's own.

use std::fmt;
use std::os::fd::RawFd;

use mshv_bindings::mshv_user_irq_entry;

use super::event::{EventFd, Holder};
use super::table::Table;
use super::{CallResult, Hypervisor, RawMsi};

/// A partition of no kernel. It keeps its table as the others do, because that is user space's work too.
pub struct NullPartition {
    table: Table<mshv_user_irq_entry>,
}

impl NullPartition {
    pub fn new() -> Self {
        Self { table: Table::new(&[]) }
    }
}

impl Default for NullPartition {
    fn default() -> Self {
        Self::new()
    }
}

impl Hypervisor for NullPartition {
    fn set_entry(&mut self, gsi: u32, msi: RawMsi) {
        let entry = mshv_user_irq_entry { gsi, address_lo: msi.address, address_hi: 0, data: msi.data };
        self.table.set(gsi, entry);
    }

    fn drop_entry(&mut self, gsi: u32) {
        self.table.drop(gsi);
    }

    fn push(&mut self) -> CallResult<usize> {
        // The compiler must take the table for read, as by a kernel.
        std::hint::black_box(self.table.as_ptr());
        Ok(self.table.len())
    }

    fn assign(&mut self, _: u32, _: &dyn Holder) -> CallResult {
        Ok(())
    }

    fn deassign(&mut self, _: u32, _: &EventFd) -> CallResult {
        Ok(())
    }

    fn create_vp(&mut self, _: u8) -> CallResult {
        Ok(())
    }

    fn fd(&self) -> Option<RawFd> {
        None
    }
}

impl fmt::Debug for NullPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NullPartition").field("entries", &self.table.len()).finish()
    }
}
