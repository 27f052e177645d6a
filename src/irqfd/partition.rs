//! A partition: its GSIs, routes, doorbells and VPs, and the lock that guards every call into its kernel.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, TryLockError, Weak};
use std::time::Duration;

use super::config::{Config, check_gsis, check_keep, check_spares};
use super::doorbell::Doorbells;
use super::error::{Error, Failure, Result};
use super::events::NewEvent;
use super::gsi::GsiState;
use super::msi::MsiRoute;
use super::plan::Change;
use super::shared::{Intent, Route};
use super::state::State;
use super::stats::PartitionStats;
use super::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard};
use super::trace::Trace;
use super::vps::VpSet;
use crate::hypervisor::Backend;
use crate::hypervisor::observer::{ObserveError, Observer};
use crate::hypervisor::owner::Owner;
#[cfg(not(all(test, shuttle)))]
use crate::hypervisor::owner::PerProcess;
use crate::hypervisor::simulated::Driver;
use crate::hypervisor::{CallError, Hypervisor, Interrupt, Operation, RawMsi, Target, descriptor};

type Partitions = std::sync::Mutex<Vec<Weak<Partition>>>;

/// Every open partition of this process, to detect a descriptor that two of them would share.
#[cfg(not(all(test, shuttle)))]
static PARTITIONS: PerProcess<Partitions> = PerProcess::new();

