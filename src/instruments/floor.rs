//! The floor: the calls into the kernel that a workload can't do without, in a loop, on tables prepared beforehand.

use super::bare::Bare;
use super::workload::{Design, FIRST_GSI, Standing, Steps, Workload, event_error, msi};
use crate::hypervisor::CallResult;
use crate::hypervisor::table::Image;

struct Floor<K: Bare> {
    kernel: K,
    routes: usize,
    quiesce: bool,
    events: Vec<K::Event>,
    /// All routes on their first vectors; one of them on its second; all on their second.
    tables: [Image<K::Entry>; 3],
    fixed: usize,
    turn: bool,
    standing: Standing,
}

/// The bare calls. With `quiesce`, a push has every armed irqfd disarmed before it and armed after it, which is what
/// the mshv driver needs to lose no signal.
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
        standing: Standing::Nothing,
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

    /// Pushes a prepared table, past the irqfds of `armed` if those must not meet it.
    fn push(&self, table: usize, armed: std::ops::Range<usize>) -> CallResult {
        if !self.quiesce {
            return self.kernel.push_image(&self.tables[table]);
        }
        armed.clone().try_for_each(|index| self.disarm(index))?;
        self.kernel.push_image(&self.tables[table])?;
        armed.clone().try_for_each(|index| self.arm(index))
    }

    /// Pushes in turn the table with the first vectors and another.
    fn push_in_turn(&mut self, other: usize, armed: std::ops::Range<usize>) -> CallResult {
        self.turn = !self.turn;
        self.push(if self.turn { other } else { 0 }, armed)
    }
}

impl<K: Bare> Steps for Floor<K> {
    fn standing(&self) -> Standing {
        self.standing
    }

    fn set_standing(&mut self, standing: Standing) {
        self.standing = standing;
    }

    fn arrange(&mut self, standing: Standing) -> CallResult {
        match self.standing {
            Standing::Nothing | Standing::Made => {}
            Standing::Armed => (0..self.routes).try_for_each(|index| self.disarm(index))?,
            Standing::Quiet => self.disarm(self.middle())?,
        }
        if standing == Standing::Nothing {
            self.events.clear();
            return Ok(());
        }
        while self.events.len() < self.routes {
            self.make()?;
        }
        match standing {
            Standing::Nothing | Standing::Made => Ok(()),
            Standing::Armed => self.work(Workload::BringUpBatch),
            Standing::Quiet => {
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
