//! Observers: they report the interrupts that a guest received, if its kernel can.

use std::io;
use std::os::fd::OwnedFd;
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
    /// Someone runs the vCPUs.
    Running,
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
            Self::Kvm(_) => {
                let taken = self.vcpus()?.take_interrupts()?.ok_or(ObserveError::Running)?;
                if taken.is_empty() {
                    // No event announces a bit set in a register, so the caller has to poll.
                    std::thread::sleep(wait.min(POLL));
                }
                Ok(taken)
            }
        }
    }

    /// A duplicate of a vCPU's descriptor, for someone who runs it; `None` if there is no such vCPU. Until
    /// `take_vcpus_back`, nothing else looks at the vCPUs.
    pub fn lend_vcpu(&self, index: u8) -> Result<Option<OwnedFd>, ObserveError> {
        Ok(self.vcpus()?.lend(index)?)
    }

    pub fn take_vcpus_back(&self) -> Result<(), ObserveError> {
        self.vcpus()?.take_back();
        Ok(())
    }

    fn vcpus(&self) -> Result<Arc<KvmVcpus>, ObserveError> {
        match self {
            Self::Kvm(vcpus) => vcpus.upgrade().ok_or(ObserveError::Closed),
            _ => Err(ObserveError::Unsupported),
        }
    }

    /// The interrupts that have arrived and that nobody has taken, each with a number to claim it by. Waits at most `wait`
    /// for one with the number `known` or above, and may return earlier without one.
    pub fn arrived(&self, wait: Duration, known: u64) -> Result<Vec<(u64, Interrupt)>, ObserveError> {
        match self {
            Self::None => Err(ObserveError::Unsupported),
            Self::Simulated(_) => Ok(self.driver()?.arrived(wait, known)),
            Self::Kvm(_) => {
                let vcpus = self.vcpus()?;
                // As in `take_interrupts`. What is there already may not be what the caller waits for.
                std::thread::sleep(wait.min(POLL));
                vcpus.arrived()?.ok_or(ObserveError::Running)
            }
        }
    }

    /// Takes the interrupts with these numbers, unless somebody has taken one of them. Leaves all others.
    pub fn claim(&self, numbers: &[u64]) -> Result<bool, ObserveError> {
        match self {
            Self::None => Err(ObserveError::Unsupported),
            Self::Simulated(_) => Ok(self.driver()?.claim(numbers)),
            Self::Kvm(_) => self.vcpus()?.claim(numbers)?.ok_or(ObserveError::Running),
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
