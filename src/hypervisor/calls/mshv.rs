//! MSHV_IRQFD, MSHV_SET_MSI_ROUTING, MSHV_IOEVENTFD, and the hypercall that raises an MSI.

use std::io;
use std::os::fd::AsRawFd;

use mshv_bindings::{
    HVCALL_ASSERT_VIRTUAL_INTERRUPT, MSHV_IOEVENTFD_BIT_DATAMATCH, MSHV_IOEVENTFD_BIT_DEASSIGN,
    MSHV_IOEVENTFD_BIT_PIO, MSHV_IRQFD_BIT_DEASSIGN, MSHV_IRQFD_BIT_RESAMPLE, hv_input_assert_virtual_interrupt,
    hv_interrupt_control, mshv_root_hvcall, mshv_user_ioeventfd, mshv_user_irq_entry, mshv_user_irqfd,
};
use mshv_ioctls::{MSHV_IOEVENTFD, MSHV_IRQFD, MSHV_ROOT_HVCALL, MSHV_SET_MSI_ROUTING};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};

use super::{IoEventFd, Irqfd};
use crate::hypervisor::table::Image;
use crate::hypervisor::{RawMsi, Target};

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

pub fn ioeventfd(partition: &impl AsRawFd, ioeventfd: IoEventFd) -> io::Result<()> {
    let argument = mshv_user_ioeventfd {
        datamatch: ioeventfd.trigger.datamatch.unwrap_or(0),
        addr: ioeventfd.trigger.address,
        len: ioeventfd.trigger.length,
        fd: ioeventfd.event,
        flags: ioeventfd.flags(
            1 << MSHV_IOEVENTFD_BIT_DATAMATCH,
            1 << MSHV_IOEVENTFD_BIT_PIO,
            1 << MSHV_IOEVENTFD_BIT_DEASSIGN,
        ),
        ..Default::default()
    };
    // SAFETY: the structure that MSHV_IOEVENTFD reads.
    match unsafe { ioctl_with_ref(partition, MSHV_IOEVENTFD(), &argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Asks the hypervisor to raise an MSI, with the fields that the driver decodes for an irqfd (`mshv_copy_girq_info`).
pub fn assert_interrupt(partition: &impl AsRawFd, msi: RawMsi) -> io::Result<()> {
    let target = Target::decode(msi);
    let flags = u64::from(target.level) | u64::from(target.logical) << 1;
    // The driver fills in the partition's id.
    let input = hv_input_assert_virtual_interrupt {
        control: hv_interrupt_control { as_uint64: u64::from(target.delivery_mode) | flags << 32 },
        dest_addr: target.destination.into(),
        vector: msi.data & 0xFF,
        ..Default::default()
    };
    let mut call = mshv_root_hvcall {
        code: HVCALL_ASSERT_VIRTUAL_INTERRUPT as u16,
        in_sz: size_of_val(&input) as u16,
        in_ptr: (&raw const input) as u64,
        ..Default::default()
    };
    // SAFETY: the structure that MSHV_ROOT_HVCALL reads and writes. It points to an input of the size that it names,
    // which lives across the call, and to no output.
    match unsafe { ioctl_with_mut_ref(partition, MSHV_ROOT_HVCALL(), &mut call) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
