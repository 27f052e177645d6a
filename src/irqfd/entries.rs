//! The messages at each GSI: the entries of the image and of the kernel's table, each route's own and the spare ones.
//!
//! The kernel's table is a cache of messages. An irqfd can be armed at any GSI whose entry is its message, so a route is
//! armed at its own GSI or at a spare one. Spare entries are loaded before a route needs them, and replaced when no
//! route has its place there.

use std::collections::HashMap;

use crate::hypervisor::{Hypervisor, RawMsi};

/// The entries of one partition, by GSI.
#[derive(Debug)]
pub(super) struct Entries {
    /// By GSI, up to the highest in use.
    entries: Vec<Entry>,
    /// The spare GSIs, in order.
    spares: Vec<u16>,
    /// The GSIs whose entry in the image may differ from the kernel's.
    dirty: Vec<u16>,
    /// The spare GSI of each message that the kernel's table has at one.
    loaded: HashMap<RawMsi, u16>,
    /// How many entries the image has.
    len: usize,
    /// How many of them are spare.
    filled: usize,
    /// The number of the latest use of a spare entry.
    clock: u32,
}

/// The entry of one GSI.
#[derive(Clone, Copy, Debug)]
struct Entry {
    image: Cell,
    kernel: Cell,
    /// The number of its latest use: when a route left it. 0 if none has since it was loaded.
    used: u32,
    /// How many routes have their place here, if it is spare.
    routes: u16,
    is_spare: bool,
    is_dirty: bool,
}

/// A message or none, in eight bytes: no MSI has address 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell(RawMsi);

impl Cell {
    const EMPTY: Self = Self(RawMsi { address: 0, data: 0 });

    fn of(msi: Option<RawMsi>) -> Self {
        msi.map_or(Self::EMPTY, Self)
    }

    fn get(self) -> Option<RawMsi> {
        (self != Self::EMPTY).then_some(self.0)
    }
}

impl Entries {
    /// Empty entries for GSIs below `end`, of which `spares` are spare.
    pub(super) fn new(end: u32, spares: Vec<u16>) -> Self {
        let empty =
            Entry { image: Cell::EMPTY, kernel: Cell::EMPTY, used: 0, routes: 0, is_spare: false, is_dirty: false };
        let mut entries = vec![empty; end as usize];
        spares.iter().for_each(|gsi| entries[usize::from(*gsi)].is_spare = true);
        Self { entries, spares, dirty: Vec::new(), loaded: HashMap::new(), len: 0, filled: 0, clock: 0 }
    }

    /// The message in the image at a GSI.
    pub(super) fn image(&self, gsi: u32) -> Option<RawMsi> {
        self.entries[gsi as usize].image.get()
    }

    /// The message in the kernel's table at a GSI.
    pub(super) fn kernel(&self, gsi: u32) -> Option<RawMsi> {
        self.entries[gsi as usize].kernel.get()
    }

