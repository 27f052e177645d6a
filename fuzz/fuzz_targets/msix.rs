//! Any accesses of a guest to an MSI-X table on a simulated partition, with failures: no panic, no error, no interrupt but
//! those that the guest's messages ask for, and no signal lost.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mshv_irqfd::hypervisor::simulated::SimulatedPartition;
use mshv_irqfd::hypervisor::{Backend, Operation};
use mshv_irqfd::irqfd::{Config, Partition};
use mshv_irqfd::pci::{AnyDevice, MsixTable};

const VECTORS: usize = 5;

#[derive(Arbitrary, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Control(u64, Vec<u8>),
    Read(u64, u8),
    /// A vector's message: vector of the CPU and mask bit.
    Program(u8, u8, bool),
    Enable(u8),
    Signal(u8),
    Consume(u8),
    Event(u8),
    Reset,
    Fail(u8, u8, u8),
}

fuzz_target!(|steps: Vec<Step>| {
    let Ok(simulated) = SimulatedPartition::open() else { return };
    let driver = simulated.driver();
    // Fewer GSIs than vectors.
    let config = Config::new(Backend::Simulated, 24..28);
    let partition = Partition::new(Box::new(simulated), config).expect("the options are right");
    partition.create_vp(0).expect("a simulated VP");
    let table = MsixTable::new(Arc::clone(&partition), VECTORS, &[]).expect("it is small");
    let mut asked = [false; 256];
    let mut quiet = true;
    for step in &steps {
        let at = |vector: &u8| usize::from(*vector) % VECTORS;
        match step {
            Step::Write(offset, data) => table.write_table(*offset % 100, data).expect("no guest write fails"),
            Step::Control(offset, data) => {
                table.write_message_control(*offset % 8, data).expect("no guest write fails");
            }
            Step::Read(offset, size) => {
                let _table = table.read_table(*offset, (*size).into()).expect("no read fails");
                let _pending = table.read_pba(*offset, (*size).into()).expect("no read fails");
            }
            Step::Program(vector, data, masked) => {
                let entry = 16 * at(vector) as u64;
                table.write_table(entry + 12, &[1, 0, 0, 0]).expect("no guest write fails");
                table.write_table(entry, &0xFEE0_0000u64.to_le_bytes()).expect("no guest write fails");
                let data = u64::from(*data) | u64::from(*masked) << 32;
                table.write_table(entry + 8, &data.to_le_bytes()).expect("no guest write fails");
            }
            Step::Enable(high) => table.write_message_control(3, &[*high]).expect("no guest write fails"),
            Step::Signal(vector) => table.vectors().signal(at(vector)).expect("no signal fails"),
            Step::Consume(vector) => {
                let _whether = table.vectors().consume_pending(at(vector)).expect("its eventfd is open");
            }
            Step::Event(vector) => drop(table.take_route(at(vector))),
            Step::Reset => table.reset().expect("no reset fails"),
            Step::Fail(which, after, times) => {
                let calls = [Operation::SetMsiRouting, Operation::AssignIrqfd, Operation::DeassignIrqfd];
                driver.fail(calls[usize::from(which % 3)], 12, (after % 8).into(), (times % 4).into());
                quiet = false;
            }
        }
        let faults: Vec<_> = table.faults().expect("it is open").into_iter().map(|(vector, _)| vector).collect();
        let is_open = table.message_control().expect("it is open") & 0xC000 == 0x8000;
        for vector in 0..VECTORS {
            let data = table.read_table(16 * vector as u64 + 8, 4).expect("it is open");
            asked[data as usize & 0xFF] = true;
            let live = is_open && !table.masked(vector).expect("it is open");
            let armed = table.vectors().route(vector).is_some_and(|route| route.armed().expect("it is open"));
            assert!(live == armed || faults.contains(&vector), "vector {vector}: {live} {armed} {faults:?}");
            assert!(!armed || !table.vectors().pending(vector).expect("it is open"));
        }
        driver.settle();
        for interrupt in driver.take_interrupts(Duration::ZERO) {
            assert!(asked[usize::from(interrupt.vector)], "spurious {interrupt:?}");
        }
    }
    if quiet {
        // Nothing failed, so every vector can still be armed, as far as there are GSIs, and sends what is pending.
        for vector in 0..VECTORS {
            if table.vectors().route(vector).is_some() {
                table.vectors().signal(vector).expect("no signal fails");
            }
        }
        table.write_message_control(3, &[0xC0]).expect("no guest write fails");
        for vector in 0..VECTORS as u64 {
            table.write_table(16 * vector, &0xFEE0_0000u64.to_le_bytes()).expect("no guest write fails");
            table.write_table(16 * vector + 8, &(0x40 + vector).to_le_bytes()).expect("no guest write fails");
        }
        driver.settle();
        let _before = driver.take_interrupts(Duration::ZERO);
        let pending: Vec<_> =
            (0..VECTORS).filter(|vector| table.vectors().pending(*vector).expect("it is open")).collect();
        table.write_message_control(3, &[0x80]).expect("no guest write fails");
        driver.settle();
        let mut arrived: Vec<_> =
            driver.take_interrupts(Duration::ZERO).iter().map(|one| one.vector - 0x40).collect();
        arrived.sort_unstable();
        let armed =
            |vector: &usize| table.vectors().route(*vector).is_some_and(|route| route.armed().expect("it is open"));
        let expected: Vec<_> = pending.iter().copied().filter(armed).map(|vector| vector as u8).collect();
        assert_eq!(arrived, expected);
        assert_eq!((0..VECTORS).filter(armed).count(), VECTORS.min(4));
    }
    let _may_fail = partition.close();
});
