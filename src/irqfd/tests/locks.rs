//! Who waits for the partition's lock, and who comes first.

use super::*;

#[test]
fn changes_that_need_no_call_wait_for_no_push() {
    let (partition, _) = partition(true);
    let route = Arc::new(partition.new_route(None).unwrap());
    route.mask().unwrap();
    route.set_msi(msi(0x41)).unwrap();
    route.signal(1).unwrap();
    let pushing = partition.lock();
    let (done, over) = std::sync::mpsc::channel();
    // A thread of its own, which can be left behind where it waits.
    let theirs = Arc::clone(&route);
    std::thread::spawn(move || done.send((theirs.set_msi(msi(0x42)).is_ok(), theirs.consume_pending().unwrap())));
    assert_eq!(over.recv_timeout(std::time::Duration::from_secs(20)), Ok((true, true)));
    drop(pushing);
    assert_eq!(route.msi().unwrap(), Some(msi(0x42)));
}

#[test]
fn who_waits_for_the_partition_comes_before_who_gives_it_up() {
    let (partition, _) = partition(true);
    // Other tests look for eventfds in every partition, and must not come in between.
    let _no_look_ups = super::super::partition::partitions().unwrap();
    let came = std::sync::atomic::AtomicBool::new(false);
    for _ in 0..100 {
        let held = partition.lock();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _held = partition.lock();
                came.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while !partition.is_awaited() {
                assert!(std::time::Instant::now() < end, "whoever waits for the partition does not hold the turn");
                std::thread::yield_now();
            }
            drop(held);
            let _held = partition.lock();
            assert!(came.swap(false, std::sync::atomic::Ordering::Relaxed), "overtaken by who had it before");
        });
    }
}
