//! Signals: how long they wait, and what becomes of those that arming leaves in a counter.

use super::*;

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
