//! The Microsoft Hypervisor's root partition driver, `/dev/mshv`.

use std::fmt;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::Path;

use mshv_bindings::{MSHV_PT_BIT_LAPIC, MSHV_PT_BIT_X2APIC, mshv_create_partition_v2};
use mshv_ioctls::{Mshv, MshvError, VcpuFd, VmFd};

use super::calls::mshv as calls;
use super::calls::{IoEventFd, Irqfd};
use super::event::{EventFd, Holder};
use super::table::Table;
use super::trigger::Trigger;
use super::{CallError, CallResult, Hypervisor, Operation, RawMsi, descriptor};

/// The device node of the driver.
pub const DEVICE: &str = "/dev/mshv";

/// The name that /proc gives to a partition's file.
pub const LINK: &str = "anon_inode:mshv_partition";

/// The name that /proc gives to a VP's file.
const VP_LINK: &str = "anon_inode:mshv_vp";

enum Vm {
    /// Made here. Dropping it closes its descriptors, unless other code has closed them.
    Made { vm: Option<VmFd>, vps: Vec<VcpuFd> },
    /// A duplicate of a caller's descriptor. `VmFd` can't be made from one.
    Adopted(RawFd),
}

/// A partition of the mshv driver.
pub struct MshvPartition {
    vm: Vm,
    fd: RawFd,
    table: Table<calls::Entry>,
}

fn failed(operation: Operation, call: &'static str, error: MshvError) -> CallError {
    CallError::new(operation, call, error.errno())
}

impl MshvPartition {
    /// Makes a partition. The crate's `create_vm` panics where the hypervisor refuses to report its properties. The
    /// bare ioctl does not need them: it uses the driver's defaults ("enable everything").
    pub fn open(device: &Path) -> CallResult<Self> {
        let fd = descriptor::open_device(device).map_err(|error| {
            CallError::new(Operation::Open, "open", error.raw_os_error().unwrap_or(libc::EINVAL))
        })?;
        // SAFETY: the descriptor is new, and `mshv` becomes its only owner.
        let mshv = unsafe { Mshv::new_with_fd_number(fd.into_raw_fd()) };
        let arguments = mshv_create_partition_v2 {
            pt_flags: 1 << MSHV_PT_BIT_LAPIC | 1 << MSHV_PT_BIT_X2APIC,
            ..Default::default()
        };
        let vm = mshv
            .create_vm_with_args(&arguments)
            .map_err(|error| failed(Operation::Open, "MSHV_CREATE_PARTITION", error))?;
        vm.initialize().map_err(|error| failed(Operation::Open, "MSHV_INITIALIZE_PARTITION", error))?;
        let fd = vm.as_raw_fd();
        Ok(Self { vm: Vm::Made { vm: Some(vm), vps: Vec::new() }, fd, table: Table::new(&[]) })
    }

    /// Takes over a partition from a duplicate of its descriptor. Every push keeps the entries of `keep`.
    pub fn adopt(fd: OwnedFd, keep: &[(u32, RawMsi)]) -> Self {
        let fd = fd.into_raw_fd();
        let keep: Vec<_> = keep.iter().map(|(gsi, msi)| entry(*gsi, *msi)).collect();
        Self { vm: Vm::Adopted(fd), fd, table: Table::new(&keep) }
    }
}

fn entry(gsi: u32, msi: RawMsi) -> calls::Entry {
    calls::entry(gsi, msi.address.into(), msi.data)
}

impl Hypervisor for MshvPartition {
    fn set_entry(&mut self, gsi: u32, msi: RawMsi) {
        self.table.set(gsi, entry(gsi, msi));
    }

    fn drop_entry(&mut self, gsi: u32) {
        self.table.drop(gsi);
    }

    fn push(&mut self) -> CallResult<usize> {
        calls::set_msi_routing(self, self.table.image())
            .map_err(|error| CallError::of(Operation::SetMsiRouting, "MSHV_SET_MSI_ROUTING", &error))?;
        Ok(self.table.len())
    }

    fn assign(&mut self, gsi: u32, event: &dyn Holder) -> CallResult {
        calls::irqfd(self, Irqfd::assign(event.event().as_raw_fd(), gsi))
            .map_err(|error| CallError::of(Operation::AssignIrqfd, "MSHV_IRQFD", &error))
    }

    fn deassign(&mut self, gsi: u32, event: &EventFd) -> CallResult {
        calls::irqfd(self, Irqfd::deassign(event.as_raw_fd(), gsi))
            .map_err(|error| CallError::of(Operation::DeassignIrqfd, "MSHV_IRQFD (deassign)", &error))
    }

    fn assign_ioeventfd(&mut self, trigger: Trigger, event: &dyn Holder) -> CallResult {
        calls::ioeventfd(self, IoEventFd { event: event.event().as_raw_fd(), trigger, deassign: false })
            .map_err(|error| CallError::of(Operation::AssignIoEventFd, "MSHV_IOEVENTFD", &error))
    }

    fn deassign_ioeventfd(&mut self, trigger: Trigger, event: &EventFd) -> CallResult {
        calls::ioeventfd(self, IoEventFd { event: event.as_raw_fd(), trigger, deassign: true })
            .map_err(|error| CallError::of(Operation::DeassignIoEventFd, "MSHV_IOEVENTFD (deassign)", &error))
    }

    /// The hypervisor's answer does not tell whether the guest takes the interrupt.
    fn signal_msi(&mut self, msi: RawMsi) -> CallResult<bool> {
        const CALL: &str = "MSHV_ROOT_HVCALL (HVCALL_ASSERT_VIRTUAL_INTERRUPT)";
        calls::assert_interrupt(self, msi)
            .map(|()| true)
            .map_err(|error| CallError::of(Operation::SignalMsi, CALL, &error))
    }

    fn create_vp(&mut self, index: u8) -> CallResult {
        match &mut self.vm {
            Vm::Made { vm: Some(vm), vps } => match vm.create_vcpu(index) {
                Ok(vp) => {
                    vps.push(vp);
                    Ok(())
                }
                // An earlier call made the VP and failed afterwards, when it mapped the register page. A VP lives as
                // long as its partition, and its descriptor is not needed here.
                Err(error) if error.errno() == libc::EEXIST => Ok(()),
                Err(error) => Err(failed(Operation::CreateVp, "MSHV_CREATE_VP", error)),
            },
            _ => Err(CallError::new(Operation::CreateVp, "MSHV_CREATE_VP", libc::EPERM)),
        }
    }

    fn fd(&self) -> Option<RawFd> {
        Some(self.fd)
    }
}

impl AsRawFd for MshvPartition {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

impl fmt::Debug for MshvPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MshvPartition").field("fd", &self.fd).field("entries", &self.table.len()).finish()
    }
}

impl Drop for MshvPartition {
    fn drop(&mut self) {
        match &mut self.vm {
            Vm::Made { vm, vps } => {
                vps.drain(..).for_each(|vp| descriptor::drop_unless_closed(vp, VP_LINK));
                vm.take().into_iter().for_each(|vm| descriptor::drop_unless_closed(vm, LINK));
            }
            Vm::Adopted(fd) if descriptor::is_still(*fd, LINK) => descriptor::close(*fd),
            Vm::Adopted(_) => {}
        }
    }
}
