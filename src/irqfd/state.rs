//! The state that a partition's lock guards, and the calls that keep it equal to the kernel's.

use std::sync::Arc;

use super::balance::Balance;
use super::config::Config;
use super::entries::Entries;
use super::error::Failure;
use super::gsi::{GsiAllocator, GsiState};
use super::preload::Habits;
use super::shared::Route;
use super::stats::PartitionStats;
use super::trace::{Event, Reason, Trace};
use super::vps::VpSet;
use crate::hypervisor::event::EventFd;
use crate::hypervisor::{CallError, CallResult, Hypervisor, Operation, RawMsi, strerror};

/// The state of a partition.
#[derive(Debug)]
pub(super) struct State {
    pub(super) hypervisor: Option<Box<dyn Hypervisor>>,
    pub(super) gsis: GsiAllocator,
    /// By GSI, counted from the partition's first.
    pub(super) slots: Vec<Slot>,
    pub(super) vps: Option<VpSet>,
    pub(super) closing: bool,
    pub(super) stats: PartitionStats,
    pub(super) entries: Entries,
    pub(super) first_gsi: u32,
    pub(super) quiesce: bool,
    /// See [`Config::entries_per_move`]; 0 if pushes are quiesced.
    pub(super) entries_per_move: usize,
    /// The slots whose irqfd is registered, in no order.
    pub(super) armed: Vec<u16>,
    /// The slots that wait to be re-armed, because a rollback could not arm them again.
    pub(super) waiting: Vec<u16>,
    pub(super) habits: Habits,
    pub(super) balance: Balance,
    /// Whether the next push takes entries along: not after one that the kernel refused.
    pub(super) loads: bool,
    pub(super) trace: Arc<Trace>,
    /// Why calls are made just now.
    pub(super) reason: Reason,
}

/// The state of one GSI that is handed out.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) route: Option<Arc<Route>>,
    /// The eventfd of its irqfd. It differs from its route's during a commit, and if it is broken.
    pub(super) event: Option<Arc<EventFd>>,
    /// The message that it should be armed with; none if it should be disarmed.
    pub(super) wanted: Option<RawMsi>,
    /// The GSI where it is armed, or was armed last: its own or a spare one.
    pub(super) place: u16,
    /// Its place in `armed`, counted from 1.
    pub(super) armed: u16,
    pub(super) broken: bool,
    /// Whether its route is a device's, which saves it.
    pub(super) of_device: bool,
}

impl Slot {
    pub(super) fn is_armed(&self) -> bool {
        self.armed != 0
    }

    pub(super) fn place(&self) -> u32 {
        self.place.into()
    }

    /// Whether this is the eventfd of its irqfd.
    pub(super) fn has(&self, event: &Option<Arc<EventFd>>) -> bool {
        self.event.as_ref().map(Arc::as_ptr) == event.as_ref().map(Arc::as_ptr)
    }
}

impl State {
    pub(super) fn new(hypervisor: Box<dyn Hypervisor>, config: &Config, vps: Option<VpSet>) -> Self {
        let size = config.gsis.len();
        let slot = |gsi| Slot {
            route: None,
            event: None,
            wanted: None,
            place: gsi as u16,
            armed: 0,
            broken: false,
            of_device: false,
        };
        let spares = config.spare_gsis(hypervisor.has_pins());
        let end = spares.iter().map(|gsi| u32::from(*gsi) + 1).max().unwrap_or(0).max(config.gsis.end);
        let entries_per_move = if config.quiesce { 0 } else { config.entries_per_move };
        Self {
            hypervisor: Some(hypervisor),
            gsis: GsiAllocator::new(size),
            slots: config.gsis.clone().map(slot).collect(),
            vps,
            closing: false,
            stats: PartitionStats::default(),
            balance: Balance::new(spares.len(), entries_per_move),
            entries: Entries::new(end, spares),
            first_gsi: config.gsis.start,
            quiesce: config.quiesce,
            entries_per_move,
            armed: Vec::with_capacity(size),
            waiting: Vec::new(),
            habits: Habits::default(),
            loads: true,
            trace: Arc::default(),
            reason: Reason::default(),
        }
    }

    /// Gives a slot its route.
    pub(super) fn give(&mut self, index: usize, route: &Arc<Route>, of_device: bool) {
        let slot = &mut self.slots[index];
        slot.route = Some(Arc::clone(route));
        slot.event = Some(route.event.get());
        slot.of_device = of_device;
    }

    pub(super) fn gsi(&self, index: usize) -> u32 {
        self.first_gsi + index as u32
    }

