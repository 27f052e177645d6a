//! The vectors of a device: a route for each that is used, its signals, and its faults.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::latch::Latch;
use crate::hypervisor::{CallError, Operation};
use crate::irqfd::{Batch, Error, Event, Failure, GsiState, IrqFdRoute, MsiRoute, Partition, Result};

/// The vectors for which the last arming or disarming failed.
pub(super) type Faults = BTreeMap<usize, Fault>;

/// A failed arming or disarming.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) error: Arc<Error>,
    /// The message that the vector had when it became live; none if that is invalid, or for a disarming.
    pub(super) message: Option<MsiRoute>,
}

/// After so many refused pushes, arming gives up: the refusals are not about single vectors.
const PUSHES: usize = 4;

/// The vectors of one device. The lock of the device's registers guards arming, disarming and the taking of routes.
/// Signals and pending bits need no lock.
#[derive(Debug)]
pub struct Vectors {
    partition: Arc<Partition>,
    /// What it is part of, for messages.
    what: &'static str,
    each: Box<[Vector]>,
    closed: AtomicBool,
}

/// Its route is taken when the vector is first used, and kept until the device is closed.
type Vector = Latch<Arc<IrqFdRoute>>;

/// An arming with a message, or a disarming.
struct Step<'a> {
    index: usize,
    route: &'a IrqFdRoute,
    message: Option<MsiRoute>,
}

impl Step<'_> {
    fn make(&self) -> Result {
        match self.message {
            None => self.route.mask(),
            Some(message) => {
                // Kept until it is unmasked, unless the route is new: new routes are unmasked.
                self.route.set_msi(message)?;
                self.route.unmask()
            }
        }
    }
}

impl Vectors {
    /// `events` are the caller's eventfds, for the vectors that have one. Those take their routes at once.
    pub(super) fn new(
        partition: Arc<Partition>,
        what: &'static str,
        count: usize,
        events: &[(usize, RawFd)],
    ) -> Result<Self> {
        partition.check_open()?;
        if let Some((index, _)) = events.iter().find(|(index, _)| *index >= count) {
            return Err(Error::Invalid(format!(
                "events has an eventfd for vector {index}; this device has vectors 0 to {}",
                count - 1
            )));
        }
        let each: Box<[Vector]> = (0..count).map(|_| Vector::default()).collect();
        for (index, fd) in events {
            let route = Arc::new(partition.new_device_route(Some(*fd))?);
            route.mask()?;
            if each[*index].give(route).is_err() {
                return Err(Error::Invalid(format!("vector {index} has two eventfds in events; give one")));
            }
        }
        Ok(Self { partition, what, each, closed: AtomicBool::new(false) })
    }

    /// Vectors that are given their routes afterwards.
    pub(super) fn restored(partition: Arc<Partition>, what: &'static str, count: usize) -> Self {
        let each = (0..count).map(|_| Vector::default()).collect();
        Self { partition, what, each, closed: AtomicBool::new(false) }
    }

    pub(super) fn give(&self, index: usize, route: IrqFdRoute) {
        // No route has been taken yet.
        let _given = self.each[index].give(Arc::new(route));
    }

    pub fn partition(&self) -> &Arc<Partition> {
        &self.partition
    }

