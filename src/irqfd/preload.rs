//! The messages that a guest is likely to want next: the ones that a push takes along.

use std::collections::BTreeSet;

use super::vps::VpSet;
use crate::hypervisor::{RawMsi, Target};

/// Address bits 19:12, the destination.
const DESTINATION: u32 = 0xFF << 12;
/// Data bits 7:0.
const VECTOR: u32 = 0xFF;
/// Vectors below are the processor's own.
const FIRST_VECTOR: u32 = 16;
const LAST_VECTOR: u32 = 255;
/// How many shapes are remembered. Guests use one, or one a driver.
const SHAPES: usize = 4;

/// A message without its destination and vector: the parts that a guest does not change when it moves an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape(RawMsi);

impl Shape {
    /// The shape of a message whose vector counts. SMI, NMI, INIT and ExtINT have no vector to vary.
    pub(super) fn of(msi: RawMsi) -> Option<Self> {
        let target = Target::decode(msi);
        let shape = Self(RawMsi { address: msi.address & !DESTINATION, data: msi.data & !VECTOR });
        matches!(target.delivery_mode, 0 | 1).then_some(shape)
    }

    fn message(self, destination: u8, vector: u32) -> RawMsi {
        RawMsi { address: self.0.address | u32::from(destination) << 12, data: self.0.data | vector }
    }

    /// The destinations to load for. A logical destination is a set of processors, so only those in use are known.
    fn destinations(self, in_use: &BTreeSet<u8>, vps: Option<&VpSet>) -> Vec<u8> {
        let logical = Target::decode(self.0).logical;
        match vps {
            Some(vps) if !logical => vps.iter().collect(),
            _ => in_use.iter().copied().collect(),
        }
    }
}

/// Remembers a shape as the latest.
pub(super) fn note(shapes: &mut Vec<Shape>, shape: Shape) {
    shapes.retain(|other| *other != shape);
    shapes.insert(0, shape);
    shapes.truncate(SHAPES);
}

/// The messages that are likely next, the likeliest first and `room` at most: for each shape every vector of every VP if
/// that fits, else as many vectors of every VP as fit, from the lowest in use up. Linux gives an interrupt the lowest
/// free vector of its new processor (kernel/irq/matrix.c), so that is where the next ones are.
pub(super) fn likely(shapes: &[Shape], in_use: &[RawMsi], vps: Option<&VpSet>, room: usize) -> Vec<RawMsi> {
    let mut likely = Vec::new();
    for shape in shapes {
        let mine = || in_use.iter().filter(|msi| Shape::of(**msi) == Some(*shape));
        let destinations = shape.destinations(&mine().map(|msi| Target::decode(*msi).destination).collect(), vps);
        let room = room - likely.len();
        let each = room / destinations.len().max(1);
        let all = (LAST_VECTOR - FIRST_VECTOR + 1) as usize;
        let first = if each >= all {
            FIRST_VECTOR
        } else {
            mine().map(|msi| msi.data & VECTOR).min().unwrap_or(FIRST_VECTOR)
        };
        let vectors = (first..=LAST_VECTOR).take(each);
        likely.extend(vectors.flat_map(|vector| destinations.iter().map(move |to| shape.message(*to, vector))));
    }
    likely
}
