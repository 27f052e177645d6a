//! The core on a hypervisor that records the calls made to it, watches the rules, and fails as it is told.

mod events;
mod loading;
mod saved;
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

const SETUPS: [Setup; 7] = [
    Setup { quiesce: false, spares: 0, entries_per_move: 64 },
    Setup { quiesce: true, spares: 0, entries_per_move: 0 },
    Setup { quiesce: true, spares: 300, entries_per_move: 0 },
    Setup { quiesce: true, spares: 3, entries_per_move: 0 },
    Setup { quiesce: false, spares: 300, entries_per_move: 2 },
    Setup { quiesce: false, spares: 3, entries_per_move: 2 },
    Setup { quiesce: false, spares: 3, entries_per_move: 0 },
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

#[test]
fn enabling_pushes_then_assigns_and_disabling_only_deassigns() {
    for quiesce in [false, true] {
        let (partition, recorder) = partition(quiesce);
        let route = partition.new_route(None).unwrap();
        assert_eq!(recorder.taken(), []);
        assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Disabled);
        route.set_msi(msi(0x41)).unwrap();
        assert_eq!(recorder.taken(), [Push(vec![(24, 0x41)]), Assign(24)]);
        assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Enabled);
        route.mask().unwrap();
        assert_eq!(recorder.taken(), [Deassign(24)]);
        route.unmask().unwrap();
        assert_eq!(recorder.taken(), [Assign(24)]);
        route.clear_msi().unwrap();
        assert_eq!(recorder.taken(), [Deassign(24)]);
        // The kernel's table still has this entry.
        route.set_msi(msi(0x41)).unwrap();
        assert_eq!(recorder.taken(), [Assign(24)]);
        route.close().unwrap();
        assert_eq!(recorder.taken(), [Deassign(24)]);
    }
}

#[test]
fn retargeting_is_one_push_and_on_mshv_everything_is_disarmed_around_it() {
    let (plain, recorder) = partition(false);
    let routes_ = routes(&plain, &recorder, 3);
    routes_[1].set_msi(msi(0x99)).unwrap();
    assert_eq!(recorder.taken(), [Push(vec![(24, 0x41), (25, 0x99), (26, 0x43)])]);

    let (quiesced, recorder) = partition(true);
    let routes_ = routes(&quiesced, &recorder, 3);
    routes_[1].set_msi(msi(0x99)).unwrap();
    let calls = recorder.taken();
    let as_set = |calls: &[Call]| calls.iter().map(|call| format!("{call:?}")).collect::<BTreeSet<_>>();
    assert_eq!(calls.len(), 7);
    assert_eq!(as_set(&calls[..3]), as_set(&[Deassign(24), Deassign(25), Deassign(26)]));
    assert_eq!(calls[3], Push(vec![(24, 0x41), (25, 0x99), (26, 0x43)]));
    assert_eq!(as_set(&calls[4..]), as_set(&[Assign(24), Assign(25), Assign(26)]));
}

#[test]
fn enabling_one_more_on_mshv_disarms_the_others_around_the_push() {
    let (partition, recorder) = partition(true);
    let _routes = routes(&partition, &recorder, 1);
    let route = partition.new_route(None).unwrap();
    route.set_msi(msi(0x50)).unwrap();
    assert_eq!(recorder.taken(), [Deassign(24), Push(vec![(24, 0x41), (25, 0x50)]), Assign(25), Assign(24)]);
}

#[test]
fn repeating_a_change_makes_no_call() {
    for quiesce in [false, true] {
        let (partition, recorder) = partition(quiesce);
        let route = &routes(&partition, &recorder, 1)[0];
        route.set_msi(msi(0x41)).unwrap();
        route.unmask().unwrap();
        assert_eq!(recorder.taken(), []);
        route.mask().unwrap();
        recorder.taken();
        route.mask().unwrap();
        // Kept, not pushed; and set back, so that unmasking need not push.
        route.set_msi(msi(0x77)).unwrap();
        route.set_msi(msi(0x41)).unwrap();
        assert_eq!(recorder.taken(), []);
        route.unmask().unwrap();
        assert_eq!(recorder.taken(), [Assign(24)]);
    }
}

#[test]
fn an_msi_set_while_masked_is_pushed_by_unmasking_and_not_before() {
    for quiesce in [false, true] {
        let (partition, recorder) = partition(quiesce);
        let routes_ = routes(&partition, &recorder, 2);
        routes_[0].mask().unwrap();
        routes_[0].set_msi(msi(0x77)).unwrap();
        assert_eq!(recorder.taken(), [Deassign(24)]);
        routes_[1].set_msi(msi(0x55)).unwrap();
        assert!(recorder.taken().contains(&Push(vec![(24, 0x41), (25, 0x55)])));
        routes_[0].unmask().unwrap();
        assert!(recorder.taken().contains(&Push(vec![(24, 0x77), (25, 0x55)])));
    }
}

#[test]
fn a_batch_disarms_pushes_once_and_arms() {
    for quiesce in [false, true] {
        let (partition, recorder) = partition(quiesce);
        let routes_ = routes(&partition, &recorder, 3);
        let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
        assert!(batch.is_empty());
        batch.mask(&routes_[0]);
        batch.set_msi(&routes_[1], msi(0x51));
        batch.set_msi(&routes_[1], msi(0x52));
        batch.clear_msi(&routes_[2]);
        assert_eq!((batch.len(), batch.is_empty(), recorder.taken()), (3, false, vec![]));
        batch.commit().unwrap();
        let calls = recorder.taken();
        let pushes: Vec<_> = calls.iter().filter(|call| matches!(call, Push(_))).collect();
        assert_eq!(pushes, [&Push(vec![(24, 0x41), (25, 0x52)])]);
        assert_eq!(recorder.kernel().armed(), BTreeSet::from([25]));
    }
}

