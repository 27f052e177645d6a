//! KVM_IRQFD, KVM_SET_GSI_ROUTING, KVM_IOEVENTFD and KVM_SIGNAL_MSI.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, KVMIO, kvm_ioeventfd,
    kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_irq_routing,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
    kvm_irqfd, kvm_msi,
};
use vmm_sys_util::ioctl::{ioctl_with_ptr, ioctl_with_ref};

use super::{IoEventFd, Irqfd};
use crate::hypervisor::PIN_GSIS;
use crate::hypervisor::table::Image;

vmm_sys_util::ioctl_iow_nr!(KVM_SET_GSI_ROUTING, KVMIO, 0x6a, kvm_irq_routing);
vmm_sys_util::ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
vmm_sys_util::ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
vmm_sys_util::ioctl_iow_nr!(KVM_SIGNAL_MSI, KVMIO, 0xa5, kvm_msi);

/// An entry of the routing table.
pub type Entry = kvm_irq_routing_entry;

/// The entries that KVM makes for an irqchip (arch/x86/kvm/irq.c, `default_routing`).
pub fn pins() -> Vec<Entry> {
    let pin = |gsi, irqchip, pin| {
        // The kernel reads all 32 bytes of the union, so all are initialized.
        let mut u = kvm_irq_routing_entry__bindgen_ty_1 { pad: [0; 8] };
        u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        Entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, u, ..Default::default() }
    };
    (0..PIN_GSIS)
        .flat_map(|gsi| {
            let pic = match gsi {
                0..8 => Some(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
                8..16 => Some(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
                _ => None,
            };
            pic.into_iter().chain([pin(gsi, KVM_IRQCHIP_IOAPIC, gsi)])
        })
        .collect()
}

/// An MSI entry. KVM's entries have room for a 64-bit address, although x86 MSIs have none.
pub fn entry(gsi: u32, address: u64, data: u32) -> Entry {
    let mut u = kvm_irq_routing_entry__bindgen_ty_1 { pad: [0; 8] };
    let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
    u.msi = kvm_irq_routing_msi { address_lo, address_hi, data, ..Default::default() };
    Entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
}

pub fn irqfd(vm: &impl AsRawFd, irqfd: Irqfd) -> io::Result<()> {
    let argument = kvm_irqfd {
        fd: irqfd.event as u32,
        gsi: irqfd.gsi,
        flags: irqfd.flags(KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE),
        resamplefd: irqfd.resample.unwrap_or(0) as u32,
        ..Default::default()
    };
    // SAFETY: the structure that KVM_IRQFD reads.
    match unsafe { ioctl_with_ref(vm, KVM_IRQFD(), &argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub fn set_gsi_routing(vm: &impl AsRawFd, table: &Image<Entry>) -> io::Result<()> {
    // SAFETY: an image of this kernel's entries has the layout of `kvm_irq_routing`.
    match unsafe { ioctl_with_ptr(vm, KVM_SET_GSI_ROUTING(), table.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub fn ioeventfd(vm: &impl AsRawFd, ioeventfd: IoEventFd) -> io::Result<()> {
    let argument = kvm_ioeventfd {
        datamatch: ioeventfd.trigger.datamatch.unwrap_or(0),
        addr: ioeventfd.trigger.address,
        len: ioeventfd.trigger.length,
        fd: ioeventfd.event,
        flags: ioeventfd.flags(
            1 << kvm_ioeventfd_flag_nr_datamatch,
            1 << kvm_ioeventfd_flag_nr_pio,
            1 << kvm_ioeventfd_flag_nr_deassign,
        ),
        ..Default::default()
    };
    // SAFETY: the structure that KVM_IOEVENTFD reads.
    match unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Raises an MSI. Returns the number of vCPUs that took it.
pub fn signal_msi(vm: &impl AsRawFd, address: u64, data: u32) -> io::Result<u32> {
    let (address_lo, address_hi) = (address as u32, (address >> 32) as u32);
    let argument = kvm_msi { address_lo, address_hi, data, ..Default::default() };
    // SAFETY: the structure that KVM_SIGNAL_MSI reads.
    match unsafe { ioctl_with_ref(vm, KVM_SIGNAL_MSI(), &argument) } {
        taken @ 0.. => Ok(taken as u32),
        _ => Err(io::Error::last_os_error()),
    }
}
