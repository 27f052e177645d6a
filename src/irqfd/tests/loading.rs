//! The kernel's table as a cache: places of messages, pushes that load, and entries that are replaced.

use std::ops::Range;

use super::super::config::other_gsis;
use super::super::plan::Change;
use super::super::shared::Intent;
use super::*;

const LOADED: Setup = SETUPS[2];
const FEW: Setup = SETUPS[3];
/// Routes are always few, and a load costs four small pushes.
const SMALL: Setup = SETUPS[7];

fn pushes(calls: &[Call]) -> usize {
    calls.iter().filter(|call| matches!(call, Push(_))).count()
}

fn to(vector: u8, vp: u8) -> MsiRoute {
    MsiRoute::new(0xFEE0_0000 | u64::from(vp) << 12, vector.into()).unwrap()
}

/// A partition with armed routes on vectors 0x41, 0x42, ...
fn armed(setup: Setup, count: u8) -> (Arc<Partition>, Recorder, Vec<IrqFdRoute>) {
    let (partition, recorder) = partition_of(setup);
    let routes = routes(&partition, &recorder, count);
    (partition, recorder, routes)
}

#[test]
fn the_first_push_loads_every_vector_of_every_vp_and_leaves_the_routes_at_their_own_gsis() {
    let (partition, recorder, routes) = armed(LOADED, 2);
    let table = recorder.kernel().table.clone();
    let vectors: BTreeSet<_> = table.range(2000..).map(|(_, msi)| msi.data).collect();
    assert_eq!(vectors, (16..=255).collect());
    assert_eq!(routes.iter().map(|route| route.armed_gsi().unwrap()).collect::<Vec<_>>(), [Some(24), Some(25)]);
    let stats = partition.stats().unwrap();
    assert_eq!((stats.pushes, stats.misses, stats.hits, stats.entries_loaded), (1, 2, 0, 240));
}

#[test]
fn a_retarget_to_a_loaded_message_moves_that_route_alone() {
    let (partition, recorder, routes) = armed(LOADED, 3);
    routes[1].set_msi(msi(0x99)).unwrap();
    let spare = routes[1].armed_gsi().unwrap().unwrap();
    assert_eq!(recorder.taken(), [Deassign(25), Assign(spare)]);
    assert_eq!(recorder.kernel().table[&spare], msi(0x99).raw());
    // Back to the message at its own GSI.
    routes[1].set_msi(msi(0x42)).unwrap();
    assert_eq!(recorder.taken(), [Deassign(spare), Assign(25)]);
    let stats = partition.stats().unwrap();
    assert_eq!((stats.pushes, stats.hits), (1, 2));
    check_rules(&partition, &recorder, &routes, "moved there and back");
}

#[test]
fn routes_with_one_message_share_its_spare_gsi() {
    let (partition, recorder, routes) = armed(LOADED, 3);
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    routes.iter().for_each(|route| batch.set_msi(route, msi(0x77)));
    batch.commit().unwrap();
    let places: BTreeSet<_> = routes.iter().map(|route| route.armed_gsi().unwrap()).collect();
    assert_eq!((places.len(), pushes(&recorder.taken())), (1, 0));
    routes[0].close().unwrap();
    assert!(routes[1].armed().unwrap() && routes[2].armed().unwrap());
    check_rules(&partition, &recorder, &routes, "one of those that share is closed");
}

#[test]
fn routes_brought_up_one_by_one_cost_one_push() {
    let (partition, recorder) = partition_of(LOADED);
    let all: Vec<_> = (0x41..0x49).map(|vector| (partition.new_route(None).unwrap(), msi(vector))).collect();
    all.iter().for_each(|(route, msi)| route.set_msi(*msi).unwrap());
    assert_eq!(pushes(&recorder.taken()), 1);
    assert!(all.iter().all(|(route, _)| route.armed().unwrap()));
}

#[test]
fn a_vp_made_later_is_taken_along_with_the_next_push() {
    let (partition, recorder, routes) = armed(Setup { spares: 600, ..LOADED }, 2);
    partition.create_vp(1).unwrap();
    routes[0].set_msi(to(0x50, 1)).unwrap();
    assert_eq!(pushes(&recorder.taken()), 1);
    routes[1].set_msi(to(0x51, 1)).unwrap();
    assert_eq!(pushes(&recorder.taken()), 0);
    assert_eq!(partition.stats().unwrap().entries_loaded, 480 - 1, "the missed message is not loaded but placed");
}

#[test]
fn no_message_is_loaded_for_a_destination_without_a_vp() {
    let (_, recorder, routes) = armed(LOADED, 1);
    // A logical destination is not checked, and says nothing about VPs.
    routes[0].set_msi(MsiRoute::new(0xFEE0_3004, 0x41).unwrap()).unwrap();
    let kernel = recorder.kernel();
    let destinations: BTreeSet<_> =
        kernel.table.values().map(|msi| (msi.address >> 12 & 0xFF, msi.address & 4)).collect();
    assert_eq!(destinations, BTreeSet::from([(0, 0), (3, 4)]));
}

