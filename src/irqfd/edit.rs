//! What a call or a batch asks of routes, brought to the kernel all at once.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use super::error::{Error, Failure, Result};
use super::events::NewEvent;
use super::msi::MsiRoute;
use super::partition::{Partition, partitions};
use super::plan::Change;
use super::shared::{ARMED, Intent, Route};
use super::sync::MutexGuard;
use crate::hypervisor::event::EventFd;
use crate::hypervisor::{CallError, Operation};

/// What is asked of one route.
#[derive(Debug, Default)]
pub(super) struct Edit {
    pub(super) msi: Option<Option<MsiRoute>>,
    pub(super) masked: Option<bool>,
    pub(super) event: Option<NewEvent>,
}

impl Edit {
    fn of(&self, intent: Intent) -> Intent {
        Intent { msi: self.msi.unwrap_or(intent.msi), masked: self.masked.unwrap_or(intent.masked), ..intent }
    }
}

/// A route whose lock is held, and what is asked of it.
struct Locked<'a> {
    route: &'a Arc<Route>,
    intent: MutexGuard<'a, Intent>,
    edit: &'a Edit,
    swap: Option<Swap<'a>>,
}

/// Another eventfd in the place of a route's.
struct Swap<'a> {
    new: &'a NewEvent,
    old: Arc<EventFd>,
    /// Whether other code has closed the old one's descriptor.
    is_gone: bool,
}

impl<'a> Locked<'a> {
    fn new(route: &'a Arc<Route>, edit: &'a Edit) -> Self {
        Self { route, intent: route.lock(), edit, swap: None }
    }

    /// Looks at the eventfds. `numbers` are the descriptors of all new ones.
    fn compare_events(&mut self, numbers: &[i32]) {
        let old = self.route.event.get();
        let is_gone = numbers.contains(&old.as_raw_fd()) || (self.edit.event.is_some() && old.is_gone());
        // The eventfd that the route has already takes no place.
        let new = self.edit.event.as_ref().filter(|new| is_gone || !new.is_same(&old));
        self.swap = new.map(|new| Swap { new, old, is_gone });
    }
}

impl Partition {
    /// Makes all the edits, each of another route of this partition, with at most one push, or none of them.
    pub(super) fn make(&self, mut edits: Vec<(&Arc<Route>, &Edit)>) -> Result {
        // Every batch locks its routes in this order.
        edits.sort_unstable_by_key(|(route, _)| (route.gsi, Arc::as_ptr(route) as usize));
        // Two routes of one GSI: a closed one and its successor. Either may be listed twice.
        if let Some(pair) = edits.windows(2).find(|pair| pair[0].0.gsi == pair[1].0.gsi) {
            return Err(pair[0].0.closed());
        }
        let news = || edits.iter().filter_map(|(_, edit)| edit.event.as_ref());
        let numbers: Vec<_> = news().map(|new| new.event.as_raw_fd()).collect();
        // Locked before the routes, and to the end: no other call puts a caller's eventfd on a route meanwhile.
        let all = if news().any(|new| new.of.is_some()) { Some(partitions()?) } else { None };
        let mut routes: Vec<_> = edits.into_iter().map(|(route, edit)| Locked::new(route, edit)).collect();
        for Locked { route, intent, .. } in &routes {
            route.check(intent)?;
        }
        if !numbers.is_empty() {
            routes.iter_mut().for_each(|locked| locked.compare_events(&numbers));
            self.check_swaps(all.as_deref().map_or(&[], Vec::as_slice), &routes)?;
        }
        let mut changes: Vec<_> = routes.iter().filter_map(|locked| self.change(locked, &routes)).collect();
        if !changes.is_empty() {
            self.apply(&mut changes)?;
        }
        for Locked { route, intent, edit, swap } in &mut routes {
            let new = edit.of(**intent);
            route.set_intent(intent, new);
            swap.iter().filter(|swap| swap.is_gone).for_each(|swap| swap.old.forget());
        }
        Ok(())
    }

    /// The change of a route, if there is anything to change.
    fn change(&self, locked: &Locked<'_>, all: &[Locked<'_>]) -> Option<Change> {
        let Locked { route, intent, edit, swap } = locked;
        let new = edit.of(**intent);
        if new == **intent && route.is_settled(new) && swap.is_none() {
            return None;
        }
        let mut change = Change::to(self.index(route.gsi), new);
        if let Some(Swap { new, old, is_gone }) = swap {
            let mut swaps = all.iter().filter_map(|other| other.swap.as_ref());
            let moves_on = swaps.clone().any(|other| other.new.is_same(old));
            change.event = Some(Arc::clone(&new.event));
            change.carries = !is_gone && !moves_on;
            change.moved = swaps.any(|other| !other.is_gone && new.is_same(&other.old));
        }
        Some(change)
    }

    /// Refuses a caller's eventfd that another route of this process has, unless that gives it up for another here. And
    /// an armed route whose eventfd is gone: without a descriptor it can't be disarmed.
    fn check_swaps(&self, all: &[Weak<Self>], routes: &[Locked<'_>]) -> Result {
        let swaps: Vec<_> =
            routes.iter().filter_map(|locked| Some((locked.route, locked.swap.as_ref()?))).collect();
        for (number, (route, Swap { new, is_gone, .. })) in swaps.iter().enumerate() {
            if *is_gone && route.load() & ARMED != 0 {
                let error = CallError::new(Operation::DeassignIrqfd, "disarming", libc::EBADF);
                return Err(Failure::new(error, Some(route.gsi)).into());
            }
            let Some(fd) = new.of else { continue };
            if let Some((other, _)) = swaps[..number].iter().find(|(_, other)| other.new.is_same(&new.event)) {
                return Err(Error::Invalid(format!(
                    "file descriptor {fd} is for the routes of GSI {} and {}; a route needs an eventfd of its own",
                    other.gsi, route.gsi
                )));
            }
            let gives_up = |gsi| swaps.iter().any(|(other, _)| other.gsi == gsi);
            self.check_event(all, new, gives_up)?;
        }
        Ok(())
    }
}
