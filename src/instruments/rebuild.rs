//! A design that keeps one state per GSI and rebuilds the routing table from all states for every change.
//!
//! It scans for a free GSI from the first, and registers an irqfd for the life of its route. Every change of a route,
//! including masking and unmasking, scans the states, collects the entries of enabled ones, copies them behind a header
//! and pushes the result.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::bare::Bare;
use super::workload::{Design, FIRST_GSI, Random, Stage, Steps, Workload, event_error, msi};
use crate::hypervisor::table::Image;
use crate::hypervisor::{CallError, CallResult, Operation, RawMsi};

/// The number of states to scan.
const STATES: usize = 2048;

#[derive(Clone, Copy, PartialEq, Eq)]
enum GsiState {
    Unallocated,
    Disabled,
    Enabled(RawMsi),
}

struct Route<E> {
    index: usize,
    event: E,
    last: Option<RawMsi>,
}

struct Rebuild<K: Bare> {
    kernel: K,
    count: usize,
    states: Mutex<Vec<GsiState>>,
    fixed: Vec<K::Entry>,
    routes: Vec<Route<K::Event>>,
    turn: bool,
    random: Random,
    stage: Stage,
}

/// The design that rebuilds the table for every change. If there are more routes than states, it doubles the states.
pub fn rebuild<K: Bare>(kernel: K, routes: usize) -> Design {
    let states = if routes > STATES { 2 * STATES } else { STATES };
    Design(Box::new(Rebuild {
        kernel,
        count: routes,
        states: Mutex::new(vec![GsiState::Unallocated; states]),
        fixed: K::fixed(),
        routes: Vec::with_capacity(routes),
        turn: false,
        random: Random::new(),
        stage: Stage::Nothing,
    }))
}

impl<K: Bare> Rebuild<K> {
    fn states(&self) -> MutexGuard<'_, Vec<GsiState>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocate(&self) -> Option<usize> {
        let mut states = self.states();
        let index = states.iter().position(|state| *state == GsiState::Unallocated)?;
        states[index] = GsiState::Disabled;
        Some(index)
    }

    fn set_route(&self, index: usize, route: Option<RawMsi>) -> CallResult {
        let mut states = self.states();
        let new = route.map_or(GsiState::Disabled, GsiState::Enabled);
        let old = std::mem::replace(&mut states[index], new);
        if old == new {
            return Ok(());
        }
        self.push(&states).inspect_err(|_| states[index] = old)
    }

    fn push(&self, states: &[GsiState]) -> CallResult {
        let enabled = states.iter().enumerate().filter_map(|(index, state)| match state {
            GsiState::Enabled(msi) => Some(K::entry(FIRST_GSI + index as u32, *msi)),
            _ => None,
        });
        let entries: Vec<_> = self.fixed.iter().copied().chain(enabled).collect();
        self.kernel.push_image(&Image::copy_of(&entries))
    }

    fn make(&mut self) -> CallResult {
        let exhausted = CallError::new(Operation::Event, "allocation of a GSI", libc::ENOSPC);
        let index = self.allocate().ok_or(exhausted)?;
        let event = K::event().map_err(event_error("eventfd2"))?;
        self.kernel.register(FIRST_GSI + index as u32, &event)?;
        self.routes.push(Route { index, event, last: None });
        Ok(())
    }

    fn set_msi(&mut self, route: usize, msi: RawMsi) -> CallResult {
        self.set_route(self.routes[route].index, Some(msi))?;
        self.routes[route].last = Some(msi);
        Ok(())
    }

    fn close(&mut self, route: Route<K::Event>) -> CallResult {
        self.set_route(route.index, None)?;
        self.kernel.unregister(FIRST_GSI + route.index as u32, &route.event)?;
        self.states()[route.index] = GsiState::Unallocated;
        Ok(())
    }

    fn middle(&self) -> usize {
        self.count / 2
    }

    /// Sets the state of every route and pushes once. The design itself has no such call; only preparations use it.
    fn set_all(&mut self, state: impl Fn(usize) -> GsiState) -> CallResult {
        let mut states = self.states();
        for route in &self.routes {
            states[route.index] = state(route.index);
        }
        self.push(&states)
    }

    /// Registers or unregisters the irqfds of all but the middle route.
    fn set_others_armed(&self, armed: bool) -> CallResult {
        for (at, route) in self.routes.iter().enumerate() {
            let gsi = FIRST_GSI + route.index as u32;
            match armed {
                _ if at == self.middle() => {}
                true => self.kernel.register(gsi, &route.event)?,
                false => self.kernel.unregister(gsi, &route.event)?,
            }
        }
        Ok(())
    }
}

impl<K: Bare> Steps for Rebuild<K> {
    fn stage(&self) -> Stage {
        self.stage
    }

    fn set_stage(&mut self, stage: Stage) {
        self.stage = stage;
    }

    fn arrange(&mut self, stage: Stage) -> CallResult {
        if self.stage == Stage::Quiet {
            self.set_others_armed(true)?;
        }
        while stage != Stage::Nothing && self.routes.len() < self.count {
            self.make()?;
        }
        match stage {
            Stage::Nothing => {
                self.set_all(|_| GsiState::Disabled)?;
                while let Some(route) = self.routes.pop() {
                    self.close(route)?;
                }
            }
            Stage::Made => self.set_all(|_| GsiState::Disabled)?,
            Stage::Armed | Stage::Quiet => {
                self.turn = false;
                self.set_all(|index| GsiState::Enabled(msi(index, false)))?;
                for route in &mut self.routes {
                    route.last = Some(msi(route.index, false));
                }
            }
        }
        if stage == Stage::Quiet { self.set_others_armed(false) } else { Ok(()) }
    }

    fn work(&mut self, workload: Workload) -> CallResult {
        let middle = self.middle();
        match workload {
            Workload::Create => (0..self.count).try_for_each(|_| self.make()),
            Workload::BringUp | Workload::MsixBringUp => {
                for index in 0..self.count {
                    self.make()?;
                    self.set_msi(index, msi(index, false))?;
                }
                self.turn = false;
                Ok(())
            }
            Workload::BringUpMade | Workload::BringUpBatch => {
                self.turn = false;
                (0..self.count).try_for_each(|index| self.set_msi(index, msi(index, false)))
            }
            Workload::Retarget => {
                self.turn = !self.turn;
                self.set_msi(middle, msi(middle, self.turn))
            }
            Workload::MsixRetarget => {
                self.turn = !self.turn;
                self.set_route(self.routes[middle].index, None)?;
                self.set_msi(middle, msi(middle, self.turn))
            }
            Workload::RetargetStorm => {
                let route = self.random.below(self.count);
                let msi = self.random.msi();
                self.set_msi(route, msi)
            }
            Workload::RetargetAll => {
                self.turn = !self.turn;
                (0..self.count).try_for_each(|index| self.set_msi(index, msi(index, self.turn)))
            }
            Workload::MaskUnmask => {
                let Route { index, last, .. } = self.routes[middle];
                self.set_route(index, None)?;
                self.set_route(index, last)
            }
            Workload::Push => self.push(&self.states()),
            Workload::Signal => self.kernel.signal(&self.routes[middle].event).map_err(event_error("write")),
            Workload::TearDown => {
                for route in std::mem::take(&mut self.routes) {
                    self.close(route)?;
                }
                Ok(())
            }
        }
    }
}
