//! KVM with its in-kernel interrupt controllers, `/dev/kvm`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_API_VERSION, kvm_irqchip, kvm_lapic_state};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::calls::kvm as calls;
use super::calls::{IoEventFd, Irqfd};
use super::event::{EventFd, Holder};
use super::table::Table;
use super::trigger::Trigger;
use super::{CallError, CallResult, Hypervisor, Interrupt, Operation, RawMsi, descriptor};

/// The device node of KVM.
pub const DEVICE: &str = "/dev/kvm";

/// The name that /proc gives to a VM's file.
pub const LINK: &str = "anon_inode:kvm-vm";

/// The start of the name that /proc gives to a vCPU's file. The vCPU's id follows.
const VCPU_LINK: &str = "anon_inode:kvm-vcpu";

/// Offsets in the local APIC's register page (Intel SDM volume 3, "Local APIC Register Address Map").
const SPURIOUS_VECTOR: usize = 0xF0;
const INTERRUPT_REQUEST: usize = 0x200;
/// Software-enabled, spurious vector 0xFF: a disabled local APIC takes no interrupt.
const ENABLED: u32 = 0x1FF;

/// A VM of KVM.
pub struct KvmPartition {
    vm: Option<VmFd>,
    vcpus: Arc<KvmVcpus>,
    /// vCPUs whose local APIC could not be enabled, by index. A vCPU lives as long as its VM and can't be made twice.
    unfinished: BTreeMap<u8, VcpuFd>,
    table: Table<calls::Entry>,
    has_pins: bool,
}

/// The vCPUs. While nothing runs them, their local APICs hold the interrupts that have arrived.
#[derive(Default)]
pub struct KvmVcpus(Mutex<Vcpus>);

#[derive(Default)]
struct Vcpus {
    by_index: BTreeMap<u8, VcpuFd>,
    /// Whether someone may run them.
    lent: bool,
    /// What was taken from the APICs together with what somebody claimed. By the index of the vCPU, and vector.
    unclaimed: BTreeSet<(u8, u8)>,
}

/// Makes a VM. A signal that comes meanwhile ends the ioctl with EINTR and no VM, so it is made again.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            made => return made,
        }
    }
}

fn failed(operation: Operation, call: &'static str, error: kvm_ioctls::Error) -> CallError {
    CallError::new(operation, call, error.errno())
}

fn open_device(device: &Path) -> CallResult<Kvm> {
    let path = CString::new(device.as_os_str().as_bytes())
        .map_err(|_| CallError::new(Operation::Open, "open", libc::EINVAL))?;
    let kvm = Kvm::new_with_path(path).map_err(|error| failed(Operation::Open, "open", error))?;
    match kvm.get_api_version() {
        -1 => Err(CallError::last(Operation::Open, "KVM_GET_API_VERSION")),
        version if version as u32 == KVM_API_VERSION => Ok(kvm),
        _ => Err(CallError::new(Operation::Open, "KVM_GET_API_VERSION", libc::ENOTTY)),
    }
}

impl KvmPartition {
    /// Makes a VM with its interrupt controllers in the kernel.
    pub fn open(device: &Path) -> CallResult<Self> {
        let kvm = open_device(device)?;
        let vm = create_vm(&kvm).map_err(|error| failed(Operation::Open, "KVM_CREATE_VM", error))?;
        vm.create_irq_chip().map_err(|error| failed(Operation::Open, "KVM_CREATE_IRQCHIP", error))?;
        Ok(Self {
            vm: Some(vm),
            vcpus: Arc::default(),
            unfinished: BTreeMap::new(),
            table: Table::new(&calls::pins()),
            has_pins: true,
        })
    }

