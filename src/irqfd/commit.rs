//! The order of calls that changes the kernel's state, and the rollback if the kernel refuses one.
//!
//! Forward: disarm every route that must not be armed (around a quiesced push: all), change the image, push it once if
//! the kernel's table lacks a wanted entry, arm. So an irqfd is armed only while the kernel's table has its entry.
//! Rollback: disarm every route that was not armed before, push the old table only if an armed route's entry would be
//! stale otherwise, arm again.

use std::ops::Range;
use std::sync::Arc;

use super::error::Failure;
use super::gsi::{GsiAllocator, GsiState};
use super::msi::MsiRoute;
use super::shared::{Intent, Route};
use super::stats::PartitionStats;
use super::vps::VpSet;
use crate::hypervisor::event::EventFd;
use crate::hypervisor::{CallError, CallResult, Hypervisor, Operation, RawMsi};

/// The state that the partition's lock guards.
#[derive(Debug)]
pub(super) struct State {
    pub(super) hypervisor: Option<Box<dyn Hypervisor>>,
    pub(super) gsis: GsiAllocator,
    /// By GSI, counted from the partition's first.
    pub(super) slots: Vec<Slot>,
    pub(super) vps: Option<VpSet>,
    pub(super) closing: bool,
    pub(super) stats: PartitionStats,
    range: Range<u32>,
    /// The slots whose irqfd is registered, in no order.
    armed: Vec<u16>,
    /// The slots whose entry in the image may differ from the kernel's since the last push.
    dirty: Vec<u16>,
    /// The slots that wait to be re-armed, because a rollback could not arm them again.
    waiting: Vec<u16>,
}

/// The state of one GSI.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) route: Option<Arc<Route>>,
    /// The MSI that it should be armed with; none if it should be disarmed.
    wanted: Option<RawMsi>,
    /// Its entry in the image, which the next push makes the kernel's.
    entry: Option<RawMsi>,
    /// Its entry in the kernel's table.
    kernel: Option<RawMsi>,
    /// Its place in `armed`, counted from 1.
    armed: u16,
    /// Whether it is in `dirty`.
    dirty: bool,
    broken: bool,
}

impl Slot {
    fn is_armed(&self) -> bool {
        self.armed != 0
    }
}

/// The state that a slot is to have, and the one that it had.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) index: usize,
    pub(super) wanted: Option<RawMsi>,
    /// Whether an entry that is no longer wanted leaves the table.
    drop_entry: bool,
    wanted_before: Option<RawMsi>,
    entry_before: Option<RawMsi>,
}

impl Change {
    /// Brings the kernel to an intent.
    pub(super) fn to(index: usize, intent: Intent) -> Self {
        let wanted = if intent.masked { None } else { intent.msi.map(MsiRoute::raw) };
        Self { index, wanted, drop_entry: intent.msi.is_none(), wanted_before: None, entry_before: None }
    }
}

impl State {
    pub(super) fn new(
        hypervisor: Box<dyn Hypervisor>,
        gsis: GsiAllocator,
        range: Range<u32>,
        vps: Option<VpSet>,
    ) -> Self {
        let size = range.len();
        Self {
            hypervisor: Some(hypervisor),
            gsis,
            slots: range.clone().map(|_| Slot::default()).collect(),
            vps,
            closing: false,
            stats: PartitionStats::default(),
            range,
            armed: Vec::with_capacity(size),
            dirty: Vec::with_capacity(size),
            waiting: Vec::new(),
        }
    }

    fn gsi(&self, index: usize) -> u32 {
        self.range.start + index as u32
    }

    /// Makes a call and counts its failure.
    fn call<T>(&mut self, call: impl FnOnce(&mut dyn Hypervisor) -> CallResult<T>) -> Result<T, Failure> {
        let result = match &mut self.hypervisor {
            Some(hypervisor) => call(hypervisor.as_mut()),
            None => Err(closed()),
        };
        self.counted(result, None)
    }

