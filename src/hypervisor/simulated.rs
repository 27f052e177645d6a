//! A simulated kernel in this process, which behaves like the mshv driver and needs no privileges.
//!
//! Eventfds are real, and one thread per partition watches them. Tables, irqfds and signals follow the driver's sources
//! (drivers/hv/mshv_irq.c, mshv_eventfd.c), including their errors and flaws, so that tests detect a caller who would
//! harm a real guest. There are two differences. The thread delivers, so a signal becomes an interrupt a moment after
//! its write (`settle` waits for that). Signals that arrive faster than the thread reads them become one interrupt,
//! because an eventfd only counts.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::calls::mshv as calls;
use super::event::{EventFd, Holder, Share};
use super::owner::Owner;
use super::table::Table;
use super::trigger::Trigger;
use super::{CallError, CallResult, Hypervisor, Interrupt, MAX_GSIS, Operation, RawMsi, descriptor};

/// A partition of the simulated kernel.
pub struct SimulatedPartition {
    owner: Owner,
    driver: Arc<Driver>,
    table: Table<calls::Entry>,
    stop: EventFd,
    watcher: Option<JoinHandle<()>>,
}

/// The kernel's part of a partition. The partition, its watching thread and its observers share it.
pub struct Driver {
    epoll: Epoll,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    /// By GSI, up to the highest that has an entry.
    table: Vec<Option<RawMsi>>,
    irqfds: BTreeMap<Key, Irqfd>,
    /// How many of them are on duplicates of callers' eventfds.
    foreign: usize,
    doorbells: Vec<Doorbell>,
    /// Those that nobody has taken, numbered in the order of their arrival.
    interrupts: VecDeque<(u64, Interrupt)>,
    /// The number of the next interrupt.
    next: u64,
    faults: Vec<Fault>,
}

/// Identifies an irqfd's eventfd: the address of a value that the irqfd's share keeps alive.
type Key = u64;

fn key(event: &EventFd) -> Key {
    std::ptr::from_ref(event) as Key
}

/// The key of the eventfd that ends the thread. No value has this address.
const STOP: Key = 0;

struct Irqfd {
    share: Share,
    gsi: u32,
}

struct Doorbell {
    trigger: Trigger,
    share: Share,
}

struct Fault {
    operation: Operation,
    errno: i32,
    after: u32,
    times: u32,
}

/// Whether an eventfd was closed, here or by other code.
fn is_gone(event: &EventFd) -> bool {
    event.is_closed() || !descriptor::is_open(event.as_raw_fd())
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

impl SimulatedPartition {
    pub fn open() -> CallResult<Self> {
        let failed = |call| move |error| CallError::new(Operation::Open, call, errno(&error));
        let owner = Owner::current().map_err(failed("madvise"))?;
        let driver = Arc::new(Driver {
            epoll: Epoll::new().map_err(failed("epoll_create1"))?,
            state: Mutex::default(),
            arrived: Condvar::new(),
        });
        let stop = EventFd::new().map_err(failed("eventfd2"))?;
        driver
            .epoll
            .ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))
            .map_err(failed("epoll_ctl"))?;
        let watched = Arc::clone(&driver);
        let watcher = std::thread::Builder::new()
            .name("mshv_irqfd-sim".into())
            .spawn(move || watched.watch())
            .map_err(failed("pthread_create"))?;
        Ok(Self { owner, driver, table: Table::new(&[]), stop, watcher: Some(watcher) })
    }

    /// The simulated kernel, for tests and demonstrations.
    pub fn driver(&self) -> Arc<Driver> {
        Arc::clone(&self.driver)
    }
}

impl Hypervisor for SimulatedPartition {
    fn set_entry(&mut self, gsi: u32, msi: RawMsi) {
        self.table.set(gsi, calls::entry(gsi, msi.address.into(), msi.data));
    }

    fn drop_entry(&mut self, gsi: u32) {
        self.table.drop(gsi);
    }

    fn push(&mut self) -> CallResult<usize> {
        self.driver.set_msi_routing(self.table.image().entries())?;
        Ok(self.table.len())
    }

    fn assign(&mut self, gsi: u32, event: &dyn Holder) -> CallResult {
        self.driver.assign_irqfd(gsi, event)
    }

