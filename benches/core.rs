//! The core on a kernel that does nothing: the cost of a call without its ioctls.
//!
//! `cargo bench` times each operation with criterion. With `--instructions NAME COUNT`, the binary only runs one
//! operation COUNT times, for callgrind; see `docs/callgrind.md`.

#![allow(clippy::unwrap_used, reason = "a failing bench should stop")]

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;

use criterion::Criterion;
use mshv_irqfd::hypervisor::{Backend, Target};
use mshv_irqfd::instruments::null::NullPartition;
use mshv_irqfd::irqfd::{Batch, Config, GsiAllocator, IrqFdRoute, MsiRoute, Partition};

const GSIS: usize = 2048;
const BATCH: usize = 64;

/// An operation, ready to run any number of times.
type Operation = Box<dyn FnMut()>;
/// Prepares an operation.
type Make = fn() -> Operation;

fn msi(vector: usize) -> MsiRoute {
    MsiRoute::new(0xFEE0_0000, 0x30 + vector as u64 % 128).unwrap()
}

/// A partition with every GSI routed and armed, and no spare one.
fn full() -> (Arc<Partition>, Vec<IrqFdRoute>) {
    full_beside(Vec::new())
}

/// A partition with every GSI routed and armed, and every vector of its VP loaded.
fn full_and_loaded() -> (Arc<Partition>, Vec<IrqFdRoute>) {
    full_beside(std::iter::once(24 + GSIS as u32..4096).collect())
}

fn full_beside(spares: Vec<Range<u32>>) -> (Arc<Partition>, Vec<IrqFdRoute>) {
    let config = Config { quiesce: false, spares, ..Config::new(Backend::Simulated, 24..24 + GSIS as u32) };
    let partition = Partition::new(Box::new(NullPartition::new()), config).unwrap();
    partition.create_vp(0).unwrap();
    let routes: Vec<_> = (0..GSIS).map(|_| partition.new_route(None).unwrap()).collect();
    let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
    for (number, route) in routes.iter().enumerate() {
        batch.set_msi(route, msi(number));
    }
    batch.commit().unwrap();
    (partition, routes)
}

/// Allocates the last free GSI and frees it.
fn allocate() -> Operation {
    let mut gsis = GsiAllocator::new(GSIS);
    assert!((1..GSIS).all(|_| gsis.allocate().is_some()));
    Box::new(move || {
        let index = black_box(gsis.allocate()).unwrap();
        gsis.free(index);
    })
}

/// Moves one route of a full table to another vector, by a push.
fn set_on_a_full_table() -> Operation {
    let (_, routes) = full();
    let mut turn = 0;
    Box::new(move || {
        turn += 1;
        routes[GSIS / 2].set_msi(black_box(msi(turn))).unwrap();
    })
}

/// Moves one route of a full table to another vector, which is loaded.
fn set_a_loaded_one() -> Operation {
    let (partition, routes) = full_and_loaded();
    let pushes = partition.stats().unwrap().pushes;
    let mut turn = 0;
    Box::new(move || {
        turn += 1;
        routes[GSIS / 2].set_msi(black_box(msi(turn))).unwrap();
        debug_assert_eq!(partition.stats().unwrap().pushes, pushes);
    })
}

/// Masks and unmasks one route of a full table.
fn mask_and_unmask() -> Operation {
    let (_, routes) = full();
    Box::new(move || {
        routes[GSIS / 2].mask().unwrap();
        routes[GSIS / 2].unmask().unwrap();
    })
}

/// Moves 64 routes of a full table to other vectors in one batch.
fn apply_a_batch() -> Operation {
    let (partition, routes) = full();
    let mut turn = 0;
    Box::new(move || {
        turn += 1;
        let mut batch = Batch::new(Arc::clone(&partition)).unwrap();
        for (number, route) in routes.iter().take(BATCH).enumerate() {
            batch.set_msi(route, msi(number + turn));
        }
        batch.commit().unwrap();
    })
}

/// Checks and decodes an MSI.
fn decode_an_msi() -> Operation {
    Box::new(|| {
        let msi = MsiRoute::new(black_box(0xFEE0_5000), black_box(0x4041)).unwrap();
        let target: Target = msi.target();
        black_box((msi.vector(), target));
    })
}

const OPERATIONS: [(&str, Make); 6] = [
    ("alloc", allocate),
    ("set-full-table", set_on_a_full_table),
    ("set-loaded", set_a_loaded_one),
    ("mask-unmask", mask_and_unmask),
    ("batch-64", apply_a_batch),
    ("msi-decode", decode_an_msi),
];

fn raise_descriptor_limit() {
    // A full table has more eventfds than the usual soft limit.
    let limit = rlimit::increase_nofile_limit(u64::MAX).unwrap();
    assert!(limit > GSIS as u64 + 64, "RLIMIT_NOFILE is {limit}: raise the hard limit (ulimit -Hn)");
}

fn main() {
    raise_descriptor_limit();
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--instructions") {
        let (name, count) = (&arguments[at + 1], arguments[at + 2].parse::<u64>().unwrap());
        let (_, make) = OPERATIONS.iter().find(|(known, _)| known == name).unwrap();
        let mut operation = make();
        (0..count).for_each(|_| operation());
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    for (name, make) in OPERATIONS {
        let mut operation = make();
        criterion.bench_function(name, |bencher| bencher.iter(&mut operation));
    }
    criterion.final_summary();
}
