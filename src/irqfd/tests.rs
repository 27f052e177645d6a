//! The core on a hypervisor that records the calls made to it, watches the rules, and fails as it is told.
//!
//! Here are the recorder and what the tests share; the tests are in files of their own, by subject.

mod calls;
mod doorbells;
mod events;
mod failures;
mod forks;
mod loading;
mod locks;
mod messages;
mod saved;
mod signals;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use super::*;
use crate::hypervisor::event::{self, EventFd, Holder};
use crate::hypervisor::trigger::Trigger;
use crate::hypervisor::{Backend, CallError, CallResult, Hypervisor, Operation, RawMsi};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    /// With the entries pushed: GSI and vector.
    Push(Vec<(u32, u8)>),
    Assign(u32),
    Deassign(u32),
    AssignIoEventFd(Trigger),
    DeassignIoEventFd(Trigger),
    SignalMsi(u8),
    CreateVp(u8),
}
use Call::{Assign, AssignIoEventFd, CreateVp, Deassign, DeassignIoEventFd, Push, SignalMsi};

/// The kernel's number of an eventfd, which all its duplicates have.
type EventId = u64;

/// A kernel that does as told and objects to what would harm a guest.
#[derive(Debug, Default)]
struct Kernel {
    image: BTreeMap<u32, RawMsi>,
    table: BTreeMap<u32, RawMsi>,
    /// The GSI of each irqfd, by its eventfd.
    irqfds: BTreeMap<EventId, u32>,
    /// The interrupts raised, by the eventfd.
    raised: BTreeMap<EventId, Vec<RawMsi>>,
    calls: Vec<Call>,
    /// Which calls fail, counted from the next.
    failing: BTreeSet<usize>,
    count: usize,
    quiesced: bool,
    /// Eventfds that could not be disarmed: a push may meet those.
    stuck: BTreeSet<EventId>,
    violations: Vec<String>,
    /// The eventfds that somebody else has closed.
    closed_events: BTreeSet<EventId>,
    drain_fails: bool,
    /// How many armings there were of which nobody has taken what they left in the counter.
    undrained: usize,
}

impl Kernel {
    fn call(&mut self, operation: Operation, call: Call) -> CallResult {
        self.calls.push(call);
        self.count += 1;
        if self.failing.remove(&(self.count - 1)) {
            return Err(CallError::new(operation, "recorded call", libc::ENOMEM));
        }
        Ok(())
    }

    fn raise(&mut self, event: EventId) {
        let msi = self.table[&self.irqfds[&event]];
        self.raised.entry(event).or_default().push(msi);
    }

    /// The GSIs where something is armed.
    fn armed(&self) -> BTreeSet<u32> {
        self.irqfds.values().copied().collect()
    }

