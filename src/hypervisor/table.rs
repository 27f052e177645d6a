//! Routing tables in the layout that the ioctls read.

use std::marker::PhantomData;

use super::MAX_GSIS;

const NONE: u16 = u16::MAX;

/// A routing table in the layout that the ioctls read: a header of two 32-bit words (the number of entries, then 0)
/// followed by entries `E`, as both `struct mshv_user_irq_table` and `struct kvm_irq_routing` are laid out.
#[derive(Debug)]
pub struct Image<E> {
    /// 64-bit words, so that an entry with 64-bit fields is aligned.
    words: Vec<u64>,
    entries: PhantomData<E>,
}

impl<E: Copy> Image<E> {
    const WORDS: usize = {
        assert!(size_of::<E>() % 8 == 0 && align_of::<E>() <= 8);
        size_of::<E>() / 8
    };

    /// Copies entries, with one allocation.
    pub fn copy_of(entries: &[E]) -> Self {
        let size = Self::word(entries.len());
        let mut words = Vec::with_capacity(size);
        words.push(entries.len() as u64);
        // SAFETY: the space behind the header was allocated for this many entries, in words that are aligned for them.
        // The copy initializes it before `set_len`.
        unsafe {
            std::ptr::copy_nonoverlapping(entries.as_ptr(), words.as_mut_ptr().add(1).cast(), entries.len());
            words.set_len(size);
        }
        Self { words, entries: PhantomData }
    }

    /// The index of an entry's first word.
    fn word(place: usize) -> usize {
        1 + place * Self::WORDS
    }

    pub fn len(&self) -> usize {
        self.words[0] as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shows the kernel only the first `count` entries.
    pub fn show(&mut self, count: usize) {
        assert!(Self::word(count) <= self.words.len());
        self.words[0] = count as u64;
    }

    fn push(&mut self, entry: E) {
        let place = self.len();
        self.words.resize(Self::word(place + 1), 0);
        self.write(place, entry);
        self.show(place + 1);
    }

    fn write(&mut self, place: usize, entry: E) {
        let words = &mut self.words[Self::word(place)..Self::word(place + 1)];
        // SAFETY: WORDS words hold an E and are aligned for it, as asserted at WORDS.
        unsafe { words.as_mut_ptr().cast::<E>().write(entry) };
    }

    /// Removes an entry and moves the last one to its place.
    fn swap_remove(&mut self, place: usize) {
        let last = self.len() - 1;
        self.words.copy_within(Self::word(last).., Self::word(place));
        self.words.truncate(Self::word(last));
        self.show(last);
    }

    /// The header, followed by `len()` entries.
    pub(super) fn as_ptr(&self) -> *const u64 {
        self.words.as_ptr()
    }

    pub fn entries(&self) -> &[E] {
        // SAFETY: the words behind the header hold at least `len()` entries, each written as an E.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().add(1).cast(), self.len()) }
    }
}

/// The image of a kernel's routing table, changed in place.
///
/// The fixed entries stay at the front. At most one entry per GSI follows, in no order. Setting and dropping take
/// constant time: the last entry moves to the place of a dropped one.
#[derive(Debug)]
pub struct Table<E> {
    image: Image<E>,
    fixed: usize,
    /// The GSIs of the entries behind the fixed ones.
    gsis: Vec<u16>,
    /// The place of a GSI's entry among those, or `NONE`.
    places: Box<[u16]>,
}

impl<E: Copy> Table<E> {
    pub fn new(fixed: &[E]) -> Self {
        Self {
            image: Image::copy_of(fixed),
            fixed: fixed.len(),
            gsis: Vec::new(),
            places: vec![NONE; MAX_GSIS as usize].into(),
        }
    }

    pub fn image(&self) -> &Image<E> {
        &self.image
    }

    pub fn len(&self) -> usize {
        self.image.len()
    }

    pub fn is_empty(&self) -> bool {
        self.image.is_empty()
    }

    pub fn set(&mut self, gsi: u32, entry: E) {
        match self.places[gsi as usize] {
            NONE => {
                self.places[gsi as usize] = self.gsis.len() as u16;
                self.gsis.push(gsi as u16);
                self.image.push(entry);
            }
            place => self.image.write(self.fixed + usize::from(place), entry),
        }
    }

    pub fn drop(&mut self, gsi: u32) {
        let place = std::mem::replace(&mut self.places[gsi as usize], NONE);
        if place == NONE {
            return;
        }
        self.image.swap_remove(self.fixed + usize::from(place));
        self.gsis.swap_remove(place.into());
        if let Some(moved) = self.gsis.get(usize::from(place)) {
            self.places[usize::from(*moved)] = place;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    type Entry = [u32; 4];

    fn contents(table: &Table<Entry>) -> BTreeMap<u32, u32> {
        assert_eq!(table.image.words.len(), 1 + 2 * table.len());
        table.image.entries()[table.fixed..].iter().map(|entry| (entry[0], entry[3])).collect()
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
            assert_eq!(table.image.entries()[..2], fixed);
        }
    }

    #[test]
    fn the_highest_gsi_has_a_place() {
        let mut table = Table::new(&[]);
        table.set(MAX_GSIS - 1, [MAX_GSIS - 1, 0, 0, 5]);
        assert_eq!(contents(&table), BTreeMap::from([(MAX_GSIS - 1, 5)]));
    }
}