    fn deassign(&mut self, gsi: u32, event: &EventFd) -> CallResult {
        self.driver.deassign_irqfd(gsi, event)
    }

    /// Does nothing: `assign` has emptied the counters, and the thread still has to deliver any later signal.
    fn drain(&mut self, _: &[&EventFd]) -> Vec<(usize, CallError)> {
        Vec::new()
    }

    fn assign_ioeventfd(&mut self, trigger: Trigger, event: &dyn Holder) -> CallResult {
        self.driver.assign_ioeventfd(trigger, event)
    }

    fn deassign_ioeventfd(&mut self, trigger: Trigger, event: &EventFd) -> CallResult {
        self.driver.deassign_ioeventfd(trigger, event)
    }

    fn signal_msi(&mut self, msi: RawMsi) -> CallResult<bool> {
        self.driver.signal_msi(msi).map(|()| true)
    }

    fn create_vp(&mut self, _: u8) -> CallResult {
        Ok(())
    }

    fn fd(&self) -> Option<RawFd> {
        None
    }
}

impl Driver {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// MSHV_SET_MSI_ROUTING: `mshv_update_routing_table()`.
    pub fn set_msi_routing(&self, entries: &[calls::Entry]) -> CallResult {
        let failed = |errno| CallError::new(Operation::SetMsiRouting, "simulated MSHV_SET_MSI_ROUTING", errno);
        let mut state = self.lock();
        state.fault(Operation::SetMsiRouting).map_err(failed)?;
        if entries.iter().any(|entry| entry.gsi >= MAX_GSIS || entry.address_hi != 0) {
            return Err(failed(libc::EINVAL));
        }
        let size = entries.iter().map(|entry| entry.gsi as usize + 1).max().unwrap_or(0);
        let mut table = vec![None; size];
        for entry in entries {
            let msi = RawMsi { address: entry.address_lo, data: entry.data };
            if table[entry.gsi as usize].replace(msi).is_some() {
                return Err(failed(libc::EINVAL));
            }
        }
        state.table = table;
        Ok(())
    }