#[test]
fn a_batch_with_a_route_of_another_partition_fails_before_any_call() {
    let ((ours, recorder), (theirs, others)) = (partition(true), partition(true));
    let (route, foreign) = (ours.new_route(None).unwrap(), theirs.new_route(None).unwrap());
    let mut batch = Batch::new(Arc::clone(&ours)).unwrap();
    batch.set_msi(&route, msi(0x41));
    batch.set_msi(&foreign, msi(0x42));
    assert!(matches!(batch.commit(), Err(Error::Invalid(_))));
    assert_eq!((recorder.taken(), others.taken(), route.msi().unwrap()), (vec![], vec![], None));
}

#[test]
fn closing_everything_costs_no_push() {
    for quiesce in [false, true] {
        let (partition, recorder) = partition(quiesce);
        let routes_ = routes(&partition, &recorder, 8);
        partition.close().unwrap();
        let calls = recorder.taken();
        assert_eq!(calls.len(), 8);
        assert!(calls.iter().all(|call| matches!(call, Deassign(_))), "{calls:?}");
        assert!(routes_.iter().all(IrqFdRoute::is_closed));
        assert!(matches!(partition.new_route(None), Err(Error::Closed(_))));
    }
}

#[test]
fn dropping_a_route_disarms_it_and_frees_the_lowest_gsi() {
    let (partition, recorder) = partition(true);
    let mut routes_ = routes(&partition, &recorder, 4);
    drop(routes_.remove(1));
    assert_eq!(recorder.taken(), [Deassign(25)]);
    assert_eq!(partition.gsi_state(25).unwrap(), GsiState::Unallocated);
    assert_eq!(partition.new_route(None).unwrap().gsi(), 25);
    // Its entry goes with the next push that there is a need for.
    routes_[0].set_msi(msi(0x99)).unwrap();
    assert!(recorder.taken().contains(&Push(vec![(24, 0x99), (26, 0x43), (27, 0x44)])));
}

#[test]
fn signals_wait_until_the_route_is_armed() {
    let (partition, recorder) = partition(true);
    let route = partition.new_route(None).unwrap();
    route.signal(3).unwrap();
    let steps: [fn(&IrqFdRoute) -> Result; 5] = [
        IrqFdRoute::mask,
        |route| route.set_msi(msi(0x41)),
        IrqFdRoute::mask,
        IrqFdRoute::clear_msi,
        IrqFdRoute::unmask,
    ];
    for step in steps {
        step(&route).unwrap();
        assert!(route.pending().unwrap());
    }
    assert_eq!(recorder.taken(), []);
    assert_eq!(route.take_pending().unwrap(), 3);
    assert!(!route.pending().unwrap());
}

#[test]
fn while_a_route_is_armed_nothing_is_pending_and_nothing_is_taken() {
    let (partition, recorder) = partition(true);
    let route = &routes(&partition, &recorder, 1)[0];
    // The kernel here takes no signals, so this one is still in the counter.
    route.signal(1).unwrap();
    assert!(!route.pending().unwrap());
    assert!(!route.consume_pending().unwrap());
    assert_eq!(route.shared().event.consume().unwrap(), 1);
}

#[test]
fn no_route_can_be_set_for_an_unallocated_gsi() {
    let (partition, _) = partition(true);
    let route = partition.new_route(None).unwrap();
    route.close().unwrap();
    let error = route.set_msi(msi(0x41)).unwrap_err();
    assert!(matches!(error, Error::Closed(_)));
    assert!(error.to_string().contains("unallocated"), "{error}");
}

#[test]
fn a_destination_without_a_vp_is_refused_before_any_call() {
    let (partition, recorder) = partition(true);
    let route = partition.new_route(None).unwrap();
    assert!(matches!(route.set_msi(missing()), Err(Error::MissingVp { destination: 5, .. })));
    assert_eq!(route.msi().unwrap(), None);
    route.mask().unwrap();
    route.set_msi(missing()).unwrap();
    assert!(matches!(route.unmask(), Err(Error::MissingVp { .. })));
    assert!(route.masked().unwrap());
    let armed = &routes(&partition, &recorder, 1)[0];
    assert!(matches!(armed.set_msi(missing()), Err(Error::MissingVp { destination: 5, .. })));
    assert_eq!((armed.armed().unwrap(), armed.msi().unwrap()), (true, Some(msi(0x41))));
    assert_eq!(recorder.taken(), []);
    partition.create_vp(5).unwrap();
    route.unmask().unwrap();
    assert!(route.armed().unwrap());
}

#[test]
fn a_vp_that_the_kernel_refused_is_no_destination() {
    let (partition, recorder) = partition(true);
    recorder.fail([0]);
    assert!(matches!(partition.create_vp(5), Err(Error::Failed(_))));
    let route = partition.new_route(None).unwrap();
    assert!(matches!(route.set_msi(missing()), Err(Error::MissingVp { destination: 5, .. })));
    assert_eq!(partition.vps().unwrap(), Some(vec![0]));
}