#[test]
fn a_message_without_a_vector_of_its_own_loads_nothing() {
    let (partition, recorder) = partition_of(LOADED);
    let route = partition.new_route(None).unwrap();
    let nmi = MsiRoute::new(0xFEE0_0000, 0x400).unwrap();
    route.set_msi(nmi).unwrap();
    assert_eq!(recorder.taken(), [Push(vec![(24, 0)]), Assign(24)]);
}

/// One of many NMIs, after which nothing is likely: what a push replaces is only what it must.
fn nmi(number: u8) -> MsiRoute {
    MsiRoute::new(0xFEE0_0000, 0x400 | u64::from(number)).unwrap()
}

#[test]
fn the_least_recently_used_entry_is_replaced_and_never_one_that_a_route_has_its_place_at() {
    let (partition, recorder) = partition_of(FEW);
    let routes: Vec<_> = (0..4).map(|_| partition.new_route(None).unwrap()).collect();
    routes.iter().zip(1..).for_each(|(route, number)| route.set_msi(nmi(number)).unwrap());
    // Four routes and three spare GSIs: each new message takes a spare one, as long as there is one without a route.
    routes[..3].iter().zip(11..).for_each(|(route, number)| route.set_msi(nmi(number)).unwrap());
    let spare = |route: &IrqFdRoute| route.armed_gsi().unwrap().filter(|gsi| *gsi >= 2000);
    assert_eq!(routes.iter().filter_map(spare).collect::<BTreeSet<_>>(), (2000..2003).collect());
    // The fourth finds none, and its own entry changes.
    routes[3].set_msi(nmi(14)).unwrap();
    assert_eq!(routes[3].armed_gsi().unwrap(), Some(27));
    // Routes 1 and then 0 go back to their own messages. Their spare entries stay until a miss replaces the older one.
    routes[1].set_msi(nmi(2)).unwrap();
    routes[0].set_msi(nmi(1)).unwrap();
    routes[3].set_msi(nmi(15)).unwrap();
    let there: Vec<_> = recorder.kernel().table.range(2000..).map(|(_, msi)| *msi).collect();
    assert!(!there.contains(&nmi(12).raw()) && there.contains(&nmi(11).raw()), "{there:?}");
    check_rules(&partition, &recorder, &routes, "an entry was replaced");
}

#[test]
fn a_masked_route_keeps_its_place_so_that_unmasking_pushes_nothing() {
    let (partition, recorder, routes) = armed(FEW, 2);
    routes[0].set_msi(msi(0x61)).unwrap();
    assert!(routes[0].armed_gsi().unwrap() >= Some(2000));
    routes[0].mask().unwrap();
    (0x70..0x80).for_each(|vector| routes[1].set_msi(msi(vector)).unwrap());
    recorder.taken();
    routes[0].unmask().unwrap();
    // At the spare GSI or, because those are few, brought home.
    assert!(matches!(recorder.taken()[..], [Assign(24 | 2000..)]));
    check_rules(&partition, &recorder, &routes, "unmasked");
}

#[test]
fn a_route_that_is_cleared_or_closed_gives_up_its_spare_gsi() {
    let leave: [fn(&IrqFdRoute) -> Result; 2] = [IrqFdRoute::clear_msi, IrqFdRoute::close];
    for leave in leave {
        let (partition, recorder, routes) = armed(LOADED, 2);
        routes.iter().for_each(|route| route.set_msi(msi(0x99)).unwrap());
        let place = routes[0].armed_gsi().unwrap().unwrap();
        let is_replaceable = || partition.lock().entries.is_replaceable(place);
        leave(&routes[0]).unwrap();
        assert!(!is_replaceable(), "the other route is there");
        routes[1].mask().unwrap();
        assert!(!is_replaceable(), "masked, it keeps its place");
        leave(&routes[1]).unwrap();
        assert!(is_replaceable());
        check_rules(&partition, &recorder, &routes, "both have left");
    }
}

#[test]
fn a_failed_push_loads_nothing_and_the_next_one_takes_nothing_along() {
    let (partition, recorder) = partition_of(LOADED);
    let route = partition.new_route(None).unwrap();
    recorder.fail([0]);
    assert!(route.set_msi(msi(0x41)).is_err());
    let Push(tried) = &recorder.taken()[0] else { panic!("no push") };
    assert_eq!((tried.len(), partition.stats().unwrap().entries_loaded), (241, 0));
    // A table of that size may be what the kernel had no memory for.
    route.set_msi(msi(0x41)).unwrap();
    assert_eq!(recorder.taken(), [Push(vec![(24, 0x41)]), Assign(24)]);
    route.set_msi(msi(0x42)).unwrap();
    assert!(matches!(&recorder.taken()[1], Push(entries) if entries.len() > 200));
    check_rules(&partition, &recorder, std::slice::from_ref(&route), "loaded in the end");
}

