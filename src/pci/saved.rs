//! A device saved and restored: its vectors. The registers do their part themselves.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use super::device::{Device, Registers, State};
use super::vector_state::VectorState;
use super::vectors::{Fault, Faults, Vectors};
use crate::irqfd::{Error, Message, MsiRoute, Partition, Result, RouteState, Wanted};

impl<R: Registers> State<R> {
    /// Saves the vectors. The caller holds the lock of the registers.
    fn save(&self, vectors: &Vectors) -> Result<Vec<VectorState>> {
        let routes: Vec<_> = vectors.taken().map(|(_, route)| &**route).collect();
        let saved = vectors.partition().save_routes(&routes)?;
        let routes: BTreeMap<_, _> = saved.iter().map(|route| (route.gsi, route)).collect();
        let mut states = Vec::new();
        for index in 0..vectors.count() {
            let gsi = vectors.route(index).map(|route| route.gsi());
            let route = gsi.and_then(|gsi| routes.get(&gsi));
            let fault = self.live[index].then(|| self.fault(index, vectors, route)).flatten();
            let armed = route.filter(|_| self.live[index] && fault.is_none()).and_then(|route| route.msi);
            let msi = fault.as_ref().map_or(armed, |fault| fault.message.map(Message::from));
            let pending = route.is_some_and(|route| route.pending) || vectors.is_latched(index);
            if gsi.is_some() || pending || fault.is_some() {
                let fault = fault.map(|fault| fault.error.to_string());
                states.push(VectorState { vector: index as u32, gsi, msi, pending, fault });
            }
        }
        Ok(states)
    }

    /// Why a live vector is not armed, unless it waits only for the next push: then it can be armed when it is restored.
    fn fault(&self, index: usize, vectors: &Vectors, route: Option<&&RouteState>) -> Option<Fault> {
        let known = self.faults.get(&index).cloned();
        match route {
            Some(RouteState { masked: false, msi: Some(_), .. }) => known,
            _ => known.or_else(|| vectors.lost_arming(index)),
        }
    }
}

impl<R: Registers> Device<R> {
    /// The state of the registers and the vectors.
    pub fn saved(&self) -> Result<R::State> {
        let state = self.lock()?;
        Ok(state.registers.save(state.save(&self.vectors)?))
    }

    /// The device that was saved, with vectors that are armed, disarmed, pending and faulty as they were: all of it, with
    /// one push at most, or nothing. `events` are the caller's eventfds, for vectors that have a GSI in the state.
    pub fn restore(partition: &Arc<Partition>, state: &R::State, events: &[(usize, RawFd)]) -> Result<Self> {
        let (registers, states) = (R::restored(state)?, R::vectors(state));
        let live: Box<[bool]> = (0..registers.count()).map(|index| registers.is_live(index)).collect();
        check(&live, states)?;
        let faults = faults(states)?;
        let mut events: BTreeMap<_, _> = events.iter().copied().collect();
        let (mut indexes, mut wanted) = (Vec::new(), Vec::new());
        for (at, state) in states.iter().enumerate() {
            let index = state.vector as usize;
            let Some(gsi) = state.gsi else { continue };
            let msi = state.msi.filter(|_| state.fault.is_none());
            let route = RouteState { gsi, masked: msi.is_none(), msi, pending: state.pending };
            indexes.push(index);
            wanted.push(Wanted { place: format!("vectors[{at}]"), state: route, event: events.remove(&index) });
        }
        if let Some(index) = events.keys().next() {
            return Err(Error::Invalid(format!(
                "events has an eventfd for vector {index}, which has no GSI in the state"
            )));
        }
        let routes = partition.restore_routes(&wanted, true)?;
        let vectors = Vectors::restored(Arc::clone(partition), R::WHAT, live.len());
        for (index, route) in indexes.into_iter().zip(routes) {
            vectors.give(index, route);
        }
        for state in states.iter().filter(|state| state.gsi.is_none() && state.pending) {
            vectors.signal(state.vector as usize)?;
        }
        Ok(Self { vectors: Arc::new(vectors), state: Mutex::new(State { registers, live, faults }) })
    }
}

/// Checks the states of vectors, of which these are live.
fn check(live: &[bool], states: &[VectorState]) -> Result {
    let refuse = |at: usize, text: String| Err(Error::Invalid(format!("vectors[{at}]{text}")));
    let mut seen = vec![None; live.len()];
    for (at, VectorState { vector, gsi, msi, fault, .. }) in states.iter().enumerate() {
        let Some(other) = seen.get_mut(*vector as usize) else {
            return refuse(
                at,
                format!(".vector: {vector} is out of range; the device has vectors 0 to {}", live.len() - 1),
            );
        };
        if let Some(other) = other.replace(at) {
            return refuse(at, format!(".vector: {vector} is that of vectors[{other}] too"));
        }
        let wrong = match (live[*vector as usize], gsi, msi, fault) {
            (true, Some(_), Some(_), None) | (true, _, _, Some(_)) | (false, _, None, None) => continue,
            (true, None, Some(_), None) => ".gsi: expected a GSI, as the vector is armed",
            (true, _, None, None) => ": the registers let the vector send, so it has an msi or a fault",
            (false, ..) => ": the registers do not let the vector send, so its msi and fault are null",
        };
        return refuse(at, wrong.into());
    }
    match live.iter().zip(seen).position(|(live, seen)| *live && seen.is_none()) {
        Some(vector) => Err(Error::Invalid(format!(
            "vectors: expected vector {vector} among them, as the registers let it send"
        ))),
        None => Ok(()),
    }
}

fn faults(states: &[VectorState]) -> Result<Faults> {
    let mut faults = Faults::default();
    for (at, state) in states.iter().enumerate() {
        let Some(text) = &state.fault else { continue };
        let refuse = |error| Error::At { place: format!("vectors[{at}].msi"), error: Box::new(Error::Msi(error)) };
        let message = state.msi.map(|msi| MsiRoute::new(msi.address, msi.data).map_err(refuse)).transpose()?;
        let fault = Fault { error: Arc::new(Error::Invalid(text.clone())), message };
        faults.insert(state.vector as usize, fault);
    }
    Ok(faults)
}
