//! The floor: a loop of only those kernel calls that a workload needs, on prepared tables.

use super::bare::Bare;
use super::workload::{Design, FIRST_GSI, Stage, Steps, Workload, event_error, msi};
use crate::hypervisor::CallResult;
use crate::hypervisor::table::Image;

struct Floor<K: Bare> {
    kernel: K,
    routes: usize,
    quiesce: bool,
    events: Vec<K::Event>,
    /// All routes on their first vectors; one on its second vector; all on their second vectors.
    tables: [Image<K::Entry>; 3],
    fixed: usize,
    turn: bool,
    stage: Stage,
}

/// The bare calls. With `quiesce`, every push is quiesced: the mshv driver needs that to lose no signal.
pub fn floor<K: Bare>(kernel: K, routes: usize, quiesce: bool) -> Design {
    let middle = routes / 2;
    let table = |second: fn(usize, usize) -> bool| {
        let entries =
            (0..routes).map(|index| K::entry(FIRST_GSI + index as u32, msi(index, second(index, middle))));
        Image::copy_of(&K::fixed().into_iter().chain(entries).collect::<Vec<_>>())
    };
    let tables = [table(|_, _| false), table(|index, middle| index == middle), table(|_, _| true)];
    Design(Box::new(Floor {
        kernel,
        routes,
        quiesce,
        events: Vec::with_capacity(routes),
        tables,
        fixed: K::fixed().len(),
        turn: false,
        stage: Stage::Nothing,
    }))
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
        self.kernel.register(FIRST_GSI + index as u32, &self.events[index])
    }

    fn disarm(&self, index: usize) -> CallResult {
        self.kernel.unregister(FIRST_GSI + index as u32, &self.events[index])
    }

    /// Pushes a prepared table. With `quiesce`, disarms the irqfds of `armed` before and arms them afterwards.
    fn push(&self, table: usize, armed: std::ops::Range<usize>) -> CallResult {
        if !self.quiesce {
            return self.kernel.push_image(&self.tables[table]);
        }
        armed.clone().try_for_each(|index| self.disarm(index))?;
        self.kernel.push_image(&self.tables[table])?;
        armed.clone().try_for_each(|index| self.arm(index))
    }

    /// Pushes, alternately, another table and the table with the first vectors.
    fn push_in_turn(&mut self, other: usize, armed: std::ops::Range<usize>) -> CallResult {
        self.turn = !self.turn;
        self.push(if self.turn { other } else { 0 }, armed)
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
            Workload::BringUp => {
                for index in all {
                    self.make()?;
                    self.tables[0].show(self.fixed + index + 1);
                    self.push(0, 0..index)?;
                    self.arm(index)?;
                }
                Ok(())
            }
            Workload::BringUpBatch => {
                self.kernel.push_image(&self.tables[0])?;
                all.clone().try_for_each(|index| self.arm(index))
            }
            Workload::Retarget => self.push_in_turn(1, all),
            Workload::RetargetAll => self.push_in_turn(2, all),
            Workload::MaskUnmask => {
                self.disarm(middle)?;
                self.arm(middle)
            }
            Workload::Push => self.push_in_turn(1, middle..middle + 1),
            Workload::Signal => self.kernel.signal(&self.events[middle]).map_err(event_error("write")),
            Workload::TearDown => {
                for (index, event) in self.events.drain(..).enumerate() {
                    self.kernel.unregister(FIRST_GSI + index as u32, &event)?;
                }
                Ok(())
            }
        }
    }
}