#[test]
fn a_move_that_fails_between_disarming_and_arming_ends_where_it_began() {
    let (partition, recorder, routes) = armed(LOADED, 2);
    routes[0].signal(1).unwrap();
    routes[0].shared().event.consume().unwrap();
    recorder.fail([1]);
    assert!(matches!(routes[0].set_msi(msi(0x99)), Err(Error::Failed(_))));
    assert!(matches!(recorder.taken()[..], [Deassign(24), Assign(2000..), Assign(24)]));
    assert_eq!((routes[0].armed_gsi().unwrap(), routes[0].msi().unwrap()), (Some(24), Some(msi(0x41))));
    check_rules(&partition, &recorder, &routes, "moved back");
}

#[test]
fn where_a_push_is_cheaper_than_a_move_the_table_stays_small_and_entries_change_in_place() {
    let setup = Setup { quiesce: false, spares: 300, entries_per_move: 4 };
    let (partition, recorder, mut routes) = armed(setup, 4);
    routes[0].set_msi(msi(0x99)).unwrap();
    assert_eq!(recorder.taken(), [Push(vec![(24, 0x99), (25, 0x42), (26, 0x43), (27, 0x44)])]);
    // With one route more a move is cheaper; the next message that is missed brings the others along.
    routes.push(partition.new_route(None).unwrap());
    routes[4].set_msi(msi(0x45)).unwrap();
    assert_eq!(pushes(&recorder.taken()), 1);
    routes[1].set_msi(msi(0x77)).unwrap();
    assert!(matches!(recorder.taken()[..], [Deassign(25), Assign(2000..)]));
    // Moving all that are at their own GSIs is dearer than one push.
    let setup = Setup { entries_per_move: 62, ..setup };
    let (partition, recorder) = partition_of(setup);
    let config = partition.config().clone();
    assert_eq!(config.entries_per_move, 62);
    let few = super::routes(&partition, &recorder, 4);
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    few.iter().zip(0x91..).for_each(|(route, vector)| batch.set_msi(route, msi(vector)));
    batch.commit().unwrap();
    assert!(matches!(&recorder.taken()[..], [Push(_)]));
    check_rules(&partition, &recorder, &few, "changed in place");
}

#[test]
fn where_a_push_is_cheaper_again_the_loaded_entries_leave_with_it() {
    let setup = Setup { quiesce: false, spares: 300, entries_per_move: 2 };
    let (partition, recorder, mut routes) = armed(setup, 4);
    assert!(recorder.kernel().table.len() > 200);
    routes.truncate(1);
    routes[0].set_msi(MsiRoute::new(0xFEE0_0008, 0x41).unwrap()).unwrap();
    assert_eq!(recorder.kernel().table.len(), 1);
    check_rules(&partition, &recorder, &routes, "small again");
}

