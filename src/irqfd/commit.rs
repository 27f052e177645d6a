//! The order of calls that changes the kernel's state, and the rollback if the kernel refuses one.
//!
//! Forward: find a place for each wanted message, a GSI where the kernel's table has it; disarm every route that must not
//! be armed or that moves to another place (around a quiesced push: all); if a message is not in the kernel's table,
//! change the image and push it once; arm. So an irqfd is armed only at a GSI whose entry is its message.
//! Rollback: disarm every route that was not armed before, or not there; push the old entries only if an armed route's
//! entry would be stale otherwise; arm again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::config::Config;
use super::entries::Entries;
use super::error::Failure;
use super::gsi::{GsiAllocator, GsiState};
use super::msi::MsiRoute;
use super::preload::Habits;
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
    entries: Entries,
    first_gsi: u32,
    quiesce: bool,
    /// See [`Config::entries_per_move`]; 0 if pushes are quiesced.
    entries_per_move: usize,
    /// The slots whose irqfd is registered, in no order.
    armed: Vec<u16>,
    /// The slots that wait to be re-armed, because a rollback could not arm them again.
    waiting: Vec<u16>,
    habits: Habits,
    /// Whether the next push takes entries along: not after one that the kernel refused.
    loads: bool,
}

/// The state of one GSI that is handed out.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) route: Option<Arc<Route>>,
    /// The message that it should be armed with; none if it should be disarmed.
    wanted: Option<RawMsi>,
    /// The GSI where it is armed, or was armed last: its own or a spare one.
    place: u16,
    /// Its place in `armed`, counted from 1.
    armed: u16,
    broken: bool,
}

impl Slot {
    fn is_armed(&self) -> bool {
        self.armed != 0
    }

    fn place(&self) -> u32 {
        self.place.into()
    }
}

/// The state that a slot is to have, and the one that it had.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) index: usize,
    pub(super) wanted: Option<RawMsi>,
    /// Whether an entry that is no longer wanted leaves the table.
    drop_entry: bool,
    /// The GSI where it is to be armed.
    place: u32,
    /// Whether the kernel's table has to be given the message there.
    pushed: bool,
    before: Before,
}

/// The state of a slot before a change.
#[derive(Clone, Copy, Debug, Default)]
struct Before {
    wanted: Option<RawMsi>,
    place: u32,
    /// Its own entry in the image.
    own: Option<RawMsi>,
}

impl Change {
    /// Brings the kernel to an intent.
    pub(super) fn to(index: usize, intent: Intent) -> Self {
        let wanted = if intent.masked { None } else { intent.msi.map(MsiRoute::raw) };
        let drop_entry = intent.msi.is_none();
        Self { index, wanted, drop_entry, place: 0, pushed: false, before: Before::default() }
    }
}

/// The choice of places for a commit.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    push: bool,
    hits: u64,
    misses: u64,
    loaded: u64,
}

impl State {
    pub(super) fn new(hypervisor: Box<dyn Hypervisor>, config: &Config, vps: Option<VpSet>) -> Self {
        let size = config.gsis.len();
        let slot = |gsi| Slot { route: None, wanted: None, place: gsi as u16, armed: 0, broken: false };
        let spares = config.spare_gsis(hypervisor.has_pins());
        let end = spares.iter().map(|gsi| u32::from(*gsi) + 1).max().unwrap_or(0).max(config.gsis.end);
        Self {
            hypervisor: Some(hypervisor),
            gsis: GsiAllocator::new(size),
            slots: config.gsis.clone().map(slot).collect(),
            vps,
            closing: false,
            stats: PartitionStats::default(),
            entries: Entries::new(end, spares),
            first_gsi: config.gsis.start,
            quiesce: config.quiesce,
            entries_per_move: if config.quiesce { 0 } else { config.entries_per_move },
            armed: Vec::with_capacity(size),
            waiting: Vec::new(),
            habits: Habits::default(),
            loads: true,
        }
    }

    fn gsi(&self, index: usize) -> u32 {
        self.first_gsi + index as u32
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
        let place = self.slots[index].place();
        let result = match (&mut self.hypervisor, &self.slots[index].route) {
            (Some(hypervisor), Some(route)) => call(hypervisor.as_mut(), place, route),
            (None, _) => Err(closed()),
            (_, None) => {
                Err(CallError::new(Operation::AssignIrqfd, "irqfd of a GSI without a route", libc::ENOENT))
            }
        };
        self.counted(result, Some(self.gsi(index)))
    }

    fn counted<T>(&mut self, result: CallResult<T>, gsi: Option<u32>) -> Result<T, Failure> {
        result.map_err(|error| {
            self.stats.failures += 1;
            Failure::new(error, gsi)
        })
    }

    /// Registers a slot's irqfd. The caller drains it then.
    fn assign(&mut self, index: usize) -> Result<(), Failure> {
        debug_assert!(!self.is_stale(index), "an irqfd is armed where the kernel's table has its message");
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
        self.entries.pushed();
        Ok(())
    }

