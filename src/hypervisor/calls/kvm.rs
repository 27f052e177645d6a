//! KVM_IRQFD and KVM_SET_GSI_ROUTING.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, KVMIO, kvm_irq_routing,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
    kvm_irqfd,
};
use vmm_sys_util::ioctl::{ioctl_with_ptr, ioctl_with_ref};

use super::Irqfd;
use crate::hypervisor::PIN_GSIS;
use crate::hypervisor::table::Image;

vmm_sys_util::ioctl_iow_nr!(KVM_SET_GSI_ROUTING, KVMIO, 0x6a, kvm_irq_routing);
vmm_sys_util::ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);

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
