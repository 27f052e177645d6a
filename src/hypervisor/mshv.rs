//! The Microsoft Hypervisor's root partition driver, `/dev/mshv`.

use std::fmt;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::Path;

use mshv_bindings::{MSHV_PT_BIT_LAPIC, MSHV_PT_BIT_X2APIC, mshv_create_partition_v2};
use mshv_ioctls::{Mshv, MshvError, VcpuFd, VmFd};

use super::calls::Irqfd;
use super::calls::mshv as calls;
use super::event::{EventFd, Holder};
use super::table::Table;
use super::{CallError, CallResult, Hypervisor, Operation, RawMsi, descriptor};

/// The device node of the driver.
pub const DEVICE: &str = "/dev/mshv";

/// What /proc calls the file of a partition.
pub const LINK: &str = "anon_inode:mshv_partition";

/// What it calls those of VPs.
const VP_LINK: &str = "anon_inode:mshv_vp";

enum Vm {
    /// Made here: dropped with its partition's last descriptor, unless that was closed behind our back.
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
    /// Makes a partition. `create_vm` of the crate panics where the hypervisor refuses to tell its
    /// properties; the bare ioctl with the driver's own defaults ("enable everything") needs none of them.
    pub fn open(device: &Path) -> CallResult<Self> {
        let fd = descriptor::open_device(device).map_err(|error| {
            CallError::new(Operation::Open, "open", error.raw_os_error().unwrap_or(libc::EINVAL))
        })?;
        // SAFETY: the descriptor was just opened and is given away for good.
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

    /// Stands on a duplicate of a partition's descriptor. `keep` stays in every table pushed.
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

    fn create_vp(&mut self, index: u8) -> CallResult {
        match &mut self.vm {
            Vm::Made { vm: Some(vm), vps } => match vm.create_vcpu(index) {
                Ok(vp) => {
                    vps.push(vp);
                    Ok(())
                }
                // Made by an earlier call that failed after the ioctl, at mapping its register page. A VP ends with its
                // partition only, and nobody uses its descriptor here.
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
                vps.drain(..).for_each(|vp| descriptor::drop_if_still(vp, VP_LINK));
                vm.take().into_iter().for_each(|vm| descriptor::drop_if_still(vm, LINK));
            }
            Vm::Adopted(fd) if descriptor::is_still(*fd, LINK) => descriptor::close(*fd),
            Vm::Adopted(_) => {}
        }
    }
}