    /// Makes a call about a slot's irqfd and counts its failure.
    fn call_irqfd(
        &mut self,
        index: usize,
        call: impl FnOnce(&mut dyn Hypervisor, u32, &Arc<Route>) -> CallResult,
    ) -> Result<(), Failure> {
        let gsi = self.gsi(index);
        let result = match (&mut self.hypervisor, &self.slots[index].route) {
            (Some(hypervisor), Some(route)) => call(hypervisor.as_mut(), gsi, route),
            (None, _) => Err(closed()),
            (_, None) => {
                Err(CallError::new(Operation::AssignIrqfd, "irqfd of a GSI without a route", libc::ENOENT))
            }
        };
        self.counted(result, Some(gsi))
    }

    fn counted<T>(&mut self, result: CallResult<T>, gsi: Option<u32>) -> Result<T, Failure> {
        result.map_err(|error| {
            self.stats.failures += 1;
            Failure::new(error, gsi)
        })
    }

    /// Registers a slot's irqfd. The caller drains it then.
    fn assign(&mut self, index: usize) -> Result<(), Failure> {
        debug_assert!(!self.is_stale(index), "an armed irqfd has its entry in the kernel's table");
        self.call_irqfd(index, |hypervisor, gsi, route| hypervisor.assign(gsi, route))?;
        self.stats.arms += 1;
        self.armed.push(index as u16);
        self.slots[index].armed = self.armed.len() as u16;
        Ok(())
    }

