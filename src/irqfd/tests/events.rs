//! Eventfds that take the place of others: swaps, moves between routes, what they carry, and what refuses them.

use super::*;

const PLAIN: Setup = SETUPS[0];
const QUIESCED: Setup = SETUPS[1];
const LOADED: Setup = SETUPS[2];

/// A partition with armed routes on vectors 0x41, 0x42, ...
fn armed(setup: Setup, count: u8) -> (Arc<Partition>, Recorder, Vec<IrqFdRoute>) {
    let (partition, recorder) = partition_of(setup);
    let routes = routes(&partition, &recorder, count);
    (partition, recorder, routes)
}

/// Writes to an eventfd as its device does, and returns the vectors raised.
fn signal(recorder: &Recorder, event: &EventFd) -> Vec<u32> {
    event.signal(1).unwrap();
    let mut kernel = recorder.kernel();
    let id = id_of(event);
    if kernel.irqfds.contains_key(&id) && event.consume().unwrap() != 0 {
        kernel.raise(id);
    }
    kernel.raised.remove(&id).unwrap_or_default().iter().map(|msi| msi.data).collect()
}

fn given(event: &EventFd) -> NewEvent {
    NewEvent::make(Some(event.as_raw_fd())).unwrap()
}

#[test]
fn a_new_eventfd_is_armed_in_place_of_the_old_one_without_a_push_or_a_call_for_others() {
    for setup in [PLAIN, QUIESCED, LOADED] {
        let (partition, recorder, routes) = armed(setup, 3);
        let (old, new) = (routes[1].shared().event.get(), EventFd::new().unwrap());
        routes[1].set_event(Some(new.as_raw_fd())).unwrap();
        assert_eq!(recorder.taken(), [Deassign(25), Assign(25)]);
        assert_eq!(
            (event_of(&routes[1]), routes[1].fileno().unwrap()),
            (id_of(&new), routes[1].shared().event.fd())
        );
        assert_eq!((signal(&recorder, &new), signal(&recorder, &old)), (vec![0x42], vec![]));
        check_rules(&partition, &recorder, &routes, "with a new eventfd");
    }
}

#[test]
fn a_route_at_a_spare_gsi_stays_there() {
    let (partition, recorder, routes) = armed(LOADED, 2);
    routes[0].set_msi(msi(0x99)).unwrap();
    let spare = routes[0].armed_gsi().unwrap().unwrap();
    recorder.taken();
    routes[0].set_event(None).unwrap();
    assert_eq!(recorder.taken(), [Deassign(spare), Assign(spare)]);
    check_rules(&partition, &recorder, &routes, "at a spare GSI");
}

#[test]
fn the_eventfd_that_a_route_has_already_makes_no_call_and_stays() {
    let (partition, recorder, routes) = armed(QUIESCED, 1);
    let (before, fd) = (event_of(&routes[0]), routes[0].fileno().unwrap());
    routes[0].set_event(Some(fd)).unwrap();
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    batch.set_event(&routes[0], duplicate(&routes[0]));
    batch.commit().unwrap();
    assert_eq!((recorder.taken(), event_of(&routes[0]), routes[0].fileno().unwrap()), (vec![], before, fd));
}

#[test]
fn a_disarmed_route_changes_its_eventfd_without_a_call_and_carries_all_signals_over() {
    let (_partition, recorder, routes) = armed(QUIESCED, 1);
    routes[0].mask().unwrap();
    recorder.taken();
    let (old, new) = (routes[0].shared().event.get(), EventFd::new().unwrap());
    new.signal(2).unwrap();
    routes[0].signal(3).unwrap();
    routes[0].set_event(Some(new.as_raw_fd())).unwrap();
    assert_eq!((recorder.taken(), old.consume().unwrap()), (vec![], 0));
    old.signal(1).unwrap();
    assert_eq!(routes[0].take_pending().unwrap(), 5, "those of both, and none that came to the old one afterwards");
    for count in [0, 1] {
        (0..count).for_each(|_| routes[0].signal(1).unwrap());
        routes[0].set_event(None).unwrap();
        assert_eq!(routes[0].take_pending().unwrap(), count);
    }
}

