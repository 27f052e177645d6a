//! The saved state of routes: what a snapshot of a partition has to keep, and how routes are made from it again.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};

use super::error::{Error, Failure, Result};
use super::events::NewEvent;
use super::format::{SavedState, dicts, nullable_dict};
use super::gsi::GsiState;
use super::msi::MsiRoute;
use super::partition::{Partition, partitions};
use super::plan::Change;
use super::route::IrqFdRoute;
use super::shared::{Intent, Route};
use super::state::State;
use super::trace::Reason;
use crate::hypervisor::{CallError, Operation};

/// The state of a partition's routes, but for those of devices: each device saves its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionState {
    /// In order of GSI.
    #[serde(deserialize_with = "dicts")]
    pub routes: Vec<RouteState>,
}

impl SavedState for PartitionState {
    const KIND: &'static str = "mshv_irqfd.Partition";
}

/// The state of a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteState {
    pub gsi: u32,
    pub masked: bool,
    #[serde(deserialize_with = "nullable_dict")]
    pub msi: Option<Message>,
    /// Whether a signal waits for the route to be armed.
    pub pending: bool,
}

/// The address and data of an MSI, not yet checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    pub address: u64,
    pub data: u64,
}

impl From<MsiRoute> for Message {
    fn from(msi: MsiRoute) -> Self {
        Self { address: msi.raw().address.into(), data: msi.raw().data.into() }
    }
}

/// A route to restore.
#[derive(Debug)]
pub struct Wanted {
    /// Where its state is, for messages.
    pub place: String,
    pub state: RouteState,
    /// The caller's eventfd. By default the route makes a new one.
    pub event: Option<RawFd>,
}

impl Wanted {
    fn intent(&self) -> Result<Intent> {
        let check =
            |msi: Message| MsiRoute::new(msi.address, msi.data).map_err(|error| self.refuse("msi", error.into()));
        let msi = self.state.msi.map(check).transpose()?;
        Ok(Intent { masked: self.state.masked, msi, closed: false })
    }

    fn refuse(&self, key: &str, error: Error) -> Error {
        Error::At { place: format!("{}.{key}", self.place), error: Box::new(error) }
    }
}

impl Partition {
    /// Saves the routes, but for those of devices.
    pub fn save(&self) -> Result<PartitionState> {
        self.check_open()?;
        let routes = self.lock_open()?.routes_of_no_device();
        let routes =
            self.look_at(
                &routes,
                |route, intent| if intent.closed { Ok(false) } else { route.check(intent).map(|()| true) },
            )?;
        Ok(PartitionState { routes })
    }

    /// Saves some routes, in order of GSI.
    pub fn save_routes(&self, routes: &[&IrqFdRoute]) -> Result<Vec<RouteState>> {
        self.check_open()?;
        let mut routes: Vec<_> = routes.iter().map(|route| Arc::clone(route.shared())).collect();
        // In this order, as a batch locks them.
        routes.sort_unstable_by_key(|route| (route.gsi, Arc::as_ptr(route) as usize));
        self.look_at(&routes, |route, intent| route.check(intent).map(|()| true))
    }

    /// The states of routes, which are in order of GSI, but for those that `check` leaves out.
    fn look_at(
        &self,
        routes: &[Arc<Route>],
        check: impl Fn(&Route, &Intent) -> Result<bool>,
    ) -> Result<Vec<RouteState>> {
        let (mut locked, mut states) = (Vec::new(), Vec::new());
        for route in routes {
            let intent = route.lock();
            if check(route, &intent)? {
                let msi = intent.msi.map(Message::from);
                states.push(RouteState { gsi: route.gsi, masked: intent.masked, msi, pending: false });
                // To the end: what is looked at then belongs to this intent.
                locked.push(intent);
            }
        }
        let indexes: Vec<_> = states.iter().map(|state| self.index(state.gsi)).collect();
        let pending = self.lock_open()?.look(&indexes)?;
        states.iter_mut().zip(pending).for_each(|(state, pending)| state.pending = pending);
        Ok(states)
    }