    /// MSHV_IRQFD: `mshv_irqfd_assign()`, which checks neither the table nor the GSI. Takes the pending signals from
    /// the counter, under the lock with which the watching thread reads it.
    pub fn assign_irqfd(&self, gsi: u32, holder: &dyn Holder) -> CallResult {
        let failed = |errno| CallError::new(Operation::AssignIrqfd, "simulated MSHV_IRQFD", errno);
        let event = holder.event();
        let key = key(event);
        let mut state = self.lock();
        state.fault(Operation::AssignIrqfd).map_err(failed)?;
        if event.is_closed() {
            return Err(failed(libc::EBADF));
        }
        if state.irqfds.contains_key(&key) || state.has_duplicate(event) {
            return Err(failed(libc::EBUSY));
        }
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, key);
        self.epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest).map_err(|error| {
            // For a file that is not an eventfd the driver returns EINVAL, but epoll returns EPERM.
            failed(if errno(&error) == libc::EPERM { libc::EINVAL } else { errno(&error) })
        })?;
        match event.consume() {
            Ok(pending) => {
                state.insert(key, Irqfd { share: holder.share(), gsi });
                if pending != 0 {
                    state.inject(gsi);
                    self.arrived.notify_all();
                }
                Ok(())
            }
            Err(error) => {
                self.forget(event);
                Err(failed(if errno(&error) == libc::EBADF { libc::EBADF } else { libc::EINVAL }))
            }
        }
    }

    /// MSHV_IRQFD with the deassign bit: `mshv_irqfd_deassign()`, which accepts a pair that is not assigned. Delivers
    /// the signals that came while armed first: the driver's handler delivers them at once.
    pub fn deassign_irqfd(&self, gsi: u32, event: &EventFd) -> CallResult {
        let failed = |errno| CallError::new(Operation::DeassignIrqfd, "simulated MSHV_IRQFD (deassign)", errno);
        let key = key(event);
        let mut state = self.lock();
        state.fault(Operation::DeassignIrqfd).map_err(failed)?;
        if state.irqfds.get(&key).is_none_or(|irqfd| irqfd.gsi != gsi) {
            return Ok(());
        }
        state.deliver(key).map_err(|error| failed(errno(&error)))?;
        self.arrived.notify_all();
        self.forget(event);
        state.remove(key);
        Ok(())
    }

    /// MSHV_IOEVENTFD: `mshv_assign_ioeventfd()`, which looks for collisions at equal length only.
    pub fn assign_ioeventfd(&self, trigger: Trigger, holder: &dyn Holder) -> CallResult {
        let failed = |errno| CallError::new(Operation::AssignIoEventFd, "simulated MSHV_IOEVENTFD", errno);
        let mut state = self.lock();
        state.fault(Operation::AssignIoEventFd).map_err(failed)?;
        if trigger.port {
            return Err(failed(libc::EOPNOTSUPP));
        }
        if !matches!(trigger.length, 0 | 1 | 2 | 4 | 8)
            || trigger.address.checked_add(trigger.length.into()).is_none()
        {
            return Err(failed(libc::EINVAL));
        }
        if is_gone(holder.event()) {
            return Err(failed(libc::EBADF));
        }
        let seen = |other: &Doorbell| other.trigger.length == trigger.length && other.trigger.collides(&trigger);
        if state.doorbells.iter().any(seen) {
            return Err(failed(libc::EEXIST));
        }
        state.doorbells.push(Doorbell { trigger, share: holder.share() });
        Ok(())
    }

    /// MSHV_IOEVENTFD with the deassign bit: `mshv_deassign_ioeventfd()`.
    pub fn deassign_ioeventfd(&self, trigger: Trigger, event: &EventFd) -> CallResult {
        let failed =
            |errno| CallError::new(Operation::DeassignIoEventFd, "simulated MSHV_IOEVENTFD (deassign)", errno);
        let mut state = self.lock();
        state.fault(Operation::DeassignIoEventFd).map_err(failed)?;
        if is_gone(event) {
            return Err(failed(libc::EBADF));
        }
        let this = |it: &Doorbell| it.trigger == trigger && std::ptr::eq((*it.share).as_ref(), event);
        let place = state.doorbells.iter().position(this).ok_or_else(|| failed(libc::ENOENT))?;
        state.doorbells.swap_remove(place);
        Ok(())
    }

    /// A guest's write to a guest-physical address. Rings every doorbell that it matches, and returns whether there was
    /// one. They have rung when the call returns.
    pub fn write_mmio(&self, address: u64, size: u32, value: u64) -> bool {
        let state = self.lock();
        let rung = state.doorbells.iter().filter(|doorbell| doorbell.trigger.matches(address, size, value));
        rung.map(|doorbell| {
            // The driver signals whether or not user space can still read the counter.
            let _closed_by_other_code = (*doorbell.share).as_ref().signal(1);
        })
        .count()
            > 0
    }

    /// HVCALL_ASSERT_VIRTUAL_INTERRUPT.
    pub fn signal_msi(&self, msi: RawMsi) -> CallResult {
        let failed = |errno| CallError::new(Operation::SignalMsi, "simulated MSHV_ROOT_HVCALL", errno);
        let mut state = self.lock();
        state.fault(Operation::SignalMsi).map_err(failed)?;
        state.receive(msi);
        self.arrived.notify_all();
        Ok(())
    }

    /// Stops watching an eventfd. One that other code has closed is no longer in the set.
    fn forget(&self, event: &EventFd) {
        let _gone = self.epoll.ctl(ControlOperation::Delete, event.as_raw_fd(), EpollEvent::default());
    }

    fn watch(&self) {
        let mut events = [EpollEvent::default(); 64];
        loop {
            let ready = match self.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Other code has closed the epoll descriptor: nothing is left to watch.
                Err(_) => return,
            };
            let mut state = self.lock();
            for event in &events[..ready] {
                if event.data() == STOP {
                    return;
                }
                // Closed while armed: as in the driver, the irqfd goes with its eventfd.
                if state.deliver(event.data()).is_err() {
                    state.remove(event.data());
                }
            }
            drop(state);
            self.arrived.notify_all();
        }
    }

    /// Delivers every signal written before the call.
    pub fn settle(&self) {
        let mut state = self.lock();
        let keys: Vec<_> = state.irqfds.keys().copied().collect();
        for key in keys {
            if state.deliver(key).is_err() {
                state.remove(key);
            }
        }
        self.arrived.notify_all();
    }

    /// Takes the interrupts that have arrived. Waits at most `timeout` for the first.
    pub fn take_interrupts(&self, timeout: Duration) -> Vec<Interrupt> {
        let state = self.lock();
        let (mut state, _) = self
            .arrived
            .wait_timeout_while(state, timeout, |state| state.interrupts.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        state.interrupts.drain(..).map(|(_, interrupt)| interrupt).collect()
    }

    /// The interrupts that have arrived and that nobody has taken, with their numbers. Waits at most `timeout` until
    /// there has been one with the number `known` or above.
    pub fn arrived(&self, timeout: Duration, known: u64) -> Vec<(u64, Interrupt)> {
        let state = self.lock();
        let (state, _) = self
            .arrived
            .wait_timeout_while(state, timeout, |state| state.next <= known)
            .unwrap_or_else(PoisonError::into_inner);
        state.interrupts.iter().copied().collect()
    }

    /// Takes the interrupts with these numbers, unless somebody has taken one of them. Leaves all others.
    pub fn claim(&self, numbers: &[u64]) -> bool {
        let mut state = self.lock();
        let there = numbers.iter().all(|number| state.interrupts.iter().any(|(other, _)| other == number));
        if there {
            state.interrupts.retain(|(number, _)| !numbers.contains(number));
        }
        there
    }

    /// Lets the next `after` calls of a kind through, then makes `times` calls fail with `errno`. Faults of one kind
    /// apply in the order of these calls.
    pub fn fail(&self, operation: Operation, errno: i32, after: u32, times: u32) {
        self.lock().faults.push(Fault { operation, errno, after, times });
    }

    /// Forgets the faults of a kind. Returns the number of calls that were still to fail.
    pub fn clear_faults(&self, operation: Operation) -> u32 {
        let mut state = self.lock();
        let faults = state.faults.iter().filter(|fault| fault.operation == operation);
        let left = faults.fold(0u32, |left, fault| left.saturating_add(fault.times));
        state.faults.retain(|fault| fault.operation != operation);
        left
    }
}

