//! A kernel that accepts every call and does nothing, so that only user space takes time.

use std::fmt;
use std::os::fd::RawFd;

use crate::hypervisor::calls::mshv as calls;
use crate::hypervisor::event::{EventFd, Holder};
use crate::hypervisor::table::Table;
use crate::hypervisor::trigger::Trigger;
use crate::hypervisor::{CallResult, Hypervisor, RawMsi};

/// A partition without a kernel. It keeps an image of the table, because that is work of user space too.
pub struct NullPartition {
    table: Table<calls::Entry>,
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
        self.table.set(gsi, calls::entry(gsi, msi.address.into(), msi.data));
    }

    fn drop_entry(&mut self, gsi: u32) {
        self.table.drop(gsi);
    }

    fn push(&mut self) -> CallResult<usize> {
        // The compiler must assume that the table is read.
        std::hint::black_box(self.table.image().entries());
        Ok(self.table.len())
    }

    fn assign(&mut self, _: u32, _: &dyn Holder) -> CallResult {
        Ok(())
    }

    fn deassign(&mut self, _: u32, _: &EventFd) -> CallResult {
        Ok(())
    }

    fn assign_ioeventfd(&mut self, _: Trigger, _: &dyn Holder) -> CallResult {
        Ok(())
    }

    fn deassign_ioeventfd(&mut self, _: Trigger, _: &EventFd) -> CallResult {
        Ok(())
    }

    fn signal_msi(&mut self, _: RawMsi) -> CallResult<bool> {
        Ok(true)
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
