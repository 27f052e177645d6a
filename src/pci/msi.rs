//! The MSI capability, with 64-bit addresses and per-vector masking.
//!
//! PCI Local Bus 3.0 section 6.8.1 has the registers, section 6.8.3 how they work; PCI Express 5.0 has the registers in
//! section 7.7.1. The numbers below are those of PCI Local Bus 3.0.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::access;
use super::device::{AnyDevice, Changed, Device, Registers};
use super::vector_state::VectorState;
use crate::irqfd::{Error, MsiRoute, Result, SavedState, dicts};

/// The most vectors of a device.
pub const MSI_VECTORS: usize = 32;

const COUNTS: &str = "1, 2, 4, 8, 16 or 32";

const CAPABILITY_ID: u8 = 0x05;
/// Message control (section 6.8.1.3). Bits 3:1 are the logarithm of the number of vectors that the device can use.
const ENABLE: u16 = 1;
const CAPABLE_SHIFT: u32 = 1;
/// The logarithm of the number of vectors that the guest grants.
const GRANTED: u16 = 0b111 << GRANTED_SHIFT;
const GRANTED_SHIFT: u32 = 4;
const ADDRESS_64: u16 = 1 << 7;
const MASKING: u16 = 1 << 8;

/// The registers in the capability (sections 6.8.1.3 to 6.8.1.8).
const CONTROL: Range<usize> = 2..4;
const ADDRESS: Range<usize> = 4..12;
const DATA: Range<usize> = 12..14;
const MASK_BITS: Range<usize> = 16..20;
const PENDING_BITS: Range<usize> = 20..24;
/// The bytes of the capability.
const CAPABILITY: usize = 24;

/// The MSI capability of a device.
///
/// A vector is live while MSI is enabled, its mask bit is clear, and the guest has granted as many vectors. It sends the
/// data register with its number in the lowest bits, as many as the granted vectors need.
///
/// A write to the data register is where a new message is complete: live vectors take it then, and not half of it
/// before.
pub type MsiCapability = Device<MsiRegisters>;

/// All registers but the pending bits.
#[derive(Debug)]
pub struct MsiRegisters {
    /// The logarithm of the number of vectors.
    capable: u16,
    bytes: [u8; PENDING_BITS.start],
    writable: [u8; PENDING_BITS.start],
}

impl MsiRegisters {
    fn of(vectors: usize) -> Self {
        let mut writable = [0; PENDING_BITS.start];
        writable[CONTROL].copy_from_slice(&(ENABLE | GRANTED).to_le_bytes());
        writable[ADDRESS].fill(0xFF);
        // An address is a multiple of 4 (section 6.8.1.4).
        writable[ADDRESS.start] = !0b11;
        writable[DATA].fill(0xFF);
        writable[MASK_BITS].copy_from_slice(&(u32::MAX >> (MSI_VECTORS - vectors)).to_le_bytes());
        let mut registers = Self { capable: vectors.ilog2() as u16, bytes: [0; PENDING_BITS.start], writable };
        registers.reset();
        registers
    }

    fn value(&self, register: Range<usize>) -> u64 {
        self.bytes[register].iter().rev().fold(0, |high, low| high << 8 | u64::from(*low))
    }

    /// The logarithm of the number of vectors that the guest grants: never more than the device can use.
    fn granted(&self) -> u16 {
        ((self.value(CONTROL) as u16 & GRANTED) >> GRANTED_SHIFT).min(self.capable)
    }
}

impl Registers for MsiRegisters {
    const WHAT: &'static str = "the MSI capability";
    type State = MsiState;

    fn new(vectors: usize) -> Result<Self> {
        checked(vectors).map(Self::of).ok_or_else(|| {
            Error::Invalid(format!("vectors {vectors} is not a number of vectors of MSI: give {COUNTS}"))
        })
    }

    fn count(&self) -> usize {
        1 << self.capable
    }

    fn is_live(&self, vector: usize) -> bool {
        self.value(CONTROL) as u16 & ENABLE != 0 && vector < 1 << self.granted() && !self.is_masked(vector)
    }

    fn is_masked(&self, vector: usize) -> bool {
        self.value(MASK_BITS) & 1 << vector != 0
    }

    fn message(&self, vector: usize) -> Result<MsiRoute> {
        let own = (1 << self.granted()) - 1;
        Ok(MsiRoute::new(self.value(ADDRESS), self.value(DATA) & !own | vector as u64)?)
    }