#[test]
fn spare_gsis_that_are_in_other_use_or_too_many_are_refused() {
    let make = |gsis: Range<u32>, spares: Range<u32>, backend: Backend| {
        let keep = vec![(3000, msi(0x41).raw())];
        let spares = vec![spares; 1];
        let config = Config { adopted: true, keep, spares, ..Config::new(backend, gsis) };
        Partition::new(Box::new(Recorder::default()), config).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(make(24..32, 32..3000, Backend::Kvm), Ok(()));
    for (gsis, spares, words) in [
        (24..32, 31..40, "spare range(31, 40) overlaps gsis range(24, 32)"),
        (24..32, 2999..3001, "spare range(2999, 3001) has GSI 3000"),
        (24..32, 4000..4097, "spare range(4000, 4097) goes outside 0-4095"),
        (0..2, 2..4096, "4094 spare GSIs and 2 of gsis exceed the 4095 entries"),
    ] {
        let refused = make(gsis, spares, Backend::Mshv).unwrap_err();
        assert!(refused.contains(words), "{refused}");
    }
}

#[test]
fn a_gsi_that_is_spare_twice_is_refused() {
    let config = Config { spares: vec![40..50, 60..70, 49..51], ..Config::new(Backend::Mshv, 24..32) };
    let refused = Partition::new(Box::new(Recorder::default()), config).unwrap_err().to_string();
    assert!(refused.contains("spare range(49, 51) overlaps spare range(40, 50)"), "{refused}");
}

#[test]
fn spare_gsis_are_as_many_as_fit_beside_the_pins() {
    let spare = |gsis: Range<u32>, pins| {
        let spares = other_gsis(&gsis);
        let found = Config { spares, ..Config::new(Backend::Kvm, gsis) }.spare_gsis(pins);
        (found.first().copied(), found.last().copied(), found.len())
    };
    assert_eq!(spare(24..2072, true), (Some(2072), Some(4079), 2008));
    assert_eq!(spare(24..2072, false), (Some(2072), Some(4095), 2024));
    assert_eq!(spare(24..4080, true), (None, None, 0));
    assert_eq!(spare(24..4079, true), (Some(4079), Some(4079), 1));
    assert_eq!(spare(4095..4096, true), (Some(24), Some(4078), 4055));
    assert_eq!(spare(0..4096, false), (None, None, 0));
    assert_eq!(spare(4095..4096, false), (Some(24), Some(4094), 4071));
}

#[test]
fn ranges_of_gsis_at_the_edges_work_with_every_other_gsi_spare() {
    let mshv = [0..4096, 24..4096, 4095..4096, 10..12].map(|gsis| (Backend::Mshv, gsis));
    for (backend, gsis) in mshv.into_iter().chain([24..4090, 4094..4096].map(|gsis| (Backend::Kvm, gsis))) {
        let recorder = Recorder::default();
        let config =
            Config { spares: other_gsis(&gsis), entries_per_move: 0, ..Config::new(backend, gsis.clone()) };
        let partition = Partition::new(Box::new(recorder.clone()), config).unwrap();
        (0..4).for_each(|vp| partition.create_vp(vp).unwrap());
        recorder.kernel().quiesced = partition.config().quiesce;
        let routes: Vec<_> = (0..gsis.len().min(2)).map(|_| partition.new_route(None).unwrap()).collect();
        for round in 0..3 {
            for (route, vp) in routes.iter().zip(0..) {
                route.set_msi(to(0x41 + round, vp + round)).unwrap();
                route.mask().unwrap();
                route.unmask().unwrap();
            }
        }
        let table = recorder.kernel().table.clone();
        assert!(
            table.keys().all(|gsi| gsis.contains(gsi) || *gsi >= 24),
            "the IOAPIC's pins are nobody's spare GSIs"
        );
        assert_eq!(table.len() > 2, !matches!(gsis, Range { start: 0..=24, end: 4096 }), "{gsis:?}");
        check_rules(&partition, &recorder, &routes, &format!("{gsis:?}"));
        drop(routes);
        partition.lock().check();
    }
}

#[test]
fn where_most_spare_gsis_are_taken_a_quiesced_push_brings_the_routes_home() {
    let (partition, recorder, routes) = armed(FEW, 4);
    for (route, vector) in routes.iter().zip([0x90, 0x80, 0x70]) {
        route.set_msi(msi(vector)).unwrap();
    }
    // Two of the three spare GSIs are taken when the third route misses. It goes to the last one, and they go home.
    let places: Vec<_> = routes.iter().map(|route| route.armed_gsi().unwrap().unwrap()).collect();
    assert_eq!((places[0], places[1], places[2] >= 2000), (24, 25, true), "{places:?}");
    let table = recorder.kernel().table.clone();
    assert_eq!([table[&24], table[&25]], [msi(0x90).raw(), msi(0x80).raw()]);
    check_rules(&partition, &recorder, &routes, "brought home");
}

#[test]
fn a_push_that_fails_brings_nobody_home() {
    let (partition, recorder, routes) = armed(FEW, 4);
    for (route, vector) in routes.iter().zip([0x90, 0x80]) {
        route.set_msi(msi(vector)).unwrap();
    }
    let held = |kernel: &Kernel| (kernel.irqfds.clone(), kernel.table.clone(), kernel.image.clone());
    let before = held(&recorder.kernel());
    // Four irqfds are disarmed, and the push fails.
    recorder.fail([4]);
    assert!(routes[2].set_msi(msi(0x70)).is_err());
    assert_eq!(held(&recorder.kernel()), before);
    recorder.fail([]);
    routes[2].set_msi(msi(0x70)).unwrap();
    check_rules(&partition, &recorder, &routes, "after the next push");
}

/// A partition with three spare GSIs, which have the messages 2, 3 and 4, and a route armed at its own with message 1.
/// The entries were used in that order, and nothing is likely next.
fn full() -> (Arc<Partition>, Recorder, IrqFdRoute) {
    let (partition, recorder) = partition_of(FEW);
    let route = partition.new_route(None).unwrap();
    [1, 2, 3, 4, 1].into_iter().for_each(|number| route.set_msi(nmi(number)).unwrap());
    assert_eq!(loaded(&recorder), [nmi(2), nmi(3), nmi(4)].map(MsiRoute::raw));
    recorder.taken();
    (partition, recorder, route)
}

/// The messages at spare GSIs.
fn loaded(recorder: &Recorder) -> Vec<RawMsi> {
    recorder.kernel().table.range(2000..).map(|(_, msi)| *msi).collect()
}

#[test]
fn a_message_whose_entry_was_replaced_is_pushed_again() {
    let (partition, recorder, route) = full();
    route.set_msi(nmi(5)).unwrap();
    assert_eq!(loaded(&recorder), [nmi(5), nmi(3), nmi(4)].map(MsiRoute::raw));
    recorder.taken();
    route.set_msi(nmi(2)).unwrap();
    assert_eq!(pushes(&recorder.taken()), 1);
    check_rules(&partition, &recorder, &[route], "a replaced message is back");
}

#[test]
fn closing_one_of_the_routes_that_share_leaves_the_entry_to_the_others() {
    let (partition, recorder, first) = full();
    let second = partition.new_route(None).unwrap();
    [6, 2].into_iter().for_each(|number| second.set_msi(nmi(number)).unwrap());
    first.set_msi(nmi(2)).unwrap();
    assert_eq!((first.armed_gsi().unwrap(), second.armed_gsi().unwrap()), (Some(2000), Some(2000)));
    first.close().unwrap();
    let third = partition.new_route(None).unwrap();
    (7..14).for_each(|number| third.set_msi(nmi(number)).unwrap());
    assert_eq!(second.armed_gsi().unwrap(), Some(2000));
    check_rules(&partition, &recorder, &[second, third], "all other entries are replaced");
}

#[test]
fn a_place_found_in_a_batch_is_not_replaced_by_the_same_batch() {
    let (partition, recorder, first) = full();
    let second = partition.new_route(None).unwrap();
    second.set_msi(nmi(6)).unwrap();
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    batch.set_msi(&first, nmi(2));
    batch.set_msi(&second, nmi(7));
    batch.commit().unwrap();
    assert_eq!(loaded(&recorder), [nmi(2), nmi(7), nmi(4)].map(MsiRoute::raw));
    check_rules(&partition, &recorder, &[first, second], "one found, one replaced");
}

#[test]
fn a_push_that_fails_replaces_no_entry() {
    let (partition, recorder, first) = full();
    recorder.fail([1]);
    assert!(first.set_msi(nmi(5)).is_err());
    recorder.taken();
    first.set_msi(nmi(2)).unwrap();
    assert!(matches!(recorder.taken()[..], [Deassign(24), Assign(2000)]));
    let second = partition.new_route(None).unwrap();
    second.set_msi(nmi(6)).unwrap();
    assert_eq!(loaded(&recorder), [nmi(2), nmi(3), nmi(4)].map(MsiRoute::raw));
    check_rules(&partition, &recorder, &[first, second], "after the next push");
}

#[test]
fn a_move_that_fails_gives_its_place_up_again() {
    let (partition, recorder, route) = full();
    recorder.fail([1]);
    assert!(route.set_msi(nmi(2)).is_err());
    [5, 6, 7].into_iter().for_each(|number| route.set_msi(nmi(number)).unwrap());
    // Trying was the latest use of message 2, so its entry is the last to be replaced.
    assert_eq!(loaded(&recorder), [nmi(7), nmi(5), nmi(6)].map(MsiRoute::raw));
    check_rules(&partition, &recorder, &[route], "all are replaced");
}

#[test]
fn a_route_that_breaks_while_its_change_waits_for_the_partition_is_refused() {
    for setup in [LOADED, FEW] {
        let (partition, recorder, routes) = armed(setup, 3);
        routes[1].set_msi(msi(0x61)).unwrap();
        let place = routes[1].armed_gsi().unwrap().unwrap();
        assert!(place >= FIRST_SPARE);
        std::thread::scope(|scope| {
            let mut state = partition.lock();
            let late = scope.spawn(|| routes[1].set_msi(msi(0x62)));
            while !partition.is_awaited() {
                std::thread::yield_now();
            }
            // Another route's push finds the eventfd closed. The change that waits has seen its route in order.
            recorder.kernel().closed_events.insert(event_of(&routes[1]));
            let wanted = Intent { msi: Some(nmi(1)), ..Intent::default() };
            state.apply(&mut [Change::to(0, wanted)]).unwrap();
            drop(state);
            assert!(matches!(late.join().unwrap(), Err(Error::Broken(25))));
        });
        assert_eq!(routes[1].state().unwrap(), GsiState::Broken);
        let at = recorder.kernel().irqfds[&event_of(&routes[1])];
        assert_eq!((at, recorder.kernel().table[&at]), (place, msi(0x61).raw()));
        partition.lock().check();
        recorder.kernel().closed_events.clear();
        routes[1].close().unwrap();
        partition.lock().check();
    }
}

#[test]
fn a_likely_message_whose_entry_a_miss_replaces_is_loaded_elsewhere() {
    let (partition, recorder, routes) = armed(Setup { spares: 300, ..LOADED }, 1);
    // 240 of 300 spare GSIs hold what is likely. These messages have no vector, and take the others and more.
    let mut others: Vec<_> = (0..4).map(|_| partition.new_route(None).unwrap()).collect();
    for number in 1..=70 {
        others[0].set_msi(nmi(number)).unwrap();
        others.rotate_left(1);
    }
    let kernel = recorder.kernel();
    let there: Vec<_> = kernel.table.range(FIRST_SPARE..).map(|(_, msi)| *msi).collect();
    let missing: Vec<_> = (16..=255).filter(|vector| !there.contains(&msi(*vector).raw())).collect();
    assert_eq!(missing, Vec::<u8>::new());
    drop(kernel);
    check_rules(&partition, &recorder, &routes, "after many misses");
}

#[test]
fn a_push_made_anyway_changes_entries_in_place_of_those_alone_that_are_armed_at_their_own_gsis() {
    let (partition, recorder, routes) = armed(Setup { quiesce: false, spares: 300, entries_per_move: 2 }, 4);
    routes[0].set_msi(msi(0x99)).unwrap();
    let spare = |vector| partition.lock().entries.spare_of(msi(vector).raw()).unwrap();
    let (from, to) = (spare(0x99), spare(0x9A));
    assert_eq!(recorder.taken(), [Deassign(24), Assign(from)]);
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    batch.set_msi(&routes[0], msi(0x9A));
    batch.set_msi(&routes[1], msi(0x9B));
    batch.set_msi(&routes[2], nmi(1));
    batch.commit().unwrap();
    let calls = recorder.taken();
    assert!(matches!(calls[..], [Deassign(_), Push(_), Assign(_)]), "{calls:?}");
    assert_eq!((&calls[0], &calls[2], spare(0x9A)), (&Deassign(from), &Assign(to), to));
    assert_eq!([1, 2].map(|at| routes[at].armed_gsi().unwrap()), [Some(25), Some(26)]);
    check_rules(&partition, &recorder, &routes, "one miss and two hits");
}

#[test]
fn a_route_that_can_not_be_disarmed_keeps_its_spare_entry_through_pushes_that_bring_others_home() {
    for broken_before in [false, true] {
        let (partition, recorder, routes) = armed(FEW, 4);
        routes[0].set_msi(nmi(9)).unwrap();
        let (place, event) = (routes[0].armed_gsi().unwrap().unwrap(), event_of(&routes[0]));
        assert!(place >= FIRST_SPARE);
        recorder.kernel().closed_events.insert(event);
        if broken_before {
            assert!(routes[0].close().is_err());
        }
        for (at, vector) in [(1, 0x80), (2, 0x70), (3, 0x60), (1, 0x81), (2, 0x71)] {
            routes[at].set_msi(msi(vector)).unwrap();
            let kernel = recorder.kernel();
            assert_eq!((kernel.irqfds[&event], kernel.table[&place]), (place, nmi(9).raw()));
            drop(kernel);
            check_rules(&partition, &recorder, &routes, "another route has missed");
        }
        assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Broken);
        // The others were brought home on the way.
        assert!(routes[1..].iter().filter(|route| route.armed_gsi().unwrap() < Some(FIRST_SPARE)).count() >= 2);
    }
}

