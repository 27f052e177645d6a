//! The order of calls that changes the kernel's state, and the rollback if the kernel refuses one.
//!
//! Forward: find a place for each wanted message, a GSI where the kernel's table has it; disarm every route that must not
//! be armed, that moves to another place or that gets another eventfd (around a quiesced push: all); if a message is not
//! in the kernel's table, change the image and push it once; arm; carry over what the old eventfds hold. So an irqfd is
//! armed only at a GSI whose entry is its message.
//! Rollback: disarm every route that was not armed before, or not there, or not so; push the old entries only if an armed
//! route's entry would be stale otherwise; arm again.

use std::sync::Arc;

use super::error::Failure;
use super::plan::{Change, Plan};
use super::shared::Route;
use super::state::State;
use super::trace::Reason;

impl State {
    /// Makes all `changes`, or none.
    pub(super) fn apply(&mut self, changes: &mut [Change]) -> Result<(), Failure> {
        let balance = self.balance;
        let mut plan = self.plan(changes);
        let mut disarmed = Vec::new();
        let result = self
            .forward(changes, &mut plan, &mut disarmed)
            .map_err(|failure| self.rollback(changes, &plan, &mut disarmed, failure));
        if result.is_ok() {
            changes.iter().for_each(|change| self.keep(change));
            self.replace_events(changes);
            self.stats.hits += plan.hits;
            self.stats.misses += plan.misses;
            self.stats.entries_loaded += plan.loaded;
            self.stats.pushes_skipped += u64::from(!plan.push);
        } else {
            self.balance = balance;
        }
        let touched = disarmed.iter().map(|index| usize::from(*index));
        for index in changes.iter().map(|change| change.index).chain(touched) {
            self.publish(index);
        }
        result
    }

    fn forward(&mut self, changes: &[Change], plan: &mut Plan, disarmed: &mut Vec<u16>) -> Result<(), Failure> {
        if plan.push && self.quiesce {
            self.reason = Reason::Quiesced;
            self.disarm_all(changes, disarmed)?;
        }
        self.go_home(plan);
        for change in changes {
            let slot = &self.slots[change.index];
            let stays = change.wanted.is_some() && change.place == slot.place() && change.event.is_none();
            if slot.is_armed() && !stays {
                self.reason = match change.wanted {
                    None => Reason::Unwanted,
                    Some(_) if change.event.is_some() => Reason::Replaced,
                    Some(_) => Reason::Moves,
                };
                self.disarm(change.index)?;
                disarmed.push(change.index as u16);
            }
        }
        for change in changes {
            let own = self.gsi(change.index);
            let slot = &mut self.slots[change.index];
            slot.wanted = change.wanted;
            slot.place = change.place as u16;
            if change.event.is_some() {
                slot.event.clone_from(&change.event);
            }
            if change.drop_entry || (change.wanted.is_some() && change.place == own) {
                self.put(own, change.wanted);
            }
        }
        if plan.push {
            self.reason = Reason::Missing;
            let pushed = self.push();
            plan.pushed = pushed.is_ok();
            self.loads = plan.pushed;
            pushed?;
        }
        plan.held = changes.iter().filter(|change| change.brings_signals()).map(|change| change.index).collect();
        let armed = self.armed.len();
        let again = disarmed.iter().rev().map(|index| (usize::from(*index), Reason::PushIsOver));
        let mut all = changes.iter().map(|change| (change.index, Reason::Wanted)).chain(again);
        let assigned = all.try_for_each(|(index, reason)| {
            self.reason = reason;
            self.assign_if_wanted(index)
        });
        // Also after a failure: the routes re-armed until then stay armed.
        assigned.and(self.drain(armed))?;
        if plan.push {
            self.arm_waiting();
        }
        Ok(())
    }

    /// Puts the new eventfds in the places of the old ones, all of which are disarmed, and carries over what those held.
    /// Until here signallers have written to the old ones, so that after a failure nothing is to be brought back.
    fn replace_events(&self, changes: &[Change]) {
        let replaced = || {
            changes.iter().filter_map(|change| {
                let slot = &self.slots[change.index];
                Some((change, slot, change.event.as_ref()?, slot.route.as_ref()?))
            })
        };
        replaced().for_each(|(change, _, event, route)| route.event.replace(event, change.carries));
        replaced().for_each(|(_, slot, _, route)| route.event.carry_over(slot.is_armed()));
    }

    /// Lets the slots that are brought home know their new place, but for those that could not be disarmed.
    fn go_home(&mut self, plan: &mut Plan) {
        for homed in std::mem::take(&mut plan.homed) {
            if self.slots[homed.index].is_armed() {
                self.leave(homed);
            } else {
                self.slots[homed.index].place = self.gsi(homed.index) as u16;
                plan.homed.push(homed);
            }
        }
    }