    /// Takes over a VM from a duplicate of its descriptor. Every push keeps the entries of `keep`, and the pins of
    /// in-kernel interrupt controllers. `device` reports the size of a vCPU's run area.
    pub fn adopt(device: &Path, fd: OwnedFd, keep: &[(u32, RawMsi)]) -> CallResult<Self> {
        let kvm = open_device(device)?;
        let fd = fd.into_raw_fd();
        // SAFETY: the descriptor has no other owner.
        let vm = unsafe { kvm.create_vmfd_from_rawfd(fd) }.map_err(|error| {
            descriptor::close(fd);
            failed(Operation::Open, "KVM_GET_VCPU_MMAP_SIZE", error)
        })?;
        let has_pins = has_irqchip(&vm)?;
        let mut fixed = if has_pins { calls::pins() } else { Vec::new() };
        fixed.extend(keep.iter().map(|(gsi, msi)| entry(*gsi, *msi)));
        Ok(Self {
            vm: Some(vm),
            vcpus: Arc::default(),
            unfinished: BTreeMap::new(),
            table: Table::new(&fixed),
            has_pins,
        })
    }

    /// The vCPUs made here, for an observer.
    pub fn vcpus(&self) -> Arc<KvmVcpus> {
        Arc::clone(&self.vcpus)
    }

    fn vm(&self, operation: Operation, call: &'static str) -> CallResult<&VmFd> {
        self.vm.as_ref().ok_or(CallError::new(operation, call, libc::EBADF))
    }
}

/// Whether a VM's PICs and IOAPIC are in the kernel, with pins in its routing table. A VM with only its local APICs in
/// the kernel ("split irqchip") has no pins. A VM without any controller can't be adopted yet: making the controllers
/// would add their pins to a table that the next push replaces.
fn has_irqchip(vm: &VmFd) -> CallResult<bool> {
    const CALL: &str = "KVM_GET_IRQCHIP";
    match vm.get_irqchip(&mut kvm_irqchip::default()) {
        Ok(()) => return Ok(true),
        Err(error) if error.errno() == libc::ENXIO => {}
        Err(error) => return Err(failed(Operation::Open, CALL, error)),
    }
    // KVM checks the descriptor of an irqfd (EBADF) only after it has found a controller to raise it.
    match calls::irqfd(vm, Irqfd::assign(-1, 0)) {
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(false),
        _ => Err(CallError::new(Operation::Open, CALL, libc::ENXIO)),
    }
}

fn entry(gsi: u32, msi: RawMsi) -> calls::Entry {
    calls::entry(gsi, msi.address.into(), msi.data)
}

/// Enables a vCPU's local APIC, as a guest does at boot.
fn enable_lapic(vcpu: &VcpuFd) -> CallResult {
    let failed = |call| move |error| failed(Operation::CreateVp, call, error);
    let mut lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    set_register(&mut lapic, SPURIOUS_VECTOR, ENABLED);
    vcpu.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))
}

impl Hypervisor for KvmPartition {
    fn set_entry(&mut self, gsi: u32, msi: RawMsi) {
        self.table.set(gsi, entry(gsi, msi));
    }

    fn drop_entry(&mut self, gsi: u32) {
        self.table.drop(gsi);
    }

    fn push(&mut self) -> CallResult<usize> {
        const CALL: &str = "KVM_SET_GSI_ROUTING";
        let vm = self.vm(Operation::SetMsiRouting, CALL)?;
        calls::set_gsi_routing(vm, self.table.image())
            .map_err(|error| CallError::of(Operation::SetMsiRouting, CALL, &error))?;
        Ok(self.table.len())
    }

    fn assign(&mut self, gsi: u32, event: &dyn Holder) -> CallResult {
        const CALL: &str = "KVM_IRQFD";
        let vm = self.vm(Operation::AssignIrqfd, CALL)?;
        calls::irqfd(vm, Irqfd::assign(event.event().as_raw_fd(), gsi))
            .map_err(|error| CallError::of(Operation::AssignIrqfd, CALL, &error))
    }

    fn deassign(&mut self, gsi: u32, event: &EventFd) -> CallResult {
        const CALL: &str = "KVM_IRQFD (deassign)";
        let vm = self.vm(Operation::DeassignIrqfd, CALL)?;
        calls::irqfd(vm, Irqfd::deassign(event.as_raw_fd(), gsi))
            .map_err(|error| CallError::of(Operation::DeassignIrqfd, CALL, &error))
    }

