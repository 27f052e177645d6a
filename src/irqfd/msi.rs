//! MSI addresses and data: their rules and their fields.

use crate::hypervisor::{RawMsi, Target};

const WINDOW: u64 = 0xFEE0_0000;
const WINDOW_END: u64 = 0xFEEF_FFFF;
/// Bits 11:4 (the upper half of an extended destination) and 1:0 (reserved: an address is a multiple of 4).
const REFUSED: u64 = 0xFF3;

/// An MSI that the local APIC architecture defines and the kernels deliver as written.
///
/// The rules follow Intel's SDM volume 3, "Message Signalled Interrupts", and the mshv driver: it decodes only address
/// bits 19:12 and 2, so other bits that would change the meaning are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiRoute(RawMsi);

/// The reason why an address and data can't be routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsiError {
    #[error("MSI address {0:#x} is outside {WINDOW:#X}-{WINDOW_END:#X}, where x86 MSIs are written")]
    Window(u64),
    #[error(
        "MSI address {0:#x} has bits 11:4 or 1:0 set: these are extended destinations and reserved bits, which the \
         kernel would drop; clear them"
    )]
    Bits(u64),
    #[error("MSI data {0:#x} has bits above 15 set; MSI data is 16 bits")]
    Data(u64),
    #[error("MSI data {data:#x} has delivery mode {mode}, which is reserved; use 0, 1, 2, 4, 5 or 7")]
    DeliveryMode { data: u64, mode: u8 },
    #[error(
        "MSI data {data:#x} has vector {vector}; fixed and lowest-priority delivery take 16 to 255 \
         (0-15 are the processor's own)"
    )]
    Vector { data: u64, vector: u8 },
}

impl MsiRoute {
    pub fn new(address: u64, data: u64) -> Result<Self, MsiError> {
        if !(WINDOW..=WINDOW_END).contains(&address) {
            return Err(MsiError::Window(address));
        }
        if address & REFUSED != 0 {
            return Err(MsiError::Bits(address));
        }
        if data > 0xFFFF {
            return Err(MsiError::Data(data));
        }
        let msi = Self(RawMsi { address: address as u32, data: data as u32 });
        match (msi.target().delivery_mode, msi.vector()) {
            (mode @ (3 | 6), _) => Err(MsiError::DeliveryMode { data, mode }),
            (0 | 1, vector @ 0..16) => Err(MsiError::Vector { data, vector }),
            _ => Ok(msi),
        }
    }

    pub fn raw(self) -> RawMsi {
        self.0
    }

    pub fn vector(self) -> u8 {
        self.0.data as u8
    }

    pub fn target(self) -> Target {
        Target::decode(self.0)
    }

    /// Packs into 36 bits, so that a route's state is one word that one load reads.
    pub(super) fn pack(self) -> u64 {
        u64::from(self.0.data) | (u64::from(self.0.address) & 0xF_FFFF) << 16
    }

    pub(super) fn unpack(bits: u64) -> Self {
        let address = WINDOW as u32 | (bits >> 16) as u32 & 0xF_FFFF;
        Self(RawMsi { address, data: bits as u32 & 0xFFFF })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_has_its_edges() {
        for (address, data, refused) in [
            (0xFEE0_0000, 0x10, None),
            (0xFEEF_F00C, 0xC7FF, None),
            (0xFEDF_FFFC, 0x41, Some(MsiError::Window(0xFEDF_FFFC))),
            (0xFEF0_0000, 0x41, Some(MsiError::Window(0xFEF0_0000))),
            (0x1_FEE0_0000, 0x41, Some(MsiError::Window(0x1_FEE0_0000))),
            (0xFEE0_0010, 0x41, Some(MsiError::Bits(0xFEE0_0010))),
            (0xFEE0_0800, 0x41, Some(MsiError::Bits(0xFEE0_0800))),
            (0xFEE0_0001, 0x41, Some(MsiError::Bits(0xFEE0_0001))),
            (0xFEE0_0002, 0x41, Some(MsiError::Bits(0xFEE0_0002))),
            (0xFEE0_0000, 0x1_0041, Some(MsiError::Data(0x1_0041))),
            (0xFEE0_0000, 0x341, Some(MsiError::DeliveryMode { data: 0x341, mode: 3 })),
            (0xFEE0_0000, 0x641, Some(MsiError::DeliveryMode { data: 0x641, mode: 6 })),
            (0xFEE0_0000, 0x0F, Some(MsiError::Vector { data: 0x0F, vector: 15 })),
            (0xFEE0_0000, 0x10F, Some(MsiError::Vector { data: 0x10F, vector: 15 })),
            (0xFEE0_0000, 0x400, None),
        ] {
            assert_eq!(MsiRoute::new(address, data).err(), refused, "{address:#x} {data:#x}");
        }
    }

    #[test]
    fn packing_loses_nothing() {
        for (address, data) in [(0xFEE0_0000, 0x10), (0xFEEF_F00C, 0xC7FF), (0xFEE1_2004, 0x8041)] {
            let msi = MsiRoute::new(address, data).unwrap();
            assert_eq!(MsiRoute::unpack(msi.pack()), msi);
        }
    }
}
