//! The floor: a loop of only those kernel calls that a workload needs, on prepared tables.

use std::ops::Range;

use super::bare::Bare;
use super::workload::{Design, FIRST_GSI, OWN_GSIS, Random, Stage, Steps, VPS, Workload, event_error, msi};
use crate::hypervisor::table::{Image, Table};
use crate::hypervisor::{CallResult, MAX_GSIS, RawMsi};

/// The vectors of a VP that an MSI can have.
const VECTORS: Range<u32> = 16..256;

/// The calls that give a route another MSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A push.
    Push,
    /// A quiesced push: the mshv driver needs that to lose no signal.
    QuiescedPush,
    /// A move: the route is disarmed, and armed at another GSI of a table that was loaded before.
    Move,
}

struct Floor<K: Bare> {
    kernel: K,
    routes: usize,
    way: Way,
    events: Vec<K::Event>,
    /// The GSI where each route is armed, or is to be.
    places: Vec<u32>,
    /// All routes on their first vectors; one on its second vector; all on their second vectors. If routes move, every
    /// table has loaded entries too.
    tables: [Image<K::Entry>; 3],
    /// The GSIs of the loaded entries.
    loaded: Range<u32>,
    /// The table that random pushes change.
    storm: Table<K::Entry>,
    random: Random,
    fixed: usize,
    turn: bool,
    stage: Stage,
}

/// The bare calls, with one way to give a route another MSI.
pub fn floor<K: Bare>(kernel: K, routes: usize, way: Way) -> Design {
    let middle = routes / 2;
    let own = |index: usize| FIRST_GSI + index as u32;
    let loaded = if way == Way::Move { loaded_gsis(routes, K::fixed().len()) } else { 0..0 };
    let table = |second: fn(usize, usize) -> bool| {
        let entries = (0..routes).map(|index| K::entry(own(index), msi(index, second(index, middle))));
        let loaded = loaded.clone().zip(every_msi()).map(|(gsi, msi)| K::entry(gsi, msi));
        Image::copy_of(&K::fixed().into_iter().chain(entries).chain(loaded).collect::<Vec<_>>())
    };
    let tables = [table(|_, _| false), table(|index, middle| index == middle), table(|_, _| true)];
    let mut storm = Table::new(&K::fixed());
    (0..routes).for_each(|index| storm.set(own(index), K::entry(own(index), msi(index, false))));
    Design(Box::new(Floor {
        kernel,
        routes,
        way,
        events: Vec::with_capacity(routes),
        places: (0..routes).map(own).collect(),
        tables,
        loaded,
        storm,
        random: Random::new(),
        fixed: K::fixed().len(),
        turn: false,
        stage: Stage::Nothing,
    }))
}

/// Every vector of every VP.
fn every_msi() -> impl Iterator<Item = RawMsi> {
    let of_vp = |vp: u8| VECTORS.map(move |data| RawMsi { address: 0xFEE0_0000 | u32::from(vp) << 12, data });
    (0..VPS).flat_map(of_vp)
}

/// The GSIs above those that the package hands out, for every MSI, or for as many as the table has room for.
fn loaded_gsis(routes: usize, fixed: usize) -> Range<u32> {
    let own = routes.max(OWN_GSIS);
    let room = MAX_GSIS as usize - fixed - own;
    let start = FIRST_GSI + own as u32;
    let end = start + room.min(every_msi().count()) as u32;
    start..end.min(MAX_GSIS)
}

impl<K: Bare> Floor<K> {
    fn middle(&self) -> usize {
        self.routes / 2
    }

    fn make(&mut self) -> CallResult {
        self.events.push(K::event().map_err(event_error("eventfd2"))?);
        Ok(())
    }

    fn arm(&self, index: usize) -> CallResult {
        self.kernel.register(self.places[index], &self.events[index])
    }

    fn disarm(&self, index: usize) -> CallResult {
        self.kernel.unregister(self.places[index], &self.events[index])
    }

    fn own(index: usize) -> u32 {
        FIRST_GSI + index as u32
    }

    /// A GSI for a route beside its own: a loaded one; without those, another route's.
    fn other(&self, index: usize) -> u32 {
        match self.loaded.len() {
            0 => Self::own((index + 1) % self.routes),
            loaded => self.loaded.start + (index % loaded) as u32,
        }
    }

    /// The GSI to which a route moves, in turn: its own, or the other.
    fn next(&self, index: usize) -> u32 {
        if self.places[index] == Self::own(index) { self.other(index) } else { Self::own(index) }
    }

    fn move_to(&mut self, index: usize, gsi: u32) -> CallResult {
        self.disarm(index)?;
        self.places[index] = gsi;
        self.arm(index)
    }

