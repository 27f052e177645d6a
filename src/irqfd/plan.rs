//! Places: the GSI where each wanted message is, or is put, in the kernel's table.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::balance::Retargets;
use super::msi::MsiRoute;
use super::shared::Intent;
use super::state::State;
use crate::hypervisor::RawMsi;
use crate::hypervisor::event::EventFd;

/// The state that a slot is to have, and the one that it had.
#[derive(Debug, Default)]
pub(super) struct Change {
    pub(super) index: usize,
    pub(super) wanted: Option<RawMsi>,
    /// Whether an entry that is no longer wanted leaves the table.
    pub(super) drop_entry: bool,
    /// The GSI where it is to be armed.
    pub(super) place: u32,
    /// Whether the kernel's table has to be given the message there.
    pub(super) pushed: bool,
    /// The eventfd that it is to have instead of its own.
    pub(super) event: Option<Arc<EventFd>>,
    /// Whether what the old eventfd holds goes over to the new one, rather than with it to another route.
    pub(super) carries: bool,
    /// Whether the new one is another route's, which gives it up here.
    pub(super) moved: bool,
    pub(super) before: Before,
}

/// The state of a slot before a change.
#[derive(Clone, Debug, Default)]
pub(super) struct Before {
    pub(super) wanted: Option<RawMsi>,
    pub(super) armed: bool,
    pub(super) place: u32,
    /// Its own entry in the image.
    pub(super) own: Option<RawMsi>,
    /// Its eventfd, if that is to change.
    pub(super) event: Option<Arc<EventFd>>,
}

impl Change {
    /// Brings the kernel to an intent.
    pub(super) fn to(index: usize, intent: Intent) -> Self {
        let wanted = if intent.masked { None } else { intent.msi.map(MsiRoute::raw) };
        let drop_entry = intent.msi.is_none();
        Self { index, wanted, drop_entry, ..Self::default() }
    }

    /// Whether its new eventfd was another route's, and comes with signals.
    pub(super) fn brings_signals(&self) -> bool {
        let waits = |event: &Arc<EventFd>| event.is_readable().unwrap_or(false);
        self.moved && self.event.as_ref().is_some_and(waits)
    }
}

/// The choice of places for a commit.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) push: bool,
    /// Whether the kernel has taken the push.
    pub(super) pushed: bool,
    pub(super) hits: u64,
    pub(super) misses: u64,
    pub(super) loaded: u64,
    /// The slots that go back to their own GSIs.
    pub(super) homed: Vec<Homed>,
    /// The slots whose new eventfds were another slot's, and come with signals.
    pub(super) held: Vec<usize>,
}

/// A slot that goes from a spare GSI back to its own, with the message that it has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Homed {
    pub(super) index: usize,
    /// The spare GSI.
    pub(super) place: u32,
    /// Its own entry in the image before.
    pub(super) own: Option<RawMsi>,
}

impl State {
    /// Chooses the place of each change, and puts the entries that it needs there into the image.
    pub(super) fn plan(&mut self, changes: &mut [Change]) -> Plan {
        let mut plan = Plan::default();
        let mut retargets = Retargets::default();
        for change in &mut *changes {
            let (slot, own) = (&self.slots[change.index], self.gsi(change.index));
            change.before = Before {
                wanted: slot.wanted,
                armed: slot.is_armed(),
                place: slot.place(),
                own: self.entries.image(own),
                event: slot.event.clone().filter(|_| change.event.is_some()),
            };
            change.place = if change.drop_entry { own } else { slot.place() };
            if let Some(msi) = change.wanted {
                self.habits.note(msi);
            }
            let Some(msi) = change.wanted.filter(|msi| self.entries.kernel(change.place) != Some(*msi)) else {
                continue;
            };
            retargets.armed |= slot.is_armed();
            retargets.disarmed |= !slot.is_armed() && self.entries.image(slot.place()).is_some();
            if let Some(place) = self.entries.find(own, msi) {
                change.place = place;
                plan.hits += 1;
            } else {
                change.pushed = true;
                plan.misses += 1;
            }
        }
        plan.push = plan.misses > 0;
        retargets.missed = plan.misses > 0;
        if self.has_few_routes() {
            self.balance.note(retargets);
        } else {
            self.balance.fill();
        }
        if self.entries_per_move > 0 && retargets.armed {
            self.push_for_moves(changes, &mut plan);
        }
        // Places that are found stay, whatever else is replaced.
        for change in changes.iter().filter(|change| !change.pushed) {
            self.reserve(change);
        }
        if plan.push {
            self.plan_push(changes, &mut plan);
        }
        plan
    }

    /// Where an armed irqfd may meet a push, changing its own entry is the better way if a push is made anyway, or is
    /// cheaper than all the moves.
    fn push_for_moves(&self, changes: &mut [Change], plan: &mut Plan) {
        let is_small = self.is_kept_small();
        // The table has its message, and an armed irqfd would move there from its own GSI. In a small table one at a spare
        // GSI goes home, so that the next push changes its entry in place.
        let moves = |change: &Change| {
            let (slot, own) = (&self.slots[change.index], self.gsi(change.index));
            let leaves = change.wanted.is_some() && ![own, slot.place()].contains(&change.place);
            slot.is_armed() && leaves && (is_small || slot.place() == own)
        };
        let number = changes.iter().filter(|change| moves(change)).count();
        if number > 0 && (plan.push || is_small || self.entries.len() <= number * self.entries_per_move) {
            plan.push = true;
            for change in changes.iter_mut().filter(|change| moves(change)) {
                (change.place, change.pushed) = (self.gsi(change.index), true);
            }
        }
    }