    /// Makes a call and counts its failure.
    pub(super) fn call<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Hypervisor) -> CallResult<T>,
    ) -> Result<T, Failure> {
        let result = match &mut self.hypervisor {
            Some(hypervisor) => call(hypervisor.as_mut()),
            None => Err(closed()),
        };
        self.counted(result, None)
    }

    /// Makes a call about a slot's irqfd and counts its failure.
    pub(super) fn call_irqfd(
        &mut self,
        index: usize,
        call: impl FnOnce(&mut dyn Hypervisor, u32, &Arc<EventFd>) -> CallResult,
    ) -> Result<(), Failure> {
        let place = self.slots[index].place();
        let result = match (&mut self.hypervisor, &self.slots[index].event) {
            (Some(hypervisor), Some(event)) => call(hypervisor.as_mut(), place, event),
            (None, _) => Err(closed()),
            (_, None) => {
                Err(CallError::new(Operation::AssignIrqfd, "irqfd of a GSI without a route", libc::ENOENT))
            }
        };
        self.counted(result, Some(self.gsi(index)))
    }

    pub(super) fn counted<T>(&mut self, result: CallResult<T>, gsi: Option<u32>) -> Result<T, Failure> {
        result.map_err(|error| {
            self.stats.failures += 1;
            let failure = Failure::new(error, gsi);
            let text = format!("refused: {}: {failure}", strerror(failure.error.errno));
            self.trace.record(Event::Failed { text });
            failure
        })
    }

    /// Registers a slot's irqfd. The caller drains it then.
    pub(super) fn assign(&mut self, index: usize) -> Result<(), Failure> {
        debug_assert!(!self.is_stale(index), "an irqfd is armed where the kernel's table has its message");
        self.call_irqfd(index, |hypervisor, gsi, event| hypervisor.assign(gsi, event))?;
        self.stats.arms += 1;
        self.armed.push(index as u16);
        self.slots[index].armed = self.armed.len() as u16;
        let (place, reason) = (self.slots[index].place(), self.reason);
        self.trace.call(|| Event::Armed { gsi: self.gsi(index), place, reason });
        Ok(())
    }

    /// Drains the routes assigned last, from a place in `armed` on.
    pub(super) fn drain(&mut self, from: usize) -> Result<(), Failure> {
        if self.armed.len() == from {
            return Ok(());
        }
        let fresh = self.armed[from..].iter();
        let events: Vec<_> = fresh.filter_map(|index| self.slots[usize::from(*index)].event.as_deref()).collect();
        let failed = self.hypervisor.as_mut().map_or_else(Vec::new, |hypervisor| hypervisor.drain(&events));
        if failed.is_empty() {
            return Ok(());
        }
        let fresh = self.armed[from..].to_vec();
        let mut result = Ok(());
        for (place, error) in failed {
            let index = usize::from(fresh[place]);
            let failure = self.counted(Err(error), Some(self.gsi(index)));
            // A counter that can't be drained could be delivered twice, so the irqfd must not stay.
            self.reason = Reason::Undrained;
            let disarmed = self.disarm(index);
            result = result.and(disarmed).and(failure);
        }
        result
    }

    pub(super) fn disarm(&mut self, index: usize) -> Result<(), Failure> {
        self.call_irqfd(index, |hypervisor, gsi, event| hypervisor.deassign(gsi, event))?;
        self.stats.disarms += 1;
        let (at, reason) = (self.slots[index].place(), self.reason);
        self.trace.call(|| Event::Disarmed { gsi: self.gsi(index), place: at, reason });
        let place = std::mem::take(&mut self.slots[index].armed);
        self.armed.swap_remove(usize::from(place) - 1);
        if let Some(moved) = self.armed.get(usize::from(place) - 1) {
            self.slots[usize::from(*moved)].armed = place;
        }
        Ok(())
    }

    pub(super) fn push(&mut self) -> Result<(), Failure> {
        let entries = self.call(|hypervisor| hypervisor.push())?;
        self.stats.pushes += 1;
        self.stats.entries_pushed += entries as u64;
        let reason = self.reason;
        self.trace.call(|| Event::Pushed { entries, reason });
        self.entries.pushed();
        Ok(())
    }

    /// Changes the image. Makes no call.
    pub(super) fn put(&mut self, gsi: u32, msi: Option<RawMsi>) {
        self.entries.put(self.hypervisor.as_deref_mut(), gsi, msi);
    }

    pub(super) fn publish(&self, index: usize) {
        let slot = &self.slots[index];
        if let Some(route) = &slot.route {
            // An irqfd that stays on the eventfd that the route was to have takes none of its own signals.
            let takes = slot.is_armed() && (!slot.broken || slot.has(&Some(route.event.get())));
            route.publish_kernel(takes.then_some(slot.place), slot.broken);
        }
    }

    /// Whether the kernel's entry is not the message that a slot should be armed with.
    pub(super) fn is_stale(&self, index: usize) -> bool {
        let slot = &self.slots[index];
        slot.wanted.is_some() && slot.wanted != self.entries.kernel(slot.place())
    }

    /// Marks a slot as broken. While it is armed its entry stays in the table: on mshv a signal on an armed irqfd
    /// without an entry becomes vector 0. Returns its GSI.
    pub(super) fn quarantine(&mut self, index: usize) -> u32 {
        let slot = &mut self.slots[index];
        slot.broken = true;
        slot.wanted = None;
        let place = slot.place();
        self.put(place, self.entries.kernel(place));
        self.gsi(index)
    }

    /// Gives up the place of a slot that is disarmed, and an eventfd that is not its route's, and drops its own entry.
    pub(super) fn vacate(&mut self, index: usize) {
        let own = self.gsi(index);
        self.entries.release(self.slots[index].place());
        let slot = &mut self.slots[index];
        slot.place = own as u16;
        // A broken one may have been armed on the eventfd that its route was to have.
        if let Some(route) = &slot.route {
            slot.event = Some(route.event.get());
        }
        self.put(own, None);
    }

    pub(super) fn create_vp(&mut self, index: u8) -> Result<(), Failure> {
        self.call(|hypervisor| hypervisor.create_vp(index))?;
        self.vps.get_or_insert_default().insert(index);
        Ok(())
    }

    #[cfg(test)]
    #[cfg(not(shuttle))]
    pub(super) fn dirty_len(&self) -> usize {
        self.entries.dirty_len()
    }

    /// Shows that what is known of slots and entries agrees, as it must between two commits.
    #[cfg(test)]
    #[cfg(not(shuttle))]
    pub(super) fn check(&self) {
        self.entries.check(self.slots.iter().map(Slot::place));
        for (index, slot) in self.slots.iter().enumerate() {
            let (own, place) = (self.gsi(index), slot.place());
            let (image, kernel) = (self.entries.image(place), self.entries.kernel(place));
            if slot.is_armed() {
                assert_eq!(usize::from(self.armed[usize::from(slot.armed) - 1]), index);
                assert!(
                    kernel.is_some() && image == kernel,
                    "GSI {own} is armed at {place}: {image:?}, {kernel:?}"
                );
                assert!(slot.broken || slot.wanted == kernel, "GSI {own} is armed with {kernel:?}");
            } else if slot.wanted.is_some() {
                assert!(
                    self.waiting.contains(&(index as u16)),
                    "GSI {own} is to be armed, and does not wait for it"
                );
                assert_eq!(
                    image, slot.wanted,
                    "GSI {own} waits for the next push, which does not bring its message"
                );
            }
            if slot.route.is_none() {
                assert!(slot.wanted.is_none() && !slot.is_armed() && place == own, "GSI {own} is free");
                assert_eq!(self.entries.image(own), None, "GSI {own} is free");
            }
            if slot.broken {
                assert_eq!(slot.wanted, None, "GSI {own} is broken, and to be armed");
                let left = place != own || self.entries.image(own).is_some();
                assert!(slot.is_armed() || !left, "GSI {own} is broken and disarmed, and keeps an entry");
            }
        }
        assert_eq!(self.armed.len(), self.slots.iter().filter(|slot| slot.is_armed()).count());
    }

    pub(super) fn gsi_state(&self, index: usize) -> GsiState {
        match &self.slots[index] {
            Slot { broken: true, .. } => GsiState::Broken,
            Slot { route: None, .. } => GsiState::Unallocated,
            slot if slot.is_armed() => GsiState::Enabled,
            _ => GsiState::Disabled,
        }
    }

    pub(super) fn kernel_table(&self) -> impl Iterator<Item = (u32, RawMsi)> + '_ {
        self.entries.kernel_table()
    }

    /// The GSI of the route that has this eventfd, if one has.
    pub(super) fn route_of(&self, event: &EventFd) -> Option<u32> {
        // A broken route may have another eventfd than its irqfd.
        // One that can't be inspected was closed by other code, and is no route's any more.
        let is_it = |other: &EventFd| event.is_same(other).unwrap_or(false);
        let of_event = |slot: &Slot| match (&slot.route, &slot.event) {
            (Some(route), Some(armed)) => is_it(armed) || is_it(&route.event.get()),
            _ => false,
        };
        self.slots.iter().position(of_event).map(|index| self.gsi(index))
    }
}

fn closed() -> CallError {
    CallError::new(Operation::Open, "call on a closed partition", libc::EBADF)
}
