//! The core's locks, tried in the orders in which threads can come: a few threads, a few operations, every rule.
//!
//! `make interleavings` builds this with shuttle in place of the standard library's locks. Its kernel delivers as the
//! real ones do: a write to an armed eventfd is an interrupt before the write returns, and arming leaves the counter.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, PoisonError};

use shuttle::sync::Mutex;
use shuttle::thread;

use super::*;
use crate::hypervisor::event::{EventFd, Holder, Share};
use crate::hypervisor::trigger::Trigger;
use crate::hypervisor::{Backend, CallError, CallResult, Hypervisor, Operation, RawMsi};

/// The kernel's number of an eventfd, which all its duplicates have.
type EventId = u64;

struct ShareOf(Share);

impl std::fmt::Debug for ShareOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", (*self.0).as_ref())
    }
}

#[derive(Debug, Default)]
struct Kernel {
    image: BTreeMap<u32, RawMsi>,
    table: BTreeMap<u32, RawMsi>,
    /// The GSI of each irqfd and its eventfd, by the eventfd's number.
    irqfds: BTreeMap<EventId, (u32, ShareOf)>,
    /// How many interrupts came, by eventfd.
    delivered: BTreeMap<EventId, u32>,
    /// The descriptor of each doorbell's eventfd, by address.
    doorbells: BTreeMap<u64, RawFd>,
    /// GSIs of which an arming is refused, once each, in this order.
    refused: VecDeque<u32>,
}

impl Kernel {
    fn deliver(&mut self, event: EventId) {
        check(self.table.contains_key(&self.irqfds[&event].0), "an irqfd is armed without an entry");
        *self.delivered.entry(event).or_default() += 1;
    }

