//! Devices on a simulated partition.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::hypervisor::{Backend, Operation};
use crate::irqfd::{Error, GsiState, Options, Partition};

const ENABLE: [u8; 2] = [0, 0x80];
const ENABLE_MASKED: [u8; 2] = [0, 0xC0];
const MASK: [u8; 4] = [1, 0, 0, 0];

fn device(vectors: usize) -> (Arc<Partition>, MsixTable) {
    let partition = Partition::open(Backend::Simulated, &Options::default()).unwrap();
    let table = MsixTable::new(Arc::clone(&partition), vectors, &[]).unwrap();
    (partition, table)
}

fn set(table: &MsixTable, vector: u64, data: u64) {
    table.write_table(16 * vector, &0xFEE0_0000u64.to_le_bytes()).unwrap();
    table.write_table(16 * vector + 8, &data.to_le_bytes()).unwrap();
}

fn mask(table: &MsixTable, vector: u64) {
    table.write_table(16 * vector + 12, &MASK).unwrap();
}

fn arrived(partition: &Partition) -> Vec<u8> {
    partition.simulated().unwrap().settle();
    partition.take_interrupts(Duration::ZERO).unwrap().iter().map(|interrupt| interrupt.vector).collect()
}

fn faulty(table: &MsixTable) -> Vec<usize> {
    table.faults().unwrap().into_iter().map(|(vector, _)| vector).collect()
}

fn armed(table: &MsixTable) -> Vec<usize> {
    table.vectors().taken().filter(|(_, route)| route.armed().unwrap()).map(|(vector, _)| vector).collect()
}

#[test]
fn only_aligned_dwords_and_qwords_inside_are_accesses() {
    let table = [(0, 4, Some(0..1)), (8, 8, Some(2..4)), (28, 4, Some(7..8)), (24, 8, Some(6..8))];
    let refused =
        [(0, 0), (0, 1), (0, 2), (0, 16), (2, 4), (4, 8), (32, 4), (32, 8), (u64::MAX - 3, 4), (u64::MAX, 8)];
    for (offset, size, expected) in table.into_iter().chain(refused.map(|(offset, size)| (offset, size, None))) {
        assert_eq!(access::dwords(offset, size, 32), expected, "{size} bytes at {offset:#x}");
    }
    for (offset, size, expected) in [
        (0, 1, Some(0..1)),
        (2, 2, Some(2..4)),
        (0, 4, Some(0..4)),
        (11, 1, Some(11..12)),
        (1, 2, None),
        (2, 4, None),
        (12, 1, None),
        (0, 3, None),
        (0, 0, None),
        (u64::MAX, 1, None),
    ] {
        assert_eq!(access::bytes(offset, size, 12), expected, "{size} bytes at {offset:#x}");
    }
}

#[test]
fn all_ones_are_as_many_as_were_asked_for() {
    let read = [
        (0, 0),
        (1, 0xFF),
        (3, 0xFF_FFFF),
        (7, u64::MAX >> 8),
        (8, u64::MAX),
        (9, u64::MAX),
        (usize::MAX, u64::MAX),
    ];
    for (size, value) in read {
        assert_eq!(access::all_ones(size), value);
    }
}

#[test]
fn values_are_little_endian() {
    assert_eq!(access::value([0x1122_3344].into_iter()), 0x1122_3344);
    assert_eq!(access::value([0x1122_3344, 0x5566_7788].into_iter()), 0x5566_7788_1122_3344);
}

#[test]
fn a_device_that_is_brought_up_makes_one_push() {
    let (partition, table) = device(MSIX_VECTORS);
    table.write_message_control(2, &ENABLE_MASKED).unwrap();
    for vector in 0..MSIX_VECTORS as u64 {
        mask(&table, vector);
        set(&table, vector, 0x20 + vector % 0xC0);
    }
    assert_eq!(partition.stats().unwrap().arms, 0);
    table.write_message_control(2, &ENABLE).unwrap();
    let stats = partition.stats().unwrap();
    assert_eq!((stats.pushes, stats.arms, stats.disarms), (1, MSIX_VECTORS as u64, 0));
    assert!(faulty(&table).is_empty());
}