    fn assign_ioeventfd(&mut self, trigger: Trigger, event: &dyn Holder) -> CallResult {
        const CALL: &str = "KVM_IOEVENTFD";
        let vm = self.vm(Operation::AssignIoEventFd, CALL)?;
        calls::ioeventfd(vm, IoEventFd { event: event.event().as_raw_fd(), trigger, deassign: false })
            .map_err(|error| CallError::of(Operation::AssignIoEventFd, CALL, &error))
    }

    fn deassign_ioeventfd(&mut self, trigger: Trigger, event: &EventFd) -> CallResult {
        const CALL: &str = "KVM_IOEVENTFD (deassign)";
        let vm = self.vm(Operation::DeassignIoEventFd, CALL)?;
        calls::ioeventfd(vm, IoEventFd { event: event.as_raw_fd(), trigger, deassign: true })
            .map_err(|error| CallError::of(Operation::DeassignIoEventFd, CALL, &error))
    }

    fn signal_msi(&mut self, msi: RawMsi) -> CallResult<bool> {
        const CALL: &str = "KVM_SIGNAL_MSI";
        let vm = self.vm(Operation::SignalMsi, CALL)?;
        calls::signal_msi(vm, msi.address.into(), msi.data)
            .map(|taken| taken != 0)
            .map_err(|error| CallError::of(Operation::SignalMsi, CALL, &error))
    }

    fn create_vp(&mut self, index: u8) -> CallResult {
        const CALL: &str = "KVM_CREATE_VCPU";
        let vcpu = match self.unfinished.remove(&index) {
            Some(vcpu) => vcpu,
            None => {
                let vm = self.vm(Operation::CreateVp, CALL)?;
                vm.create_vcpu(index.into()).map_err(|error| failed(Operation::CreateVp, CALL, error))?
            }
        };
        match enable_lapic(&vcpu) {
            Ok(()) => {
                self.vcpus.lock().by_index.insert(index, vcpu);
            }
            Err(error) => {
                self.unfinished.insert(index, vcpu);
                return Err(error);
            }
        }
        Ok(())
    }

    fn has_pins(&self) -> bool {
        self.has_pins
    }

    fn fd(&self) -> Option<RawFd> {
        self.vm.as_ref().map(AsRawFd::as_raw_fd)
    }
}

impl AsRawFd for KvmPartition {
    /// -1 during the drop.
    fn as_raw_fd(&self) -> RawFd {
        self.fd().unwrap_or(-1)
    }
}

impl fmt::Debug for KvmPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmPartition").field("fd", &self.fd()).field("entries", &self.table.len()).finish()
    }
}

impl Drop for KvmPartition {
    fn drop(&mut self) {
        let unfinished = std::mem::take(&mut self.unfinished).into_values();
        unfinished.for_each(|vcpu| descriptor::drop_unless_closed(vcpu, VCPU_LINK));
        self.vm.take().into_iter().for_each(|vm| descriptor::drop_unless_closed(vm, LINK));
    }
}