#[test]
fn the_broadcast_destination_is_taken_by_kvm_only() {
    let everybody = MsiRoute::new(0xFEEF_F000, 0x41).unwrap();
    for quiesce in [false, true] {
        let (partition, recorder) = partition(quiesce);
        let route = partition.new_route(None).unwrap();
        let refused = matches!(route.set_msi(everybody), Err(Error::MissingVp { destination: 0xFF, .. }));
        assert_eq!((refused, recorder.taken().is_empty()), (quiesce, quiesce));
    }
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

type Operate = fn(&Arc<Partition>, &[IrqFdRoute]) -> Result;

const OPERATIONS: [(&str, Operate); 14] = [
    ("enable", |_, routes| routes[3].set_msi(msi(0x70))),
    ("retarget", |_, routes| routes[0].set_msi(msi(0x71))),
    ("mask", |_, routes| routes[0].mask()),
    ("unmask", |_, routes| routes[2].unmask()),
    ("clear", |_, routes| routes[1].clear_msi()),
    ("clear masked", |_, routes| routes[2].clear_msi()),
    ("batch: retarget two", |partition, routes| {
        let mut batch = Batch::new(Arc::clone(partition))?;
        batch.set_msi(&routes[0], msi(0x72));
        batch.set_msi(&routes[1], msi(0x73));
        batch.commit()
    }),
    ("batch: retarget and enable", |partition, routes| {
        let mut batch = Batch::new(Arc::clone(partition))?;
        batch.set_msi(&routes[0], msi(0x72));
        batch.unmask(&routes[2]);
        batch.set_msi(&routes[3], msi(0x74));
        batch.commit()
    }),
    ("batch: mask and enable", |partition, routes| {
        let mut batch = Batch::new(Arc::clone(partition))?;
        batch.mask(&routes[0]);
        batch.set_msi(&routes[3], msi(0x74));
        batch.commit()
    }),
    ("batch: clear and enable", |partition, routes| {
        let mut batch = Batch::new(Arc::clone(partition))?;
        batch.clear_msi(&routes[0]);
        batch.set_msi(&routes[3], msi(0x74));
        batch.commit()
    }),
    ("batch: mask two", |partition, routes| {
        let mut batch = Batch::new(Arc::clone(partition))?;
        batch.mask(&routes[0]);
        batch.mask(&routes[1]);
        batch.commit()
    }),
    ("another eventfd", |_, routes| routes[0].set_event(None)),
    ("batch: exchange eventfds and enable", |partition, routes| {
        let mut batch = Batch::new(Arc::clone(partition))?;
        batch.set_event(&routes[0], duplicate(&routes[1]));
        batch.set_event(&routes[1], duplicate(&routes[0]));
        batch.set_msi(&routes[3], msi(0x74));
        batch.commit()
    }),
    ("batch: retarget with the eventfd of another", |partition, routes| {
        let mut batch = Batch::new(Arc::clone(partition))?;
        batch.set_event(&routes[3], duplicate(&routes[0]));
        batch.set_msi(&routes[3], msi(0x74));
        batch.set_event(&routes[0], NewEvent::make(None)?);
        batch.commit()
    }),
];

/// The eventfd of a route, for another one.
fn duplicate(route: &IrqFdRoute) -> NewEvent {
    NewEvent::make(Some(route.fileno().unwrap())).unwrap()
}

fn number_of_calls(setup: Setup, operate: Operate) -> usize {
    let (partition, recorder, routes) = scene_of(setup);
    operate(&partition, &routes).unwrap();
    recorder.taken().len()
}

/// Shows that a partition is in order after a failure: everything can be changed, and is as asked.
fn everything_works(partition: &Arc<Partition>, recorder: &Recorder, routes: &[IrqFdRoute], context: &str) {
    recorder.fail([]);
    for (route, vector) in routes.iter().zip(0x80..) {
        if route.state().unwrap() == GsiState::Broken {
            assert!(matches!(route.set_msi(msi(vector)), Err(Error::Broken(_))), "{context}");
            assert!(matches!(route.mask(), Err(Error::Broken(_))), "{context}");
            continue;
        }
        if !route.armed().unwrap() && recorder.kernel().stuck.contains(&event_of(route)) {
            let Err(Error::Failed(failure)) = route.unmask() else { panic!("{context}: armed twice") };
            assert_eq!(failure.error.errno, libc::EBUSY, "{context}");
            // Its own eventfd is stuck on a broken route.
            route.set_event(None).unwrap_or_else(|error| panic!("{context}: {error}"));
        }
        route.unmask().unwrap_or_else(|error| panic!("{context}: {error}"));
        route.set_msi(msi(vector)).unwrap_or_else(|error| panic!("{context}: {error}"));
        assert!(route.armed().unwrap(), "{context}");
    }
    check_rules(partition, recorder, routes, context);
}

#[test]
fn a_call_that_fails_once_leaves_everything_as_it_was() {
    for setup in SETUPS {
        for (name, operate) in OPERATIONS {
            for failing in 0..number_of_calls(setup, operate) {
                let context = format!("{name}, {setup:?}, call {failing} fails");
                let (partition, recorder, routes) = scene_of(setup);
                let (before, armed) = (seen(&routes), recorder.kernel().irqfds.clone());
                recorder.fail([failing]);
                assert!(matches!(operate(&partition, &routes), Err(Error::Failed(_))), "{context}");
                assert_eq!(seen(&routes), before, "{context}");
                assert_eq!(recorder.kernel().irqfds, armed, "{context}");
                check_rules(&partition, &recorder, &routes, &context);
                everything_works(&partition, &recorder, &routes, &context);
            }
        }
    }
}

/// Tries every set of calls that can fail: none, and after each failure any of the calls that are still made. `attempt`
/// lets the calls of these numbers fail and says how many were made in all. Returns how many sets of one failure, of two,
/// ... there were.
fn every_failure(attempt: &mut impl FnMut(&[usize]) -> usize) -> Vec<usize> {
    fn explore(failing: &mut Vec<usize>, attempt: &mut impl FnMut(&[usize]) -> usize, tried: &mut Vec<usize>) {
        let made = attempt(failing);
        for next in failing.last().map_or(0, |last| last + 1)..made {
            failing.push(next);
            tried.resize(tried.len().max(failing.len()), 0);
            tried[failing.len() - 1] += 1;
            explore(failing, attempt, tried);
            failing.pop();
        }
    }
    let mut tried = Vec::new();
    explore(&mut Vec::new(), attempt, &mut tried);
    tried
}

#[test]
fn failed_rollbacks_break_single_routes_and_nothing_else() {
    let mut broken = 0;
    for setup in SETUPS {
        for (name, operate) in OPERATIONS {
            let tried = every_failure(&mut |failing| {
                let context = format!("{name}, {setup:?}, calls {failing:?} fail");
                let (partition, recorder, routes) = scene_of(setup);
                let before = seen(&routes);
                recorder.fail(failing.iter().copied());
                let result = operate(&partition, &routes);
                let made = recorder.taken().len();
                recorder.fail([]);
                check_rules(&partition, &recorder, &routes, &context);
                let failure = match result {
                    Err(Error::Failed(failure)) => failure,
                    Ok(()) if failing.is_empty() => return made,
                    _ => panic!("{context}: {result:?}"),
                };
                for (route, before) in routes.iter().zip(before) {
                    let (state, masked, msi, event) = seen(std::slice::from_ref(route))[0].unwrap();
                    let (state_before, masked_before, msi_before, event_before) = before.unwrap();
                    assert_eq!((masked, msi), (masked_before, msi_before), "{context}: intent is kept");
                    assert_eq!(event, event_before, "{context}: so is the eventfd");
                    let said = failure.broken.contains(&route.gsi());
                    assert_eq!(state == GsiState::Broken, said, "{context}: GSI {}", route.gsi());
                    if state != state_before && !said {
                        assert!(failure.disarmed.contains(&route.gsi()), "{context}: GSI {}", route.gsi());
                    }
                }
                broken += failure.broken.len();
                everything_works(&partition, &recorder, &routes, &context);
                broken_gsis_are_quarantined(&partition, routes, &failure.broken, &context);
                partition.close().unwrap_or_else(|error| panic!("{context}: {error}"));
                assert!(recorder.kernel().armed().is_empty(), "{context}: closing leaves nothing armed");
                made
            });
            assert_eq!(tried.first().copied().unwrap_or(0), number_of_calls(setup, operate));
            println!("{name}, {setup:?}: sets of one, two, ... calls that failed: {tried:?}");
        }
    }
    assert!(broken > 0, "no route was broken: the test shows nothing");
}

/// Shows that GSIs of broken routes are not handed out again, and that all others are.
fn broken_gsis_are_quarantined(partition: &Arc<Partition>, routes: Vec<IrqFdRoute>, broken: &[u32], context: &str) {
    drop(routes);
    assert!(broken.iter().all(|gsi| partition.gsi_state(*gsi).unwrap() == GsiState::Broken), "{context}");
    let again: Vec<_> = std::iter::from_fn(|| partition.new_route(None).ok()).collect();
    assert_eq!(again.len(), 8 - broken.len(), "{context}");
    assert!(again.iter().all(|route| !broken.contains(&route.gsi())), "{context}");
}

#[test]
fn closing_leaves_armed_only_routes_that_the_kernel_refused_to_disarm_twice() {
    for setup in SETUPS {
        let tried = every_failure(&mut |failing| {
            let context = format!("{setup:?}, calls {failing:?} fail");
            let (partition, recorder, routes) = scene_of(setup);
            recorder.fail(failing.iter().copied());
            assert_eq!(partition.close().is_err(), !failing.is_empty(), "{context}");
            assert!(routes.iter().all(IrqFdRoute::is_closed), "{context}");
            let calls = recorder.taken();
            let tries = |gsi| calls.iter().filter(|call| **call == Deassign(gsi)).count();
            assert!(recorder.kernel().armed().iter().all(|gsi| tries(*gsi) == 2), "{context}: {calls:?}");
            assert_eq!(recorder.kernel().violations, Vec::<String>::new(), "{context}");
            calls.len()
        });
        assert_eq!(tried[0], 2, "two routes are armed");
        println!("close the partition, {setup:?}: sets of one, two, ... calls that failed: {tried:?}");
    }
}

#[test]
fn closing_goes_on_past_errors_and_quarantines_routes_that_stay_armed() {
    let (partition, recorder) = partition(true);
    let all = routes(&partition, &recorder, 3);
    recorder.fail([0]);
    assert!(matches!(all[0].close(), Err(Error::Failed(_))));
    assert!(all[0].is_closed());
    assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Broken);
    assert_eq!(partition.new_route(None).unwrap().gsi(), 27);
    // The irqfd that is still there keeps its entry through other routes' pushes.
    recorder.fail([0]);
    all[1].set_msi(msi(0x90)).unwrap();
    assert!(recorder.kernel().table.contains_key(&24));
    recorder.fail([0]);
    let error = partition.close().unwrap_err();
    assert!(all.iter().all(IrqFdRoute::is_closed), "{error}");
    assert_eq!(recorder.kernel().violations, Vec::<String>::new());
}

