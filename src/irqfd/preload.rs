//! The messages that a guest is likely to want next: the ones that a push takes along.
//!
//! Linux moves an interrupt to the lowest free vector of its new processor (kernel/irq/matrix.c). So a VP's next vectors
//! are the ones above all that it has had, and the ones that it has had and that are free again, from the lowest up.
//! Vectors that were passed over so far were not free: the guest uses them for itself, or a device holds them in reserve.
//! `tools/vector_trace.py` compares this with simpler policies; docs/benchmarks.md has the figures.

use super::vps::VpSet;
use crate::hypervisor::{RawMsi, Target};

/// Address bits 19:12, the destination.
const DESTINATION: u32 = 0xFF << 12;
/// Data bits 7:0.
const VECTOR: u32 = 0xFF;
/// Vectors below are the processor's own.
const FIRST_VECTOR: u8 = 16;
const VECTORS: usize = 256 - FIRST_VECTOR as usize;
/// How many shapes are remembered. A guest uses one, or one a driver.
const SHAPES: usize = 4;
/// The ranks of vectors that were passed over, among those of the others, which are 0, 1, 2, ...
const PASSED_OVER: (u16, u16) = (8, 4);

/// A message without its destination and vector: the parts that a guest does not change when it moves an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape(RawMsi);

impl Shape {
    /// The shape of a message with a vector. SMI, NMI, INIT and ExtINT have none to vary.
    fn of(msi: RawMsi) -> Option<Self> {
        let shape = Self(RawMsi { address: msi.address & !DESTINATION, data: msi.data & !VECTOR });
        matches!(Target::decode(msi).delivery_mode, 0 | 1).then_some(shape)
    }

    fn is_logical(self) -> bool {
        Target::decode(self.0).logical
    }

    fn message(self, destination: u8, vector: u8) -> RawMsi {
        RawMsi { address: self.0.address | u32::from(destination) << 12, data: self.0.data | u32::from(vector) }
    }
}

/// A set of vectors.
#[derive(Clone, Copy, Debug, Default)]
struct Vectors([u64; 4]);

impl Vectors {
    fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector / 64)] |= 1 << (vector % 64);
    }

    fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 64)] & 1 << (vector % 64) != 0
    }

    fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    fn highest(&self) -> Option<u8> {
        (0..=u8::MAX).rev().find(|vector| self.contains(*vector))
    }
}

/// The messages of one shape that routes have had.
#[derive(Debug)]
struct Habit {
    shape: Shape,
    lowest: u8,
    /// By destination.
    had: Box<[Vectors; 256]>,
}

/// What a guest has wanted so far.
#[derive(Debug, Default)]
pub(super) struct Habits {
    /// The latest first.
    habits: Vec<Habit>,
}

impl Habits {
    /// Remembers a message that a route is to be armed with.
    pub(super) fn note(&mut self, msi: RawMsi) {
        let Some(shape) = Shape::of(msi) else { return };
        let (vector, destination) = (msi.data as u8, Target::decode(msi).destination);
        match self.habits.iter().position(|habit| habit.shape == shape) {
            Some(0) => {}
            Some(at) => self.habits[..=at].rotate_right(1),
            None => {
                self.habits.truncate(SHAPES - 1);
                let had = Box::new([Vectors::default(); 256]);
                self.habits.insert(0, Habit { shape, lowest: vector, had });
            }
        }
        let habit = &mut self.habits[0];
        habit.lowest = habit.lowest.min(vector);
        habit.had[usize::from(destination)].insert(vector);
    }

    /// The messages that are likely next, the likeliest first: of every shape in use, all vectors of all VPs if those
    /// fit into the shape's share of `room`, else the likeliest. `in_use` are the messages that routes want now.
    pub(super) fn likely(&self, in_use: &[RawMsi], vps: Option<&VpSet>, room: usize) -> Vec<RawMsi> {
        let live = |habit: &&Habit| in_use.iter().any(|msi| Shape::of(*msi) == Some(habit.shape));
        let habits: Vec<_> = self.habits.iter().filter(live).collect();
        let share = room / habits.len().max(1);
        habits.into_iter().flat_map(|habit| habit.likely(in_use, vps, share)).collect()
    }
}

