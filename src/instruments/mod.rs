//! Instruments that measure and probe kernels. The core does not depend on them.
//!
//! The bench compares the package with two other designs: the bare calls ([`floor`]) and a table that is rebuilt for
//! every change ([`rebuild`]). [`latency`] times signals while routes move. [`null`] is a kernel that does nothing. [`probe`] makes calls that the package never
//! makes, to show how a kernel reacts.

pub mod bare;
mod floor;
pub mod latency;
pub mod null;
pub mod probe;
mod rebuild;
mod workload;

pub use floor::{Way, floor};
pub use rebuild::rebuild;
pub use workload::{Design, FIRST_GSI, VPS, Workload};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::simulated::SimulatedPartition;

    #[test]
    fn every_workload_of_every_design_can_follow_every_other() {
        let open = || SimulatedPartition::open().unwrap();
        let floors = [Way::Push, Way::QuiescedPush, Way::Move].map(|way| floor(open(), 5, way));
        for mut design in floors.into_iter().chain([rebuild(open(), 5)]) {
            for first in Workload::ALL {
                for second in Workload::ALL {
                    design.run(first, 2).unwrap();
                    design.run(second, 1).unwrap();
                }
            }
        }
    }
}