#[test]
fn a_broken_route_that_a_later_push_disarms_gives_up_its_spare_gsi() {
    let (partition, recorder, routes) = armed(FEW, 4);
    routes[0].set_msi(msi(0x90)).unwrap();
    let place = routes[0].armed_gsi().unwrap().unwrap();
    recorder.fail([0]);
    assert!(routes[0].close().is_err());
    assert_eq!(recorder.kernel().armed().len(), 4);
    routes[1].set_msi(msi(0x80)).unwrap();
    assert_eq!(recorder.kernel().armed().len(), 3, "the push disarmed it");
    check_rules(&partition, &recorder, &routes, "disarmed after all");
    assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Broken);
    (0x60..0x68).for_each(|vector| routes[1].set_msi(msi(vector)).unwrap());
    assert_ne!(recorder.kernel().table[&place], msi(0x90).raw(), "its spare GSI is used again");
    assert!(!recorder.kernel().table.contains_key(&24));
}

#[test]
fn an_arming_that_fails_after_others_were_brought_home_leaves_them_there_and_its_route_where_it_was() {
    let (partition, recorder, routes) = armed(FEW, 4);
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    for (route, number) in routes.iter().zip([9, 9, 8]) {
        batch.set_msi(route, nmi(number));
    }
    batch.commit().unwrap();
    let shared = routes[1].armed_gsi().unwrap();
    assert!(shared >= Some(FIRST_SPARE) && shared == routes[0].armed_gsi().unwrap());
    // The second route takes the last spare GSI, so the first and the third go home. The first leaves the second alone at
    // a GSI that it needs again, and the third leaves one that is loaded at once.
    let left = routes[2].armed_gsi().unwrap().unwrap();
    recorder.fail([5]);
    recorder.taken();
    assert!(routes[1].set_msi(msi(0x80)).is_err());
    assert!(matches!(recorder.taken()[4..6], [Push(_), Assign(FIRST_SPARE..)]));
    let places: Vec<_> = routes.iter().map(|route| route.armed_gsi().unwrap()).collect();
    assert_eq!(places, [Some(24), shared, Some(26), Some(27)]);
    assert_ne!(recorder.kernel().table[&left], nmi(8).raw());
    check_rules(&partition, &recorder, &routes, "arming failed");
}