    /// Gives every message that the kernel's table lacks a place, and loads the messages that are likely next.
    fn plan_push(&mut self, changes: &mut [Change], plan: &mut Plan) {
        // While the table is kept small, the spare GSIs have no part in it: scanning them would take longer than the push.
        let is_small = self.is_kept_small();
        let is_plain = is_small && self.entries.filled() == 0;
        let mut replaceable = if is_plain { Vec::new() } else { self.entries.replaceable() }.into_iter();
        let mut planned = HashMap::new();
        for change in changes.iter_mut().filter(|change| change.pushed) {
            let (slot, own) = (&self.slots[change.index], self.gsi(change.index));
            let Some(msi) = change.wanted else { continue };
            // Its own entry, if that is empty, if it may be changed under an armed irqfd, and while the table is kept small.
            // Otherwise it keeps its old message there, which the guest may want again.
            let in_place = is_small || (self.entries_per_move > 0 && slot.place() == own);
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
        self.load(changes, replaceable.collect(), &planned, plan);
    }

    /// Whether pushing a table without spare entries is cheaper than moving an irqfd.
    fn has_few_routes(&self) -> bool {
        self.gsis.taken() <= self.entries_per_move
    }

    /// Whether pushes take no entries along: for few routes, as long as those are retargeted while they are armed.
    fn is_kept_small(&self) -> bool {
        self.has_few_routes() && !self.balance.loads()
    }

    /// Loads spare entries with the messages that are likely next.
    fn load(&mut self, changes: &[Change], mut free: Vec<u32>, planned: &HashMap<RawMsi, u32>, plan: &mut Plan) {
        if self.is_kept_small() {
            free.into_iter().for_each(|gsi| self.put(gsi, None));
            return;
        }
        if !self.loads || self.entries.spares() == 0 {
            return;
        }
        let now = self.slots.iter().filter_map(|slot| slot.wanted);
        let in_use: Vec<_> = now.chain(changes.iter().filter_map(|change| change.wanted)).collect();
        let likely = self.habits.likely(&in_use, self.vps.as_ref(), self.entries.spares());
        if self.quiesce && likely.len() > free.len() && 2 * free.len() < self.entries.spares() {
            plan.homed = self.bring_home(changes);
            let mut left: Vec<_> = plan.homed.iter().map(|homed| homed.place).collect();
            left.sort_unstable();
            left.dedup();
            free.extend(left.into_iter().filter(|gsi| self.entries.is_replaceable(*gsi)));
        }
        // A message that is there already keeps its place, unless a change has just been given it.
        let missing = |msi: &RawMsi| !planned.contains_key(msi) && !self.entries.has_a_place(*msi);
        let likely: Vec<_> = likely.into_iter().filter(missing).take(free.len()).collect();
        let there: HashSet<_> = likely.iter().filter_map(|msi| self.entries.kept_spare_of(*msi)).collect();
        free.retain(|gsi| !there.contains(gsi));
        let absent = likely.into_iter().filter(|msi| self.entries.kept_spare_of(*msi).is_none());
        let loaded: Vec<_> = absent.zip(free).collect();
        loaded.iter().for_each(|(msi, gsi)| self.put(*gsi, Some(*msi)));
        plan.loaded = loaded.len() as u64;
    }

    /// Sends the routes at spare GSIs back to their own, which makes room for likely messages. A quiesced push disarms all
    /// of them anyway, so this costs no call. It has a price: the messages are at GSIs then that no other route can use.
    fn bring_home(&mut self, changes: &[Change]) -> Vec<Homed> {
        let changed: HashSet<_> = changes.iter().map(|change| change.index).collect();
        let mut homed = Vec::new();
        for index in (0..self.slots.len()).filter(|index| !changed.contains(index)) {
            let (own, place) = (self.gsi(index), self.slots[index].place());
            if place != own && !self.slots[index].broken {
                homed.push(Homed { index, place, own: self.entries.image(own) });
                self.put(own, self.entries.kernel(place));
                self.entries.release(place);
            }
        }
        homed
    }

    /// Leaves a slot at its spare GSI after all.
    pub(super) fn leave(&mut self, homed: Homed) {
        let Homed { index, place, own } = homed;
        self.slots[index].place = place as u16;
        self.entries.reserve(place);
        self.put(self.gsi(index), own);
    }

    /// Holds the place of a change beside the one that its slot has until the commit is over.
    fn reserve(&mut self, change: &Change) {
        if change.place != change.before.place {
            self.entries.reserve(change.place);
        }
    }

    /// Gives up the place that a slot had before a change that has succeeded.
    pub(super) fn keep(&mut self, change: &Change) {
        if change.place != change.before.place {
            self.entries.release(change.before.place);
        }
    }
}