#[test]
fn a_broken_route_can_be_closed_which_tries_once_more() {
    let (partition, recorder, routes) = scene(false);
    // The push succeeds, arming fails, and so does the rollback.
    recorder.fail([1, 2, 3]);
    let Err(Error::Failed(failure)) = OPERATIONS[7].1(&partition, &routes) else { panic!("no failure") };
    assert_eq!(failure.broken, [24]);
    assert!(matches!(routes[0].unmask(), Err(Error::Broken(24))));
    recorder.taken();
    routes[0].close().unwrap();
    assert_eq!(recorder.taken(), [Deassign(24)]);
    assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Broken);
    assert_eq!(partition.new_route(None).unwrap().gsi(), 28);
}

#[test]
fn a_route_that_could_not_be_armed_again_keeps_its_signals_and_is_armed_with_the_next_push() {
    let (partition, recorder, routes) = scene(true);
    // Disarms 24 and 25, fails to push, fails to arm the first of them again.
    recorder.fail([2, 3]);
    let Err(Error::Failed(failure)) = routes[3].set_msi(msi(0x70)) else { panic!("no failure") };
    let waiting = failure.disarmed.clone();
    assert_eq!(waiting.len(), 1);
    let route = routes.iter().find(|route| route.gsi() == waiting[0]).unwrap();
    assert_eq!(route.state().unwrap(), GsiState::Disabled);
    route.signal(1).unwrap();
    assert!(route.pending().unwrap());
    routes[3].set_msi(msi(0x70)).unwrap();
    assert!(route.armed().unwrap());
    check_rules(&partition, &recorder, &routes, "after the next push");
}