#[test]
fn a_full_eventfd_is_carried_over_whole() {
    let (_partition, _recorder, routes) = armed(QUIESCED, 1);
    routes[0].mask().unwrap();
    routes[0].signal(u64::MAX - 1).unwrap();
    routes[0].set_event(None).unwrap();
    assert_eq!(routes[0].take_pending().unwrap(), u64::MAX - 1);
}

#[test]
fn signals_in_the_new_eventfd_become_one_interrupt_and_those_in_the_old_one_another() {
    let (partition, recorder, routes) = armed(QUIESCED, 1);
    let new = EventFd::new().unwrap();
    new.signal(2).unwrap();
    routes[0].set_event(Some(new.as_raw_fd())).unwrap();
    assert_eq!(recorder.kernel().raised.remove(&id_of(&new)), Some(vec![msi(0x41).raw()]));
    // Signals come to the old one while it is disarmed.
    routes[0].mask().unwrap();
    routes[0].signal(2).unwrap();
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    batch.set_event(&routes[0], NewEvent::make(None).unwrap());
    batch.unmask(&routes[0]);
    batch.commit().unwrap();
    // One signal for both: this kernel leaves it in the counter.
    assert_eq!(routes[0].shared().event.consume().unwrap(), 1);
    assert_eq!((new.consume().unwrap(), recorder.kernel().raised.len()), (0, 0));
}

#[test]
fn an_eventfd_moves_to_another_route_with_what_it_holds_in_one_step() {
    let (partition, recorder, routes) = armed(QUIESCED, 2);
    routes[0].mask().unwrap();
    routes[1].mask().unwrap();
    recorder.taken();
    let moved = event_of(&routes[0]);
    routes[0].signal(3).unwrap();
    routes[1].signal(4).unwrap();
    // The order of the calls does not matter.
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    batch.set_event(&routes[1], duplicate(&routes[0]));
    batch.set_event(&routes[0], NewEvent::make(None).unwrap());
    batch.commit().unwrap();
    assert_eq!((recorder.taken(), event_of(&routes[1])), (vec![], moved));
    assert_eq!([0, 1].map(|at| routes[at].take_pending().unwrap()), [0, 7]);
}

#[test]
fn an_armed_eventfd_is_disarmed_before_it_is_armed_for_another_route() {
    for setup in [PLAIN, QUIESCED, LOADED] {
        let (partition, recorder, routes) = armed(setup, 2);
        let moved = routes[1].shared().event.get();
        let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
        batch.set_event(&routes[1], NewEvent::make(None).unwrap());
        batch.set_event(&routes[0], given(&moved));
        batch.commit().unwrap();
        assert_eq!(recorder.taken(), [Deassign(24), Deassign(25), Assign(24), Assign(25)]);
        assert_eq!(signal(&recorder, &moved), [0x41]);
        check_rules(&partition, &recorder, &routes, "moved");
    }
}

#[test]
fn a_move_with_another_message_is_one_push_at_most() {
    for setup in SETUPS {
        let (partition, recorder, routes) = armed(setup, 3);
        let moved = routes[0].shared().event.get();
        let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
        batch.set_event(&routes[0], NewEvent::make(None).unwrap());
        batch.set_event(&routes[1], given(&moved));
        batch.set_msi(&routes[1], MsiRoute::new(0xFEE0_0000, 0x471).unwrap());
        batch.commit().unwrap();
        assert_eq!(recorder.taken().iter().filter(|call| matches!(call, Push(_))).count(), 1);
        assert_eq!(signal(&recorder, &moved), [0x471]);
        check_rules(&partition, &recorder, &routes, &format!("{setup:?}"));
    }
}

#[test]
fn routes_exchange_eventfds_and_pass_them_on_in_a_chain() {
    for ring in [false, true] {
        let (partition, recorder, routes) = armed(QUIESCED, 3);
        let before: Vec<_> = routes.iter().map(|route| route.shared().event.get()).collect();
        let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
        batch.set_event(&routes[0], if ring { given(&before[2]) } else { NewEvent::make(None).unwrap() });
        batch.set_event(&routes[1], given(&before[0]));
        batch.set_event(&routes[2], given(&before[1]));
        batch.commit().unwrap();
        let raised: Vec<_> = before.iter().map(|event| signal(&recorder, event)).collect();
        assert_eq!(raised, [vec![0x42], vec![0x43], if ring { vec![0x41] } else { vec![] }]);
        check_rules(&partition, &recorder, &routes, "passed on");
    }
}