    /// The number of vectors.
    pub fn count(&self) -> usize {
        self.each.len()
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Checks that this process may use the vectors. Comes before any lock; see [`Partition::check_owner`].
    pub fn check_open(&self) -> Result {
        self.partition.check_open()?;
        if self.is_closed() { Err(Error::Closed(self.what.into())) } else { Ok(()) }
    }

    /// The vector's route, if it has been taken.
    pub fn route(&self, index: usize) -> Option<&Arc<IrqFdRoute>> {
        self.each[index].route()
    }

    /// The vectors whose routes have been taken.
    pub fn taken(&self) -> impl Iterator<Item = (usize, &Arc<IrqFdRoute>)> {
        (0..self.count()).filter_map(|index| Some((index, self.route(index)?)))
    }

    /// The vector's route for other code, taken now if need be: masked like the vector. The caller holds the lock
    /// of the registers.
    pub(super) fn take_masked(&self, index: usize) -> Result<&Arc<IrqFdRoute>> {
        let new = self.route(index).is_none();
        let route = self.take(index)?;
        if new {
            route.mask()?;
        }
        Ok(route)
    }

    /// The vector's route, taken now if need be. A new one is unmasked and has no message. The caller holds the
    /// lock of the registers.
    fn take(&self, index: usize) -> Result<&Arc<IrqFdRoute>> {
        let new = || Ok(Arc::new(self.partition.new_device_route(None)?));
        self.each[index].take(new, |route| route.signal(1))
    }

    /// As `signal`, unless that could block; see [`IrqFdRoute::try_signal`].
    pub fn try_signal(&self, index: usize) -> Result<bool> {
        match self.route(index) {
            Some(route) => route.try_signal(1),
            None => self.signal(index).map(|()| true),
        }
    }

    /// Signals a vector: sends its message if it is armed, otherwise leaves a signal pending. Takes no lock.
    pub fn signal(&self, index: usize) -> Result {
        if let Some(route) = self.route(index) {
            return route.signal(1);
        }
        self.check_open()?;
        self.each[index].latch(|route| route.signal(1))
    }

    /// Whether a signal waits for the vector to take a route.
    pub(super) fn is_latched(&self, index: usize) -> bool {
        self.each[index].is_latched()
    }

    /// Whether a signal waits for the vector to be armed. Takes no lock.
    pub fn pending(&self, index: usize) -> Result<bool> {
        self.check_open()?;
        Ok(self.is_latched(index) || self.route(index).map_or(Ok(false), |route| route.pending())?)
    }

    /// The pending bits of some vectors, the first lowest: 64 of them at most. Takes no lock.
    pub(super) fn pending_bits(&self, vectors: Range<usize>) -> u64 {
        let pending = |index: &usize| {
            // A route that is closed, or whose eventfd other code has closed, will never send anything.
            self.is_latched(*index) || self.route(*index).is_some_and(|route| route.pending().unwrap_or(false))
        };
        let (first, end) = (vectors.start, vectors.end.min(self.count()));
        (first..end).filter(pending).fold(0, |bits, index| bits | 1 << (index - first))
    }

    /// Takes the pending signals of a vector, and returns whether there were any. For a device whose reason to
    /// interrupt has gone.
    pub fn consume_pending(&self, index: usize) -> Result<bool> {
        self.check_open()?;
        let from_latch = self.each[index].clear();
        Ok(self.route(index).map_or(Ok(false), |route| route.consume_pending())? || from_latch)
    }

    /// Arms vectors with their messages, with one push at most unless the kernel refuses a call. The vectors that
    /// can't be armed stay disarmed; the others are armed. The caller holds the lock of the registers.
    pub(super) fn arm(&self, faults: &mut Faults, wanted: Vec<(usize, Result<MsiRoute>)>) {
        let mut steps = Vec::new();
        for (index, message) in wanted {
            let valid = message.as_ref().ok().copied();
            let step = message.and_then(|message| {
                let route = self.take(index)?;
                route.check_msi(message)?;
                Ok(Step { index, route, message: Some(message) })
            });
            match step {
                Ok(step) => steps.push(step),
                Err(error) => {
                    self.fail_to_arm(faults, index, Fault { error: Arc::new(error), message: valid });
                }
            }
        }
        self.make(&steps, faults, &mut Vec::new());
    }

    /// Remembers why a vector could not be armed. It may be armed with a message that the guest does not want any more:
    /// that of a live MSI vector, or one that could not be disarmed. Better silent.
    fn fail_to_arm(&self, faults: &mut Faults, index: usize, fault: Fault) {
        if let Some(route) = self.route(index).filter(|route| route.armed().unwrap_or(false)) {
            // If this is refused too, the first error is the one to tell.
            let _refused = route.mask();
        }
        let text = || format!("vector {index} of {} stays disarmed: {}", self.what, fault.error);
        self.partition.trace().call(|| Event::Fault { text: text() });
        faults.insert(index, fault);
    }

    /// Disarms vectors. Those that the kernel refuses to disarm stay armed; the others are disarmed. The caller
    /// holds the lock of the registers.
    pub(super) fn disarm(&self, faults: &mut Faults, vectors: Vec<usize>) {
        let step = |index| {
            let route = self.route(index).filter(|route| !route.is_closed())?;
            (!route.masked().unwrap_or(false)).then_some(Step { index, route, message: None })
        };
        let steps: Vec<_> = vectors.into_iter().filter_map(step).collect();
        self.make(&steps, faults, &mut Vec::new());
    }

    /// Makes all steps in one batch. If that is refused, makes each half by itself, down to the steps at fault.
    /// `refused` has the pushes that were refused so far.
    fn make(&self, steps: &[Step<'_>], faults: &mut Faults, refused: &mut Vec<Arc<Error>>) {
        let result = match (steps, &refused[..]) {
            ([], _) => return,
            (_, [.., last]) if refused.len() >= PUSHES => Err(Arc::clone(last)),
            ([step], _) => step.make().map_err(Arc::new),
            _ => self.commit(steps).map_err(Arc::new),
        };
        let Err(error) = result else {
            // A vector that is masked keeps the fault that tells why it was not armed.
            for step in steps.iter().filter(|step| step.message.is_some()) {
                faults.remove(&step.index);
            }
            return;
        };
        if matches!(&*error, Error::Failed(failure) if failure.error.operation == Operation::SetMsiRouting) {
            refused.push(Arc::clone(&error));
        }
        if steps.len() == 1 || refused.len() >= PUSHES {
            for Step { index, message, .. } in steps {
                let fault = Fault { error: Arc::clone(&error), message: *message };
                match message {
                    Some(_) => self.fail_to_arm(faults, *index, fault),
                    None => drop(faults.insert(*index, fault)),
                }
            }
            return;
        }
        let (first, second) = steps.split_at(steps.len() / 2);
        self.make(first, faults, refused);
        self.make(second, faults, refused);
    }

    fn commit(&self, steps: &[Step<'_>]) -> Result {
        let mut batch = Batch::new(Arc::clone(&self.partition))?;
        for step in steps {
            match step.message {
                Some(message) => {
                    batch.set_msi(step.route, message);
                    batch.unmask(step.route);
                }
                None => batch.mask(step.route),
            }
        }
        batch.commit()
    }

    /// Whether a vector's route is broken.
    pub(super) fn is_broken(&self, index: usize) -> bool {
        self.route(index).is_some_and(|route| matches!(route.state(), Ok(GsiState::Broken)))
    }

    /// The fault of a vector that was armed and is not armed any more: a failed call about another route disarmed it,
    /// and could not arm it again.
    pub(super) fn lost_arming(&self, index: usize) -> Option<Fault> {
        let route = self.route(index)?;
        let error = match route.state() {
            Ok(GsiState::Enabled) => return None,
            Ok(GsiState::Broken) => Error::Broken(route.gsi()),
            Ok(_) => {
                let waits =
                    "waiting to be re-armed after another call failed (signals wait; the next push tries again)";
                let error = CallError::new(Operation::AssignIrqfd, waits, libc::EAGAIN);
                Failure::new(error, Some(route.gsi())).into()
            }
            Err(error) => error,
        };
        Some(Fault { error: Arc::new(error), message: route.msi().ok().flatten() })
    }

    /// Closes the routes. Continues past errors and reports them at the end. The caller holds the lock of the
    /// registers.
    pub(super) fn close(&self) -> Result {
        self.closed.store(true, Ordering::Release);
        let mut failures: Vec<Failure> = Vec::new();
        for (_, route) in self.taken() {
            match route.close() {
                Err(Error::Failed(failure)) => failures.push(*failure),
                other => other?,
            }
        }
        if failures.is_empty() {
            return Ok(());
        }
        let first = failures.swap_remove(0);
        Err(Failure { further: failures, ..first }.into())
    }

    /// For finalizers in a forked child: closes the descriptors.
    pub(super) fn abandon(&self) -> Result {
        self.taken().try_for_each(|(_, route)| route.abandon())
    }
}