#[test]
fn closing_a_route_that_waits_to_be_re_armed_leaves_the_others_to_the_next_push() {
    let (partition, recorder, mut routes) = scene(true);
    // Disarms 24 and 25, fails to push, fails to arm both again.
    recorder.fail([2, 3, 4]);
    let Err(Error::Failed(failure)) = routes[3].set_msi(msi(0x70)) else { panic!("no failure") };
    assert_eq!(failure.disarmed.len(), 2);
    drop(routes.remove(0));
    routes[2].set_msi(msi(0x70)).unwrap();
    assert!(routes[0].armed().unwrap());
    check_rules(&partition, &recorder, &routes, "after the next push");
}

#[test]
fn a_route_that_could_not_be_armed_again_is_armed_by_setting_it_again() {
    let retries: [fn(&IrqFdRoute) -> Result; 2] = [IrqFdRoute::unmask, |route| route.set_msi(msi(0x41))];
    for again in retries {
        let (partition, recorder, routes) = scene(false);
        let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
        batch.mask(&routes[0]);
        batch.set_msi(&routes[3], msi(0x70));
        // Disarms 24, fails to push, fails to arm 24 again.
        recorder.fail([1, 2]);
        assert!(batch.commit().is_err());
        assert_eq!(routes[0].state().unwrap(), GsiState::Disabled);
        again(&routes[0]).unwrap();
        assert!(routes[0].armed().unwrap());
        check_rules(&partition, &recorder, &routes, "armed again");
    }
}

#[test]
fn closing_the_partition_tries_once_more_to_disarm_a_stuck_route() {
    let (partition, recorder) = partition(true);
    let all = routes(&partition, &recorder, 1);
    recorder.fail([0]);
    assert!(all[0].close().is_err());
    assert_eq!(recorder.kernel().armed(), BTreeSet::from([24]));
    assert!(matches!(all[0].signal(1), Err(Error::Closed(_))));
    partition.close().unwrap();
    assert_eq!(recorder.kernel().armed(), BTreeSet::new());
}

#[test]
fn an_eventfd_of_one_route_is_refused_for_another_until_the_first_is_closed() {
    let ((ours, _), (theirs, _)) = (partition(true), partition(true));
    let event = EventFd::new().unwrap();
    let fd = event.as_raw_fd();
    let route = ours.new_route(Some(fd)).unwrap();
    assert_eq!(route.fileno().unwrap(), route.shared().event.get().as_raw_fd());
    // A caller's eventfd may be in blocking mode.
    assert!(!route.try_signal(1).unwrap() && !route.pending().unwrap());
    let own = ours.new_route(None).unwrap();
    assert!(own.try_signal(1).unwrap() && own.pending().unwrap());
    for other in [&ours, &theirs] {
        let refused = other.new_route(Some(fd)).unwrap_err().to_string();
        assert!(refused.contains("eventfd of the route of GSI 24"), "{refused}");
        assert_eq!(refused.contains("of another partition"), Arc::ptr_eq(other, &theirs), "{refused}");
    }
    route.close().unwrap();
    assert_eq!(theirs.new_route(Some(fd)).unwrap().gsi(), 24);
}

