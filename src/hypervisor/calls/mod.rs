//! The ioctls for irqfds, routing tables, doorbells and MSIs: one thin layer per kernel, without state, that returns
//! `io::Result`.

pub mod kvm;
pub mod mshv;

use std::os::fd::RawFd;

use super::trigger::Trigger;

/// The argument of either kernel's irqfd ioctl, valid or not.
#[derive(Clone, Copy, Debug)]
pub struct Irqfd {
    pub event: RawFd,
    pub gsi: u32,
    pub deassign: bool,
    pub resample: Option<RawFd>,
}

impl Irqfd {
    pub fn assign(event: RawFd, gsi: u32) -> Self {
        Self { event, gsi, deassign: false, resample: None }
    }

    pub fn deassign(event: RawFd, gsi: u32) -> Self {
        Self { deassign: true, ..Self::assign(event, gsi) }
    }

    /// The flags word, from each flag's bit in a kernel's interface.
    fn flags(&self, deassign: u32, resample: u32) -> u32 {
        flag(self.deassign, deassign) | flag(self.resample.is_some(), resample)
    }
}

/// The argument of either kernel's ioeventfd ioctl.
#[derive(Clone, Copy, Debug)]
pub struct IoEventFd {
    pub event: RawFd,
    pub trigger: Trigger,
    pub deassign: bool,
}

impl IoEventFd {
    /// The flags word, from each flag's bit in a kernel's interface.
    fn flags(&self, datamatch: u32, port: u32, deassign: u32) -> u32 {
        flag(self.trigger.datamatch.is_some(), datamatch)
            | flag(self.trigger.port, port)
            | flag(self.deassign, deassign)
    }
}

fn flag(condition: bool, bit: u32) -> u32 {
    if condition { bit } else { 0 }
}
