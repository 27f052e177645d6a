//! Several routes changed at once, with one push.

use std::sync::Arc;

use super::error::{Error, Result};
use super::msi::MsiRoute;
use super::partition::Partition;
use super::plan::Change;
use super::route::IrqFdRoute;
use super::shared::Intent;

/// Collects changes, then makes all of them or none.
///
/// Collecting takes no lock. The commit checks each change against the route's state at that time.
///
/// `R` holds a route until the batch is dropped: a reference, or an owner.
#[derive(Debug)]
pub struct Batch<R> {
    partition: Arc<Partition>,
    edits: Vec<(R, Edit)>,
    /// The place in `edits` of each route's edit, by GSI. If two routes share a GSI, one of them is closed or belongs
    /// to another partition, and the commit fails.
    places: Vec<u32>,
    foreign: Option<u32>,
}

/// A batch of this many routes reserves room for all of the partition's: a large batch usually changes most of them.
const MANY: usize = 64;

#[derive(Clone, Copy, Debug, Default)]
struct Edit {
    msi: Option<Option<MsiRoute>>,
    masked: Option<bool>,
}

impl Edit {
    fn of(self, intent: Intent) -> Intent {
        Intent { msi: self.msi.unwrap_or(intent.msi), masked: self.masked.unwrap_or(intent.masked), ..intent }
    }
}

impl<R: AsRef<IrqFdRoute>> Batch<R> {
    pub fn new(partition: Arc<Partition>) -> Result<Self> {
        partition.check_open()?;
        Ok(Self { partition, edits: Vec::new(), places: Vec::new(), foreign: None })
    }

    fn edit(&mut self, route: R) -> &mut Edit {
        let (shared, gsi) = (route.as_ref().shared(), route.as_ref().gsi() as usize);
        if !route.as_ref().is_of(&self.partition) {
            self.foreign = Some(gsi as u32);
        }
        if self.places.len() <= gsi {
            self.places.resize((gsi + 1).next_multiple_of(MANY), 0);
        }
        let mut place = self.places[gsi] as usize;
        if self.edits.get(place).is_none_or(|(known, _)| !Arc::ptr_eq(known.as_ref().shared(), shared)) {
            place = self.edits.len();
            if place == MANY {
                self.edits.reserve(self.partition.config().gsis.len());
            }
            self.edits.push((route, Edit::default()));
            self.places[gsi] = place as u32;
        }
        &mut self.edits[place].1
    }

    pub fn set_msi(&mut self, route: R, msi: MsiRoute) {
        self.edit(route).msi = Some(Some(msi));
    }

    pub fn clear_msi(&mut self, route: R) {
        self.edit(route).msi = Some(None);
    }

    pub fn mask(&mut self, route: R) {
        self.edit(route).masked = Some(true);
    }

    pub fn unmask(&mut self, route: R) {
        self.edit(route).masked = Some(false);
    }

    /// The number of routes that it changes.
    pub fn len(&self) -> usize {
        self.edits.len()
    }

    pub fn is_empty(&self) -> bool {
        self.edits.is_empty()
    }

    /// Makes all the changes, with at most one push, or none of them.
    pub fn commit(&self) -> Result {
        self.partition.check_open()?;
        if let Some(gsi) = self.foreign {
            return Err(Error::Invalid(format!(
                "the route of GSI {gsi} belongs to another partition; a batch takes only its own partition's routes"
            )));
        }
        let mut edits: Vec<_> = self.edits.iter().map(|(route, edit)| (route.as_ref().shared(), *edit)).collect();
        // Every batch locks its routes in this order.
        edits.sort_unstable_by_key(|(route, _)| (route.gsi, Arc::as_ptr(route) as usize));
        // Two routes of one GSI: a closed one and its successor. Either may be listed twice.
        if let Some(pair) = edits.windows(2).find(|pair| pair[0].0.gsi == pair[1].0.gsi) {
            return Err(pair[0].0.closed());
        }
        let mut routes: Vec<_> = edits.into_iter().map(|(route, edit)| (route, route.lock(), edit)).collect();
        for (route, intent, _) in &routes {
            route.check(intent)?;
        }
        let mut changes = Vec::with_capacity(routes.len());
        for (route, intent, edit) in &routes {
            let new = edit.of(**intent);
            if new != **intent || !route.is_settled(new) {
                changes.push(Change::to(self.partition.index(route.gsi), new));
            }
        }
        if !changes.is_empty() {
            self.partition.apply(&mut changes)?;
        }
        for (route, intent, edit) in &mut routes {
            let new = edit.of(**intent);
            route.set_intent(intent, new);
        }
        Ok(())
    }
}
