//! Any sequence of operations on a simulated partition, with failures: no panic, and no spurious interrupt.
#![no_main]

use std::collections::BTreeSet;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mshv_irqfd::hypervisor::event::EventFd;
use mshv_irqfd::hypervisor::simulated::SimulatedPartition;
use mshv_irqfd::hypervisor::{Backend, Operation};
use mshv_irqfd::irqfd::{Batch, Config, GsiState, IrqFdRoute, MsiRoute, NewEvent, Partition};

#[derive(Arbitrary, Debug)]
enum Edit {
    Set(u8),
    Clear,
    Mask,
    Unmask,
    /// To a new eventfd, or that of a route.
    Event(Option<u8>),
}

#[derive(Arbitrary, Debug)]
enum Step {
    New,
    /// On the descriptor of a route, or on an arbitrary number.
    NewOn(Result<u8, u16>),
    Edit(u8, Edit),
    Commit(Vec<(u8, Edit)>),
    Signal(u8, u64),
    Consume(u8),
    Close(u8),
    Drop(u8),
    Fail(u8, u8, u8),
}

fn msi(vector: u8) -> Option<MsiRoute> {
    MsiRoute::new(0xFEE0_0000, vector.into()).ok()
}

/// The kernel's number of a route's eventfd.
fn event_of(route: &IrqFdRoute) -> u64 {
    let event = EventFd::adopt(route.fileno().expect("it is open")).expect("an eventfd");
    event.id().ok().flatten().expect("/proc tells the number")
}

fuzz_target!(|input: (bool, u8, Vec<Step>)| {
    // Few spare GSIs, so that entries are replaced; or none.
    let (quiesce, spare, steps) = input;
    let Ok(simulated) = SimulatedPartition::open() else { return };
    let driver = simulated.driver();
    let spares = std::iter::once(30..30 + u32::from(spare % 6)).collect();
    let config = Config { quiesce, spares, ..Config::new(Backend::Simulated, 24..30) };
    let partition = Partition::new(Box::new(simulated), config).expect("the options are right");
    partition.create_vp(0).expect("a simulated VP");
    let mut routes: Vec<IrqFdRoute> = Vec::new();
    for step in &steps {
        let at = |number: u8| usize::from(number) % routes.len().max(1);
        match step {
            Step::New => routes.extend(partition.new_route(None)),
            Step::NewOn(Ok(number)) => {
                let fd = routes.get(at(*number)).and_then(|route| route.fileno().ok());
                assert!(fd.is_none_or(|fd| partition.new_route(Some(fd)).is_err()), "one eventfd on two routes");
            }
            // Numbers that are not open, and those of the standard streams.
            Step::NewOn(Err(number)) => {
                let fd = if *number < 3 { RawFd::from(*number as u8) } else { 1 << 20 | RawFd::from(*number) };
                assert!(partition.new_route(Some(fd)).is_err(), "{fd} is no eventfd");
            }
            Step::Commit(edits) => {
                let Ok(mut batch) = Batch::new(Arc::clone(&partition)) else { continue };
                for (number, edit) in edits {
                    let Some(route) = routes.get(at(*number)) else { continue };
                    let fd = |number: &u8| routes.get(at(*number)).and_then(|route| route.fileno().ok());
                    match edit {
                        Edit::Event(number) => {
                            // The number of a closed route leads to no eventfd.
                            let event = NewEvent::make(number.as_ref().and_then(fd));
                            batch.set_event(route, event.expect("an eventfd"));
                        }
                        Edit::Set(vector) => drop(msi(*vector).map(|msi| batch.set_msi(route, msi))),
                        Edit::Clear => batch.clear_msi(route),
                        Edit::Mask => batch.mask(route),
                        Edit::Unmask => batch.unmask(route),
                    }
                }
                let _may_fail = batch.commit();
            }
            Step::Fail(which, after, times) => {
                let calls = [Operation::SetMsiRouting, Operation::AssignIrqfd, Operation::DeassignIrqfd];
                driver.fail(calls[usize::from(which % 3)], 12, (after % 8).into(), (times % 4).into());
            }
            Step::Drop(number) if !routes.is_empty() => drop(routes.swap_remove(at(*number))),
            Step::Edit(number, _) | Step::Signal(number, _) | Step::Consume(number) | Step::Close(number) => {
                let Some(route) = routes.get(at(*number)) else { continue };
                let _may_fail = match step {
                    Step::Edit(_, Edit::Set(vector)) => msi(*vector).map_or(Ok(()), |msi| route.set_msi(msi)),
                    Step::Edit(_, Edit::Clear) => route.clear_msi(),
                    Step::Edit(_, Edit::Mask) => route.mask(),
                    Step::Edit(_, Edit::Unmask) => route.unmask(),
                    Step::Edit(_, Edit::Event(number)) => {
                        let other = number.as_ref().and_then(|number| routes.get(at(*number)));
                        route.set_event(other.and_then(|other| other.fileno().ok()))
                    }
                    Step::Signal(_, times) => route.signal((*times).clamp(1, u64::MAX - 1)),
                    Step::Consume(_) => route.consume_pending().map(drop),
                    _ => route.close(),
                };
            }
            Step::Drop(_) => {}
        }
        driver.settle();
        for interrupt in driver.take_interrupts(Duration::ZERO) {
            assert!(interrupt.vector >= 16, "spurious {interrupt:?}");
        }
        let open: Vec<_> = routes.iter().filter(|route| !route.is_closed()).collect();
        let events: BTreeSet<_> = open.iter().map(|route| event_of(route)).collect();
        assert_eq!(events.len(), open.len(), "two routes have one eventfd");
        let table = partition.routing_table().expect("it is open");
        for route in routes.iter().filter(|route| !route.is_closed()) {
            if route.state().expect("it is open") == GsiState::Enabled {
                let at = route.armed_gsi().expect("it is open").expect("it is armed");
                let msi = route.msi().expect("it is open").expect("armed routes have an MSI").raw();
                assert!(table.contains(&(at, msi)), "GSI {} is armed at {at} but not routed there", route.gsi());
            }
        }
    }
    let _may_fail = partition.close();
});