impl State {
    fn fault(&mut self, operation: Operation) -> Result<(), i32> {
        self.faults.retain(|fault| fault.times > 0);
        let Some(fault) = self.faults.iter_mut().find(|fault| fault.operation == operation) else {
            return Ok(());
        };
        if fault.after > 0 {
            fault.after -= 1;
            return Ok(());
        }
        fault.times -= 1;
        Err(fault.errno)
    }

    fn insert(&mut self, key: Key, irqfd: Irqfd) {
        self.foreign += usize::from((*irqfd.share).as_ref().is_foreign());
        self.irqfds.insert(key, irqfd);
    }

    fn remove(&mut self, key: Key) {
        if let Some(irqfd) = self.irqfds.remove(&key) {
            self.foreign -= usize::from((*irqfd.share).as_ref().is_foreign());
        }
    }

    /// Whether an irqfd is on another descriptor of the same eventfd. Only one of a caller's has duplicates.
    fn has_duplicate(&self, event: &EventFd) -> bool {
        let mut others = self.irqfds.values().map(|irqfd| (*irqfd.share).as_ref());
        (event.is_foreign() || self.foreign > 0) && others.any(|other| event.is_same(other).unwrap_or(false))
    }

    fn receive(&mut self, msi: RawMsi) {
        self.interrupts.push_back((self.next, Interrupt::decode(msi)));
        self.next += 1;
    }

    /// `mshv_irqfd_wakeup()`: empties the counter, without a look at the table, and then injects.
    fn deliver(&mut self, key: Key) -> io::Result<()> {
        let Some(irqfd) = self.irqfds.get(&key) else {
            return Ok(());
        };
        if (*irqfd.share).as_ref().consume()? != 0 {
            let gsi = irqfd.gsi;
            self.inject(gsi);
        }
        Ok(())
    }

    /// `mshv_assert_irq_slow()`: checks an entry for validity only if its GSI is not 0. A slot of the table that was
    /// never written is all zeros.
    fn inject(&mut self, gsi: u32) {
        const ZEROS: RawMsi = RawMsi { address: 0, data: 0 };
        let msi = match self.table.get(gsi as usize) {
            Some(entry) => entry.unwrap_or(ZEROS),
            None if gsi == 0 => ZEROS,
            None => return,
        };
        self.receive(msi);
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl fmt::Debug for SimulatedPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimulatedPartition").field("entries", &self.table.len()).finish()
    }
}

