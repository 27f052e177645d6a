//! What a forked child is refused and may do.

use super::*;

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