#[test]
fn where_pushes_are_quiesced_no_number_of_entries_makes_a_push_cheaper_than_a_move() {
    let (_, recorder, routes) = armed(Setup { quiesce: true, spares: 300, entries_per_move: 64 }, 3);
    routes[0].set_msi(msi(0x99)).unwrap();
    assert!(matches!(recorder.taken()[..], [Deassign(24), Assign(FIRST_SPARE..)]));
}

#[test]
fn one_push_takes_the_place_of_as_many_moves_as_are_dearer() {
    // Seven entries: a push of them costs more than three moves, and less than four.
    let setup = Setup { quiesce: false, spares: 3, entries_per_move: 2 };
    for (masked, expected) in [(false, 1), (true, 0)] {
        let (partition, recorder, routes) = armed(setup, 4);
        assert_eq!(recorder.kernel().table.len(), 7);
        if masked {
            // To arm this one is no move.
            routes[3].mask().unwrap();
        }
        let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
        routes.iter().zip([0x45, 0x46, 0x47, 0x45]).for_each(|(route, vector)| batch.set_msi(route, msi(vector)));
        batch.unmask(&routes[3]);
        recorder.taken();
        batch.commit().unwrap();
        let calls = recorder.taken();
        assert_eq!((pushes(&calls), calls.len()), (expected, if masked { 7 } else { 1 }), "{calls:?}");
        let stats = partition.stats().unwrap();
        assert_eq!((stats.hits, stats.misses, stats.pushes), (4, 4, 1 + expected as u64));
        check_rules(&partition, &recorder, &routes, "all were hits");
    }
}