impl Drop for SimulatedPartition {
    fn drop(&mut self) {
        let watcher = self.watcher.take();
        if !self.owner.is_current() {
            // The thread runs in the parent alone, and a write to the shared eventfd would stop it there. Its share of
            // the driver is never dropped in this process, so the driver's one descriptor is closed by hand.
            std::mem::forget((watcher, Arc::clone(&self.driver)));
            descriptor::close(self.driver.epoll.as_raw_fd());
            return;
        }
        if let (Ok(()), Some(watcher)) = (self.stop.signal(1), watcher) {
            // If the thread panicked, the panic has already been reported.
            let _ended = watcher.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MSI: RawMsi = RawMsi { address: 0xFEE0_1000, data: 0x41 };
    const BOGUS: RawMsi = RawMsi { address: 0, data: 0 };

    fn entry(gsi: u32) -> calls::Entry {
        calls::Entry { gsi, address_lo: MSI.address, address_hi: 0, data: MSI.data }
    }

    fn event() -> Arc<EventFd> {
        Arc::new(EventFd::new().unwrap())
    }

    fn taken(driver: &Driver) -> Vec<Interrupt> {
        driver.settle();
        driver.take_interrupts(Duration::ZERO)
    }

    fn expect(driver: &Driver, event: &EventFd, msis: &[RawMsi]) {
        event.signal(1).unwrap();
        let decoded: Vec<_> = msis.iter().copied().map(Interrupt::decode).collect();
        assert_eq!(taken(driver), decoded);
        assert_eq!(event.consume().unwrap(), 0);
    }

    fn errno_of(result: CallResult) -> i32 {
        result.unwrap_err().errno
    }

    // Each test is one observed behaviour of the driver, towards wrong callers too.

    #[test]
    fn an_armed_and_routed_signal_is_one_interrupt() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        driver.set_msi_routing(&[entry(24)]).unwrap();
        driver.assign_irqfd(24, &event).unwrap();
        expect(&driver, &event, &[MSI]);
        expect(&driver, &event, &[MSI]);
    }

    #[test]
    fn a_signal_on_a_dropped_entry_is_lost_or_becomes_vector_0() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        driver.set_msi_routing(&[entry(24)]).unwrap();
        driver.assign_irqfd(24, &event).unwrap();
        driver.set_msi_routing(&[]).unwrap();
        expect(&driver, &event, &[]);
        driver.set_msi_routing(&[entry(30)]).unwrap();
        expect(&driver, &event, &[BOGUS]);
    }