/// Locks the list. This comes before a route's lock.
#[cfg(not(all(test, shuttle)))]
pub(super) fn partitions() -> Result<std::sync::MutexGuard<'static, Vec<Weak<Partition>>>> {
    let all = PARTITIONS.get().map_err(|error| unsupported_kernel(&error))?;
    Ok(all.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Each test has a list of its own: shuttle's locks belong to one test.
#[cfg(all(test, shuttle))]
pub(super) fn partitions() -> Result<std::sync::MutexGuard<'static, Vec<Weak<Partition>>>> {
    thread_local!(static ALL: &'static Partitions = Box::leak(Box::default()));
    Ok(ALL.with(|all| all.lock().unwrap_or_else(PoisonError::into_inner)))
}

fn unsupported_kernel(error: &std::io::Error) -> Error {
    let errno = error.raw_os_error().unwrap_or(libc::ENOSYS);
    Failure::new(CallError::new(Operation::Open, "madvise (MADV_WIPEONFORK)", errno), None).into()
}

/// A partition of a hypervisor. Its routes and doorbells keep it alive; dropping it closes it.
///
/// Locks are taken in this order: a device's, that of the list of partitions, a route's, then a partition's, then the
/// doorbells'. A batch locks its routes by GSI. The partition's lock guards the routing table, the set of armed irqfds
/// and the doorbells, and every call that changes them.
#[derive(Debug)]
pub struct Partition {
    owner: Owner,
    config: Config,
    observer: Observer,
    fd: Option<RawFd>,
    closed: AtomicBool,
    /// Changes of intent that needed no call into the kernel, and so no lock.
    skipped: AtomicU64,
    /// Held while waiting for `state`, so that threads take turns: a thread that has just released `state` queues here,
    /// behind the thread that waits for it.
    turn: Mutex<()>,
    state: Mutex<State>,
    doorbells: Doorbells,
    trace: Arc<Trace>,
}

impl Partition {
    /// Takes over a hypervisor's partition. No other code may use its irqfds and routing table.
    pub fn new(hypervisor: Box<dyn Hypervisor>, config: Config) -> Result<Arc<Self>> {
        Self::observed(hypervisor, Observer::None, config)
    }

    /// As `new`, with an observer of the interrupts that arrive.
    pub(super) fn observed(
        hypervisor: Box<dyn Hypervisor>,
        observer: Observer,
        config: Config,
    ) -> Result<Arc<Self>> {
        let pins = hypervisor.has_pins();
        check_gsis(config.backend, pins, &config.gsis, config.keep.len())?;
        check_keep(config.backend, pins, &config.gsis, &config.keep)?;
        check_spares(&config, pins)?;
        let owner = Owner::current().map_err(|error| unsupported_kernel(&error))?;
        let fd = hypervisor.fd();
        let vps = if config.adopted { config.vps } else { Some(VpSet::default()) };
        let state = State::new(hypervisor, &config, vps);
        let trace = Arc::clone(&state.trace);
        let partition = Arc::new(Self {
            owner,
            fd,
            config,
            observer,
            closed: AtomicBool::new(false),
            skipped: AtomicU64::new(0),
            turn: Mutex::default(),
            state: Mutex::new(state),
            doorbells: Doorbells::default(),
            trace,
        });
        let mut all = partitions()?;
        all.retain(|other| other.strong_count() > 0);
        if let Some(fd) = fd.filter(|_| partition.config.adopted) {
            let other = all.iter().filter_map(Weak::upgrade).find(|other| other.has_file(fd));
            if other.is_some() {
                return Err(Error::Invalid(
                    "this process already has a Partition on that file; its routing table can have only one".into(),
                ));
            }
        }
        all.push(Arc::downgrade(&partition));
        Ok(partition)
    }

    fn has_file(&self, fd: RawFd) -> bool {
        !self.is_closed() && self.fd.and_then(|own| descriptor::same_file(own, fd)) == Some(true)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock, unless the partition is closing.
    pub(super) fn lock_open(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock();
        if state.closing { Err(closed()) } else { Ok(state) }
    }

    pub(super) fn doorbells(&self) -> &Doorbells {
        &self.doorbells
    }

    /// Whether a thread waits for the lock.
    #[cfg(test)]
    #[cfg(not(shuttle))]
    pub(super) fn is_awaited(&self) -> bool {
        self.turn.try_lock().is_err()
    }

    /// Checks that this process may act on the partition. Comes before any lock: a forked child could find one
    /// held by a thread that it does not have.
    pub fn check_owner(&self) -> Result {
        if self.owner.is_current() { Ok(()) } else { Err(Error::Forked) }
    }

    pub fn check_open(&self) -> Result {
        self.check_owner()?;
        if self.is_closed() { Err(closed()) } else { Ok(()) }
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The record of its calls into the kernel.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    pub fn fileno(&self) -> Result<RawFd> {
        if self.is_closed() {
            return Err(closed());
        }
        self.fd.ok_or_else(|| Error::Unsupported("a simulated partition has no file descriptor".into()))
    }

    pub(super) fn index(&self, gsi: u32) -> usize {
        (gsi - self.config.gsis.start) as usize
    }

    /// Makes a route on a new eventfd, or on a duplicate of the caller's.
    pub(super) fn add_route(&self, event: Option<RawFd>, of_device: bool) -> Result<Arc<Route>> {
        self.check_open()?;
        if event.is_none() {
            return self.add_route_on(self.lock(), NewEvent::make(None)?, of_device);
        }
        // Held to the end, so that two callers can't pass the same eventfd at the same time.
        let all = partitions()?;
        let event = NewEvent::make(event)?;
        self.check_event(&all, &event, |_| false)?;
        self.add_route_on(self.lock(), event, of_device)
    }

    /// Makes eventfds for routes, or duplicates those of callers, and makes the routes on them.
    pub(super) fn with_events<T>(
        &self,
        fds: &[Option<RawFd>],
        make: impl FnOnce(Vec<NewEvent>) -> Result<T>,
    ) -> Result<T> {
        // Held to the end, as in `add_route`.
        let all = if fds.iter().any(Option::is_some) { Some(partitions()?) } else { None };
        let mut events: Vec<NewEvent> = Vec::with_capacity(fds.len());
        for fd in fds {
            let event = NewEvent::make(*fd)?;
            if let (Some(fd), Some(all)) = (fd, &all) {
                self.check_event(all, &event, |_| false)?;
                let same = |other: &&NewEvent| other.of.is_some() && event.is_same(&other.event);
                if let Some(other) = events.iter().find(same).and_then(|other| other.of) {
                    return Err(Error::Invalid(format!(
                        "file descriptors {other} and {fd} are of one eventfd; a route needs one of its own"
                    )));
                }
            }
            events.push(event);
        }
        make(events)
    }

    /// Refuses a caller's eventfd that a route of this process has, unless it is a route of this partition that
    /// `gives_up` its eventfd. Kernels accept some of these, and one of the routes would get no signals.
    pub(super) fn check_event(
        &self,
        all: &[Weak<Self>],
        event: &NewEvent,
        gives_up: impl Fn(u32) -> bool,
    ) -> Result {
        let Some(fd) = event.of else { return Ok(()) };
        for other in all.iter().filter_map(Weak::upgrade) {
            let of_this = std::ptr::eq(self, &raw const *other);
            if let Some(gsi) = other.lock().route_of(&event.event).filter(|gsi| !(of_this && gives_up(*gsi))) {
                return Err(Error::Invalid(format!(
                    "file descriptor {fd} is the eventfd of the route of GSI {gsi}{}; a route needs one of its own",
                    if of_this { "" } else { " of another partition" },
                )));
            }
        }
        Ok(())
    }

    /// Makes a route on a new eventfd. Returns `None` instead of waiting for the partition's lock.
    pub(super) fn try_add_route(&self) -> Result<Option<Arc<Route>>> {
        self.check_open()?;
        let state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(None),
        };
        self.add_route_on(state, NewEvent::make(None)?, false).map(Some)
    }

    fn add_route_on(&self, mut state: MutexGuard<'_, State>, new: NewEvent, of_device: bool) -> Result<Arc<Route>> {
        if state.closing {
            return Err(closed());
        }
        let index = state.gsis.allocate().ok_or_else(|| Error::Exhausted(self.config.gsis.clone()))?;
        let route = Arc::new(Route::new(self.config.gsis.start + index as u32, new.event));
        state.give(index, &route, of_device);
        Ok(route)
    }

    /// Makes all the changes in the kernel, or none of them.
    pub(super) fn apply(&self, changes: &mut [Change]) -> Result {
        let mut state = self.lock();
        if state.closing {
            return Err(closed());
        }
        // Seen again under the lock: another route's push may have found a route's eventfd closed since.
        if let Some(change) = changes.iter().find(|change| state.slots[change.index].broken) {
            return Err(Error::Broken(state.gsi(change.index)));
        }
        if let Some(vps) = state.vps.filter(|_| !self.config.allow_missing_vp) {
            for change in &*changes {
                self.check_vp(&vps, change)?;
            }
        }
        state.apply(changes)?;
        Ok(())
    }

    /// Makes the checks that `apply` makes before any call.
    pub(super) fn check_msi(&self, gsi: u32, msi: MsiRoute) -> Result {
        let state = self.lock_open()?;
        match state.vps.filter(|_| !self.config.allow_missing_vp) {
            Some(vps) => self.check_destination(&vps, Some(gsi), msi.raw()),
            None => Ok(()),
        }
    }

    /// Raises an MSI now. Returns false if the kernel reports that the guest did not take it.
    pub fn signal_msi(&self, msi: MsiRoute) -> Result<bool> {
        self.check_open()?;
        let mut state = self.lock_open()?;
        if let Some(vps) = state.vps.filter(|_| !self.config.allow_missing_vp) {
            self.check_destination(&vps, None, msi.raw())?;
        }
        Ok(state.call(|hypervisor| hypervisor.signal_msi(msi.raw()))?)
    }

    /// Refuses a destination without a VP. On the root scheduler the mshv driver dereferences a null pointer for
    /// it, with interrupts off (`mshv_try_assert_irq_fast`). Elsewhere the interrupt would be lost. Logical
    /// destinations take another path in the driver.
    fn check_vp(&self, vps: &VpSet, change: &Change) -> Result {
        let gsi = self.config.gsis.start + change.index as u32;
        change.wanted.map_or(Ok(()), |msi| self.check_destination(vps, Some(gsi), msi))
    }

    /// Makes the check of `apply` for a change.
    pub(super) fn check_vp_of(&self, state: &State, change: &Change) -> Result {
        let vps = state.vps.filter(|_| !self.config.allow_missing_vp);
        vps.map_or(Ok(()), |vps| self.check_vp(&vps, change))
    }

    fn check_destination(&self, vps: &VpSet, gsi: Option<u32>, msi: RawMsi) -> Result {
        let target = Target::decode(msi);
        let exists = match target.destination {
            _ if target.logical => true,
            u8::MAX => self.config.backend.takes_broadcast() && *vps != VpSet::default(),
            index => vps.contains(index),
        };
        if exists {
            return Ok(());
        }
        Err(Error::MissingVp { gsi, destination: target.destination, vps: vps.to_string() })
    }

    /// Counts a change of intent that needs no call into the kernel.
    pub(super) fn count_skipped(&self) {
        self.skipped.fetch_add(1, Ordering::Relaxed);
    }

    /// Disarms and forgets a route. Continues past errors and reports them.
    pub(super) fn close_route(&self, route: &Arc<Route>) -> std::result::Result<(), Failure> {
        let mut intent = route.lock();
        if intent.closed {
            return Ok(());
        }
        let result = self.lock().release(self.index(route.gsi));
        let closed = Intent { closed: true, ..*intent };
        route.set_intent(&mut intent, closed);
        match &result {
            Ok(()) => route.event.close(),
            // Closed by other code: the number may belong to another file by now.
            Err(failure) if failure.error.errno == libc::EBADF => route.event.forget_if_closed(),
            // Closing the partition tries once more to disarm it, and needs the descriptor for that.
            Err(_) => route.event.wake_waiters(),
        }
        result
    }

    /// Creates the VP with this index, which is also its APIC id.
    pub fn create_vp(&self, index: u8) -> Result {
        self.check_open()?;
        if self.config.adopted {
            return Err(Error::Unsupported(
                "an adopted partition gets its VPs from the VMM that made it; name them with \
                 Partition.from_fd(vps=...)"
                    .into(),
            ));
        }
        if index > VpSet::MAX {
            return Err(Error::Invalid(format!(
                "VP index {index} is the broadcast destination; indexes are 0 to {}",
                VpSet::MAX
            )));
        }
        let mut state = self.lock();
        if state.closing {
            return Err(closed());
        }
        if state.vps.is_some_and(|vps| vps.contains(index)) {
            return Err(Error::Invalid(format!("VP {index} already exists")));
        }
        state.create_vp(index)?;
        Ok(())
    }

    /// The VPs against which MSI destinations are checked; `None` if unknown.
    pub fn vps(&self) -> Result<Option<Vec<u8>>> {
        self.check_open()?;
        Ok(self.lock().vps.map(|vps| vps.iter().collect()))
    }

    pub fn gsi_state(&self, gsi: u32) -> Result<GsiState> {
        self.check_open()?;
        if !self.config.gsis.contains(&gsi) {
            return Err(Error::Invalid(format!(
                "GSI {gsi} is outside gsis range({}, {})",
                self.config.gsis.start, self.config.gsis.end
            )));
        }
        Ok(self.lock().gsi_state(self.index(gsi)))
    }

    /// The MSI entries of the last push, by GSI, including inert ones and the caller's own. No kernel can be asked for
    /// its table.
    pub fn routing_table(&self) -> Result<Vec<(u32, RawMsi)>> {
        self.check_open()?;
        let state = self.lock();
        let kept = if state.stats.pushes > 0 { &self.config.keep[..] } else { &[] };
        let mut table: Vec<_> = state.kernel_table().chain(kept.iter().copied()).collect();
        table.sort_unstable_by_key(|(gsi, _)| *gsi);
        Ok(table)
    }

    /// Counts since the partition was opened. Works on a closed partition too.
    pub fn stats(&self) -> Result<PartitionStats> {
        self.check_owner()?;
        let mut stats = self.lock().stats;
        stats.pushes_skipped += self.skipped.load(Ordering::Relaxed);
        Ok(stats)
    }

    /// Takes the interrupts that have arrived. Waits at most `wait` for the first, and may return earlier without one.
    pub fn take_interrupts(&self, wait: Duration) -> Result<Vec<Interrupt>> {
        self.check_open()?;
        self.observer.take_interrupts(wait).map_err(unreported)
    }

    /// The interrupts that have arrived and that nobody has taken, each with a number to claim it by. Waits at most `wait`
    /// for one with the number `known` or above, and may return earlier without one.
    pub fn arrived_interrupts(&self, wait: Duration, known: u64) -> Result<Vec<(u64, Interrupt)>> {
        self.check_open()?;
        self.observer.arrived(wait, known).map_err(unreported)
    }

    /// Takes the interrupts with these numbers, unless somebody has taken one of them. Leaves all others.
    pub fn claim_interrupts(&self, numbers: &[u64]) -> Result<bool> {
        self.check_open()?;
        self.observer.claim(numbers).map_err(unreported)
    }

    /// Returns once the interrupt of every signal before this call has been raised.
    pub fn settle(&self) -> Result {
        self.check_open()?;
        match self.config.backend {
            Backend::Simulated => self.simulated()?.settle(),
            Backend::Kvm => self.lock_open()?.flush()?,
            // The driver raises it before the write returns.
            Backend::Mshv => {}
        }
        Ok(())
    }

    /// A duplicate of the descriptor of a vCPU that was made here, for someone who runs it. Until `take_vcpus_back`,
    /// `take_interrupts` is refused: the guest takes them.
    pub fn lend_vcpu(&self, index: u8) -> Result<OwnedFd> {
        self.check_open()?;
        let vcpu = self.observer.lend_vcpu(index).map_err(|error| unobservable(error, ONLY_KVM))?;
        vcpu.ok_or_else(|| Error::Invalid(format!("this partition made no VP {index}")))
    }

    /// Takes the lent vCPUs back: nobody runs them any more.
    pub fn take_vcpus_back(&self) -> Result {
        self.check_open()?;
        self.observer.take_vcpus_back().map_err(|error| unobservable(error, ONLY_KVM))
    }

    /// The kernel of a simulated partition.
    pub fn simulated(&self) -> Result<Arc<Driver>> {
        self.check_open()?;
        self.observer.driver().map_err(|error| unobservable(error, "only a simulated partition can do that"))
    }

    /// Closes the routes, the doorbells and the partition. Continues past errors and reports them at the end.
    pub fn close(&self) -> Result {
        self.check_owner()?;
        let routes = self.lock().start_closing();
        let mut failures: Vec<_> = routes.iter().filter_map(|route| self.close_route(route).err()).collect();
        let mut state = self.lock();
        let still_armed = state.release_leftovers();
        failures.extend(self.doorbells.remove_all(&mut state));
        let hypervisor = state.hypervisor.take();
        let left: Vec<_> = state.slots.iter_mut().filter_map(|slot| slot.event.take()).collect();
        drop(state);
        self.closed.store(true, Ordering::Release);
        drop(hypervisor);
        routes.iter().for_each(|route| route.event.close());
        left.iter().for_each(|event| event.close());
        for still in still_armed {
            if failures.iter().all(|failure| failure.gsi != still.gsi) {
                failures.push(still);
            }
        }
        if failures.is_empty() {
            return Ok(());
        }
        let first = failures.swap_remove(0);
        Err(Failure { further: failures, ..first }.into())
    }

    /// For finalizers: closes. Does nothing in a forked child, where dropping the partition closes its descriptors.
    pub fn abandon(&self) -> Result {
        if self.check_owner().is_ok() { self.close() } else { Ok(()) }
    }
}

const ONLY_KVM: &str = "only KVM has vCPUs that a program can run";

fn closed() -> Error {
    Error::Closed("the partition".into())
}

fn unreported(error: ObserveError) -> Error {
    unobservable(error, "the mshv driver does not report which interrupts arrived")
}

fn unobservable(error: ObserveError, unsupported: &'static str) -> Error {
    match error {
        ObserveError::Closed => closed(),
        ObserveError::Unsupported => Error::Unobservable(unsupported),
        ObserveError::Running => Error::Unsupported(
            "a guest runs on the vCPUs and takes the interrupts itself; ask the guest, or stop it first".into(),
        ),
        ObserveError::Io(error) => {
            Failure::new(CallError::of(Operation::Observe, "KVM_GET_LAPIC or KVM_SET_LAPIC", &error), None).into()
        }
    }
}