/// Gives a route another message as a guest does that masks it meanwhile. Returns the number of pushes.
fn retarget_masked(recorder: &Recorder, route: &IrqFdRoute, msi: MsiRoute) -> usize {
    route.mask().unwrap();
    route.set_msi(msi).unwrap();
    recorder.taken();
    route.unmask().unwrap();
    pushes(&recorder.taken())
}

/// A partition with few routes whose table masked retargets have loaded. Routes 1 to 3 are at their own GSIs still.
fn loaded_for_few() -> (Arc<Partition>, Recorder, Vec<IrqFdRoute>) {
    let (partition, recorder, routes) = armed(SMALL, 4);
    (0x61..0x66).for_each(|vector| _ = retarget_masked(&recorder, &routes[0], msi(vector)));
    assert!(loaded(&recorder).len() > 200 && routes[0].armed_gsi().unwrap() >= Some(FIRST_SPARE));
    (partition, recorder, routes)
}

#[test]
fn masked_retargets_of_few_routes_load_the_table_once_they_have_cost_as_much() {
    let (partition, recorder, routes) = armed(SMALL, 4);
    for vector in 0x61..0x64 {
        assert_eq!(retarget_masked(&recorder, &routes[1], msi(vector)), 1);
        assert_eq!(loaded(&recorder), []);
    }
    assert_eq!(retarget_masked(&recorder, &routes[1], msi(0x64)), 1);
    assert_eq!((loaded(&recorder).len(), routes[1].armed_gsi().unwrap()), (240, Some(25)));
    for (route, vector) in routes.iter().cycle().take(20).zip(0x71..) {
        assert_eq!(retarget_masked(&recorder, route, msi(vector)), 0);
    }
    assert_eq!(partition.stats().unwrap().hits, 20);
    check_rules(&partition, &recorder, &routes, "retargeted masked");
}

#[test]
fn a_masked_retarget_that_fails_counts_for_nothing() {
    let (partition, recorder, routes) = armed(SMALL, 4);
    (0x61..0x64).for_each(|vector| _ = retarget_masked(&recorder, &routes[1], msi(vector)));
    routes[1].mask().unwrap();
    routes[1].set_msi(msi(0x64)).unwrap();
    recorder.fail([0]);
    assert!(routes[1].unmask().is_err());
    recorder.fail([]);
    routes[2].set_msi(msi(0x70)).unwrap();
    let tables = [0x65, 0x66].map(|vector| {
        retarget_masked(&recorder, &routes[1], msi(vector));
        loaded(&recorder).len()
    });
    assert_eq!(tables, [0, 240]);
    check_rules(&partition, &recorder, &routes, "one failed");
}