    #[test]
    fn gsi_0_armed_and_never_routed_is_vector_0() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        driver.assign_irqfd(0, &event).unwrap();
        expect(&driver, &event, &[BOGUS]);
    }

    #[test]
    fn arming_delivers_one_interrupt_for_all_pending_signals() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        driver.set_msi_routing(&[entry(24)]).unwrap();
        event.signal(3).unwrap();
        driver.assign_irqfd(24, &event).unwrap();
        assert_eq!(taken(&driver).len(), 1);
        expect(&driver, &event, &[MSI]);
    }

    #[test]
    fn disarming_delivers_earlier_signals_and_keeps_later_ones() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        driver.set_msi_routing(&[entry(24)]).unwrap();
        driver.assign_irqfd(24, &event).unwrap();
        event.signal(1).unwrap();
        driver.deassign_irqfd(24, &event).unwrap();
        event.signal(5).unwrap();
        assert_eq!(taken(&driver), [Interrupt::decode(MSI)]);
        assert_eq!(event.consume().unwrap(), 5);
    }

    #[test]
    fn a_bad_table_is_einval_and_the_old_one_stays() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        driver.set_msi_routing(&[entry(24)]).unwrap();
        driver.assign_irqfd(24, &event).unwrap();
        let high = calls::Entry { address_hi: 1, ..entry(24) };
        for bad in [&[high][..], &[entry(24), entry(24)], &[entry(4096)]] {
            assert_eq!(errno_of(driver.set_msi_routing(bad)), libc::EINVAL);
        }
        expect(&driver, &event, &[MSI]);
        driver.set_msi_routing(&[entry(24), entry(4095)]).unwrap();
    }

    #[test]
    fn one_eventfd_has_one_gsi_and_one_gsi_may_have_two_eventfds() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, first, second) = (partition.driver(), event(), event());
        driver.set_msi_routing(&[entry(24)]).unwrap();
        driver.assign_irqfd(24, &first).unwrap();
        let twin = Arc::new(EventFd::adopt(first.as_raw_fd()).unwrap());
        for same in [&first, &twin] {
            assert_eq!(errno_of(driver.assign_irqfd(25, same)), libc::EBUSY);
        }
        driver.assign_irqfd(24, &second).unwrap();
        expect(&driver, &first, &[MSI]);
        expect(&driver, &second, &[MSI]);
    }

    #[test]
    fn irqfds_are_not_checked_against_the_table_and_unknown_pairs_are_disarmed_silently() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        driver.assign_irqfd(9999, &event).unwrap();
        expect(&driver, &event, &[]);
        driver.deassign_irqfd(24, &event).unwrap();
        assert_eq!(errno_of(driver.assign_irqfd(24, &event)), libc::EBUSY);
        driver.deassign_irqfd(9999, &event).unwrap();
        driver.deassign_irqfd(9999, &event).unwrap();
    }

    #[test]
    fn a_closed_eventfd_is_ebadf() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        event.close();
        assert_eq!(errno_of(driver.assign_irqfd(24, &event)), libc::EBADF);
    }

    #[test]
    fn the_thread_delivers_without_settle() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        driver.set_msi_routing(&[entry(24)]).unwrap();
        driver.assign_irqfd(24, &event).unwrap();
        for _ in 0..1000 {
            event.signal(1).unwrap();
            assert_eq!(driver.take_interrupts(Duration::from_secs(60)), [Interrupt::decode(MSI)]);
        }
    }

    #[test]
    fn faults_come_in_order_with_their_delay_and_count() {
        let partition = SimulatedPartition::open().unwrap();
        let driver = partition.driver();
        driver.fail(Operation::SetMsiRouting, libc::ENOMEM, 1, 2);
        driver.fail(Operation::SetMsiRouting, libc::EINVAL, 0, 1);
        let seen: Vec<_> = (0..5).map(|_| driver.set_msi_routing(&[]).map_err(|error| error.errno)).collect();
        assert_eq!(seen, [Ok(()), Err(libc::ENOMEM), Err(libc::ENOMEM), Err(libc::EINVAL), Ok(())]);
    }

    #[test]
    fn the_faults_that_are_left_are_counted_however_many_there_are() {
        let partition = SimulatedPartition::open().unwrap();
        let driver = partition.driver();
        for (times, left) in [(3, 3), (u32::MAX, u32::MAX)] {
            driver.fail(Operation::SetMsiRouting, libc::ENOMEM, 0, times);
            driver.fail(Operation::SetMsiRouting, libc::EINVAL, 0, times - 3);
            driver.fail(Operation::AssignIrqfd, libc::EINVAL, 0, 1);
            assert_eq!(driver.clear_faults(Operation::SetMsiRouting), left);
            driver.set_msi_routing(&[]).unwrap();
            assert_eq!(driver.clear_faults(Operation::AssignIrqfd), 1);
        }
    }

    #[test]
    fn decoding_reads_the_bits_that_the_driver_reads() {
        let msi = RawMsi { address: 0xFEE0_5004, data: 0x8145 };
        let target = Target { destination: 5, delivery_mode: 1, logical: true, level: true };
        assert_eq!(Interrupt::decode(msi), Interrupt { vector: 0x45, target: Some(target) });
    }

    fn trigger(length: u32, datamatch: Option<u64>) -> Trigger {
        Trigger { address: 0x1000, length, datamatch, port: false }
    }

    #[test]
    fn a_matching_write_rings_until_the_doorbell_is_taken_away() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        driver.assign_ioeventfd(trigger(4, Some(7)), &event).unwrap();
        assert!(driver.write_mmio(0x1000, 4, 7));
        assert!(!driver.write_mmio(0x1000, 4, 8));
        assert_eq!(event.consume().unwrap(), 1);
        assert_eq!(errno_of(driver.deassign_ioeventfd(trigger(4, None), &event)), libc::ENOENT);
        driver.deassign_ioeventfd(trigger(4, Some(7)), &event).unwrap();
        assert!(!driver.write_mmio(0x1000, 4, 7));
        assert_eq!(errno_of(driver.deassign_ioeventfd(trigger(4, Some(7)), &event)), libc::ENOENT);
    }

    #[test]
    fn the_driver_sees_collisions_at_equal_length_only() {
        let partition = SimulatedPartition::open().unwrap();
        let driver = partition.driver();
        let [event, other] = [(); 2].map(|()| event());
        driver.assign_ioeventfd(trigger(4, None), &event).unwrap();
        assert_eq!(errno_of(driver.assign_ioeventfd(trigger(4, Some(7)), &other)), libc::EEXIST);
        driver.assign_ioeventfd(trigger(0, None), &other).unwrap();
        assert!(driver.write_mmio(0x1000, 4, 7));
        assert_eq!((event.consume().unwrap(), other.consume().unwrap()), (1, 1));
        // The same trigger belongs to one eventfd.
        assert_eq!(errno_of(driver.deassign_ioeventfd(trigger(4, None), &other)), libc::ENOENT);
    }

    #[test]
    fn a_doorbell_that_the_driver_can_not_make_is_refused_as_it_does() {
        let partition = SimulatedPartition::open().unwrap();
        let (driver, event) = (partition.driver(), event());
        for (wrong, errno) in [
            (trigger(3, None), libc::EINVAL),
            (Trigger { address: u64::MAX, ..trigger(1, None) }, libc::EINVAL),
            (Trigger { port: true, ..trigger(4, None) }, libc::EOPNOTSUPP),
        ] {
            assert_eq!(errno_of(driver.assign_ioeventfd(wrong, &event)), errno, "{wrong}");
        }
        driver.fail(Operation::AssignIoEventFd, libc::ENOMEM, 0, 1);
        assert_eq!(errno_of(driver.assign_ioeventfd(trigger(4, None), &event)), libc::ENOMEM);
        assert!(!driver.write_mmio(0x1000, 4, 7));
        driver.assign_ioeventfd(trigger(4, None), &event).unwrap();
        driver.fail(Operation::DeassignIoEventFd, libc::EIO, 0, 1);
        assert_eq!(errno_of(driver.deassign_ioeventfd(trigger(4, None), &event)), libc::EIO);
        assert!(driver.write_mmio(0x1000, 4, 7));
        event.close();
        assert_eq!(errno_of(driver.deassign_ioeventfd(trigger(4, None), &event)), libc::EBADF);
        assert_eq!(errno_of(driver.assign_ioeventfd(trigger(8, None), &event)), libc::EBADF);
    }

    #[test]
    fn an_msi_without_an_eventfd_is_one_interrupt() {
        let partition = SimulatedPartition::open().unwrap();
        let driver = partition.driver();
        driver.signal_msi(MSI).unwrap();
        driver.fail(Operation::SignalMsi, libc::EIO, 0, 1);
        assert_eq!(errno_of(driver.signal_msi(MSI)), libc::EIO);
        assert_eq!(taken(&driver), [Interrupt::decode(MSI)]);
    }

    use super::super::Target;

    #[test]
    fn claiming_takes_all_of_the_named_interrupts_or_none_and_leaves_the_others() {
        let partition = SimulatedPartition::open().unwrap();
        let driver = partition.driver();
        for vector in 0x41..0x44 {
            driver.signal_msi(RawMsi { data: vector, ..MSI }).unwrap();
        }
        let arrived = driver.arrived(Duration::ZERO, 0);
        assert_eq!(arrived.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(driver.claim(&[2, 0]));
        assert!(!driver.claim(&[1, 2]));
        assert_eq!(driver.take_interrupts(Duration::ZERO), [arrived[1].1]);
        assert!(driver.arrived(Duration::ZERO, 3).is_empty());
    }

    #[test]
    fn a_wait_for_a_later_interrupt_ends_when_it_arrives_even_if_it_has_been_taken() {
        let partition = SimulatedPartition::open().unwrap();
        let driver = partition.driver();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| driver.arrived(Duration::from_secs(60), 1).len());
            driver.signal_msi(MSI).unwrap();
            driver.signal_msi(MSI).unwrap();
            assert_eq!(waiter.join().unwrap(), 2);
        });
        driver.take_interrupts(Duration::ZERO);
        assert!(driver.arrived(Duration::from_secs(60), 1).is_empty());
    }
}
