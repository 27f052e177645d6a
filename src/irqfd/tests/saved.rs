//! Saved and restored routes: the calls that are made, in which order, and what is left if one fails.

use super::*;

fn state(gsi: u32, vector: u8) -> RouteState {
    RouteState { gsi, masked: false, msi: Some(msi(vector).into()), pending: false }
}

fn states(count: u8) -> PartitionState {
    PartitionState { routes: (0..count).map(|at| state(25 + u32::from(at), 0x41 + at)).collect() }
}

fn readable(route: &IrqFdRoute) -> bool {
    route.shared().event.is_pending().unwrap()
}

fn refused<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn saving_disarms_each_armed_route_and_arms_it_again() {
    for setup in SETUPS {
        let (partition, recorder) = partition_of(setup);
        let routes_ = routes(&partition, &recorder, 3);
        routes_[1].mask().unwrap();
        routes_[1].signal(1).unwrap();
        recorder.taken();
        let saved = partition.save().unwrap().routes;
        assert_eq!(recorder.taken(), [Deassign(24), Deassign(26), Assign(24), Assign(26)]);
        let masked = RouteState { masked: true, pending: true, ..state(25, 0x42) };
        assert_eq!(saved, [state(24, 0x41), masked, state(26, 0x43)]);
        assert!(routes_[1].pending().unwrap());
        assert_eq!(recorder.kernel().undrained, 0);
        partition.lock().check();
    }
}

#[test]
fn a_route_that_saving_can_not_arm_again_waits_for_the_next_push() {
    let (partition, recorder) = partition(false);
    let routes_ = routes(&partition, &recorder, 3);
    recorder.fail([4]);
    assert!(refused(partition.save()).contains("waiting to be re-armed (signals wait"));
    assert_eq!(recorder.taken(), [Deassign(24), Deassign(25), Deassign(26), Assign(24), Assign(25), Assign(26)]);
    assert_eq!(routes_.iter().map(|route| route.armed().unwrap()).collect::<Vec<_>>(), [true, false, true]);
    partition.lock().check();
    assert_eq!(partition.save().unwrap().routes[1], state(25, 0x42));
    routes_[2].set_msi(msi(0x99)).unwrap();
    assert!(routes_[1].armed().unwrap());
}

#[test]
fn if_a_route_can_not_be_disarmed_saving_arms_the_others_again() {
    let (partition, recorder) = partition(true);
    let routes_ = routes(&partition, &recorder, 3);
    recorder.fail([1]);
    assert!(partition.save().is_err());
    assert_eq!(recorder.taken(), [Deassign(24), Deassign(25), Assign(24)]);
    assert!(routes_.iter().all(|route| route.armed().unwrap()));
    partition.lock().check();
}

#[test]
fn restoring_is_one_push_then_the_armings() {
    for setup in SETUPS {
        let (partition, recorder) = partition_of(setup);
        let mut state = states(3);
        state.routes[1].masked = true;
        state.routes[2].pending = true;
        let restored = partition.restore(&state, &[], false).unwrap();
        let calls = recorder.taken();
        assert!(matches!(calls[..], [Push(_), Assign(25), Assign(27)]), "{setup:?}: {calls:?}");
        assert_eq!(restored.keys().copied().collect::<Vec<_>>(), [25, 26, 27]);
        assert_eq!(partition.new_route(None).unwrap().gsi(), 24);
        partition.lock().check();
        let raised = recorder.kernel().raised.len();
        // Signalled once it is armed: this kernel leaves that in the counter.
        assert_eq!((raised, readable(&restored[&27])), (0, true));
    }
}

#[test]
fn what_waits_in_a_callers_eventfd_is_left_to_the_arming() {
    let (partition, recorder) = partition(true);
    let event = EventFd::new().unwrap();
    event.signal(3).unwrap();
    let mut state = states(1);
    state.routes[0].pending = true;
    let restored = partition.restore(&state, &[(25, event.as_raw_fd())], false).unwrap();
    assert_eq!(recorder.kernel().raised.values().map(Vec::len).sum::<usize>(), 1);
    assert!(!readable(&restored[&25]));
}