    /// Restores routes, and returns them by GSI. `events` are the caller's eventfds, by GSI. If asked, rings the doorbells
    /// then: no saved state has the rings that were in flight.
    pub fn restore(
        self: &Arc<Self>,
        state: &PartitionState,
        events: &[(u32, RawFd)],
        ring_doorbells: bool,
    ) -> Result<BTreeMap<u32, IrqFdRoute>> {
        let mut events: BTreeMap<_, _> = events.iter().copied().collect();
        let wanted: Vec<_> = (0..)
            .zip(&state.routes)
            .map(|(at, route): (usize, _)| Wanted {
                place: format!("routes[{at}]"),
                state: route.clone(),
                event: events.remove(&route.gsi),
            })
            .collect();
        if let Some(gsi) = events.keys().next() {
            return Err(Error::Invalid(format!(
                "events has an eventfd for GSI {gsi}, which the state has no route of"
            )));
        }
        let routes = self.restore_routes(&wanted, false)?;
        if ring_doorbells {
            self.ring_doorbells()?;
        }
        Ok(routes.into_iter().map(|route| (route.gsi(), route)).collect())
    }

    /// Rings the open doorbells, as the guest does. Not those on a route's eventfd, of this partition or of another one of
    /// this process: their rings are the route's signals, which are saved as its pending bit.
    fn ring_doorbells(&self) -> Result {
        // Held to the end: no other call puts a doorbell's eventfd on a route meanwhile.
        let all = partitions()?;
        let mut doorbells = self.doorbells().open(&*self.lock_open()?);
        for other in all.iter().filter_map(Weak::upgrade) {
            let state = other.lock();
            doorbells.retain(|doorbell| state.route_of(&doorbell.event).is_none());
        }
        self.doorbells().ring(&*self.lock_open()?, &doorbells)
    }

    /// Restores all these routes, with one push at most, or none of them. They are in the order given.
    pub fn restore_routes(self: &Arc<Self>, wanted: &[Wanted], of_device: bool) -> Result<Vec<IrqFdRoute>> {
        self.check_open()?;
        let intents = wanted.iter().map(Wanted::intent).collect::<Result<Vec<_>>>()?;
        let fds: Vec<_> = wanted.iter().map(|wanted| wanted.event).collect();
        let (routes, again) = self.with_events(&fds, |events| {
            let again = self.to_signal_again(wanted, &events)?;
            let routes: Vec<_> = wanted
                .iter()
                .zip(events)
                .zip(&intents)
                .map(|((wanted, event), intent)| {
                    let route = Route::new(wanted.state.gsi, event.event);
                    route.set_intent(&mut route.lock(), *intent);
                    Arc::new(route)
                })
                .collect();
            self.place_routes(wanted, &routes, &intents, of_device)?;
            Ok((routes, again))
        })?;
        let routes: Vec<_> = routes.into_iter().map(|route| IrqFdRoute::on(self, route)).collect();
        for (route, again) in routes.iter().zip(again) {
            if again {
                route.signal(1)?;
            }
        }
        Ok(routes)
    }

    /// Which routes are to be signalled once they are there. Not those whose eventfd has come along with its signals:
    /// arming delivers these.
    fn to_signal_again(&self, wanted: &[Wanted], events: &[NewEvent]) -> Result<Vec<bool>> {
        let again = |(wanted, new): (&Wanted, &NewEvent)| {
            let there = new.event.is_readable().map_err(|error| poll_failure(wanted.state.gsi, &error))?;
            Ok(wanted.state.pending && !there)
        };
        wanted.iter().zip(events).map(again).collect()
    }