#[test]
fn signals_are_latched_before_a_route_is_taken_and_sent_once_it_is_armed() {
    let (partition, table) = device(3);
    table.vectors().signal(1).unwrap();
    table.vectors().signal(1).unwrap();
    assert!(table.vectors().route(1).is_none());
    assert_eq!(table.read_pba(0, 8).unwrap(), 0b10);
    set(&table, 1, 0x41);
    table.write_message_control(2, &ENABLE).unwrap();
    assert_eq!(arrived(&partition), [0x41]);
    assert_eq!(table.read_pba(0, 8).unwrap(), 0);
    assert!(!table.vectors().consume_pending(1).unwrap());
}

#[test]
fn latched_signals_can_be_taken_back_and_a_reset_takes_them() {
    let (_partition, table) = device(2);
    table.vectors().signal(0).unwrap();
    table.vectors().signal(1).unwrap();
    assert!(table.vectors().consume_pending(0).unwrap());
    assert!(!table.vectors().pending(0).unwrap());
    table.reset().unwrap();
    assert!(!table.vectors().pending(1).unwrap());
}

#[test]
fn an_arming_that_is_refused_once_is_made_again_without_another_push() {
    let (partition, table) = device(100);
    table.write_message_control(2, &ENABLE_MASKED).unwrap();
    (0..100).for_each(|vector| set(&table, vector, 0x41));
    let simulated = partition.simulated().unwrap();
    simulated.fail(Operation::AssignIrqfd, libc::ENOMEM, 99, 1);
    table.write_message_control(2, &ENABLE).unwrap();
    assert!(faulty(&table).is_empty());
    assert_eq!(armed(&table).len(), 100);
    assert_eq!(partition.stats().unwrap().pushes, 1);
}

#[test]
fn a_refused_push_is_tried_again_a_few_times_and_then_told() {
    let (partition, table) = device(64);
    table.write_message_control(2, &ENABLE_MASKED).unwrap();
    (0..64).for_each(|vector| set(&table, vector, 0x20 + vector));
    let simulated = partition.simulated().unwrap();
    simulated.fail(Operation::SetMsiRouting, libc::ENOMEM, 0, 100);
    table.write_message_control(2, &ENABLE).unwrap();
    assert_eq!(faulty(&table), (0..64).collect::<Vec<_>>());
    assert_eq!(partition.stats().unwrap().failures, 4);
    assert!(armed(&table).is_empty());
}

#[test]
fn a_vector_whose_disarming_was_refused_is_disarmed_when_its_next_message_is_bad() {
    let (partition, table) = device(1);
    table.write_message_control(2, &ENABLE).unwrap();
    set(&table, 0, 0x41);
    partition.simulated().unwrap().fail(Operation::DeassignIrqfd, libc::EIO, 0, 1);
    mask(&table, 0);
    assert_eq!((faulty(&table), armed(&table)), (vec![0usize], vec![0usize]));
    set(&table, 0, 0);
    assert_eq!((faulty(&table), armed(&table)), (vec![0usize], Vec::<usize>::new()));
    assert!(matches!(*table.faults().unwrap()[0].1, Error::Msi(_)));
    mask(&table, 0);
    set(&table, 0, 0x42);
    assert_eq!((faulty(&table), armed(&table)), (Vec::<usize>::new(), vec![0usize]));
}

#[test]
fn an_event_of_two_vectors_or_of_none_is_refused_and_leaves_no_route() {
    let partition = Partition::open(Backend::Simulated, &Options::default()).unwrap();
    let event = crate::hypervisor::event::EventFd::new().unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&event);
    for events in [&[(0, fd), (1, fd)][..], &[(0, fd), (0, fd)], &[(2, fd)]] {
        assert!(MsixTable::new(Arc::clone(&partition), 2, events).is_err());
        assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Unallocated);
    }
    let table = MsixTable::new(Arc::clone(&partition), 2, &[(1, fd)]).unwrap();
    assert_eq!(table.vectors().taken().map(|(vector, _)| vector).collect::<Vec<_>>(), [1usize]);
}

