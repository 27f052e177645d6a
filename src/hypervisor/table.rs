//! The image of a kernel's routing table: the very bytes that the ioctl reads, changed in place.

use std::marker::PhantomData;

use super::MAX_GSIS;

const NONE: u16 = u16::MAX;

/// A header of two 32-bit words (the number of entries, then 0) followed by entries `E`, as both
/// `struct mshv_user_irq_table` and `struct kvm_irq_routing` are laid out.
///
/// Entries that `new` is given stay in front for good. One entry a GSI is kept behind them, in no order:
/// setting and dropping take constant time, because a dropped entry's place is taken by the last one.
pub(super) struct Table<E> {
    /// 64-bit words, so that an entry with 64-bit fields is aligned.
    words: Vec<u64>,
    fixed: usize,
    /// Which GSI each of the entries behind the fixed ones is for.
    gsis: Vec<u16>,
    /// Where a GSI's entry is among those, or `NONE`.
    places: Box<[u16]>,
    entries: PhantomData<E>,
}

/// The words of a table with just these entries, right or wrong.
pub(super) fn image<E: Copy>(entries: &[E]) -> Vec<u64> {
    Table::new(entries).words
}

impl<E: Copy> Table<E> {
    const WORDS: usize = {
        assert!(size_of::<E>().is_multiple_of(8) && align_of::<E>() <= 8);
        size_of::<E>() / 8
    };

    pub(super) fn new(fixed: &[E]) -> Self {
        let mut table = Self {
            words: vec![0],
            fixed: 0,
            gsis: Vec::new(),
            places: vec![NONE; MAX_GSIS as usize].into(),
            entries: PhantomData,
        };
        for entry in fixed {
            table.append(*entry);
        }
        table.fixed = fixed.len();
        table.count();
        table
    }

    fn append(&mut self, entry: E) {
        let at = self.words.len();
        self.words.resize(at + Self::WORDS, 0);
        self.write(at, entry);
    }

    fn write(&mut self, at: usize, entry: E) {
        let words = &mut self.words[at..at + Self::WORDS];
        // SAFETY: WORDS words hold an E, and their alignment is enough for it (asserted where WORDS is made).
        unsafe { words.as_mut_ptr().cast::<E>().write(entry) };
    }

    fn word(&self, place: usize) -> usize {
        1 + (self.fixed + place) * Self::WORDS
    }

    /// Puts the number of entries into the header, whose second half stays 0.
    fn count(&mut self) {
        self.words[0] = self.len() as u64;
    }

    pub(super) fn len(&self) -> usize {
        self.fixed + self.gsis.len()
    }

    pub(super) fn set(&mut self, gsi: u32, entry: E) {
        match self.places[gsi as usize] {
            NONE => {
                self.places[gsi as usize] = self.gsis.len() as u16;
                self.gsis.push(gsi as u16);
                self.append(entry);
                self.count();
            }
            place => self.write(self.word(place.into()), entry),
        }
    }

    pub(super) fn drop(&mut self, gsi: u32) {
        let place = std::mem::replace(&mut self.places[gsi as usize], NONE);
        if place == NONE {
            return;
        }
        let last = self.word(self.gsis.len() - 1);
        let freed = self.word(place.into());
        self.words.copy_within(last.., freed);
        self.words.truncate(last);
        self.gsis.swap_remove(place.into());
        if let Some(moved) = self.gsis.get(usize::from(place)) {
            self.places[usize::from(*moved)] = place;
        }
        self.count();
    }

    /// Where the header is, followed by `len()` entries.
    pub(super) fn as_ptr(&self) -> *const u64 {
        self.words.as_ptr()
    }

    pub(super) fn entries(&self) -> &[E] {
        // SAFETY: the words behind the header hold `len()` entries, each written as an E.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().add(1).cast(), self.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    type Entry = [u32; 4];

    fn contents(table: &Table<Entry>) -> BTreeMap<u32, u32> {
        assert_eq!(table.words[0], table.len() as u64);
        assert_eq!(table.words.len(), 1 + 2 * table.len());
        table.entries()[table.fixed..].iter().map(|entry| (entry[0], entry[3])).collect()
    }

    #[test]
    fn any_order_of_sets_and_drops_leaves_the_entries_set_last() {
        let fixed = [[7, 0, 0, 1], [7, 0, 0, 2]];
        let mut table = Table::new(&fixed);
        let mut model = BTreeMap::new();
        let mut random = 1u32;
        for step in 0..20_000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let gsi = random >> 16 & 63;
            if random >> 30 == 0 {
                table.drop(gsi);
                model.remove(&gsi);
            } else {
                table.set(gsi, [gsi, 0, 0, step]);
                model.insert(gsi, step);
            }
            assert_eq!(contents(&table), model);
            assert_eq!(table.entries()[..2], fixed);
        }
    }

    #[test]
    fn the_highest_gsi_has_a_place() {
        let mut table = Table::new(&[]);
        table.set(MAX_GSIS - 1, [MAX_GSIS - 1, 0, 0, 5]);
        assert_eq!(contents(&table), BTreeMap::from([(MAX_GSIS - 1, 5)]));
    }
}