    /// Pushes a table. If pushes are quiesced, disarms the irqfds of `armed` before and arms them afterwards.
    fn push(&self, table: &Image<K::Entry>, armed: Range<usize>) -> CallResult {
        if self.way != Way::QuiescedPush {
            return self.kernel.push_image(table);
        }
        armed.clone().try_for_each(|index| self.disarm(index))?;
        self.kernel.push_image(table)?;
        armed.clone().try_for_each(|index| self.arm(index))
    }

    /// Pushes, alternately, another table and the table with the first vectors.
    fn push_in_turn(&mut self, other: usize, armed: Range<usize>) -> CallResult {
        self.turn = !self.turn;
        self.push(&self.tables[if self.turn { other } else { 0 }], armed)
    }

    /// Routes and arms a route that exists. The routes below it are armed already.
    fn bring_up(&mut self, index: usize) -> CallResult {
        if self.way != Way::Move {
            self.tables[0].show(self.fixed + index + 1);
            self.push(&self.tables[0], 0..index)?;
        } else if index == 0 {
            self.push(&self.tables[0], 0..0)?;
        }
        self.arm(index)
    }
}

impl<K: Bare> Steps for Floor<K> {
    fn stage(&self) -> Stage {
        self.stage
    }

    fn set_stage(&mut self, stage: Stage) {
        self.stage = stage;
    }

    fn arrange(&mut self, stage: Stage) -> CallResult {
        match self.stage {
            Stage::Nothing | Stage::Made => {}
            Stage::Armed => (0..self.routes).try_for_each(|index| self.disarm(index))?,
            Stage::Quiet => self.disarm(self.middle())?,
        }
        self.places = (0..self.routes).map(Self::own).collect();
        if stage == Stage::Nothing {
            self.events.clear();
            return Ok(());
        }
        while self.events.len() < self.routes {
            self.make()?;
        }
        match stage {
            Stage::Nothing | Stage::Made => Ok(()),
            Stage::Armed => self.work(Workload::BringUpBatch),
            Stage::Quiet => {
                self.kernel.push_image(&self.tables[0])?;
                self.arm(self.middle())
            }
        }
    }

    fn work(&mut self, workload: Workload) -> CallResult {
        let all = 0..self.routes;
        let middle = self.middle();
        match workload {
            Workload::Create => all.clone().try_for_each(|_| self.make()),
            Workload::BringUp => all.clone().try_for_each(|index| {
                self.make()?;
                self.bring_up(index)
            }),
            Workload::BringUpMade => all.clone().try_for_each(|index| self.bring_up(index)),
            Workload::BringUpBatch => {
                self.kernel.push_image(&self.tables[0])?;
                all.clone().try_for_each(|index| self.arm(index))
            }
            Workload::MsixBringUp => {
                all.clone().try_for_each(|_| self.make())?;
                self.work(Workload::BringUpBatch)
            }
            Workload::Retarget | Workload::MsixRetarget if self.way == Way::Move => {
                self.move_to(middle, self.next(middle))
            }
            Workload::MsixRetarget if self.way == Way::Push => {
                self.disarm(middle)?;
                self.push_in_turn(1, all)?;
                self.arm(middle)
            }
            Workload::Retarget | Workload::MsixRetarget => self.push_in_turn(1, all),
            Workload::RetargetStorm => {
                let index = self.random.below(self.routes);
                if self.way == Way::Move {
                    let other = self.random.below(self.routes.max(self.loaded.len()));
                    return self.move_to(index, self.other(other));
                }
                let msi = self.random.msi();
                self.storm.set(Self::own(index), K::entry(Self::own(index), msi));
                self.push(self.storm.image(), all)
            }
            Workload::RetargetAll if self.way == Way::Move => {
                all.clone().try_for_each(|index| self.disarm(index))?;
                self.places = all.clone().map(|index| self.next(index)).collect();
                all.clone().try_for_each(|index| self.arm(index))
            }
            Workload::RetargetAll => self.push_in_turn(2, all),
            Workload::MaskUnmask => {
                self.disarm(middle)?;
                self.arm(middle)
            }
            Workload::Push => self.push_in_turn(1, middle..middle + 1),
            Workload::Signal => self.kernel.signal(&self.events[middle]).map_err(event_error("write")),
            Workload::TearDown => {
                for (event, gsi) in self.events.drain(..).zip(&self.places) {
                    self.kernel.unregister(*gsi, &event)?;
                }
                self.places = all.map(Self::own).collect();
                Ok(())
            }
        }
    }
}