#[test]
fn what_routes_of_a_ring_hold_goes_with_their_eventfds_and_nothing_is_carried() {
    let (partition, _recorder, routes) = armed(QUIESCED, 2);
    routes.iter().for_each(|route| route.mask().unwrap());
    routes[0].signal(3).unwrap();
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    batch.set_event(&routes[0], duplicate(&routes[1]));
    batch.set_event(&routes[1], duplicate(&routes[0]));
    batch.commit().unwrap();
    assert_eq!([0, 1].map(|at| routes[at].take_pending().unwrap()), [0, 3]);
}

#[test]
fn an_eventfd_that_another_route_keeps_is_refused_before_any_call() {
    let ((ours, recorder, routes), (theirs, _)) = (armed(QUIESCED, 3), partition(true));
    let foreign = theirs.new_route(None).unwrap();
    let refused = |result: Result, words: &str| {
        let Err(Error::Invalid(told)) = result else { panic!("{result:?}") };
        assert!(told.contains(words), "{told}");
        assert_eq!(recorder.taken(), []);
    };
    refused(routes[0].set_event(Some(routes[1].fileno().unwrap())), "the eventfd of the route of GSI 25;");
    refused(routes[0].set_event(Some(foreign.fileno().unwrap())), "the route of GSI 24 of another partition;");
    let before = seen(&routes);
    let with = |others: Vec<(usize, NewEvent)>| {
        let mut batch = Batch::new(Arc::clone(&ours)).unwrap();
        batch.mask(&routes[1]);
        batch.set_event(&routes[0], duplicate(&routes[1]));
        others.into_iter().for_each(|(at, event)| batch.set_event(&routes[at], event));
        batch.commit()
    };
    refused(with(vec![]), "of GSI 25;");
    // It keeps its own also if it is given its own.
    refused(with(vec![(1, duplicate(&routes[1]))]), "of GSI 25;");
    let twice = vec![(1, NewEvent::make(None).unwrap()), (2, duplicate(&routes[1]))];
    refused(with(twice), "for the routes of GSI 24 and 26;");
    assert_eq!(seen(&routes), before);
    // The last word counts.
    let mut batch = Batch::new(Arc::clone(&ours)).unwrap();
    batch.set_event(&routes[0], duplicate(&routes[1]));
    batch.set_event(&routes[0], NewEvent::make(None).unwrap());
    batch.commit().unwrap();
    check_rules(&ours, &recorder, &routes, "refused");
}

#[test]
fn an_eventfd_that_was_given_up_is_free_for_others() {
    let ((ours, _, routes), (theirs, _)) = (armed(QUIESCED, 1), partition(true));
    let event = EventFd::new().unwrap();
    routes[0].set_event(Some(event.as_raw_fd())).unwrap();
    assert!(matches!(theirs.new_route(Some(event.as_raw_fd())), Err(Error::Invalid(_))));
    routes[0].set_event(None).unwrap();
    let other = theirs.new_route(Some(event.as_raw_fd())).unwrap();
    assert!(matches!(routes[0].set_event(Some(event.as_raw_fd())), Err(Error::Invalid(_))));
    other.close().unwrap();
    routes[0].set_event(Some(event.as_raw_fd())).unwrap();
    drop(ours);
}

#[test]
fn a_failure_leaves_signals_where_they_were_and_later_ones_too() {
    let (partition, recorder, routes) = armed(QUIESCED, 1);
    let (old, new) = (event_of(&routes[0]), EventFd::new().unwrap());
    // The new eventfd can't be armed, and then the old one not again.
    recorder.fail([1, 2]);
    let Err(Error::Failed(failure)) = routes[0].set_event(Some(new.as_raw_fd())) else { panic!("no failure") };
    assert_eq!((failure.disarmed, event_of(&routes[0])), (vec![24], old));
    routes[0].signal(2).unwrap();
    assert_eq!(new.consume().unwrap(), 0);
    // Another try arms it, and carries over what came meanwhile.
    routes[0].set_event(Some(new.as_raw_fd())).unwrap();
    assert_eq!((routes[0].armed().unwrap(), new.consume().unwrap()), (true, 1));
    check_rules(&partition, &recorder, &routes, "after another try");
}