#[test]
fn whichever_call_fails_restoring_leaves_no_route_and_no_gsi_taken() {
    for setup in SETUPS {
        for failing in 0..8 {
            let (partition, recorder) = partition_of(setup);
            let route = partition.new_route(None).unwrap();
            route.set_msi(msi(0x90)).unwrap();
            let spare = |partition: &Partition| partition.lock().gsis.taken();
            recorder.taken();
            recorder.fail([failing]);
            let Err(error) = partition.restore(&states(4), &[], false) else {
                assert!(failing >= 4, "{setup:?}");
                break;
            };
            assert!(matches!(error, Error::Failed(_)), "{error}");
            assert_eq!((spare(&partition), route.armed().unwrap()), (1, true), "{setup:?}, call {failing}");
            assert_eq!(recorder.kernel().irqfds.len(), 1);
            partition.lock().check();
            assert_eq!(partition.restore(&states(4), &[], false).unwrap().len(), 4);
            assert_eq!(recorder.kernel().violations, [""; 0]);
        }
    }
}

#[test]
fn a_gsi_that_restoring_could_not_disarm_is_quarantined_and_in_no_state() {
    let (partition, recorder) = partition(true);
    // The push, the first arming, the second one, which fails, and the disarming of the first.
    recorder.fail([2, 3]);
    assert!(refused(partition.restore(&states(2), &[], false)).contains("left broken: GSI 25"));
    assert_eq!(partition.gsi_state(25).unwrap(), GsiState::Broken);
    assert_eq!(partition.gsi_state(26).unwrap(), GsiState::Unallocated);
    assert_eq!(partition.save().unwrap().routes, []);
    assert!(refused(partition.restore(&states(1), &[], false)).contains("routes[0].gsi: GSI 25 is quarantined"));
    partition.lock().check();
    recorder.taken();
    partition.close().unwrap();
    assert_eq!(recorder.taken(), [Deassign(25)]);
}

#[test]
fn a_state_that_is_refused_makes_no_call() {
    let (partition, recorder) = partition(true);
    let route = partition.new_route(None).unwrap();
    let with = |at: usize, new: RouteState| {
        let mut state = states(3);
        state.routes[at] = new;
        state
    };
    for (state, words) in [
        (with(1, state(24, 0x50)), "routes[1].gsi: GSI 24 is another route's"),
        (with(1, state(23, 0x50)), "routes[1].gsi: GSI 23 is outside gsis range(24, 32)"),
        (with(1, state(32, 0x50)), "routes[1].gsi: GSI 32 is outside gsis range(24, 32)"),
        (with(2, state(25, 0x50)), "routes[2].gsi: GSI 25 is that of routes[0] too"),
        (
            with(2, RouteState { msi: Some(Message { address: 0, data: 0x41 }), ..state(28, 0x50) }),
            "routes[2].msi: MSI address 0x0 is outside",
        ),
        (
            with(2, RouteState { msi: Some(missing().into()), ..state(28, 0x50) }),
            "routes[2].msi: GSI 28: no VP has",
        ),
    ] {
        let text = refused(partition.restore(&state, &[], false));
        assert!(text.starts_with(words), "{text}");
        assert_eq!((recorder.taken(), partition.lock().gsis.taken()), (vec![], 1));
    }
    drop(route);
    assert_eq!(partition.restore(&with(1, state(24, 0x50)), &[], false).unwrap().len(), 3);
}

#[test]
fn doorbells_ring_once_if_asked_but_not_those_of_a_routes_eventfd() {
    let (partition, _recorder) = partition(true);
    let bell = |address, event: Option<&EventFd>| {
        let trigger = Trigger { address, length: 4, datamatch: None, port: false };
        partition.new_ioeventfd(trigger, event.map(AsRawFd::as_raw_fd)).unwrap()
    };
    let event = EventFd::new().unwrap();
    let (bell, direct) = (bell(0x1000, None), bell(0x2000, Some(&event)));
    for (ring, count) in [(false, 0), (true, 1)] {
        let route = RouteState { masked: true, ..state(25, 0x41) };
        let state = PartitionState { routes: vec![route] };
        let _routes = partition.restore(&state, &[(25, event.as_raw_fd())], ring).unwrap();
        assert_eq!((bell.consume().unwrap(), direct.consume().unwrap()), (count, 0));
    }
}

#[test]
fn a_devices_routes_are_not_the_partitions_to_save() {
    let (partition, _recorder) = partition(true);
    let (_plain, device) = (partition.new_route(None).unwrap(), partition.new_device_route(None).unwrap());
    let gsis = || partition.save().unwrap().routes.iter().map(|route| route.gsi).collect::<Vec<_>>();
    assert_eq!(gsis(), [24]);
    assert_eq!(partition.save_routes(&[&device]).unwrap()[0].gsi, 25);
    device.close().unwrap();
    // Its GSI may go to a route that is no device's.
    let _next = partition.new_route(None).unwrap();
    assert_eq!(gsis(), [24, 25]);
}