#[test]
fn a_table_that_is_dropped_frees_its_gsis() {
    let (partition, table) = device(1);
    table.write_message_control(2, &ENABLE).unwrap();
    set(&table, 0, 0x41);
    assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Enabled);
    drop(table);
    assert_eq!(partition.gsi_state(24).unwrap(), GsiState::Unallocated);
}

#[test]
fn signals_from_many_threads_that_meet_the_first_unmasking_are_not_lost() {
    for _ in 0..100 {
        let (partition, table) = device(1);
        table.write_message_control(2, &ENABLE).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| table.vectors().signal(0).unwrap());
            }
            set(&table, 0, 0x41);
        });
        let arrived = arrived(&partition);
        assert!((1..=4).contains(&arrived.len()), "{arrived:?}");
        assert!(!table.vectors().pending(0).unwrap());
    }
}

#[test]
fn a_vector_that_waits_to_be_re_armed_is_told_until_a_push_arms_it() {
    let options = Options { preload: false, ..Options::default() };
    let partition = Partition::open(Backend::Simulated, &options).unwrap();
    let table = MsixTable::new(Arc::clone(&partition), 2, &[]).unwrap();
    table.write_message_control(2, &ENABLE).unwrap();
    set(&table, 0, 0x41);
    // The arming of vector 1, and the re-arming of vector 0, which the push had disarmed.
    partition.simulated().unwrap().fail(Operation::AssignIrqfd, libc::ENOMEM, 0, 2);
    set(&table, 1, 0x42);
    assert_eq!((faulty(&table), armed(&table)), (vec![0usize, 1], Vec::<usize>::new()));
    let text = table.faults().unwrap()[0].1.to_string();
    assert!(text.contains("GSI 24") && text.contains("the next push tries again"), "{text}");
    table.vectors().signal(0).unwrap();
    assert!(table.vectors().pending(0).unwrap());
    mask(&table, 1);
    set(&table, 1, 0x43);
    assert_eq!((faulty(&table), armed(&table)), (Vec::<usize>::new(), vec![0usize, 1]));
    assert_eq!(arrived(&partition), [0x41]);
}

#[test]
fn a_live_msi_vector_that_can_not_take_its_new_message_sends_none() {
    let options = Options { preload: false, ..Options::default() };
    let partition = Partition::open(Backend::Simulated, &options).unwrap();
    let device = MsiCapability::new(Arc::clone(&partition), 2, &[]).unwrap();
    device.write(4, &0xFEE0_0000u32.to_le_bytes()).unwrap();
    device.write(12, &[0x40, 0]).unwrap();
    device.write(2, &[0x11, 0]).unwrap();
    partition.simulated().unwrap().fail(Operation::SetMsiRouting, libc::ENOMEM, 0, 100);
    device.write(12, &[0x50, 0]).unwrap();
    assert_eq!(device.faults().unwrap().len(), 2);
    device.vectors().signal(1).unwrap();
    assert!(arrived(&partition).is_empty());
    assert_eq!(device.read(20, 4).unwrap(), 0b10);
    // The messages of before need no push.
    device.write(12, &[0x40, 0]).unwrap();
    assert_eq!(arrived(&partition), [0x41]);
    assert!(device.faults().unwrap().is_empty());
}

#[test]
fn msi_sends_no_more_vectors_than_the_guest_grants() {
    let partition = Partition::open(Backend::Simulated, &Options::default()).unwrap();
    assert!(MsiCapability::new(Arc::clone(&partition), 3, &[]).is_err());
    let device = MsiCapability::new(Arc::clone(&partition), 32, &[]).unwrap();
    device.write(4, &0xFEE0_0000u32.to_le_bytes()).unwrap();
    device.write(12, &[0x5F, 0]).unwrap();
    for (code, granted) in [(0u8, 1u8), (3, 8), (5, 32), (7, 32)] {
        device.write(2, &[code << 4 | 1, 0]).unwrap();
        let live: Vec<_> =
            (0..32).filter(|vector| device.vectors().route(*vector).is_some_and(|r| r.armed().unwrap())).collect();
        assert_eq!(live, (0..granted.into()).collect::<Vec<usize>>());
        device.vectors().signal(0).unwrap();
        assert_eq!(arrived(&partition), [0x5F & !(granted - 1)]);
        device.write(2, &[0, 0]).unwrap();
    }
}
