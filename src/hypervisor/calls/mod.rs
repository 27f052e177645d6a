//! The ioctls for irqfds and routing tables: one thin layer per kernel, without state, that returns `io::Result`.

pub mod kvm;
pub mod mshv;

use std::os::fd::RawFd;

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
        let flag = |condition, bit| if condition { bit } else { 0 };
        flag(self.deassign, deassign) | flag(self.resample.is_some(), resample)
    }
}
