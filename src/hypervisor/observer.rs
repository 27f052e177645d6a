//! Observers: how to see which interrupts arrived in a guest, where a kernel tells.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Interrupt;
use super::kvm::{KvmPartition, KvmVcpus};
use super::simulated::{Driver, SimulatedPartition};

/// Asks a partition's kernel about interrupts. Weak, so that a closed partition is gone.
#[derive(Debug, Default)]
pub enum Observer {
    /// The mshv driver does not tell.
    #[default]
    None,
    Kvm(Weak<KvmVcpus>),
    Simulated(Weak<Driver>),
}

/// Why an observer has no answer.
#[derive(Debug)]
pub enum ObserveError {
    /// The partition is closed.
    Closed,
    /// This kernel can't be asked that.
    Unsupported,
    Io(io::Error),
}

impl From<io::Error> for ObserveError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Observer {
    pub fn of_kvm(partition: &KvmPartition) -> Self {
        Self::Kvm(Arc::downgrade(&partition.vcpus()))
    }

    pub fn of_simulated(partition: &SimulatedPartition) -> Self {
        Self::Simulated(Arc::downgrade(&partition.driver()))
    }

    /// Takes the interrupts that arrived. Waits for one for as long as `wait`, or returns early without one.
    pub fn take_interrupts(&self, wait: Duration) -> Result<Vec<Interrupt>, ObserveError> {
        match self {
            Self::None => Err(ObserveError::Unsupported),
            Self::Simulated(_) => Ok(self.driver()?.take_interrupts(wait)),
            Self::Kvm(vcpus) => {
                let vcpus = vcpus.upgrade().ok_or(ObserveError::Closed)?;
                let taken = vcpus.take_interrupts()?;
                if taken.is_empty() {
                    // No event tells of a bit set in a register, so the caller looks again.
                    std::thread::sleep(wait.min(Duration::from_micros(200)));
                }
                Ok(taken)
            }
        }
    }

    /// The simulated kernel.
    pub fn driver(&self) -> Result<Arc<Driver>, ObserveError> {
        match self {
            Self::Simulated(driver) => driver.upgrade().ok_or(ObserveError::Closed),
            _ => Err(ObserveError::Unsupported),
        }
    }
}