    /// Drains the routes assigned last, from a place in `armed` on.
    fn drain(&mut self, from: usize) -> Result<(), Failure> {
        if self.armed.len() == from {
            return Ok(());
        }
        let routes = self.armed[from..].iter().filter_map(|index| self.slots[usize::from(*index)].route.as_deref());
        let events: Vec<_> = routes.map(|route| &route.event).collect();
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
            let disarmed = self.disarm(index);
            result = result.and(disarmed).and(failure);
        }
        result
    }

    fn disarm(&mut self, index: usize) -> Result<(), Failure> {
        self.call_irqfd(index, |hypervisor, gsi, route| hypervisor.deassign(gsi, &route.event))?;
        self.stats.disarms += 1;
        let place = std::mem::take(&mut self.slots[index].armed);
        self.armed.swap_remove(usize::from(place) - 1);
        if let Some(moved) = self.armed.get(usize::from(place) - 1) {
            self.slots[usize::from(*moved)].armed = place;
        }
        Ok(())
    }

    fn push(&mut self) -> Result<(), Failure> {
        let entries = self.call(|hypervisor| hypervisor.push())?;
        self.stats.pushes += 1;
        self.stats.entries_pushed += entries as u64;
        for index in self.dirty.drain(..) {
            let slot = &mut self.slots[usize::from(index)];
            slot.kernel = slot.entry;
            slot.dirty = false;
        }
        Ok(())
    }

    /// Changes the image. Makes no call.
    fn put_entry(&mut self, index: usize, entry: Option<RawMsi>) {
        let gsi = self.gsi(index);
        let slot = &mut self.slots[index];
        if slot.entry == entry {
            return;
        }
        slot.entry = entry;
        if !std::mem::replace(&mut slot.dirty, true) {
            self.dirty.push(index as u16);
        }
        if let Some(hypervisor) = &mut self.hypervisor {
            match entry {
                Some(msi) => hypervisor.set_entry(gsi, msi),
                None => hypervisor.drop_entry(gsi),
            }
        }
    }

    /// Makes all `changes`, or none. With `quiesce`, no push meets an armed irqfd.
    pub(super) fn apply(&mut self, changes: &mut [Change], quiesce: bool) -> Result<(), Failure> {
        for change in &mut *changes {
            let slot = &self.slots[change.index];
            (change.wanted_before, change.entry_before) = (slot.wanted, slot.entry);
        }
        let push = changes
            .iter()
            .any(|change| change.wanted.is_some() && change.wanted != self.slots[change.index].kernel);
        let mut disarmed = Vec::new();
        let result = self
            .forward(changes, push, push && quiesce, &mut disarmed)
            .map_err(|failure| self.rollback(changes, quiesce, &mut disarmed, failure));
        if result.is_ok() && !push {
            self.stats.pushes_skipped += 1;
        }
        let touched = disarmed.iter().map(|index| usize::from(*index));
        for index in changes.iter().map(|change| change.index).chain(touched) {
            self.publish(index);
        }
        result
    }

    fn publish(&self, index: usize) {
        let slot = &self.slots[index];
        if let Some(route) = &slot.route {
            route.publish_kernel(slot.is_armed(), slot.broken);
        }
    }

    fn forward(
        &mut self,
        changes: &[Change],
        push: bool,
        quiesced: bool,
        disarmed: &mut Vec<u16>,
    ) -> Result<(), Failure> {
        if quiesced {
            self.disarm_all(changes, disarmed)?;
        } else {
            for change in changes {
                if change.wanted.is_none() && self.slots[change.index].is_armed() {
                    self.disarm(change.index)?;
                    disarmed.push(change.index as u16);
                }
            }
        }
        for change in changes {
            self.slots[change.index].wanted = change.wanted;
            if change.wanted.is_some() || change.drop_entry {
                self.put_entry(change.index, change.wanted);
            }
        }
        if push {
            self.push()?;
        }
        let armed = self.armed.len();
        let again = disarmed.iter().rev().map(|index| usize::from(*index));
        let mut all = changes.iter().map(|change| change.index).chain(again);
        let assigned = all.try_for_each(|index| self.assign_if_wanted(index));
        // Also after a failure: the routes re-armed until then stay armed.
        assigned.and(self.drain(armed))?;
        if push {
            self.arm_waiting();
        }
        Ok(())
    }

    fn disarm_all(&mut self, changes: &[Change], disarmed: &mut Vec<u16>) -> Result<(), Failure> {
        for index in self.armed.clone() {
            let slot = usize::from(index);
            match self.disarm(slot) {
                Ok(()) => disarmed.push(index),
                // An earlier call could not disarm it either, and the others must not wait for it.
                Err(_) if self.slots[slot].broken => {}
                // Other code closed its descriptor. It can never be disarmed, and this call is not about it.
                Err(failure)
                    if failure.error.errno == libc::EBADF && changes.iter().all(|change| change.index != slot) =>
                {
                    self.quarantine(slot);
                    self.publish(slot);
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    fn assign_if_wanted(&mut self, index: usize) -> Result<(), Failure> {
        let slot = &self.slots[index];
        if slot.wanted.is_some() && !slot.is_armed() { self.assign(index) } else { Ok(()) }
    }

    /// Tries again to arm the routes that wait to be re-armed. A failure here is no failure of the call at hand.
    fn arm_waiting(&mut self) {
        for index in std::mem::take(&mut self.waiting) {
            self.arm_again(index.into());
            self.publish(index.into());
        }
    }

    /// Arms a slot that should be armed and is not, if the kernel has its entry; otherwise it waits to be re-armed.
    fn arm_again(&mut self, index: usize) -> bool {
        let slot = &self.slots[index];
        if slot.wanted.is_none() || slot.is_armed() {
            return true;
        }
        if slot.kernel == slot.wanted && self.assign(index).and_then(|()| self.drain(self.armed.len() - 1)).is_ok()
        {
            return true;
        }
        if !self.waiting.contains(&(index as u16)) {
            self.waiting.push(index as u16);
        }
        false
    }

    /// Restores the state from before the call as far as the kernel allows, and adds to the failure where it does not.
    fn rollback(
        &mut self,
        changes: &[Change],
        quiesce: bool,
        disarmed: &mut Vec<u16>,
        mut failure: Failure,
    ) -> Failure {
        for change in changes {
            self.slots[change.index].wanted = change.wanted_before;
            self.put_entry(change.index, change.entry_before);
        }
        for change in changes {
            let slot = &self.slots[change.index];
            if slot.wanted.is_none() && slot.is_armed() && self.disarm(change.index).is_err() {
                failure.broken.push(self.quarantine(change.index));
            }
        }
        if changes.iter().any(|change| self.is_stale(change.index)) {
            // Never push past an armed irqfd.
            if !quiesce || self.disarm_all(changes, disarmed).is_ok() {
                // A failure shows in the entries that stay stale.
                let _pushed_back = self.push();
            }
            for change in changes {
                if self.slots[change.index].is_armed() && self.is_stale(change.index) {
                    failure.broken.push(self.quarantine(change.index));
                    // Better silent than armed with an MSI that no caller asks for any more.
                    if self.disarm(change.index).is_ok() {
                        self.put_entry(change.index, None);
                    }
                }
            }
        }
        for index in disarmed.iter().map(|index| usize::from(*index)) {
            let gsi = self.gsi(index);
            if !self.arm_again(index) && !failure.disarmed.contains(&gsi) {
                failure.disarmed.push(gsi);
            }
        }
        failure
    }

    /// Whether the kernel's entry is not the MSI that a slot should be armed with.
    fn is_stale(&self, index: usize) -> bool {
        let slot = &self.slots[index];
        slot.wanted.is_some() && slot.wanted != slot.kernel
    }

    /// Marks a slot as broken. While it is armed its entry stays in the table: on mshv a signal on an armed irqfd
    /// without an entry becomes vector 0. Returns its GSI.
    fn quarantine(&mut self, index: usize) -> u32 {
        let slot = &mut self.slots[index];
        slot.broken = true;
        slot.wanted = None;
        let kernel = slot.kernel;
        self.put_entry(index, kernel);
        self.gsi(index)
    }

    /// Disarms a slot and removes its route, even if the kernel refuses. The GSI is free again unless its irqfd may
    /// still be registered, or the slot was broken before.
    pub(super) fn release(&mut self, index: usize) -> Result<(), Failure> {
        self.slots[index].wanted = None;
        let result = if self.slots[index].is_armed() { self.disarm(index) } else { Ok(()) };
        let result = result.map_err(|mut failure| {
            failure.broken.push(self.quarantine(index));
            failure
        });
        if !self.slots[index].is_armed() {
            self.put_entry(index, None);
        }
        self.stats.pushes_skipped += 1;
        self.waiting.retain(|other| usize::from(*other) != index);
        self.publish(index);
        if result.is_ok() {
            let slot = &mut self.slots[index];
            slot.route = None;
            if !slot.broken {
                self.gsis.free(index);
            }
        }
        result
    }

    pub(super) fn create_vp(&mut self, index: u8) -> Result<(), Failure> {
        self.call(|hypervisor| hypervisor.create_vp(index))?;
        self.vps.get_or_insert_default().insert(index);
        Ok(())
    }

    /// Tries once more to disarm the routes that could not be disarmed when they were closed.
    pub(super) fn release_leftovers(&mut self) -> Vec<Failure> {
        let armed = self.armed.clone().into_iter().map(usize::from);
        let there = |state: &Self, index: usize| {
            state.slots[index].route.as_ref().is_some_and(|route| !route.event.is_closed())
        };
        armed.filter_map(|index| if there(self, index) { self.disarm(index).err() } else { None }).collect()
    }

    /// Refuses all further changes, and returns the routes to close.
    pub(super) fn start_closing(&mut self) -> Vec<Arc<Route>> {
        self.closing = true;
        self.slots.iter().filter_map(|slot| slot.route.clone()).collect()
    }

    #[cfg(test)]
    #[cfg(not(shuttle))]
    pub(super) fn dirty_len(&self) -> usize {
        self.dirty.len()
    }

    pub(super) fn gsi_state(&self, index: usize) -> GsiState {
        match &self.slots[index] {
            Slot { broken: true, .. } => GsiState::Broken,
            Slot { route: None, .. } => GsiState::Unallocated,
            slot if slot.is_armed() => GsiState::Enabled,
            _ => GsiState::Disabled,
        }
    }

    pub(super) fn kernel_entries(&self) -> impl Iterator<Item = (u32, RawMsi)> + '_ {
        let entries = self.slots.iter().enumerate();
        entries.filter_map(|(index, slot)| Some((self.gsi(index), slot.kernel?)))
    }

    /// The GSI of the route that has this eventfd, if one has.
    pub(super) fn route_of(&self, event: &EventFd) -> Option<u32> {
        let mut routes = self.slots.iter().filter_map(|slot| slot.route.as_ref());
        // An eventfd that can't be inspected was closed by other code, and is no route's any more.
        let of_event = |route: &&Arc<Route>| route.event.is_same(event).unwrap_or(false);
        routes.find(of_event).map(|route| route.gsi)
    }
}

fn closed() -> CallError {
    CallError::new(Operation::Open, "call on a closed partition", libc::EBADF)
}