#[test]
fn few_routes_that_are_brought_up_again_and_again_keep_a_small_table() {
    let (partition, recorder) = partition_of(SMALL);
    for round in 0..10 {
        let routes: Vec<_> = (0..4).map(|_| partition.new_route(None).unwrap()).collect();
        routes.iter().zip(0x41 + round * 4..).for_each(|(route, vector)| route.set_msi(msi(vector)).unwrap());
        routes.iter().for_each(|route| route.clear_msi().unwrap());
        routes.iter().zip(0x42 + round * 4..).for_each(|(route, vector)| route.set_msi(msi(vector)).unwrap());
        check_rules(&partition, &recorder, &routes, "brought up twice");
    }
    assert_eq!(loaded(&recorder), []);
}

#[test]
fn few_routes_that_are_retargeted_masked_as_often_as_armed_keep_a_small_table() {
    let (partition, recorder, routes) = armed(SMALL, 4);
    for vector in (0x51..0x80).step_by(2) {
        assert_eq!(retarget_masked(&recorder, &routes[1], msi(vector)), 1);
        routes[2].set_msi(msi(vector + 1)).unwrap();
        assert!(matches!(&recorder.taken()[..], [Push(entries)] if entries.len() == 4));
    }
    check_rules(&partition, &recorder, &routes, "retargeted in turn");
}

#[test]
fn armed_retargets_of_few_routes_make_a_loaded_table_small_again_and_bring_them_home() {
    let (partition, recorder, routes) = loaded_for_few();
    // The load has saved four pushes, and another one since.
    for (vector, route) in (0x71..0x75).zip([0, 1, 0, 1]) {
        routes[route].set_msi(msi(vector)).unwrap();
        assert!(matches!(recorder.taken()[..], [Deassign(_), Assign(FIRST_SPARE..)]));
    }
    let (from, other) = (routes[0].armed_gsi().unwrap().unwrap(), routes[1].armed_gsi().unwrap().unwrap());
    routes[0].set_msi(msi(0x75)).unwrap();
    let calls = recorder.taken();
    assert_eq!((&calls[0], &calls[2..]), (&Deassign(from), &[Assign(24)][..]));
    // Where a route is, or was until now, the entry stays.
    let expected = [(24, 0x75), (25, 0x42), (26, 0x43), (27, 0x44), (from, 0x73), (other, 0x74)];
    assert_eq!(calls[1], Push(expected.into()));
    routes[0].set_msi(msi(0x76)).unwrap();
    assert!(matches!(&recorder.taken()[..], [Push(entries)] if entries.len() == 5));
    // A message at its own GSI needs no push to go home to.
    routes[1].set_msi(msi(0x42)).unwrap();
    assert_eq!(recorder.taken(), [Deassign(other), Assign(25)]);
    routes[1].set_msi(msi(0x77)).unwrap();
    assert!(matches!(&recorder.taken()[..], [Push(entries)] if entries.len() == 4));
    check_rules(&partition, &recorder, &routes, "small again");
}

#[test]
fn a_miss_makes_the_table_of_few_routes_small_unless_it_has_served_for_long() {
    for served in [false, true] {
        let (partition, recorder, routes) = armed(SMALL, 4);
        (0x61..if served { 0x70 } else { 0x65 })
            .for_each(|vector| _ = retarget_masked(&recorder, &routes[1], msi(vector)));
        assert_eq!(loaded(&recorder).len(), 240);
        for expected in [served, false] {
            let calls = [0, 1].map(|_| retarget_masked(&recorder, &routes[2], nmi(9)));
            assert_eq!((calls, loaded(&recorder).len() > 200), ([1, 0], expected), "{served}");
            assert_eq!(retarget_masked(&recorder, &routes[2], nmi(8)), 1);
        }
        check_rules(&partition, &recorder, &routes, "missed");
    }
}

#[test]
fn a_route_that_is_brought_home_and_fails_is_where_it_was() {
    for failing in 0..32u32 {
        let (partition, recorder, routes) = loaded_for_few();
        (0x71..0x75).for_each(|vector| routes[0].set_msi(msi(vector)).unwrap());
        let before = routes[0].armed_gsi().unwrap();
        assert!(before >= Some(FIRST_SPARE));
        recorder.taken();
        recorder.fail((0..5).filter(|call| failing & 1 << call != 0));
        let result = routes[0].set_msi(msi(0x7F));
        let (made, context) = (recorder.taken(), format!("{failing:#b}"));
        recorder.fail([]);
        assert_eq!(pushes(&made), usize::from(failing & 1 == 0), "{context}");
        assert_eq!(result.is_ok(), failing & 0b111 == 0, "{context}");
        check_rules(&partition, &recorder, &routes, &context);
        if (failing & 0b111).count_ones() == 1 && failing >> 3 == 0 {
            assert_eq!((routes[0].armed_gsi().unwrap(), routes[0].msi().unwrap()), (before, Some(msi(0x74))));
        }
    }
}
