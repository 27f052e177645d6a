//! Calls that the kernel refuses: what the rollback leaves, what breaks, and what closing still does.

use super::*;

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
fn dropping_a_route_that_cannot_be_disarmed_quarantines_its_gsi_and_goes_on() {
    let (partition, recorder) = partition(true);
    let mut all = routes(&partition, &recorder, 2);
    recorder.fail([0]);
    drop(all.remove(0));
    assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Broken);
    assert!(all[0].armed().unwrap());
}