impl KvmVcpus {
    fn lock(&self) -> MutexGuard<'_, Vcpus> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPUs, unless they are lent: KVM locks a vCPU for as long as it runs, which may be for ever, and the guest takes
    /// the interrupts.
    fn at_rest(&self) -> Option<MutexGuard<'_, Vcpus>> {
        let vcpus = self.lock();
        if vcpus.lent { None } else { Some(vcpus) }
    }

    /// A duplicate of a vCPU's descriptor, for someone who runs the vCPU; `None` if there is no such vCPU.
    pub fn lend(&self, index: u8) -> io::Result<Option<OwnedFd>> {
        let mut vcpus = self.lock();
        let own =
            vcpus.by_index.get(&index).map(|vcpu| descriptor::owned_duplicate(vcpu.as_raw_fd())).transpose()?;
        vcpus.lent |= own.is_some();
        Ok(own)
    }

    /// Takes note that nobody runs the vCPUs any more.
    pub fn take_back(&self) {
        self.lock().lent = false;
    }

    /// Takes all interrupts, in order of vCPU and vector; see [`Vcpus::clear`]. `None` while the vCPUs are lent.
    pub fn take_interrupts(&self) -> io::Result<Option<Vec<Interrupt>>> {
        let Some(mut vcpus) = self.at_rest() else { return Ok(None) };
        vcpus.clear()?;
        let all = std::mem::take(&mut vcpus.unclaimed);
        Ok(Some(all.into_iter().map(|(_, vector)| vector_alone(vector)).collect()))
    }

    /// The interrupts that nobody has taken, in order of vCPU and vector, each with a number to claim it by. Clears no
    /// register. `None` while the vCPUs are lent.
    pub fn arrived(&self) -> io::Result<Option<Vec<(u64, Interrupt)>>> {
        let Some(vcpus) = self.at_rest() else { return Ok(None) };
        let mut all = vcpus.unclaimed.clone();
        for (index, vcpu) in &vcpus.by_index {
            all.extend(requested(&vcpu.get_lapic().map_err(io::Error::from)?).map(|vector| (*index, vector)));
        }
        Ok(Some(all.into_iter().map(|at| (number(at), vector_alone(at.1))).collect()))
    }

    /// Takes the interrupts with these numbers, unless somebody has taken one of them; see [`Vcpus::clear`]. `None` while
    /// the vCPUs are lent.
    pub fn claim(&self, numbers: &[u64]) -> io::Result<Option<bool>> {
        let Some(mut vcpus) = self.at_rest() else { return Ok(None) };
        vcpus.clear()?;
        let there = numbers.iter().all(|wanted| vcpus.unclaimed.iter().any(|at| number(*at) == *wanted));
        if there {
            vcpus.unclaimed.retain(|at| !numbers.contains(&number(*at)));
        }
        Ok(Some(there))
    }
}

impl Vcpus {
    /// Moves the bits of the interrupt request registers into `unclaimed`. This takes two ioctls for each vCPU, and an
    /// interrupt that arrives between them is lost, so nothing may signal meanwhile.
    fn clear(&mut self) -> io::Result<()> {
        for (index, vcpu) in &self.by_index {
            let mut lapic = vcpu.get_lapic().map_err(io::Error::from)?;
            let mut any = false;
            for vector in requested(&lapic) {
                any = true;
                self.unclaimed.insert((*index, vector));
            }
            if any {
                (0..8).for_each(|at| set_register(&mut lapic, INTERRUPT_REQUEST + 16 * at, 0));
                vcpu.set_lapic(&lapic).map_err(io::Error::from)?;
            }
        }
        Ok(())
    }
}

/// The vectors whose bits are set in the interrupt request register.
fn requested(lapic: &kvm_lapic_state) -> impl Iterator<Item = u8> {
    let bits: [u32; 8] = std::array::from_fn(|at| register(lapic, INTERRUPT_REQUEST + 16 * at));
    (0..=u8::MAX).filter(move |vector| bits[usize::from(vector / 32)] & 1 << (vector % 32) != 0)
}

fn number((index, vector): (u8, u8)) -> u64 {
    u64::from(index) << 8 | u64::from(vector)
}

fn vector_alone(vector: u8) -> Interrupt {
    Interrupt { vector, target: None }
}

impl fmt::Debug for KvmVcpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVcpus").finish_non_exhaustive()
    }
}

impl Drop for KvmVcpus {
    fn drop(&mut self) {
        // No lock: in a forked child it could stay locked for ever.
        let vcpus = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        let all = std::mem::take(&mut vcpus.by_index).into_values();
        all.for_each(|vcpu| descriptor::drop_unless_closed(vcpu, VCPU_LINK));
    }
}

fn register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|at| lapic.regs[offset + at] as u8))
}

fn set_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (at, byte) in value.to_le_bytes().into_iter().enumerate() {
        lapic.regs[offset + at] = byte as _;
    }
}