    /// Gives routes their GSIs and arms those that are to be, or changes nothing.
    fn place_routes(
        &self,
        wanted: &[Wanted],
        routes: &[Arc<Route>],
        intents: &[Intent],
        of_device: bool,
    ) -> Result {
        let mut state = self.lock_open()?;
        let mut changes = Vec::new();
        let mut places = BTreeMap::new();
        for (wanted, intent) in wanted.iter().zip(intents) {
            let gsi = wanted.state.gsi;
            self.check_free(&state, gsi).map_err(|error| wanted.refuse("gsi", error))?;
            if let Some(other) = places.insert(gsi, &wanted.place) {
                let error = Error::Invalid(format!("GSI {gsi} is that of {other} too"));
                return Err(wanted.refuse("gsi", error));
            }
            if !intent.is_idle() {
                let change = Change::to(self.index(gsi), *intent);
                self.check_vp_of(&state, &change).map_err(|error| wanted.refuse("msi", error))?;
                changes.push(change);
            }
        }
        for route in routes {
            state.place(self.index(route.gsi), route, of_device);
        }
        if changes.is_empty() {
            return Ok(());
        }
        if let Err(failure) = state.apply(&mut changes) {
            routes.iter().for_each(|route| state.take_back(self.index(route.gsi)));
            drop(state);
            // One that could not be disarmed stays in the partition's books.
            for route in routes {
                let mut intent = route.lock();
                let closed = Intent { closed: true, ..*intent };
                route.set_intent(&mut intent, closed);
            }
            return Err(failure.into());
        }
        Ok(())
    }

    fn check_free(&self, state: &State, gsi: u32) -> Result {
        let gsis = &self.config().gsis;
        if !gsis.contains(&gsi) {
            return Err(Error::Invalid(format!(
                "GSI {gsi} is outside gsis range({}, {}) of this partition",
                gsis.start, gsis.end
            )));
        }
        let why = match state.gsi_state(self.index(gsi)) {
            GsiState::Unallocated => return Ok(()),
            GsiState::Broken => "is quarantined: its route is or was broken",
            GsiState::Disabled | GsiState::Enabled => "is another route's; restore before making routes",
        };
        Err(Error::Invalid(format!("GSI {gsi} {why}")))
    }
}

impl State {
    /// Whether signals wait in the eventfds of some slots.
    ///
    /// An irqfd can be on its way to the guest with a signal: KVM injects some from a work item. Disarming waits for
    /// that. So every irqfd is disarmed while the counters are looked at, and each signal so far is either with the guest
    /// or in a counter. Arming again raises an interrupt for those that came since.
    fn look(&mut self, indexes: &[usize]) -> std::result::Result<Vec<bool>, Failure> {
        let mut disarmed = Vec::new();
        self.reason = Reason::Saved;
        let result = self.look_disarmed(indexes, &mut disarmed);
        let mut left = None;
        for index in disarmed {
            self.reason = Reason::Saved;
            let armed = self.assign(index).and_then(|()| self.drain(self.armed.len() - 1));
            self.publish(index);
            if let Err(failure) = armed {
                if !self.slots[index].is_armed() {
                    self.waiting.push(index as u16);
                }
                left.get_or_insert(failure).disarmed.push(self.gsi(index));
            }
        }
        match left {
            Some(failure) => Err(failure),
            None => result,
        }
    }

    fn look_disarmed(
        &mut self,
        indexes: &[usize],
        disarmed: &mut Vec<usize>,
    ) -> std::result::Result<Vec<bool>, Failure> {
        for index in indexes {
            if self.slots[*index].is_armed() {
                self.disarm(*index)?;
                disarmed.push(*index);
            }
        }
        let pending = |index: &usize| match &self.slots[*index].route {
            Some(route) => route.event.is_pending().map_err(|error| poll_failure(route.gsi, &error)),
            None => Ok(false),
        };
        indexes.iter().map(pending).collect()
    }

    fn routes_of_no_device(&self) -> Vec<Arc<Route>> {
        let slots = self.slots.iter().filter(|slot| !slot.of_device);
        slots.filter_map(|slot| slot.route.clone()).collect()
    }

    /// Gives a route the free GSI that it names.
    fn place(&mut self, index: usize, route: &Arc<Route>, of_device: bool) {
        self.gsis.take(index);
        self.give(index, route, of_device);
    }

    /// Frees the GSI of a route that nobody has had, after its arming has been rolled back.
    fn take_back(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        // It could not be disarmed. Closing the partition tries once more, and needs the descriptor for that.
        if slot.is_armed() {
            return;
        }
        slot.route = None;
        slot.event = None;
        if !slot.broken {
            self.gsis.free(index);
        }
    }
}

fn poll_failure(gsi: u32, error: &std::io::Error) -> Failure {
    Failure::new(CallError::of(Operation::Event, "poll", error), Some(gsi))
}