    fn disarm_all(&mut self, changes: &[Change], disarmed: &mut Vec<u16>) -> Result<(), Failure> {
        for index in self.armed.clone() {
            let slot = usize::from(index);
            match self.disarm(slot) {
                Ok(()) => {
                    disarmed.push(index);
                    // It could not be disarmed before. Its entry is of no use any more.
                    if self.slots[slot].broken {
                        self.vacate(slot);
                    }
                }
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
        self.reason = Reason::Waited;
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
    fn rollback(
        &mut self,
        changes: &[Change],
        plan: &Plan,
        disarmed: &mut Vec<u16>,
        mut failure: Failure,
    ) -> Failure {
        self.reason = Reason::RolledBack;
        for change in changes {
            let slot = &self.slots[change.index];
            let (before, same) = (&change.before, change.event.is_none() || slot.has(&change.before.event));
            let stays = before.armed && before.place == slot.place() && same;
            if slot.is_armed() && !stays && self.disarm(change.index).is_err() {
                failure.broken.push(self.quarantine(change.index));
            }
        }
        self.give_back(changes, plan);
        for change in changes {
            let (own, slot) = (self.gsi(change.index), &mut self.slots[change.index]);
            if slot.broken && slot.is_armed() {
                // It keeps the place where it is armed still.
                self.keep(change);
                continue;
            }
            slot.wanted = change.before.wanted;
            slot.place = change.before.place as u16;
            if change.event.is_some() {
                slot.event.clone_from(&change.before.event);
            }
            self.put(own, change.before.own);
            if change.place != change.before.place {
                self.entries.release(change.place);
            }
        }
        if !plan.pushed {
            plan.homed.iter().for_each(|homed| self.leave(*homed));
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
        self.arm_all_again(disarmed, &mut failure);
        failure
    }

    /// Arms what a failed call has disarmed, and adds to the failure what the kernel refuses.
    fn arm_all_again(&mut self, disarmed: &[u16], failure: &mut Failure) {
        for index in disarmed.iter().map(|index| usize::from(*index)) {
            let gsi = self.gsi(index);
            if !self.arm_again(index) && !failure.disarmed.contains(&gsi) {
                failure.disarmed.push(gsi);
            }
        }
    }

    /// Disarms every irqfd and arms it again. A kernel that takes signals from an eventfd first and raises the interrupts
    /// later (KVM) has raised them when an irqfd is disarmed.
    pub(super) fn flush(&mut self) -> Result<(), Failure> {
        let mut disarmed = Vec::new();
        self.reason = Reason::Flushed;
        let mut result = self.disarm_all(&[], &mut disarmed);
        if result.is_ok() {
            let armed = self.armed.len();
            let assigned = disarmed.iter().try_for_each(|index| self.assign_if_wanted(usize::from(*index)));
            result = assigned.and(self.drain(armed));
        }
        result = result.map_err(|mut failure| {
            self.arm_all_again(&disarmed, &mut failure);
            failure
        });
        disarmed.iter().for_each(|index| self.publish(usize::from(*index)));
        result
    }

    /// Gives the eventfds that were to move their signals back, if arming has made interrupts of other routes of them: they
    /// are signals of the routes that keep the eventfds.
    fn give_back(&self, changes: &[Change], plan: &Plan) {
        for change in changes.iter().filter(|change| plan.held.contains(&change.index)) {
            let Some(event) = change.event.as_ref().filter(|_| !self.slots[change.index].is_armed()) else {
                continue;
            };
            // Disarming empties a counter. If other code has closed the eventfd, nobody can be told.
            if event.is_readable().is_ok_and(|is_left| !is_left) {
                let _gone = event.signal(1);
            }
        }
    }

    /// Disarms a slot and removes its route, even if the kernel refuses. The GSI is free again unless its irqfd may
    /// still be registered, or the slot was broken before.
    pub(super) fn release(&mut self, index: usize) -> Result<(), Failure> {
        self.slots[index].wanted = None;
        self.reason = Reason::Closed;
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
            slot.event = None;
            if !slot.broken {
                self.gsis.free(index);
            }
        }
        result
    }

    /// Tries once more to disarm the routes that could not be disarmed when they were closed.
    pub(super) fn release_leftovers(&mut self) -> Vec<Failure> {
        self.reason = Reason::Closed;
        let armed = self.armed.clone().into_iter().map(usize::from);
        let there =
            |state: &Self, index: usize| state.slots[index].event.as_ref().is_some_and(|event| !event.is_closed());
        armed.filter_map(|index| if there(self, index) { self.disarm(index).err() } else { None }).collect()
    }

    /// Refuses all further changes, and returns the routes to close.
    pub(super) fn start_closing(&mut self) -> Vec<Arc<Route>> {
        self.closing = true;
        self.slots.iter().filter_map(|slot| slot.route.clone()).collect()
    }
}