impl Habit {
    fn likely(&self, in_use: &[RawMsi], vps: Option<&VpSet>, room: usize) -> Vec<RawMsi> {
        let destinations = self.destinations(vps);
        let all = FIRST_VECTOR..=u8::MAX;
        if destinations.len() * VECTORS <= room {
            return destinations
                .iter()
                .flat_map(|to| all.clone().map(|vector| self.shape.message(*to, vector)))
                .collect();
        }
        let mut wanted = Box::new([Vectors::default(); 256]);
        for msi in in_use.iter().filter(|msi| Shape::of(**msi) == Some(self.shape)) {
            wanted[usize::from(Target::decode(*msi).destination)].insert(msi.data as u8);
        }
        let mut ranked = Vec::new();
        for to in destinations {
            let (had, wanted) = (&self.had[usize::from(to)], &wanted[usize::from(to)]);
            let highest = had.highest();
            let (mut next, mut passed_over) = (0, PASSED_OVER.0);
            for vector in (self.lowest..=u8::MAX).filter(|vector| !wanted.contains(*vector)) {
                let likely = highest.is_none_or(|highest| vector > highest) || had.contains(vector);
                let (rank, step) = if likely { (&mut next, 1) } else { (&mut passed_over, PASSED_OVER.1) };
                ranked.push((*rank, vector, to));
                *rank += step;
            }
        }
        if room < ranked.len() {
            ranked.select_nth_unstable(room);
            ranked.truncate(room);
        }
        ranked.sort_unstable();
        ranked.into_iter().map(|(_, vector, to)| self.shape.message(to, vector)).collect()
    }

    /// Every VP. Where the VPs are not known, or the destination is logical, which is a set of processors, only those
    /// that routes have had are known to be there.
    fn destinations(&self, vps: Option<&VpSet>) -> Vec<u8> {
        match vps {
            Some(vps) if !self.shape.is_logical() => vps.iter().collect(),
            _ => (0..=u8::MAX).filter(|to| !self.had[usize::from(*to)].is_empty()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(vector: u8, destination: u8) -> RawMsi {
        RawMsi { address: 0xFEE0_0000 | u32::from(destination) << 12, data: vector.into() }
    }

    fn vps(count: u8) -> VpSet {
        (0..count).collect()
    }

    fn after(messages: &[RawMsi]) -> Habits {
        let mut habits = Habits::default();
        messages.iter().for_each(|msi| habits.note(*msi));
        habits
    }

    #[test]
    fn all_vectors_of_all_vps_are_likely_if_they_fit() {
        let first = to(0x41, 1);
        let likely = after(&[first]).likely(&[first], Some(&vps(3)), 720);
        assert_eq!((likely.len(), likely[0], likely[719]), (720, to(16, 0), to(255, 2)));
    }

    #[test]
    fn if_not_all_fit_every_vp_gets_its_lowest_free_vectors_first() {
        let first = to(0x22, 0);
        let likely = after(&[first]).likely(&[first], Some(&vps(3)), 7);
        // VP 0 has had 0x22, so its next is 0x23.
        let expected = [to(0x22, 1), to(0x22, 2), to(0x23, 0), to(0x23, 1), to(0x23, 2), to(0x24, 0), to(0x24, 1)];
        assert_eq!(likely, expected);
    }

    #[test]
    fn a_vector_that_is_free_again_comes_before_one_that_was_passed_over() {
        let (old, now) = (to(0x22, 0), to(0x25, 0));
        let likely = after(&[old, now]).likely(&[now], Some(&vps(1)), 12);
        let vectors: Vec<_> = likely.iter().map(|msi| msi.data).collect();
        assert_eq!(vectors, [0x22, 0x26, 0x27, 0x28, 0x29, 0x2A, 0x2B, 0x2C, 0x23, 0x2D, 0x2E, 0x2F]);
    }

    #[test]
    fn shapes_in_use_share_the_room_and_others_get_none() {
        let (fixed, lowest_priority) = (to(0x41, 0), RawMsi { data: 0x141, ..to(0x41, 0) });
        let habits = after(&[fixed, lowest_priority]);
        let count = |in_use: &[RawMsi]| {
            let likely = habits.likely(in_use, Some(&vps(1)), 480);
            [0, 1].map(|mode| likely.iter().filter(|msi| msi.data >> 8 == mode).count())
        };
        assert_eq!(count(&[fixed, lowest_priority]), [240, 240]);
        assert_eq!(count(&[lowest_priority]), [0, 240]);
    }

    #[test]
    fn unknown_vps_and_logical_destinations_are_those_that_were_used() {
        let (physical, logical) = (to(0x41, 7), RawMsi { address: 0xFEE0_3004, data: 0x41 });
        for (msi, vps) in [(physical, None), (logical, Some(&vps(2)))] {
            let likely = after(&[msi]).likely(&[msi], vps, 1000);
            assert_eq!(likely.len(), 240);
            assert!(likely.iter().all(|other| other.address == msi.address));
        }
    }

    #[test]
    fn the_oldest_shape_is_forgotten() {
        let shapes: Vec<_> = (0..5).map(|bits| RawMsi { data: 0x41 | bits << 12, ..to(0x41, 0) }).collect();
        let likely = after(&shapes).likely(&shapes, Some(&vps(1)), 10_000);
        assert_eq!(likely.len(), 4 * 240);
        assert!(likely.iter().all(|msi| msi.data >> 12 != 0));
    }
}