#[test]
fn clearing_and_setting_the_same_msi_for_ever_takes_no_memory() {
    let (partition, recorder) = partition(false);
    let route = &routes(&partition, &recorder, 1)[0];
    for _ in 0..1000 {
        route.clear_msi().unwrap();
        route.set_msi(msi(0x41)).unwrap();
    }
    assert!(partition.lock().dirty_len() <= 1);
}

#[test]
fn an_eventfd_closed_by_other_code_breaks_its_own_route_and_no_other() {
    let (partition, recorder) = partition(true);
    let all = routes(&partition, &recorder, 3);
    recorder.kernel().closed_events.insert(event_of(&all[1]));
    all[0].set_msi(msi(0x71)).unwrap();
    assert_eq!(all[1].state().unwrap(), GsiState::Broken);
    assert!(all[0].armed().unwrap() && all[2].armed().unwrap());
    assert_eq!(recorder.kernel().table[&25].data, 0x42, "its irqfd may still be there, and keeps its entry");
    assert_eq!(recorder.kernel().violations, Vec::<String>::new());
}

#[test]
fn a_route_that_cannot_be_drained_is_not_left_armed() {
    for (failing, state) in [(vec![], GsiState::Disabled), (vec![2, 3], GsiState::Broken)] {
        let (partition, recorder) = partition(true);
        let route = partition.new_route(None).unwrap();
        recorder.kernel().drain_fails = true;
        recorder.fail(failing);
        assert!(route.set_msi(msi(0x41)).is_err());
        assert_eq!(route.state().unwrap(), state);
        assert_eq!(recorder.kernel().armed().contains(&24), state == GsiState::Broken);
        check_rules(&partition, &recorder, std::slice::from_ref(&route), "after a failed drain");
    }
}

#[test]
fn a_route_that_cannot_be_drained_again_is_disarmed_and_reported() {
    let (partition, recorder) = partition(true);
    let armed = &routes(&partition, &recorder, 1)[0];
    let route = partition.new_route(None).unwrap();
    recorder.kernel().drain_fails = true;
    let Err(Error::Failed(failure)) = route.set_msi(msi(0x50)) else { panic!("no failure") };
    assert_eq!((failure.broken, failure.disarmed), (vec![], vec![24]));
    assert_eq!((armed.armed().unwrap(), recorder.kernel().armed().len()), (false, 0));
    recorder.kernel().drain_fails = false;
    route.set_msi(msi(0x51)).unwrap();
    assert!(armed.armed().unwrap() && route.armed().unwrap());
}

#[test]
fn a_route_waiting_to_be_re_armed_is_not_armed_while_its_signals_are_taken() {
    let (partition, recorder, routes) = scene(true);
    recorder.fail([2, 3]);
    assert!(routes[3].set_msi(msi(0x70)).is_err());
    let waiting = routes.iter().find(|route| !route.masked().unwrap() && !route.armed().unwrap()).unwrap();
    waiting.signal(1).unwrap();
    // Taking them waits for a push that is under way, which may arm the route.
    let pushing = partition.lock();
    std::thread::scope(|scope| {
        let taker = scope.spawn(|| waiting.consume_pending());
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        assert!(waiting.pending().unwrap(), "taken while the table was locked");
        drop(pushing);
        assert!(taker.join().unwrap().unwrap());
    });
}

#[test]
fn a_batch_with_a_closed_route_and_its_successor_on_the_gsi_fails_and_does_not_hang() {
    let (partition, recorder) = partition(true);
    let old = partition.new_route(None).unwrap();
    old.close().unwrap();
    let new = partition.new_route(None).unwrap();
    assert_eq!(old.gsi(), new.gsi());
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    for route in [&old, &new, &old, &new] {
        batch.set_msi(route, msi(0x41));
    }
    assert!(matches!(batch.commit(), Err(Error::Closed(_))));
    assert_eq!(recorder.taken(), []);
}

#[test]
fn every_call_is_counted_and_every_push_that_was_not_needed() {
    let (partition, recorder) = partition(true);
    let count = || {
        let stats = partition.stats().unwrap();
        [stats.pushes, stats.entries_pushed, stats.pushes_skipped, stats.arms, stats.disarms, stats.failures]
    };
    let [first, second] = [0x41, 0x42].map(|vector| {
        let route = partition.new_route(None).unwrap();
        route.set_msi(msi(vector)).unwrap();
        route
    });
    assert_eq!(count(), [2, 3, 0, 3, 1, 0]);
    first.mask().unwrap();
    first.set_msi(msi(0x51)).unwrap();
    assert_eq!(count(), [2, 3, 2, 3, 2, 0]);
    // What is so already is no change.
    first.set_msi(msi(0x51)).unwrap();
    second.set_msi(msi(0x42)).unwrap();
    assert_eq!(count(), [2, 3, 2, 3, 2, 0]);
    recorder.fail([0]);
    assert!(first.unmask().is_err());
    first.unmask().unwrap();
    assert_eq!(count(), [3, 5, 2, 5, 3, 1]);
    recorder.fail([0]);
    assert!(second.set_msi(msi(0x52)).is_err());
    second.close().unwrap();
    partition.close().unwrap();
    assert_eq!(count(), [3, 5, 4, 5, 5, 2]);
}

