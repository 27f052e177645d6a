//! A device: the registers that its guest's driver sees, over the vectors that send its messages.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::vector_state::VectorState;
use super::vectors::{Faults, Vectors};
use crate::irqfd::{Error, IrqFdRoute, MsiRoute, Partition, Result, SavedState};

/// The registers of a capability, as they are: they make no calls.
pub trait Registers: Send + Sized + std::fmt::Debug {
    /// The name of the capability in messages.
    const WHAT: &'static str;
    /// The saved state of a device.
    type State: SavedState + Send + Sync;

    /// The registers of a device with so many vectors, in their reset state.
    fn new(vectors: usize) -> Result<Self>;
    /// The number of vectors.
    fn count(&self) -> usize;
    /// Whether a vector may send its message.
    fn is_live(&self, vector: usize) -> bool;
    /// Whether the guest has masked a vector.
    fn is_masked(&self, vector: usize) -> bool;
    /// The message of a vector.
    fn message(&self, vector: usize) -> Result<MsiRoute>;
    fn reset(&mut self);
    /// The state of a device with these registers, and with these vectors.
    fn save(&self, vectors: Vec<VectorState>) -> Self::State;
    /// The registers that were saved.
    fn restored(state: &Self::State) -> Result<Self>;
    /// The vectors that were saved.
    fn vectors(state: &Self::State) -> &[VectorState];
}

/// What a write changed.
#[derive(Debug)]
pub(super) struct Changed {
    /// The vectors that may be live now and were not, or the other way round.
    pub(super) vectors: Range<usize>,
    /// Whether those that stay live take their new messages.
    pub(super) messages: bool,
}

/// A device with one of the capabilities. Dropping it closes it.
///
/// A vector's route is armed while the vector is live, with the message that it had when it became so.
///
/// Locks are taken in this order: the device's, a route's, the partition's.
#[derive(Debug)]
pub struct Device<R> {
    pub(super) vectors: Arc<Vectors>,
    pub(super) state: Mutex<State<R>>,
}

#[derive(Debug)]
pub(super) struct State<R> {
    pub(super) registers: R,
    /// The vectors that are live.
    pub(super) live: Box<[bool]>,
    pub(super) faults: Faults,
}

impl<R: Registers> Device<R> {
    /// A device in its reset state. `events` are the caller's eventfds, for the vectors that have one: those take a GSI
    /// at once, the others when they are first live.
    pub fn new(partition: Arc<Partition>, vectors: usize, events: &[(usize, RawFd)]) -> Result<Self> {
        let registers = R::new(vectors)?;
        let live = vec![false; registers.count()].into();
        let vectors = Arc::new(Vectors::new(partition, R::WHAT, registers.count(), events)?);
        let state = State { registers, live, faults: Faults::default() };
        Ok(Self { vectors, state: Mutex::new(state) })
    }

    pub(super) fn lock(&self) -> Result<MutexGuard<'_, State<R>>> {
        self.vectors.check_open()?;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have been closed while this thread waited.
        self.vectors.check_open()?;
        Ok(state)
    }

    /// The faults, with the vectors that the failed call of another route has disarmed.
    fn all_faults(&self, state: &State<R>) -> Faults {
        let mut faults = state.faults.clone();
        for index in (0..self.vectors.count()).filter(|index| state.live[*index]) {
            if !faults.contains_key(&index) {
                faults.extend(self.vectors.lost_arming(index).map(|fault| (index, fault)));
            }
        }
        faults
    }

    /// The lock, unless another thread has it.
    pub(super) fn try_lock(&self) -> Result<Option<MutexGuard<'_, State<R>>>> {
        self.vectors.check_open()?;
        let state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(None),
        };
        self.vectors.check_open()?;
        Ok(Some(state))
    }

    /// Changes the registers. Then arms and disarms the vectors that are to be, with one push at most.
    pub(super) fn change(&self, edit: impl FnOnce(&mut R) -> Option<Changed>) -> Result {
        let mut state = self.lock()?;
        let State { registers, live, faults } = &mut *state;
        let Some(changed) = edit(registers) else { return Ok(()) };
        let (mut arm, mut disarm) = (Vec::new(), Vec::new());
        for index in changed.vectors {
            let now = registers.is_live(index);
            match std::mem::replace(&mut live[index], now) {
                before if now && (!before || changed.messages) => arm.push((index, registers.message(index))),
                before if before && !now => disarm.push(index),
                _ => {}
            }
        }
        self.vectors.disarm(faults, disarm);
        self.vectors.arm(faults, arm);
        Ok(())
    }
}