    /// Changes the image. Makes no call.
    fn put(&mut self, gsi: u32, msi: Option<RawMsi>) {
        self.entries.put(self.hypervisor.as_deref_mut(), gsi, msi);
    }

    /// Makes all `changes`, or none.
    pub(super) fn apply(&mut self, changes: &mut [Change]) -> Result<(), Failure> {
        let plan = self.plan(changes);
        let mut disarmed = Vec::new();
        let result = self
            .forward(changes, plan.push, &mut disarmed)
            .map_err(|failure| self.rollback(changes, &mut disarmed, failure));
        if result.is_ok() {
            changes.iter().for_each(|change| self.keep(change));
            self.stats.hits += plan.hits;
            self.stats.misses += plan.misses;
            self.stats.entries_loaded += plan.loaded;
            self.stats.pushes_skipped += u64::from(!plan.push);
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
            route.publish_kernel(slot.is_armed().then_some(slot.place), slot.broken);
        }
    }

    /// Chooses the place of each change, and puts the entries that it needs there into the image.
    fn plan(&mut self, changes: &mut [Change]) -> Plan {
        let mut plan = Plan::default();
        // Changes for which the kernel's table has the message, and an armed irqfd would move there from its own GSI.
        let mut moves = 0;
        for change in &mut *changes {
            let (slot, own) = (&self.slots[change.index], self.gsi(change.index));
            change.before = Before { wanted: slot.wanted, place: slot.place(), own: self.entries.image(own) };
            change.place = if change.drop_entry { own } else { slot.place() };
            if let Some(msi) = change.wanted {
                self.habits.note(msi);
            }
            let Some(msi) = change.wanted.filter(|msi| self.entries.kernel(change.place) != Some(*msi)) else {
                continue;
            };
            if let Some(place) = self.entries.find(own, msi) {
                change.place = place;
                plan.hits += 1;
                moves += usize::from(slot.is_armed() && slot.place() == own);
            } else {
                change.pushed = true;
                plan.misses += 1;
            }
        }
        plan.push = plan.misses > 0;
        // Where an armed irqfd may meet a push, changing its own entry is the better way if a push is made anyway, or is
        // cheaper than all the moves.
        if self.entries_per_move > 0
            && moves > 0
            && (plan.push || self.entries.len() <= moves * self.entries_per_move)
        {
            plan.push = true;
            for change in &mut *changes {
                let (slot, own) = (&self.slots[change.index], self.gsi(change.index));
                if slot.is_armed() && slot.place() == own && change.place != own {
                    (change.place, change.pushed) = (own, true);
                }
            }
        }
        // Places that are found stay, whatever else is replaced.
        for change in changes.iter().filter(|change| !change.pushed) {
            self.reserve(change);
        }
        if plan.push {
            plan.loaded = self.plan_push(changes);
        }
        plan
    }

    /// Gives every message that the kernel's table lacks a place, and loads the messages that are likely next. Returns
    /// the number of the latter.
    fn plan_push(&mut self, changes: &mut [Change]) -> u64 {
        let mut replaceable = self.entries.replaceable().into_iter();
        let mut planned = HashMap::new();
        for change in changes.iter_mut().filter(|change| change.pushed) {
            let (slot, own) = (&self.slots[change.index], self.gsi(change.index));
            let Some(msi) = change.wanted else { continue };
            // Its own entry, if that is empty, or may be changed under an armed irqfd. Otherwise it keeps its old message
            // there, which the guest may want again.
            let in_place = self.entries_per_move > 0 && slot.place() == own;
            change.place = own;
            if self.entries.image(own).is_some() && !in_place {
                let spare = planned.get(&msi).copied().or_else(|| replaceable.next());
                change.place = spare.unwrap_or(own);
            }
            if change.place != own && planned.insert(msi, change.place).is_none() {
                self.put(change.place, Some(msi));
            }
            self.reserve(change);
        }
        self.load(changes, replaceable, &planned)
    }

    /// Loads spare entries with the messages that are likely next. Returns how many.
    fn load(
        &mut self,
        changes: &[Change],
        replaceable: impl Iterator<Item = u32>,
        planned: &HashMap<RawMsi, u32>,
    ) -> u64 {
        if self.gsis.taken() <= self.entries_per_move {
            // Pushing a small table is cheaper than moving an irqfd, so the table is kept small.
            replaceable.for_each(|gsi| self.put(gsi, None));
            return 0;
        }
        if !self.loads || self.entries.spares() == 0 {
            return 0;
        }
        let now = self.slots.iter().filter_map(|slot| slot.wanted);
        let in_use: Vec<_> = now.chain(changes.iter().filter_map(|change| change.wanted)).collect();
        let likely = self.habits.likely(&in_use, self.vps.as_ref(), self.entries.spares());
        let mut free: Vec<_> = replaceable.collect();
        // A message that is there already keeps its place.
        let missing = |msi: &RawMsi| !planned.contains_key(msi) && !self.entries.has_a_place(*msi);
        let likely: Vec<_> = likely.into_iter().filter(missing).take(free.len()).collect();
        let there: HashSet<_> = likely.iter().filter_map(|msi| self.entries.spare_of(*msi)).collect();
        free.retain(|gsi| !there.contains(gsi));
        let absent = likely.into_iter().filter(|msi| self.entries.spare_of(*msi).is_none());
        let loaded: Vec<_> = absent.zip(free).collect();
        loaded.iter().for_each(|(msi, gsi)| self.put(*gsi, Some(*msi)));
        loaded.len() as u64
    }

