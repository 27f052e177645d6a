//! What a call or a batch asks of routes, brought to the kernel all at once.

use std::sync::{Arc, Weak};

use super::error::{Error, Result};
use super::events::NewEvent;
use super::msi::MsiRoute;
use super::partition::{Partition, partitions};
use super::plan::Change;
use super::shared::{Intent, Route};

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

/// A route, and the eventfd that takes the place of the one that it has.
type Replaced<'a> = (&'a Arc<Route>, &'a NewEvent);

impl Partition {
    /// Makes all the edits, each of another route of this partition, with at most one push, or none of them.
    pub(super) fn make(&self, mut edits: Vec<(&Arc<Route>, &Edit)>) -> Result {
        // Every batch locks its routes in this order.
        edits.sort_unstable_by_key(|(route, _)| (route.gsi, Arc::as_ptr(route) as usize));
        // Two routes of one GSI: a closed one and its successor. Either may be listed twice.
        if let Some(pair) = edits.windows(2).find(|pair| pair[0].0.gsi == pair[1].0.gsi) {
            return Err(pair[0].0.closed());
        }
        // Locked before the routes, and to the end: no other call puts a caller's eventfd on a route meanwhile.
        let callers = edits.iter().any(|(_, edit)| edit.event.as_ref().is_some_and(|event| event.of.is_some()));
        let all = if callers { Some(partitions()?) } else { None };
        let mut routes: Vec<_> = edits.into_iter().map(|(route, edit)| (route, route.lock(), edit)).collect();
        for (route, intent, _) in &routes {
            route.check(intent)?;
        }
        // The eventfd that a route has already takes no place.
        let new =
            |route: &Route, edit: &'_ Edit| edit.event.as_ref().is_some_and(|new| !new.is_same(&route.event.get()));
        let replaced: Vec<Replaced<'_>> = (routes.iter())
            .filter(|(route, _, edit)| new(route, edit))
            .filter_map(|(route, _, edit)| Some((*route, edit.event.as_ref()?)))
            .collect();
        if let Some(all) = &all {
            self.check_events(all, &replaced)?;
        }
        let mut changes = Vec::with_capacity(routes.len());
        for (route, intent, edit) in &routes {
            let new = edit.of(**intent);
            let event = replaced.iter().find(|(other, _)| Arc::ptr_eq(other, route)).map(|(_, event)| *event);
            if new == **intent && route.is_settled(new) && event.is_none() {
                continue;
            }
            let mut change = Change::to(self.index(route.gsi), new);
            if let Some(event) = event {
                let old = route.event.get();
                change.event = Some(Arc::clone(&event.event));
                change.carries = !replaced.iter().any(|(_, other)| other.is_same(&old));
            }
            changes.push(change);
        }
        if !changes.is_empty() {
            self.apply(&mut changes)?;
        }
        for (route, intent, edit) in &mut routes {
            let new = edit.of(**intent);
            route.set_intent(intent, new);
        }
        Ok(())
    }

    /// Refuses a caller's eventfd that another route of this process has, unless that gives it up for another here.
    fn check_events(&self, all: &[Weak<Self>], replaced: &[Replaced<'_>]) -> Result {
        for (number, (route, new)) in replaced.iter().enumerate() {
            let Some(fd) = new.of else { continue };
            if let Some((other, _)) = replaced[..number].iter().find(|(_, other)| other.is_same(&new.event)) {
                return Err(Error::Invalid(format!(
                    "file descriptor {fd} is for the routes of GSI {} and {}; a route needs an eventfd of its own",
                    other.gsi, route.gsi
                )));
            }
            let gives_up = |gsi| replaced.iter().any(|(other, _)| other.gsi == gsi);
            self.check_event(all, new, gives_up)?;
        }
        Ok(())
    }
}