    /// How many entries the image has.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn spares(&self) -> usize {
        self.spares.len()
    }

    /// How many entries the image has at spare GSIs.
    pub(super) fn filled(&self) -> usize {
        self.filled
    }

    /// The kernel's table, by GSI.
    pub(super) fn kernel_table(&self) -> impl Iterator<Item = (u32, RawMsi)> + '_ {
        self.entries.iter().enumerate().filter_map(|(gsi, entry)| Some((gsi as u32, entry.kernel.get()?)))
    }

    /// Where the kernel's table has a message for the route with this own GSI.
    pub(super) fn find(&self, own: u32, msi: RawMsi) -> Option<u32> {
        if self.kernel(own) == Some(msi) {
            return Some(own);
        }
        self.spare_of(msi)
    }

    /// The spare GSI where the kernel's table has a message.
    pub(super) fn spare_of(&self, msi: RawMsi) -> Option<u32> {
        self.loaded.get(&msi).map(|gsi| u32::from(*gsi))
    }

    /// The spare GSI of a message, if the image has not another message there by now.
    pub(super) fn kept_spare_of(&self, msi: RawMsi) -> Option<u32> {
        self.spare_of(msi).filter(|gsi| self.image(*gsi) == Some(msi))
    }

    /// Changes the image. Makes no call.
    pub(super) fn put(
        &mut self,
        hypervisor: Option<&mut (dyn Hypervisor + 'static)>,
        gsi: u32,
        msi: Option<RawMsi>,
    ) {
        let entry = &mut self.entries[gsi as usize];
        let before = std::mem::replace(&mut entry.image, Cell::of(msi));
        if entry.image == before {
            return;
        }
        let (after, before) = (usize::from(msi.is_some()), usize::from(before != Cell::EMPTY));
        self.len = self.len + after - before;
        if entry.is_spare {
            self.filled = self.filled + after - before;
        }
        if !std::mem::replace(&mut entry.is_dirty, true) {
            self.dirty.push(gsi as u16);
        }
        if let Some(hypervisor) = hypervisor {
            match msi {
                Some(msi) => hypervisor.set_entry(gsi, msi),
                None => hypervisor.drop_entry(gsi),
            }
        }
    }

    /// The kernel has taken the image.
    pub(super) fn pushed(&mut self) {
        for gsi in &self.dirty {
            let entry = &mut self.entries[usize::from(*gsi)];
            entry.is_dirty = false;
            let before = std::mem::replace(&mut entry.kernel, entry.image);
            if !entry.is_spare || before == entry.kernel {
                continue;
            }
            entry.used = 0;
            if let Some(msi) = before.get().filter(|msi| self.loaded.get(msi) == Some(gsi)) {
                self.loaded.remove(&msi);
            }
            if let Some(msi) = entry.kernel.get() {
                self.loaded.insert(msi, *gsi);
            }
        }
        self.dirty.clear();
    }

    /// Restores the spare entries of the image to what the kernel has, after a push that failed or was not made.
    pub(super) fn restore_spares(&mut self, mut hypervisor: Option<&mut (dyn Hypervisor + 'static)>) {
        for gsi in self.dirty.clone() {
            let entry = &self.entries[usize::from(gsi)];
            if entry.is_spare {
                self.put(hypervisor.as_deref_mut(), gsi.into(), entry.kernel.get());
            }
        }
        let entries = &mut self.entries;
        self.dirty.retain(|gsi| {
            let entry = &mut entries[usize::from(*gsi)];
            entry.is_dirty = !entry.is_spare;
            entry.is_dirty
        });
    }

    /// Gives a route its place at a GSI, whose entry then stays. Only spare entries need to know.
    pub(super) fn reserve(&mut self, gsi: u32) {
        let entry = &mut self.entries[gsi as usize];
        if entry.is_spare {
            entry.routes += 1;
        }
    }

    /// Takes a route's place away, which is the entry's latest use.
    pub(super) fn release(&mut self, gsi: u32) {
        if !self.entries[gsi as usize].is_spare {
            return;
        }
        self.clock = self.clock.checked_add(1).unwrap_or_else(|| {
            // After some days of nothing but retargets: all that were used are used alike.
            self.entries.iter_mut().for_each(|entry| entry.used = entry.used.min(1));
            2
        });
        let entry = &mut self.entries[gsi as usize];
        entry.routes -= 1;
        entry.used = self.clock;
    }

    /// Whether a route has its place at the spare GSI of a message.
    pub(super) fn has_a_place(&self, msi: RawMsi) -> bool {
        self.kept_spare_of(msi).is_some_and(|gsi| self.entries[gsi as usize].routes > 0)
    }

    /// Whether no route has its place at a spare GSI.
    pub(super) fn is_replaceable(&self, gsi: u32) -> bool {
        self.entries[gsi as usize].routes == 0
    }

    /// The spare GSIs whose entry may be replaced: the empty ones, those that no route has used since they were loaded,
    /// then the least recently used.
    pub(super) fn replaceable(&self) -> Vec<u32> {
        let mut found: Vec<_> = self.spares.iter().filter(|gsi| self.is_replaceable(u32::from(**gsi))).collect();
        found.sort_by_key(|gsi| {
            let entry = &self.entries[usize::from(**gsi)];
            (entry.image != Cell::EMPTY, entry.used)
        });
        found.into_iter().map(|gsi| u32::from(*gsi)).collect()
    }

    #[cfg(test)]
    #[cfg(not(shuttle))]
    pub(super) fn dirty_len(&self) -> usize {
        self.dirty.len()
    }

    /// The image, by GSI.
    #[cfg(test)]
    #[cfg(not(shuttle))]
    pub(super) fn image_table(&self) -> impl Iterator<Item = (u32, RawMsi)> + '_ {
        self.entries.iter().enumerate().filter_map(|(gsi, entry)| Some((gsi as u32, entry.image.get()?)))
    }

    /// Shows that the counts and the maps agree with the entries. Between two commits `places` are the places of all
    /// routes.
    #[cfg(test)]
    #[cfg(not(shuttle))]
    pub(super) fn check(&self, places: impl IntoIterator<Item = u32>) {
        let mut routes = HashMap::new();
        places.into_iter().for_each(|place| *routes.entry(place).or_insert(0) += 1);
        let mut dirty = self.dirty.clone();
        dirty.sort_unstable();
        let marked = (0..).zip(&self.entries).filter(|(_, entry)| entry.is_dirty).map(|(gsi, _)| gsi);
        assert_eq!(dirty, marked.collect::<Vec<u16>>(), "the dirty entries, each once");
        let mut loaded = 0;
        for (gsi, entry) in (0..).zip(&self.entries) {
            assert!(entry.is_dirty || entry.image == entry.kernel, "GSI {gsi} differs and is not dirty");
            if !entry.is_spare {
                continue;
            }
            assert!(!entry.is_dirty && entry.image == entry.kernel, "spare GSI {gsi} differs between commits");
            let count = routes.get(&gsi).copied().unwrap_or(0);
            assert_eq!(entry.routes, count, "the routes that have their place at GSI {gsi}");
            if let Some(msi) = entry.kernel.get() {
                loaded += 1;
                assert_eq!(self.spare_of(msi), Some(gsi), "the spare GSI of {msi:?}");
            } else {
                assert_eq!(count, 0, "a route has its place at GSI {gsi}, which has no entry");
            }
        }
        assert_eq!(self.loaded.len(), loaded, "each loaded message is at a spare GSI");
        assert_eq!(self.len, self.entries.iter().filter(|entry| entry.image != Cell::EMPTY).count());
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    /// Entries with spare GSIs 5, 6 and 7, each of which has the message with its number.
    fn loaded() -> Entries {
        let mut entries = Entries::new(8, vec![5, 6, 7]);
        load(&mut entries, &[(5, 5), (6, 6), (7, 7)]);
        entries
    }

    fn load(entries: &mut Entries, messages: &[(u32, u32)]) {
        messages.iter().for_each(|(gsi, data)| entries.put(None, *gsi, Some(message(*data))));
        entries.pushed();
    }

    fn message(data: u32) -> RawMsi {
        RawMsi { address: 0xFEE0_0000, data }
    }

    fn visit(entries: &mut Entries, gsi: u32) {
        entries.reserve(gsi);
        assert!(!entries.is_replaceable(gsi));
        entries.release(gsi);
    }

    #[test]
    fn an_entry_that_is_loaded_anew_counts_as_unused_until_a_route_leaves_it() {
        let mut entries = loaded();
        [6, 7, 5].iter().for_each(|gsi| visit(&mut entries, *gsi));
        assert_eq!(entries.replaceable(), [6, 7, 5]);
        load(&mut entries, &[(5, 0x50)]);
        assert_eq!(entries.replaceable(), [5, 6, 7]);
        entries.check([]);
    }

    #[test]
    fn when_the_clock_runs_out_unused_entries_stay_the_first_to_be_replaced() {
        let mut entries = loaded();
        entries.clock = u32::MAX - 1;
        [6, 5].iter().for_each(|gsi| visit(&mut entries, *gsi));
        assert_eq!(entries.replaceable(), [7, 6, 5]);
    }

    #[test]
    fn a_message_that_moves_to_another_spare_gsi_is_found_there_in_whatever_order_they_changed() {
        for order in [[(5, 9), (6, 5)], [(6, 5), (5, 9)]] {
            let mut entries = loaded();
            load(&mut entries, &order);
            assert_eq!([5, 6, 9].map(|data| entries.spare_of(message(data))), [Some(6), None, Some(5)]);
            entries.check([]);
        }
    }
}