    fn reset(&mut self) {
        self.bytes.fill(0);
        self.bytes[0] = CAPABILITY_ID;
        let control = ADDRESS_64 | MASKING | self.capable << CAPABLE_SHIFT;
        self.bytes[CONTROL].copy_from_slice(&control.to_le_bytes());
    }

    fn save(&self, vectors: Vec<VectorState>) -> MsiState {
        let control = self.value(CONTROL) as u16;
        MsiState {
            size: self.count() as u32,
            enabled: control & ENABLE != 0,
            multiple_message_enable: (control & GRANTED) >> GRANTED_SHIFT,
            address: self.value(ADDRESS),
            data: self.value(DATA) as u16,
            mask_bits: self.value(MASK_BITS) as u32,
            vectors,
        }
    }

    fn restored(state: &MsiState) -> Result<Self> {
        let count = checked(state.size as usize).ok_or_else(|| {
            Error::Invalid(format!("size: {} is not a number of vectors of MSI: expected {COUNTS}", state.size))
        })?;
        let granted = state.multiple_message_enable;
        if granted > GRANTED >> GRANTED_SHIFT {
            return Err(Error::Invalid(format!(
                "multiple_message_enable: {granted} is out of range; it is 0 to 7"
            )));
        }
        let mut registers = Self::of(count);
        let enabled = if state.enabled { ENABLE } else { 0 };
        let control = registers.value(CONTROL) as u16 | enabled | granted << GRANTED_SHIFT;
        registers.bytes[CONTROL].copy_from_slice(&control.to_le_bytes());
        for (key, register, value) in [
            ("address", ADDRESS, state.address),
            ("data", DATA, state.data.into()),
            ("mask_bits", MASK_BITS, state.mask_bits.into()),
        ] {
            let bytes = &value.to_le_bytes()[..register.len()];
            for (place, new) in register.clone().zip(bytes) {
                if (new ^ registers.bytes[place]) & !registers.writable[place] != 0 {
                    return Err(Error::Invalid(format!(
                        "{key}: {value:#x} has bits set that no guest can write in this capability"
                    )));
                }
                registers.bytes[place] = *new;
            }
        }
        Ok(registers)
    }

    fn vectors(state: &MsiState) -> &[VectorState] {
        &state.vectors
    }
}

/// The saved state of a capability.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsiState {
    /// The number of vectors.
    pub size: u32,
    pub enabled: bool,
    /// The field of message control that the guest writes: the logarithm of the number of vectors that it grants.
    pub multiple_message_enable: u16,
    pub address: u64,
    pub data: u16,
    pub mask_bits: u32,
    /// The vectors that have a route, a signal or a fault.
    #[serde(deserialize_with = "dicts")]
    pub vectors: Vec<VectorState>,
}

impl SavedState for MsiState {
    const KIND: &'static str = "mshv_irqfd.MsiCapability";
}

impl Device<MsiRegisters> {
    /// Reads the capability in configuration space, at an offset from its first byte. An access that is not an aligned
    /// byte, word or dword reads as all ones. The next pointer is 0.
    pub fn read(&self, offset: u64, size: usize) -> Result<u64> {
        let Some(places) = access::bytes(offset, size, CAPABILITY) else {
            self.vectors().check_open()?;
            return Ok(access::all_ones(size));
        };
        let bytes = self.capability()?;
        Ok(bytes[places].iter().rev().fold(0, |high, low| high << 8 | u64::from(*low)))
    }

    /// Writes the capability. Bits that are not writable stay, and an access that is not an aligned byte, word or dword
    /// writes nothing.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result {
        self.change(|registers| {
            let places = access::bytes(offset, data.len(), CAPABILITY)?;
            let messages = places.start < DATA.end && DATA.start < places.end;
            for (place, value) in places.zip(data).filter(|(place, _)| *place < PENDING_BITS.start) {
                let (byte, writable) = (&mut registers.bytes[place], registers.writable[place]);
                *byte = *byte & !writable | value & writable;
            }
            Some(Changed { vectors: 0..self.vectors().count(), messages })
        })
    }

    /// All bytes of the capability.
    pub fn capability(&self) -> Result<[u8; CAPABILITY]> {
        let state = self.lock()?;
        let pending = self.vectors().pending_bits(0..MSI_VECTORS) as u32;
        let mut bytes = [0; CAPABILITY];
        bytes[..PENDING_BITS.start].copy_from_slice(&state.registers.bytes);
        bytes[PENDING_BITS].copy_from_slice(&pending.to_le_bytes());
        Ok(bytes)
    }
}

fn checked(vectors: usize) -> Option<usize> {
    ((1..=MSI_VECTORS).contains(&vectors) && vectors.is_power_of_two()).then_some(vectors)
}