#[test]
fn a_forked_child_is_refused_before_any_lock() {
    type Use = fn(&Arc<Partition>, &IrqFdRoute) -> Result;
    let uses: [(&str, Use); 19] = [
        ("set_msi", |_, route| route.set_msi(msi(0x42))),
        ("clear_msi", |_, route| route.clear_msi()),
        ("mask", |_, route| route.mask()),
        ("unmask", |_, route| route.unmask()),
        ("state", |_, route| route.state().map(drop)),
        ("armed_gsi", |_, route| route.armed_gsi().map(drop)),
        ("pending", |_, route| route.pending().map(drop)),
        ("take_pending", |_, route| route.take_pending().map(drop)),
        ("close of the route", |_, route| route.close()),
        ("new_route", |partition, _| partition.new_route(None).map(drop)),
        ("new_route with an eventfd", |partition, route| partition.new_route(Some(route.fileno()?)).map(drop)),
        ("try_new_route", |partition, _| partition.try_new_route().map(drop)),
        ("create_vp", |partition, _| partition.create_vp(1)),
        ("vps", |partition, _| partition.vps().map(drop)),
        ("gsi_state", |partition, _| partition.gsi_state(24).map(drop)),
        ("routing_table", |partition, _| partition.routing_table().map(drop)),
        ("stats", |partition, _| partition.stats().map(drop)),
        ("batch", |partition, _| Batch::<&IrqFdRoute>::new(Arc::clone(partition)).map(drop)),
        ("close of the partition", |partition, _| partition.close()),
    ];
    let (partition, recorder) = partition(true);
    let route = &routes(&partition, &recorder, 1)[0];
    for (name, refused) in uses {
        in_child_with_locks_held(&partition, route, name, || {
            matches!(refused(&partition, route), Err(Error::Forked))
        });
    }
}

#[test]
fn a_forked_child_gives_up_descriptors_without_a_call_or_a_lock() {
    let (partition, recorder) = partition(true);
    let route = &routes(&partition, &recorder, 1)[0];
    in_child_with_locks_held(&partition, route, "abandon of the route", || {
        route.abandon().is_ok() && route.shared().event.is_closed() && recorder.taken().is_empty()
    });
    in_child_with_locks_held(&partition, route, "abandon of the partition", || {
        partition.abandon().is_ok() && recorder.taken().is_empty()
    });
    assert!(!route.shared().event.is_closed() && route.armed().unwrap());
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

#[test]
fn dropping_a_route_that_cannot_be_disarmed_quarantines_its_gsi_and_goes_on() {
    let (partition, recorder) = partition(true);
    let mut all = routes(&partition, &recorder, 2);
    recorder.fail([0]);
    drop(all.remove(0));
    assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Broken);
    assert!(all[0].armed().unwrap());
}

#[test]
fn changes_that_need_no_call_wait_for_no_push() {
    let (partition, _) = partition(true);
    let route = Arc::new(partition.new_route(None).unwrap());
    route.mask().unwrap();
    route.set_msi(msi(0x41)).unwrap();
    route.signal(1).unwrap();
    let pushing = partition.lock();
    let (done, over) = std::sync::mpsc::channel();
    // A thread of its own, which can be left behind where it waits.
    let theirs = Arc::clone(&route);
    std::thread::spawn(move || done.send((theirs.set_msi(msi(0x42)).is_ok(), theirs.consume_pending().unwrap())));
    assert_eq!(over.recv_timeout(std::time::Duration::from_secs(20)), Ok((true, true)));
    drop(pushing);
    assert_eq!(route.msi().unwrap(), Some(msi(0x42)));
}

#[test]
fn who_waits_for_the_partition_comes_before_who_gives_it_up() {
    let (partition, _) = partition(true);
    // Other tests look for eventfds in every partition, and must not come in between.
    let _no_look_ups = super::partition::partitions().unwrap();
    let came = std::sync::atomic::AtomicBool::new(false);
    for _ in 0..100 {
        let held = partition.lock();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _held = partition.lock();
                came.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while !partition.is_awaited() {
                assert!(std::time::Instant::now() < end, "whoever waits for the partition does not hold the turn");
                std::thread::yield_now();
            }
            drop(held);
            let _held = partition.lock();
            assert!(came.swap(false, std::sync::atomic::Ordering::Relaxed), "overtaken by who had it before");
        });
    }
}

fn trigger(address: u64, length: u32) -> Trigger {
    Trigger { address, length, datamatch: None, port: false }
}

#[test]
fn a_doorbell_is_one_call_and_closing_it_another() {
    let (partition, recorder) = partition(true);
    let bell = partition.new_ioeventfd(trigger(0x1000, 4), None).unwrap();
    assert_eq!(recorder.taken(), [AssignIoEventFd(trigger(0x1000, 4))]);
    bell.signal(2).unwrap();
    assert_eq!(bell.consume().unwrap(), 2);
    bell.close().unwrap();
    bell.close().unwrap();
    assert_eq!(recorder.taken(), [DeassignIoEventFd(trigger(0x1000, 4))]);
    assert!(bell.is_closed());
    for result in [bell.signal(1), bell.consume().map(drop), bell.fileno().map(drop)] {
        assert!(matches!(result, Err(Error::Closed(_))));
    }
    drop(partition.new_ioeventfd(trigger(0x1000, 4), None).unwrap());
    assert_eq!(recorder.taken(), [AssignIoEventFd(trigger(0x1000, 4)), DeassignIoEventFd(trigger(0x1000, 4))]);
}

