//! Messages that are refused for want of a VP, and those that are sent without a route.

use super::*;

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
