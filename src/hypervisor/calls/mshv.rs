//! MSHV_IRQFD and MSHV_SET_MSI_ROUTING.

use std::io;
use std::os::fd::AsRawFd;

use mshv_bindings::{MSHV_IRQFD_BIT_DEASSIGN, MSHV_IRQFD_BIT_RESAMPLE, mshv_user_irq_entry, mshv_user_irqfd};
use mshv_ioctls::{MSHV_IRQFD, MSHV_SET_MSI_ROUTING};
use vmm_sys_util::ioctl::{ioctl_with_ptr, ioctl_with_ref};

use super::Irqfd;
use crate::hypervisor::table::Image;

/// An entry of the routing table.
pub type Entry = mshv_user_irq_entry;

pub fn entry(gsi: u32, address: u64, data: u32) -> Entry {
    Entry { gsi, address_lo: address as u32, address_hi: (address >> 32) as u32, data }
}

pub fn irqfd(partition: &impl AsRawFd, irqfd: Irqfd) -> io::Result<()> {
    let flags = irqfd.flags(1 << MSHV_IRQFD_BIT_DEASSIGN, 1 << MSHV_IRQFD_BIT_RESAMPLE);
    let argument =
        mshv_user_irqfd { fd: irqfd.event, resamplefd: irqfd.resample.unwrap_or(0), gsi: irqfd.gsi, flags };
    // SAFETY: the structure that MSHV_IRQFD reads.
    match unsafe { ioctl_with_ref(partition, MSHV_IRQFD(), &argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub fn set_msi_routing(partition: &impl AsRawFd, table: &Image<Entry>) -> io::Result<()> {
    // SAFETY: an image of this kernel's entries has the layout of `mshv_user_irq_table`.
    match unsafe { ioctl_with_ptr(partition, MSHV_SET_MSI_ROUTING(), table.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