    fn check(&mut self, fine: bool, rule: &str) {
        if !fine {
            self.violations.push(format!("{rule}, after {:?}", self.calls));
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Recorder(Arc<Mutex<Kernel>>);

impl Recorder {
    fn kernel(&self) -> std::sync::MutexGuard<'_, Kernel> {
        // A test that fails with it in hand drops its routes after that, and those call once more.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taken(&self) -> Vec<Call> {
        std::mem::take(&mut self.kernel().calls)
    }

    /// Lets the calls of these numbers fail, counted from the next.
    fn fail(&self, numbers: impl IntoIterator<Item = usize>) {
        let mut kernel = self.kernel();
        kernel.failing = numbers.into_iter().collect();
        kernel.count = 0;
    }
}

impl Hypervisor for Recorder {
    fn set_entry(&mut self, gsi: u32, msi: RawMsi) {
        self.kernel().image.insert(gsi, msi);
    }

    fn drop_entry(&mut self, gsi: u32) {
        self.kernel().image.remove(&gsi);
    }

    fn push(&mut self) -> CallResult<usize> {
        let mut kernel = self.kernel();
        let entries = kernel.image.iter().map(|(gsi, msi)| (*gsi, msi.data as u8)).collect();
        let met = kernel.quiesced && !kernel.irqfds.keys().all(|event| kernel.stuck.contains(event));
        kernel.check(!met, "no push meets an armed irqfd");
        // Without quiescing, an entry may change under an irqfd that is armed at its route's own GSI.
        let changed = kernel
            .armed()
            .into_iter()
            .find(|gsi| kernel.image.get(gsi) != kernel.table.get(gsi) && (kernel.quiesced || *gsi >= FIRST_SPARE));
        kernel.check(changed.is_none(), "no push changes the entry of an armed irqfd that it must not change");
        kernel.call(Operation::SetMsiRouting, Push(entries))?;
        kernel.table = kernel.image.clone();
        let routed = kernel.armed().iter().all(|gsi| kernel.table.contains_key(gsi));
        kernel.check(routed, "armed implies routed");
        Ok(kernel.table.len())
    }

    fn assign(&mut self, gsi: u32, holder: &dyn Holder) -> CallResult {
        let mut kernel = self.kernel();
        let id = id_of(holder.event());
        let (routed, twice) = (kernel.table.contains_key(&gsi), kernel.irqfds.contains_key(&id));
        kernel.check(routed, "armed implies routed");
        if twice && kernel.stuck.contains(&id) {
            return Err(CallError::new(Operation::AssignIrqfd, "recorded call", libc::EBUSY));
        }
        kernel.check(!twice, "an irqfd is assigned once");
        if kernel.closed_events.contains(&id) {
            return Err(CallError::new(Operation::AssignIrqfd, "recorded call", libc::EBADF));
        }
        kernel.call(Operation::AssignIrqfd, Assign(gsi))?;
        kernel.irqfds.insert(id, gsi);
        kernel.undrained += 1;
        if holder.event().is_readable().unwrap() {
            kernel.raise(id);
        }
        Ok(())
    }

    fn deassign(&mut self, gsi: u32, event: &EventFd) -> CallResult {
        let mut kernel = self.kernel();
        let id = id_of(event);
        let armed = kernel.irqfds.get(&id) == Some(&gsi);
        kernel.check(armed, "only an armed irqfd is disarmed");
        if kernel.closed_events.contains(&id) {
            kernel.stuck.insert(id);
            return Err(CallError::new(Operation::DeassignIrqfd, "recorded call", libc::EBADF));
        }
        let result = kernel.call(Operation::DeassignIrqfd, Deassign(gsi));
        if result.is_ok() {
            // What arming left in the counter goes with the irqfd.
            event.consume().unwrap();
            kernel.irqfds.remove(&id);
            kernel.stuck.remove(&id);
        } else {
            kernel.stuck.insert(id);
        }
        result
    }

    fn drain(&mut self, events: &[&EventFd]) -> Vec<(usize, CallError)> {
        let failed = |place| (place, CallError::new(Operation::Event, "recorded drain", libc::EIO));
        self.kernel().undrained -= events.len();
        if self.kernel().drain_fails {
            return (0..events.len()).map(failed).collect();
        }
        assert!(event::drain(events).is_empty());
        Vec::new()
    }

    fn assign_ioeventfd(&mut self, trigger: Trigger, _: &dyn Holder) -> CallResult {
        self.kernel().call(Operation::AssignIoEventFd, AssignIoEventFd(trigger))
    }

    fn deassign_ioeventfd(&mut self, trigger: Trigger, _: &EventFd) -> CallResult {
        self.kernel().call(Operation::DeassignIoEventFd, DeassignIoEventFd(trigger))
    }

    fn signal_msi(&mut self, msi: RawMsi) -> CallResult<bool> {
        self.kernel().call(Operation::SignalMsi, SignalMsi(msi.data as u8)).map(|()| true)
    }

    fn create_vp(&mut self, index: u8) -> CallResult {
        self.kernel().call(Operation::CreateVp, CreateVp(index))
    }

    fn fd(&self) -> Option<RawFd> {
        None
    }
}

/// The terms of a partition that decide which calls it makes.
#[derive(Clone, Copy, Debug)]
struct Setup {
    quiesce: bool,
    /// How many spare GSIs there are: none, fewer than a load has messages, or as many as it has.
    spares: u32,
    entries_per_move: usize,
}

/// The first spare GSI of a partition that has any.
const FIRST_SPARE: u32 = 2000;

const SETUPS: [Setup; 8] = [
    Setup { quiesce: false, spares: 0, entries_per_move: 64 },
    Setup { quiesce: true, spares: 0, entries_per_move: 0 },
    Setup { quiesce: true, spares: 300, entries_per_move: 0 },
    Setup { quiesce: true, spares: 3, entries_per_move: 0 },
    Setup { quiesce: false, spares: 300, entries_per_move: 2 },
    Setup { quiesce: false, spares: 3, entries_per_move: 2 },
    Setup { quiesce: false, spares: 3, entries_per_move: 0 },
    Setup { quiesce: false, spares: 300, entries_per_move: 64 },
];

fn partition(quiesce: bool) -> (Arc<Partition>, Recorder) {
    partition_of(SETUPS[usize::from(quiesce)])
}

fn partition_of(setup: Setup) -> (Arc<Partition>, Recorder) {
    let Setup { quiesce, spares, entries_per_move } = setup;
    let recorder = Recorder::default();
    recorder.kernel().quiesced = quiesce;
    let backend = if quiesce { Backend::Mshv } else { Backend::Kvm };
    let config = Config {
        quiesce,
        spares: (spares > 0).then_some(FIRST_SPARE..FIRST_SPARE + spares).into_iter().collect(),
        entries_per_move,
        ..Config::new(backend, 24..32)
    };
    let partition = Partition::new(Box::new(recorder.clone()), config).unwrap();
    partition.create_vp(0).unwrap();
    assert_eq!(recorder.taken(), [CreateVp(0)]);
    (partition, recorder)
}

fn msi(vector: u8) -> MsiRoute {
    MsiRoute::new(0xFEE0_0000, vector.into()).unwrap()
}

fn missing() -> MsiRoute {
    MsiRoute::new(0xFEE0_5000, 0x41).unwrap()
}

/// Routes with vectors 0x41, 0x42, ... on GSIs 24, 25, ...
fn routes(partition: &Arc<Partition>, recorder: &Recorder, count: u8) -> Vec<IrqFdRoute> {
    let routes: Vec<_> = (0..count).map(|_| partition.new_route(None).unwrap()).collect();
    let mut batch = Batch::new(Arc::clone(partition)).unwrap();
    for (route, vector) in routes.iter().zip(0x41..) {
        batch.set_msi(route, msi(vector));
    }
    batch.commit().unwrap();
    recorder.taken();
    routes
}

fn id_of(event: &EventFd) -> EventId {
    event.id().unwrap().unwrap()
}

/// The eventfd that a route has now.
fn event_of(route: &IrqFdRoute) -> EventId {
    id_of(&route.shared().event.get())
}

/// What is known of a route from outside.
type Seen = (GsiState, bool, Option<MsiRoute>, EventId);

fn seen(routes: &[IrqFdRoute]) -> Vec<Option<Seen>> {
    let one =
        |route: &IrqFdRoute| Some((route.state().ok()?, route.masked().ok()?, route.msi().ok()?, event_of(route)));
    routes.iter().map(one).collect()
}

/// What the rules say of every moment between two calls.
fn check_rules(partition: &Arc<Partition>, recorder: &Recorder, routes: &[IrqFdRoute], context: &str) {
    check_rules_of(partition, recorder, routes, context);
}

fn check_rules_of<'a>(
    partition: &Arc<Partition>,
    recorder: &Recorder,
    routes: impl IntoIterator<Item = &'a IrqFdRoute>,
    context: &str,
) {
    let table: BTreeMap<_, _> = partition.routing_table().unwrap().into_iter().collect();
    let state = partition.lock();
    let kernel = recorder.kernel();
    assert_eq!(kernel.violations, Vec::<String>::new(), "{context}");
    assert_eq!(table, kernel.table, "{context}: our record is what the kernel holds");
    state.check();
    let image: BTreeMap<_, _> = state.entries.image_table().collect();
    assert_eq!(image, kernel.image, "{context}: the image is what the next push brings");
    assert_eq!(kernel.undrained, 0, "{context}: what arming leaves is drained");
    for route in routes.into_iter().filter(|route| !route.is_closed()) {
        let (state, masked, msi, event) = seen(std::slice::from_ref(route))[0].unwrap();
        let gsi = route.gsi();
        match state {
            GsiState::Enabled => {
                let at = route.armed_gsi().unwrap();
                assert_eq!(kernel.irqfds.get(&event).copied(), at, "{context}: GSI {gsi} is said to be armed");
                let message = at.and_then(|at| kernel.table.get(&at).copied());
                assert_eq!(message, msi.map(MsiRoute::raw), "{context}: GSI {gsi}");
                assert!(!masked, "{context}: GSI {gsi}");
            }
            GsiState::Disabled => {
                // Its eventfd may be stuck on a broken route that it was moved to.
                let armed = kernel.irqfds.contains_key(&event) && !kernel.stuck.contains(&event);
                assert!(!armed, "{context}: GSI {gsi} is armed");
                assert_eq!(route.armed_gsi().unwrap(), None, "{context}: GSI {gsi}");
            }
            GsiState::Broken => assert_eq!(route.armed_gsi().unwrap(), None, "{context}: GSI {gsi} is broken"),
            GsiState::Unallocated => panic!("{context}: GSI {gsi} of an open route is unallocated"),
        }
    }
}

/// Four routes in the states that matter: armed, armed, masked with another MSI, without an MSI.
fn scene(quiesce: bool) -> (Arc<Partition>, Recorder, Vec<IrqFdRoute>) {
    scene_of(SETUPS[usize::from(quiesce)])
}

fn scene_of(setup: Setup) -> (Arc<Partition>, Recorder, Vec<IrqFdRoute>) {
    let (partition, recorder) = partition_of(setup);
    let mut all = routes(&partition, &recorder, 3);
    all[2].mask().unwrap();
    all[2].set_msi(msi(0x60)).unwrap();
    all.push(partition.new_route(None).unwrap());
    recorder.taken();
    (partition, recorder, all)
}

/// The eventfd of a route, for another one.
fn duplicate(route: &IrqFdRoute) -> NewEvent {
    NewEvent::make(Some(route.fileno().unwrap())).unwrap()
}

fn trigger(address: u64, length: u32) -> Trigger {
    Trigger { address, length, datamatch: None, port: false }
}

/// Shows that something is true in a forked child that inherits both locks held, and comes true without waiting.
fn in_child_with_locks_held(partition: &Partition, route: &IrqFdRoute, what: &str, seen: impl FnOnce() -> bool) {
    let child = {
        let _locks = (route.shared().lock(), partition.lock());
        // SAFETY: the child calls what is to be seen to take no lock, and ends without unwinding.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: sets a timer that kills a child that waits, and ends one that does not.
            unsafe {
                libc::alarm(20);
                libc::_exit(if seen() { 0 } else { 1 })
            };
        }
        child
    };
    let mut status = -1;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert!(!libc::WIFSIGNALED(status), "{what} waited for a lock in a forked child");
    assert_eq!(libc::WEXITSTATUS(status), 0, "{what} did in a forked child what it must not");
}
