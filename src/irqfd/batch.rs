//! Several routes changed at once, with one push.

use std::sync::Arc;

use super::edit::Edit;
use super::error::{Error, Result};
use super::events::NewEvent;
use super::msi::MsiRoute;
use super::partition::Partition;
use super::route::IrqFdRoute;

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

    /// See [`IrqFdRoute::set_event`]. An eventfd that another route of the batch gives up goes over to this one, with what
    /// it holds.
    pub fn set_event(&mut self, route: R, event: NewEvent) {
        self.edit(route).event = Some(event);
    }

    /// The routes that it changes. One is there twice if another one with its GSI came in between.
    pub fn routes(&self) -> impl Iterator<Item = &R> {
        self.edits.iter().map(|(route, _)| route)
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
        self.partition.make(self.edits.iter().map(|(route, edit)| (route.as_ref().shared(), edit)).collect())
    }
}