#[test]
fn an_irqfd_that_stays_on_the_new_eventfd_breaks_the_route_and_keeps_the_eventfd_from_others() {
    let (partition, recorder, routes) = armed(PLAIN, 2);
    let (old, new) = (event_of(&routes[0]), EventFd::new().unwrap());
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    batch.set_event(&routes[0], given(&new));
    batch.set_event(&routes[1], NewEvent::make(None).unwrap());
    // Disarms both, arms the first, not the second, and can't disarm the first again.
    recorder.fail([3, 4]);
    let Err(Error::Failed(failure)) = batch.commit() else { panic!("no failure") };
    assert_eq!((failure.broken, event_of(&routes[0])), (vec![24], old));
    assert_eq!(recorder.kernel().irqfds[&id_of(&new)], 24);
    assert!(matches!(routes[0].set_event(None), Err(Error::Broken(24))));
    assert!(matches!(routes[1].set_event(Some(new.as_raw_fd())), Err(Error::Invalid(_))));
    let before = routes[0].fileno().unwrap();
    assert!(matches!(routes[1].set_event(Some(before)), Err(Error::Invalid(_))));
    recorder.taken();
    routes[0].close().unwrap();
    assert_eq!(
        (recorder.taken(), recorder.kernel().irqfds.contains_key(&id_of(&new))),
        (vec![Deassign(24)], false)
    );
    routes[1].set_event(Some(new.as_raw_fd())).unwrap();
}

#[test]
fn an_armed_eventfd_that_other_code_has_closed_can_not_be_replaced_and_a_disarmed_one_can() {
    let (partition, recorder, routes) = armed(QUIESCED, 2);
    recorder.kernel().closed_events.insert(event_of(&routes[0]));
    let before = seen(&routes);
    let Err(Error::Failed(failure)) = routes[0].set_event(None) else { panic!("no failure") };
    assert_eq!((failure.error.errno, failure.gsi), (libc::EBADF, Some(24)));
    assert_eq!(seen(&routes), before);
    routes[1].mask().unwrap();
    recorder.kernel().closed_events.insert(event_of(&routes[1]));
    routes[1].set_event(None).unwrap();
    routes[1].unmask().unwrap();
    assert!(routes[1].armed().unwrap());
    drop(partition);
}

#[test]
fn the_descriptor_of_the_old_eventfd_is_closed_once_nobody_uses_it() {
    let (_partition, _recorder, routes) = armed(QUIESCED, 1);
    let fd = routes[0].fileno().unwrap();
    let name = || std::fs::read_link(format!("/proc/self/fd/{fd}")).ok();
    let (id, used) = (event_of(&routes[0]), routes[0].shared().event.get());
    routes[0].set_event(None).unwrap();
    assert_eq!((name().is_some(), id_of(&used)), (true, id), "a thread uses it still");
    let twin = EventFd::adopt(used.as_raw_fd()).unwrap();
    drop(used);
    // Another test's file may have the number by now.
    let same = EventFd::adopt(fd).is_ok_and(|other| other.is_same(&twin).unwrap());
    assert!(!same, "descriptor {fd} is open still");
}

#[test]
fn a_closed_route_and_a_forked_child_take_no_eventfd() {
    let (partition, _recorder, routes) = armed(QUIESCED, 2);
    routes[0].close().unwrap();
    assert!(matches!(routes[0].set_event(None), Err(Error::Closed(_))));
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    batch.set_event(&routes[0], NewEvent::make(None).unwrap());
    assert!(matches!(batch.commit(), Err(Error::Closed(_))));
    let fd = routes[1].fileno().unwrap();
    in_child_with_locks_held(&partition, &routes[1], "takes an eventfd", || {
        [None, Some(fd)].iter().all(|event| matches!(routes[1].set_event(*event), Err(Error::Forked)))
    });
}

#[test]
fn those_who_wait_for_the_old_eventfd_are_told() {
    let (_partition, _recorder, routes) = armed(QUIESCED, 2);
    let watches: Vec<_> = routes.iter().map(|route| route.watch().unwrap()).collect();
    routes[0].set_event(None).unwrap();
    let ended = watches.iter().map(|watch| EventFd::adopt(watch.changed()).unwrap().is_readable().unwrap());
    assert_eq!(ended.collect::<Vec<_>>(), [true, false]);
    let again = routes[0].watch().unwrap();
    assert!(!EventFd::adopt(again.changed()).unwrap().is_readable().unwrap());
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
