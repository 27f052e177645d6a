//! The state of a GSI, and the allocator of GSIs, lowest first.

/// The state of a GSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsiState {
    /// No route has it.
    Unallocated,
    /// A route has it and is not armed.
    Disabled,
    /// Its route is armed.
    Enabled,
    /// A failed rollback left its route in an unknown or wrong state in the kernel. The GSI is quarantined.
    Broken,
}

/// Allocates the lowest free GSI, in constant time.
///
/// It has one bit per GSI, set while the GSI is free, and one summary bit per word, set while the word has a free GSI.
/// Two count-trailing-zeros find the lowest free GSI.
#[derive(Debug)]
pub struct GsiAllocator {
    words: Box<[u64]>,
    summary: u64,
    taken: usize,
}

impl GsiAllocator {
    /// Makes all of `0..size` free. One summary word covers at most 4096.
    pub fn new(size: usize) -> Self {
        debug_assert!(size <= 64 * 64);
        let words: Box<[u64]> = (0..size.div_ceil(64))
            .map(|word| match size - 64 * word {
                64.. => u64::MAX,
                rest => (1 << rest) - 1,
            })
            .collect();
        let summary = words.iter().enumerate().fold(0, |bits, (at, _)| bits | 1 << at);
        Self { words, summary, taken: 0 }
    }

    /// Takes the lowest free GSI.
    pub fn allocate(&mut self) -> Option<usize> {
        if self.summary == 0 {
            return None;
        }
        let at = self.summary.trailing_zeros() as usize;
        let word = &mut self.words[at];
        let bit = word.trailing_zeros() as usize;
        *word &= *word - 1;
        if *word == 0 {
            self.summary &= !(1 << at);
        }
        self.taken += 1;
        Some(64 * at + bit)
    }

    /// Takes a free GSI.
    pub fn take(&mut self, index: usize) {
        let word = &mut self.words[index / 64];
        debug_assert!(*word & 1 << (index % 64) != 0, "{index} is taken");
        *word &= !(1 << (index % 64));
        if *word == 0 {
            self.summary &= !(1 << (index / 64));
        }
        self.taken += 1;
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Frees a GSI that is taken.
    pub fn free(&mut self, index: usize) {
        debug_assert!(self.words[index / 64] & 1 << (index % 64) == 0, "{index} is already free");
        self.taken -= 1;
        self.words[index / 64] |= 1 << (index % 64);
        self.summary |= 1 << (index / 64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_lowest_free_one_is_taken_until_none_is_left() {
        for size in [1, 63, 64, 65, 2048, 4072, 4096] {
            let mut gsis = GsiAllocator::new(size);
            assert!((0..size).all(|index| gsis.allocate() == Some(index)));
            assert_eq!(gsis.allocate(), None);
            gsis.free(size / 2);
            assert_eq!(gsis.allocate(), Some(size / 2));
            assert_eq!(gsis.allocate(), None);
        }
    }

    #[test]
    fn any_order_of_takes_and_frees_agrees_with_a_sorted_set() {
        let mut gsis = GsiAllocator::new(200);
        let mut free: BTreeSet<usize> = (0..200).collect();
        let mut taken = Vec::new();
        let mut random = 7u32;
        for _ in 0..50_000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if random >> 31 == 0 || taken.is_empty() {
                let lowest = free.pop_first();
                assert_eq!(gsis.allocate(), lowest);
                taken.extend(lowest);
            } else if random >> 30 == 3 && !free.is_empty() {
                let some = *free.iter().nth((random >> 8) as usize % free.len()).unwrap();
                free.remove(&some);
                gsis.take(some);
                taken.push(some);
            } else {
                let index = taken.swap_remove((random >> 8) as usize % taken.len());
                gsis.free(index);
                free.insert(index);
            }
            assert_eq!(gsis.taken(), taken.len());
        }
    }
}
