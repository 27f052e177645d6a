//! Observers: they report the interrupts that a guest received, if its kernel can.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Interrupt;
use super::kvm::{KvmPartition, KvmVcpus};
use super::simulated::{Driver, SimulatedPartition};

/// The time between two looks at a register.
const POLL: Duration = Duration::from_micros(200);

/// Asks a partition's kernel for received interrupts. It holds a weak reference, so that it keeps no partition alive.
#[derive(Debug, Default)]
pub enum Observer {
    /// The mshv driver does not report interrupts.
    #[default]
    None,
    Kvm(Weak<KvmVcpus>),
    Simulated(Weak<Driver>),
}

/// The reason why an observer has no answer.
#[derive(Debug)]
pub enum ObserveError {
    /// The partition is closed.
    Closed,
    /// The kernel does not support the query.
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

    /// Takes the interrupts that have arrived. Waits at most `wait` for the first, and may return earlier without one.
    pub fn take_interrupts(&self, wait: Duration) -> Result<Vec<Interrupt>, ObserveError> {
        match self {
            Self::None => Err(ObserveError::Unsupported),
            Self::Simulated(_) => Ok(self.driver()?.take_interrupts(wait)),
            Self::Kvm(vcpus) => {
                let vcpus = vcpus.upgrade().ok_or(ObserveError::Closed)?;
                let taken = vcpus.take_interrupts()?;
                if taken.is_empty() {
                    // No event announces a bit set in a register, so the caller has to poll.
                    std::thread::sleep(wait.min(POLL));
                }
                Ok(taken)
            }
        }
    }

    /// The interrupts that have arrived and that nobody has taken, each with a number to claim it by. Waits at most `wait`
    /// for one with the number `known` or above, and may return earlier without one.
    pub fn arrived(&self, wait: Duration, known: u64) -> Result<Vec<(u64, Interrupt)>, ObserveError> {
        match self {
            Self::None => Err(ObserveError::Unsupported),
            Self::Simulated(_) => Ok(self.driver()?.arrived(wait, known)),
            Self::Kvm(vcpus) => {
                let vcpus = vcpus.upgrade().ok_or(ObserveError::Closed)?;
                // As in `take_interrupts`. What is there already may not be what the caller waits for.
                std::thread::sleep(wait.min(POLL));
                Ok(vcpus.arrived()?)
            }
        }
    }

    /// Takes the interrupts with these numbers, unless somebody has taken one of them. Leaves all others.
    pub fn claim(&self, numbers: &[u64]) -> Result<bool, ObserveError> {
        match self {
            Self::None => Err(ObserveError::Unsupported),
            Self::Simulated(_) => Ok(self.driver()?.claim(numbers)),
            Self::Kvm(vcpus) => Ok(vcpus.upgrade().ok_or(ObserveError::Closed)?.claim(numbers)?),
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