    /// Empties the counter of an armed eventfd, as a write to it does.
    fn take(&mut self, event: EventId) {
        let armed = self.irqfds.get(&event).is_some_and(|(_, share)| (*share.0).as_ref().consume().unwrap() != 0);
        if armed {
            self.deliver(event);
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Guest(Arc<Mutex<Kernel>>);

/// Objects once: a check that has failed already drops its routes, and what those do then would end the process.
fn check(fine: bool, rule: &str) {
    assert!(fine || std::thread::panicking(), "{rule}");
}

impl Guest {
    /// Each call is a point at which another thread may come in.
    fn kernel<T>(&self, act: impl FnOnce(&mut Kernel) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What a write to the eventfd does.
    fn signal(&self, route: &IrqFdRoute) -> bool {
        self.kernel(|kernel| {
            let before = event_of(route);
            let written = route.signal(1).is_ok();
            if written {
                BTreeSet::from([before, event_of(route)]).into_iter().for_each(|event| kernel.take(event));
            }
            written
        })
    }
}

impl Hypervisor for Guest {
    fn set_entry(&mut self, gsi: u32, msi: RawMsi) {
        self.kernel(|kernel| kernel.image.insert(gsi, msi));
    }

    fn drop_entry(&mut self, gsi: u32) {
        self.kernel(|kernel| kernel.image.remove(&gsi));
    }

    fn push(&mut self) -> CallResult<usize> {
        self.kernel(|kernel| {
            check(kernel.irqfds.is_empty(), "a push meets an armed irqfd");
            kernel.table = kernel.image.clone();
            Ok(kernel.table.len())
        })
    }

    fn assign(&mut self, gsi: u32, event: &dyn Holder) -> CallResult {
        self.kernel(|kernel| {
            check(kernel.table.contains_key(&gsi), "an irqfd is armed without an entry");
            if kernel.refused.front() == Some(&gsi) {
                kernel.refused.pop_front();
                return Err(CallError::new(Operation::AssignIrqfd, "refused call", libc::ENOMEM));
            }
            let id = id_of(event.event());
            check(kernel.irqfds.insert(id, (gsi, ShareOf(event.share()))).is_none(), "an irqfd is armed twice");
            if event.event().is_readable().unwrap() {
                kernel.deliver(id);
            }
            Ok(())
        })
    }

    fn deassign(&mut self, gsi: u32, event: &EventFd) -> CallResult {
        let armed = self.kernel(|kernel| {
            kernel.take(id_of(event));
            kernel.irqfds.remove(&id_of(event))
        });
        check(armed.is_some_and(|(at, _)| at == gsi), "an irqfd is disarmed twice, or where it is not armed");
        Ok(())
    }

    fn drain(&mut self, events: &[&EventFd]) -> Vec<(usize, CallError)> {
        events.iter().for_each(|event| {
            self.kernel(|_| check(event.consume().is_ok(), "an eventfd that is armed can be read"));
        });
        Vec::new()
    }

    fn assign_ioeventfd(&mut self, trigger: Trigger, event: &dyn Holder) -> CallResult {
        let before = self.kernel(|kernel| kernel.doorbells.insert(trigger.address, event.event().as_raw_fd()));
        check(before.is_none(), "two doorbells collide");
        Ok(())
    }

    fn deassign_ioeventfd(&mut self, trigger: Trigger, event: &EventFd) -> CallResult {
        let there = self.kernel(|kernel| kernel.doorbells.remove(&trigger.address));
        check(there == Some(event.as_raw_fd()), "a doorbell is taken away twice");
        Ok(())
    }

    fn signal_msi(&mut self, _: RawMsi) -> CallResult<bool> {
        Ok(true)
    }

    fn create_vp(&mut self, _: u8) -> CallResult {
        Ok(())
    }

    fn fd(&self) -> Option<RawFd> {
        None
    }
}

struct Scene {
    partition: Arc<Partition>,
    guest: Guest,
    routes: Vec<Arc<IrqFdRoute>>,
}

fn msi(vector: u8) -> MsiRoute {
    MsiRoute::new(0xFEE0_0000, vector.into()).unwrap()
}

fn id_of(event: &EventFd) -> EventId {
    event.id().unwrap().unwrap()
}

/// The eventfd that a route has now.
fn event_of(route: &IrqFdRoute) -> EventId {
    id_of(&route.shared().event.get())
}

/// A partition with so many armed routes, where every other message is a push.
fn scene(count: u8) -> Scene {
    scene_with(count, Vec::new())
}

/// A partition with so many armed routes, where every message is loaded.
fn loaded_scene(count: u8) -> Scene {
    scene_with(count, std::iter::once(100..400).collect())
}

fn scene_with(count: u8, spares: Vec<std::ops::Range<u32>>) -> Scene {
    let guest = Guest::default();
    let config = Config { spares, ..Config::new(Backend::Mshv, 24..28) };
    let partition = Partition::new(Box::new(guest.clone()), config).unwrap();
    partition.create_vp(0).unwrap();
    let routes: Vec<_> = (0..count).map(|_| Arc::new(partition.new_route(None).unwrap())).collect();
    for (route, vector) in routes.iter().zip(0x41..) {
        route.set_msi(msi(vector)).unwrap();
    }
    Scene { partition, guest, routes }
}

type Act = Box<dyn FnOnce() + Send>;

fn together(acts: impl IntoIterator<Item = Act>) {
    let threads: Vec<_> = acts.into_iter().map(thread::spawn).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

impl Scene {
    fn act(&self, at: usize, act: impl FnOnce(&IrqFdRoute) + Send + 'static) -> Act {
        let route = Arc::clone(&self.routes[at]);
        Box::new(move || act(&route))
    }

    fn commit(&self, order: [usize; 2], vector: u8, refused: bool) -> Act {
        let (partition, routes) = (Arc::clone(&self.partition), self.routes.clone());
        Box::new(move || {
            let Ok(mut batch) = Batch::new(partition) else { return assert!(refused) };
            order.iter().for_each(|at| batch.set_msi(&routes[*at], msi(vector + *at as u8)));
            assert!(batch.commit().is_ok() || refused);
        })
    }

    fn signal(&self, at: usize) -> Act {
        let guest = self.guest.clone();
        self.act(at, move |route| assert!(guest.signal(route)))
    }

    fn delivered(&self, at: usize) -> u32 {
        let event = event_of(&self.routes[at]);
        self.guest.kernel(|kernel| kernel.delivered.get(&event).copied().unwrap_or_default())
    }

    /// How many interrupts came in all.
    fn delivered_to_any(&self) -> u32 {
        self.guest.kernel(|kernel| kernel.delivered.values().sum())
    }

    /// What is said of every route is so in the kernel. Delivers what armed eventfds were given without a signal.
    fn check(&self) {
        self.guest.kernel(|kernel| {
            let armed: Vec<_> = kernel.irqfds.keys().copied().collect();
            armed.into_iter().for_each(|event| kernel.take(event));
        });
        let table: BTreeMap<_, _> = self.partition.routing_table().unwrap().into_iter().collect();
        for route in self.routes.iter().filter(|route| !route.is_closed()) {
            let wanted = route.msi().unwrap().filter(|_| !route.masked().unwrap());
            self.guest.kernel(|kernel| {
                assert_eq!(kernel.table, table);
                let at = kernel.irqfds.get(&event_of(route)).map(|(at, _)| *at);
                assert_eq!((at.is_some(), at), (wanted.is_some(), route.armed_gsi().unwrap()));
                assert!(wanted.is_none_or(|msi| at.is_some_and(|at| table[&at] == msi.raw())));
            });
        }
    }
}

/// Tries interleavings at random, and those that a few changes of priority tell apart.
fn tried(scenario: impl Fn() + Copy + Send + Sync + 'static) {
    let tries = std::env::var("INTERLEAVINGS").ok().and_then(|tries| tries.parse().ok()).unwrap_or(2000);
    shuttle::check_random(scenario, tries);
    shuttle::check_pct(scenario, tries, 3);
}

#[test]
fn a_route_retargeted_while_another_is_signalled_loses_none_of_its_signals() {
    tried(|| {
        let scene = scene(2);
        let retarget = scene.act(1, |route| route.set_msi(msi(0x51)).unwrap());
        together([
            scene.act(0, |route| route.set_msi(msi(0x52)).unwrap()),
            retarget,
            scene.signal(0),
            scene.signal(0),
        ]);
        scene.check();
        assert!((1..=2).contains(&scene.delivered(0)));
        assert!(!scene.routes[0].pending().unwrap());
    });
}

#[test]
fn a_signal_is_consumed_or_delivered_and_never_both() {
    tried(|| {
        let scene = scene(1);
        let consumed = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let count = Arc::clone(&consumed);
        let consume = scene.act(0, move |route| {
            let taken = route.consume_pending().unwrap();
            count.fetch_add(taken.into(), std::sync::atomic::Ordering::Relaxed);
        });
        let mask = scene.act(0, |route| {
            route.mask().unwrap();
            route.unmask().unwrap();
        });
        together([mask, consume, scene.signal(0)]);
        scene.check();
        let consumed = consumed.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(scene.delivered(0) + consumed, 1);
    });
}

#[test]
fn batches_in_any_order_and_a_closing_partition_end_with_nothing_armed() {
    tried(|| {
        let scene = scene(2);
        let partition = Arc::clone(&scene.partition);
        let close = Box::new(move || partition.close().unwrap());
        let (maker, made) = (Arc::clone(&scene.partition), Arc::new(std::sync::OnceLock::new()));
        let keep = Arc::clone(&made);
        let make = Box::new(move || {
            if let Ok(route) = maker.new_route(None) {
                assert!(route.set_msi(msi(0x71)).is_ok() || maker.new_route(None).is_err());
                assert!(keep.set(route).is_ok());
            }
        });
        together([scene.commit([0, 1], 0x51, true), scene.commit([1, 0], 0x61, true), close, make]);
        assert!(scene.routes.iter().all(|route| route.is_closed()));
        assert!(made.get().is_none_or(IrqFdRoute::is_closed), "made while the partition was closed, and left open");
        assert!(scene.guest.kernel(|kernel| kernel.irqfds.is_empty()));
    });
}

#[test]
fn batches_over_the_same_routes_end_as_one_of_them() {
    tried(|| {
        let scene = scene(2);
        together([scene.commit([0, 1], 0x51, false), scene.commit([1, 0], 0x61, false), scene.signal(0)]);
        scene.check();
        let vectors = [0, 1].map(|at| scene.routes[at].msi().unwrap().unwrap().vector());
        assert!([[0x51, 0x52], [0x61, 0x62]].contains(&vectors), "{vectors:x?}");
        assert_eq!(scene.delivered(0), 1);
    });
}

#[test]
fn saving_beside_changes_and_signals_loses_nothing_and_sees_no_half_of_a_batch() {
    tried(|| {
        let scene = scene(2);
        let partition = Arc::clone(&scene.partition);
        let save: Act = Box::new(move || {
            let saved = partition.save().unwrap().routes;
            let vectors: Vec<_> = saved.iter().map(|route| route.msi.unwrap().data).collect();
            assert!([[0x41, 0x42], [0x51, 0x52]].contains(&[vectors[0], vectors[1]]), "{vectors:x?}");
        });
        together([save, scene.commit([1, 0], 0x51, false), scene.signal(0), scene.signal(1)]);
        scene.check();
        for at in 0..2 {
            assert!((1..=2).contains(&scene.delivered(at)));
            assert!(!scene.routes[at].pending().unwrap());
        }
    });
}

#[test]
fn routes_restored_beside_new_ones_and_a_closing_partition_are_closed_or_refused() {
    tried(|| {
        let scene = scene(1);
        let (partition, maker, closer) =
            (Arc::clone(&scene.partition), Arc::clone(&scene.partition), Arc::clone(&scene.partition));
        let restored = Arc::new(std::sync::OnceLock::new());
        let keep = Arc::clone(&restored);
        let restore: Act = Box::new(move || {
            let route = |gsi| RouteState { gsi, masked: false, msi: Some(msi(0x61).into()), pending: true };
            let state = PartitionState { routes: vec![route(26), route(27)] };
            if let Ok(routes) = partition.restore(&state, &[], false) {
                assert!(keep.set(routes).is_ok());
            }
        });
        let make = Box::new(move || drop(maker.new_route(None)));
        let guest = scene.guest.clone();
        // Refused once the route is closed.
        let signal = scene.act(0, move |route| _ = guest.signal(route));
        together([restore, make, signal, Box::new(move || closer.close().unwrap())]);
        let routes = restored.get().into_iter().flat_map(BTreeMap::values);
        assert!(routes.into_iter().all(IrqFdRoute::is_closed));
        assert!(scene.guest.kernel(|kernel| kernel.irqfds.is_empty()));
    });
}

#[test]
fn a_route_closed_under_its_users_is_closed_and_the_others_work() {
    tried(|| {
        let scene = scene(2);
        let refused = |result: Result| assert!(matches!(result, Ok(()) | Err(Error::Closed(_))));
        together([
            scene.act(0, |route| route.close().unwrap()),
            scene.act(0, move |route| refused(route.set_msi(msi(0x51)))),
            scene.act(0, move |route| refused(route.mask())),
            scene.commit([1, 0], 0x61, true),
        ]);
        scene.check();
        assert!(scene.routes[0].is_closed());
        let gsi = scene.routes[0].gsi();
        assert!(scene.guest.kernel(|kernel| !kernel.irqfds.values().any(|(at, _)| *at == gsi)));
        assert_eq!(scene.partition.new_route(None).unwrap().gsi(), gsi);
        assert!(scene.guest.signal(&scene.routes[1]));
        assert_eq!(scene.delivered(1), 1);
    });
}

#[test]
fn a_signal_of_a_route_that_is_masked_and_cleared_at_once_is_delivered_or_pending() {
    tried(|| {
        let scene = scene(1);
        let mask = scene.act(0, |route| route.mask().unwrap());
        let clear = scene.act(0, |route| route.clear_msi().unwrap());
        together([mask, clear, scene.signal(0)]);
        scene.check();
        let pending = u32::from(scene.routes[0].pending().unwrap());
        assert_eq!(scene.delivered(0) + pending, 1);
    });
}

#[test]
fn state_under_two_locks_is_published_whole() {
    tried(|| {
        let scene = scene(1);
        let other = scene.partition.new_route(None).unwrap();
        let (gsi, refused) = (scene.routes[0].gsi(), other.gsi());
        // The other one can't be armed, and then the first, which was quiesced for it, not again.
        scene.guest.kernel(|kernel| kernel.refused = VecDeque::from([refused, gsi]));
        let fail = Box::new(move || assert!(other.set_msi(msi(0x71)).is_err()));
        together([fail, scene.act(0, |route| route.set_msi(msi(0x51)).unwrap())]);
        let armed = scene.guest.kernel(|kernel| kernel.irqfds.values().any(|(at, _)| *at == gsi));
        assert_eq!(scene.routes[0].armed().unwrap(), armed);
        assert_eq!(scene.routes[0].msi().unwrap(), Some(msi(0x51)));
    });
}

#[test]
fn two_changes_of_one_route_at_once_end_as_one_of_them() {
    tried(|| {
        let scene = scene(1);
        together([0x51, 0x52].map(|vector| scene.act(0, move |route| route.set_msi(msi(vector)).unwrap())));
        scene.check();
        assert!([0x51, 0x52].contains(&scene.routes[0].msi().unwrap().unwrap().vector()));
    });
}

#[test]
fn routes_that_move_among_loaded_messages_lose_no_signal_and_make_no_push() {
    tried(|| {
        let scene = loaded_scene(2);
        let pushes = scene.partition.stats().unwrap().pushes;
        let mask = scene.act(1, |route| {
            route.mask().unwrap();
            route.unmask().unwrap();
        });
        together([
            scene.act(0, |route| route.set_msi(msi(0x52)).unwrap()),
            scene.act(0, |route| route.set_msi(msi(0x42)).unwrap()),
            mask,
            scene.signal(0),
            scene.signal(1),
        ]);
        scene.check();
        assert_eq!(scene.partition.stats().unwrap().pushes, pushes);
        assert_eq!([scene.delivered(0), scene.delivered(1)], [1, 1]);
    });
}

#[test]
fn two_routes_that_come_to_one_message_and_leave_it_share_its_entry() {
    tried(|| {
        let scene = loaded_scene(2);
        let there_and_back = |at: usize| {
            scene.act(at, move |route| {
                route.set_msi(msi(0x60)).unwrap();
                route.set_msi(msi(0x70 + at as u8)).unwrap();
            })
        };
        together([there_and_back(0), there_and_back(1), scene.signal(0), scene.signal(1)]);
        scene.check();
        assert_eq!([scene.delivered(0), scene.delivered(1)], [1, 1]);
    });
}

#[test]
fn a_signal_while_the_eventfd_is_replaced_is_delivered_or_pending() {
    for masked in [false, true] {
        let scenario = move || {
            let scene = scene(1);
            if masked {
                scene.routes[0].mask().unwrap();
            }
            let replace = scene.act(0, |route| route.set_event(None).unwrap());
            together([replace, scene.signal(0), scene.signal(0)]);
            scene.check();
            let pending = scene.routes[0].take_pending().unwrap();
            let (delivered, expected) = (scene.delivered_to_any(), if masked { 0..=0 } else { 1..=4 });
            assert!(expected.contains(&delivered), "{delivered} interrupts");
            // Each comes twice at most.
            assert!(if masked { (2..=4).contains(&pending) } else { pending == 0 }, "{pending} pending");
        };
        tried(scenario);
    }
}

#[test]
fn a_pending_signal_shows_while_the_eventfd_is_replaced_again_and_again() {
    tried(|| {
        let scene = scene(1);
        scene.routes[0].mask().unwrap();
        scene.routes[0].signal(3).unwrap();
        let replace = || scene.act(0, |route| route.set_event(None).unwrap());
        let look = scene.act(0, |route| (0..3).for_each(|_| assert!(route.pending().unwrap(), "it is pending")));
        together([replace(), replace(), look]);
        assert_eq!(scene.routes[0].take_pending().unwrap(), 3);
    });
}

#[test]
fn a_route_that_is_masked_and_gets_another_eventfd_at_once_loses_no_signal() {
    tried(|| {
        let scene = scene(2);
        let replace = scene.act(0, |route| route.set_event(None).unwrap());
        let mask = scene.act(0, |route| {
            route.mask().unwrap();
            route.unmask().unwrap();
        });
        let other = scene.act(1, |route| route.set_msi(msi(0x52)).unwrap());
        together([replace, mask, other, scene.signal(0)]);
        scene.check();
        assert!((1..=2).contains(&scene.delivered_to_any()), "{} interrupts", scene.delivered_to_any());
        assert!(!scene.routes[0].pending().unwrap());
    });
}

#[test]
fn a_signal_while_an_eventfd_moves_reaches_one_of_the_two_routes() {
    for signalled in [0, 1] {
        let scenario = move || {
            let scene = scene(2);
            let (partition, routes) = (Arc::clone(&scene.partition), scene.routes.clone());
            let moving: Act = Box::new(move || {
                let mut batch = Batch::new(partition).unwrap();
                batch.set_event(&routes[1], NewEvent::make(Some(routes[0].fileno().unwrap())).unwrap());
                batch.set_event(&routes[0], NewEvent::make(None).unwrap());
                batch.commit().unwrap();
            });
            together([moving, scene.signal(signalled)]);
            scene.check();
            assert!((1..=2).contains(&scene.delivered_to_any()), "{} interrupts", scene.delivered_to_any());
            assert!(scene.routes.iter().all(|route| !route.pending().unwrap()));
        };
        tried(scenario);
    }
}

#[test]
fn doorbells_made_and_closed_while_their_partition_closes_are_taken_away_once_each() {
    tried(|| {
        let scene = scene(1);
        let trigger = |address| Trigger { address, length: 4, datamatch: None, port: false };
        let bell = Arc::new(scene.partition.new_ioeventfd(trigger(0x1000), None).unwrap());
        let close = |bell: &Arc<IoEventFd>| -> Act {
            let bell = Arc::clone(bell);
            Box::new(move || bell.close().unwrap())
        };
        let make = |address| -> Act {
            let partition = Arc::clone(&scene.partition);
            Box::new(move || match partition.new_ioeventfd(trigger(address), None) {
                Ok(bell) => bell.close().unwrap(),
                Err(Error::Closed(_)) => {}
                // The other thread's, at the same address.
                Err(error) => assert!(matches!(error, Error::Invalid(_)), "{error}"),
            })
        };
        let partition = Arc::clone(&scene.partition);
        let end: Act = Box::new(move || partition.close().unwrap());
        together([close(&bell), close(&bell), make(0x2000), make(0x2000), end]);
        assert!(bell.is_closed());
        scene.guest.kernel(|kernel| assert!(kernel.doorbells.is_empty()));
    });
}
