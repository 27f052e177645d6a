//! The calls that each change makes, in which order, and the changes that make none.

use super::*;

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
fn no_route_can_be_set_for_an_unallocated_gsi() {
    let (partition, _) = partition(true);
    let route = partition.new_route(None).unwrap();
    route.close().unwrap();
    let error = route.set_msi(msi(0x41)).unwrap_err();
    assert!(matches!(error, Error::Closed(_)));
    assert!(error.to_string().contains("unallocated"), "{error}");
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
