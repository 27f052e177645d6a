//! Doorbells: the calls that they make, what is refused, and what happens to one that can't be taken away.

use super::*;

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