#[test]
fn a_doorbell_that_breaks_a_rule_makes_no_call() {
    let (mshv, recorder) = partition(true);
    let _bell = mshv.new_ioeventfd(trigger(0x1000, 0), None).unwrap();
    recorder.taken();
    let with_value = |length, value| Trigger { datamatch: Some(value), ..trigger(0x2000, length) };
    for wrong in [
        trigger(0x1000, 4),
        trigger(0x2000, 3),
        trigger(u64::MAX - 3, 4),
        with_value(0, 7),
        with_value(1, 0x100),
        with_value(4, 1 << 32),
    ] {
        assert!(matches!(mshv.new_ioeventfd(wrong, None), Err(Error::Invalid(_))), "{wrong}");
    }
    let port = |address, length| Trigger { port: true, ..trigger(address, length) };
    assert!(matches!(mshv.new_ioeventfd(port(0x510, 2), None), Err(Error::Unsupported(_))));
    assert!(matches!(mshv.new_ioeventfd(trigger(0x2000, 4), Some(-1)), Err(Error::Adopt(_))));
    assert_eq!(recorder.taken(), []);

    let (kvm, recorder) = partition(false);
    for wrong in [port(0x510, 8), port(0xFFFF, 2), port(0x1_0000, 0), port(u64::MAX, 1)] {
        assert!(matches!(kvm.new_ioeventfd(wrong, None), Err(Error::Invalid(_))), "{wrong}");
    }
    assert_eq!(recorder.taken(), []);
    let fine = [port(0xFFFE, 2), port(0xFFFF, 0), trigger(0, 8), trigger(u64::MAX - 4, 4), with_value(8, u64::MAX)];
    let _bells = fine.map(|fine| kvm.new_ioeventfd(fine, None).unwrap());
}

#[test]
fn a_doorbell_that_the_kernel_refuses_is_none() {
    let (partition, recorder) = partition(true);
    recorder.fail([0]);
    match partition.new_ioeventfd(trigger(0x1000, 4), None) {
        Err(Error::Failed(failure)) => {
            assert_eq!((failure.error.errno, failure.gsi), (libc::ENOMEM, None));
            assert!(
                failure.to_string().starts_with("doorbell (MMIO 0x1000, 4 bytes): recorded call: "),
                "{failure}"
            );
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(partition.stats().unwrap().failures, 1);
    partition.new_ioeventfd(trigger(0x1000, 4), None).unwrap();
}

#[test]
fn a_doorbell_that_can_not_be_taken_away_keeps_its_address_and_is_tried_once_more() {
    let (partition, recorder) = partition(true);
    let (bell, other) = (
        partition.new_ioeventfd(trigger(0x1000, 4), None).unwrap(),
        partition.new_ioeventfd(trigger(0x2000, 4), None).unwrap(),
    );
    recorder.taken();
    recorder.fail([0]);
    assert!(matches!(bell.close(), Err(Error::Failed(_))));
    assert!(bell.is_closed());
    bell.close().unwrap();
    assert_eq!(recorder.taken(), [DeassignIoEventFd(trigger(0x1000, 4))]);
    let refused = partition.new_ioeventfd(trigger(0x1000, 4), None).unwrap_err().to_string();
    assert!(refused.contains("refused to take away"), "{refused}");
    partition.close().unwrap();
    assert_eq!(recorder.taken(), [DeassignIoEventFd(trigger(0x1000, 4)), DeassignIoEventFd(trigger(0x2000, 4))]);
    assert!(other.is_closed());
    other.close().unwrap();
    assert_eq!(recorder.taken(), []);
    assert!(matches!(partition.new_ioeventfd(trigger(0x1000, 4), None), Err(Error::Closed(_))));
}

#[test]
fn closing_takes_doorbells_away_and_goes_on_past_failures() {
    let (partition, recorder) = partition(true);
    let routes_ = routes(&partition, &recorder, 1);
    let bells = [0x1000, 0x2000].map(|address| partition.new_ioeventfd(trigger(address, 4), None).unwrap());
    recorder.taken();
    recorder.fail([1]);
    match partition.close() {
        Err(Error::Failed(failure)) => assert_eq!(failure.error.operation, Operation::DeassignIoEventFd),
        other => panic!("{other:?}"),
    }
    let away = |address| DeassignIoEventFd(trigger(address, 4));
    assert_eq!(recorder.taken(), [Deassign(24), away(0x1000), away(0x2000)]);
    assert!(routes_[0].is_closed() && bells.iter().all(IoEventFd::is_closed));
}

#[test]
fn an_msi_is_one_call_and_is_checked_as_those_of_routes_are() {
    let (partition, recorder) = partition(true);
    assert!(partition.signal_msi(msi(0x41)).unwrap());
    assert_eq!(recorder.taken(), [SignalMsi(0x41)]);
    match partition.signal_msi(missing()) {
        Err(Error::MissingVp { gsi: None, destination: 5, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(recorder.taken(), []);
    recorder.fail([0]);
    assert!(matches!(partition.signal_msi(msi(0x41)), Err(Error::Failed(_))));
    assert_eq!(partition.stats().unwrap().failures, 1);
    recorder.taken();
    partition.close().unwrap();
    assert!(matches!(partition.signal_msi(msi(0x41)), Err(Error::Closed(_))));
    assert_eq!(recorder.taken(), []);
}