fn reasons(faults: Faults) -> Vec<(usize, Arc<Error>)> {
    faults.into_iter().map(|(index, fault)| (index, fault.error)).collect()
}

/// A device, whatever its registers are.
pub trait AnyDevice: Send + Sync + std::fmt::Debug {
    /// What needs no lock: signals, pending bits, the routes that have been taken.
    fn vectors(&self) -> &Arc<Vectors>;
    /// Returns to the state after a reset: disarms every vector, and takes away what is pending. Vectors keep their
    /// routes.
    fn reset(&self) -> Result;
    /// The vectors that are not armed or disarmed as the guest asked, with the reason.
    fn faults(&self) -> Result<Vec<(usize, Arc<Error>)>>;
    /// Arms and disarms the vectors that are not as the guest asked, with one push at most. Returns those that are not
    /// so still.
    fn retry(&self) -> Result<Vec<(usize, Arc<Error>)>>;
    /// Whether the guest has masked a vector.
    fn masked(&self, index: usize) -> Result<bool>;
    /// The vector's route, taken now if need be.
    fn take_route(&self, index: usize) -> Result<&Arc<IrqFdRoute>>;
    /// Saves the registers and the vectors, as JSON.
    fn save(&self) -> Result<String>;
    /// Closes the vectors' routes. Continues past errors and reports them at the end.
    fn close(&self) -> Result;
    /// For finalizers: closes. In a forked child closes only the descriptors.
    fn abandon(&self) -> Result;
}

impl<R: Registers> AnyDevice for Device<R> {
    fn vectors(&self) -> &Arc<Vectors> {
        &self.vectors
    }

    fn reset(&self) -> Result {
        let mut state = self.lock()?;
        let State { registers, live, faults } = &mut *state;
        registers.reset();
        live.fill(false);
        faults.clear();
        self.vectors.disarm(faults, (0..self.vectors.count()).collect());
        for index in 0..self.vectors.count() {
            // Fails only if the route was closed by itself, or its eventfd by other code. Then nothing is pending.
            let _taken = self.vectors.consume_pending(index);
        }
        Ok(())
    }

    fn faults(&self) -> Result<Vec<(usize, Arc<Error>)>> {
        Ok(reasons(self.all_faults(&*self.lock()?)))
    }

    fn retry(&self) -> Result<Vec<(usize, Arc<Error>)>> {
        let mut state = self.lock()?;
        let faults = self.all_faults(&state);
        let State { live, faults: known, .. } = &mut *state;
        // Those that are disarmed are as the guest asked. A failure below puts the others back.
        known.retain(|index, _| live[*index] || self.vectors.is_broken(*index));
        self.vectors.disarm(known, faults.keys().copied().filter(|index| !live[*index]).collect());
        // The message from the time when the vector became live: the guest may be writing another one to its entry.
        let again = faults.iter().filter_map(|(index, fault)| Some((*index, Ok(fault.message?))));
        self.vectors.arm(known, again.filter(|(index, _)| live[*index]).collect());
        Ok(reasons(self.all_faults(&state)))
    }

    fn masked(&self, index: usize) -> Result<bool> {
        Ok(self.lock()?.registers.is_masked(index))
    }

    fn take_route(&self, index: usize) -> Result<&Arc<IrqFdRoute>> {
        let _state = self.lock()?;
        self.vectors.take_masked(index)
    }

    fn save(&self) -> Result<String> {
        self.saved()?.to_json()
    }

    fn close(&self) -> Result {
        self.vectors.partition().check_owner()?;
        let _state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.vectors.close()
    }

    fn abandon(&self) -> Result {
        if self.vectors.partition().check_owner().is_ok() { self.close() } else { self.vectors.abandon() }
    }
}