    /// Holds the place of a change beside the one that its slot has until the commit is over.
    fn reserve(&mut self, change: &Change) {
        if change.place != change.before.place {
            self.entries.reserve(change.place);
        }
    }

    /// Gives up the place that a slot had before a change that has succeeded.
    fn keep(&mut self, change: &Change) {
        if change.place != change.before.place {
            self.entries.release(change.before.place);
        }
    }

    fn forward(&mut self, changes: &[Change], push: bool, disarmed: &mut Vec<u16>) -> Result<(), Failure> {
        if push && self.quiesce {
            self.disarm_all(changes, disarmed)?;
        }
        for change in changes {
            let slot = &self.slots[change.index];
            if slot.is_armed() && (change.wanted.is_none() || change.place != slot.place()) {
                self.disarm(change.index)?;
                disarmed.push(change.index as u16);
            }
        }
        for change in changes {
            let own = self.gsi(change.index);
            let slot = &mut self.slots[change.index];
            slot.wanted = change.wanted;
            slot.place = change.place as u16;
            if change.drop_entry || (change.wanted.is_some() && change.place == own) {
                self.put(own, change.wanted);
            }
        }
        if push {
            let pushed = self.push();
            self.loads = pushed.is_ok();
            pushed?;
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
        if !self.is_stale(index) && self.assign(index).and_then(|()| self.drain(self.armed.len() - 1)).is_ok() {
            return true;
        }
        if !self.waiting.contains(&(index as u16)) {
            self.waiting.push(index as u16);
        }
        false
    }

    /// Restores the state from before the call as far as the kernel allows, and adds to the failure where it does not.
    fn rollback(&mut self, changes: &[Change], disarmed: &mut Vec<u16>, mut failure: Failure) -> Failure {
        for change in changes {
            let slot = &self.slots[change.index];
            let stays = change.before.wanted.is_some() && change.before.place == slot.place();
            if slot.is_armed() && !stays && self.disarm(change.index).is_err() {
                failure.broken.push(self.quarantine(change.index));
            }
        }
        for change in changes {
            let (own, slot) = (self.gsi(change.index), &mut self.slots[change.index]);
            if slot.broken && slot.is_armed() {
                // It keeps the place where it is armed still.
                self.keep(change);
                continue;
            }
            slot.wanted = change.before.wanted;
            slot.place = change.before.place as u16;
            self.put(own, change.before.own);
            if change.place != change.before.place {
                self.entries.release(change.place);
            }
        }
        self.entries.restore_spares(self.hypervisor.as_deref_mut());
        if changes.iter().any(|change| self.is_stale(change.index)) {
            // Never push past an armed irqfd.
            if !self.quiesce || self.disarm_all(changes, disarmed).is_ok() {
                // A failure shows in the entries that stay stale.
                let _pushed_back = self.push();
            }
            for change in changes {
                if self.slots[change.index].is_armed() && self.is_stale(change.index) {
                    failure.broken.push(self.quarantine(change.index));
                    // Better silent than armed with an MSI that no caller asks for any more.
                    if self.disarm(change.index).is_ok() {
                        self.vacate(change.index);
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

    /// Whether the kernel's entry is not the message that a slot should be armed with.
    fn is_stale(&self, index: usize) -> bool {
        let slot = &self.slots[index];
        slot.wanted.is_some() && slot.wanted != self.entries.kernel(slot.place())
    }

    /// Marks a slot as broken. While it is armed its entry stays in the table: on mshv a signal on an armed irqfd
    /// without an entry becomes vector 0. Returns its GSI.
    fn quarantine(&mut self, index: usize) -> u32 {
        let slot = &mut self.slots[index];
        slot.broken = true;
        slot.wanted = None;
        let place = slot.place();
        self.put(place, self.entries.kernel(place));
        self.gsi(index)
    }

    /// Gives up the place of a slot that is disarmed, and drops its own entry.
    fn vacate(&mut self, index: usize) {
        let own = self.gsi(index);
        self.entries.release(self.slots[index].place());
        self.slots[index].place = own as u16;
        self.put(own, None);
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
            self.vacate(index);
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
        self.entries.dirty_len()
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
        let mut routes = self.slots.iter().filter_map(|slot| slot.route.as_ref());
        // An eventfd that can't be inspected was closed by other code, and is no route's any more.
        let of_event = |route: &&Arc<Route>| route.event.is_same(event).unwrap_or(false);
        routes.find(of_event).map(|route| route.gsi)
    }
}

fn closed() -> CallError {
    CallError::new(Operation::Open, "call on a closed partition", libc::EBADF)
}
