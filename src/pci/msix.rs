//! The MSI-X capability: its table, its pending bits and its message control register.
//!
//! PCI Local Bus 3.0 section 6.8.2 has the structures, section 6.8.3 how they work; PCI Express 5.0 has the structures
//! in section 7.7.2. The numbers below are those of PCI Local Bus 3.0.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::access;
use super::device::{AnyDevice, Changed, Device, Registers};
use super::vector_state::VectorState;
use crate::irqfd::{Error, MsiRoute, Result, SavedState, dicts};

/// The most vectors of a device: the size field has 11 bits (section 6.8.2.3).
pub const MSIX_VECTORS: usize = 2048;

const CAPABILITY_ID: u8 = 0x11;
/// Message control (section 6.8.2.3). Bits 10:0 are the number of vectors less one, bits 13:11 are reserved.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
/// The place in the capability of message control's upper byte, which has all bits that can be written.
const CONTROL_HIGH: usize = 3;
/// The bytes of the capability.
const CAPABILITY: usize = 12;
const BARS: u64 = 6;

/// An entry of the table: address, upper address, data, vector control (sections 6.8.2.6 to 6.8.2.9).
type Entry = [u32; 4];
const ENTRY: usize = size_of::<Entry>();
const CONTROL: usize = 3;
/// The mask bit of vector control. The other bits are reserved: here they are read-only and 0.
const MASK: u32 = 1;
const RESET: Entry = [0, 0, 0, MASK];

/// The MSI-X capability of a device.
///
/// A vector is live while MSI-X is enabled and neither its mask bit nor the function mask is set. As section 6.8.3.5
/// demands, a message is taken from its entry when the vector becomes live. To change the entry of a live vector is
/// undefined there; here the change waits until the vector is live again.
pub type MsixTable = Device<MsixRegisters>;

/// The table and message control.
#[derive(Debug)]
pub struct MsixRegisters {
    entries: Box<[Entry]>,
    /// `ENABLE` and `FUNCTION_MASK`.
    control: u16,
}

impl Registers for MsixRegisters {
    const WHAT: &'static str = "the MSI-X table";
    type State = MsixState;

    fn new(vectors: usize) -> Result<Self> {
        if !(1..=MSIX_VECTORS).contains(&vectors) {
            return Err(Error::Invalid(format!(
                "vectors {vectors} is out of range; an MSI-X table has 1 to {MSIX_VECTORS}"
            )));
        }
        Ok(Self { entries: vec![RESET; vectors].into(), control: 0 })
    }

    fn count(&self) -> usize {
        self.entries.len()
    }

    fn is_live(&self, vector: usize) -> bool {
        self.control & ENABLE != 0 && !self.is_masked(vector)
    }

    fn is_masked(&self, vector: usize) -> bool {
        self.control & FUNCTION_MASK != 0 || self.entries[vector][CONTROL] & MASK != 0
    }

    fn message(&self, vector: usize) -> Result<MsiRoute> {
        let [low, high, data, _] = self.entries[vector];
        Ok(MsiRoute::new(u64::from(high) << 32 | u64::from(low), data.into())?)
    }

    fn reset(&mut self) {
        self.entries.fill(RESET);
        self.control = 0;
    }

    fn save(&self, vectors: Vec<VectorState>) -> MsixState {
        let entry = |(vector, [low, high, data, control]): (usize, &Entry)| EntryState {
            vector: vector as u32,
            address: u64::from(*high) << 32 | u64::from(*low),
            data: *data,
            masked: control & MASK != 0,
        };
        let table = self.entries.iter().enumerate().filter(|(_, entry)| **entry != RESET).map(entry).collect();
        MsixState {
            size: self.count() as u32,
            enabled: self.control & ENABLE != 0,
            function_mask: self.control & FUNCTION_MASK != 0,
            table,
            vectors,
        }
    }

    fn restored(state: &MsixState) -> Result<Self> {
        let count = state.size as usize;
        if !(1..=MSIX_VECTORS).contains(&count) {
            return Err(Error::Invalid(format!(
                "size: {count} is out of range; an MSI-X table has 1 to {MSIX_VECTORS}"
            )));
        }
        let mut entries: Box<[Entry]> = vec![RESET; count].into();
        let mut seen = vec![None; count];
        for (at, EntryState { vector, address, data, masked }) in state.table.iter().enumerate() {
            let Some(other) = seen.get_mut(*vector as usize) else {
                return Err(Error::Invalid(format!(
                    "table[{at}].vector: {vector} is out of range; the device has vectors 0 to {}",
                    count - 1
                )));
            };
            if let Some(other) = other.replace(at) {
                return Err(Error::Invalid(format!("table[{at}].vector: {vector} is that of table[{other}] too")));
            }
            let control = if *masked { MASK } else { 0 };
            entries[*vector as usize] = [*address as u32, (address >> 32) as u32, *data, control];
        }
        let control = if state.enabled { ENABLE } else { 0 } | if state.function_mask { FUNCTION_MASK } else { 0 };
        Ok(Self { entries, control })
    }

    fn vectors(state: &MsixState) -> &[VectorState] {
        &state.vectors
    }
}

/// The saved state of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// The number of vectors.
    pub size: u32,
    pub enabled: bool,
    pub function_mask: bool,
    /// The entries that are not in the reset state.
    #[serde(deserialize_with = "dicts")]
    pub table: Vec<EntryState>,
    /// The vectors that have a route, a signal or a fault.
    #[serde(deserialize_with = "dicts")]
    pub vectors: Vec<VectorState>,
}

/// The saved state of an entry: whatever the guest has written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntryState {
    pub vector: u32,
    pub address: u64,
    pub data: u32,
    pub masked: bool,
}

impl SavedState for MsixState {
    const KIND: &'static str = "mshv_irqfd.MsixTable";
}

/// Whether dwords of an entry have its vector control.
fn reaches_control(dwords: &Range<usize>) -> bool {
    dwords.end % 4 == 0
}

impl MsixRegisters {
    /// Writes dwords of the table. Returns the vector whose control was written.
    fn write(&mut self, dwords: Range<usize>, data: &[u8]) -> Option<Changed> {
        // A qword does not reach into the next entry.
        let vector = dwords.start / 4;
        let control = reaches_control(&dwords);
        for (place, bytes) in dwords.zip(data.chunks_exact(4)) {
            let value = bytes.iter().rev().fold(0, |high, low| high << 8 | u32::from(*low));
            let writable = if place % 4 == CONTROL { MASK } else { u32::MAX };
            self.entries[vector][place % 4] = value & writable;
        }
        control.then_some(Changed { vectors: vector..vector + 1, messages: false })
    }
}

impl Device<MsixRegisters> {
    fn table_bytes(&self) -> usize {
        self.vectors().count() * ENTRY
    }

    fn pba_bytes(&self) -> usize {
        self.vectors().count().div_ceil(64) * 8
    }

    /// Reads the table. An access that section 6.8.2 does not define reads as all ones.
    pub fn read_table(&self, offset: u64, size: usize) -> Result<u64> {
        let state = self.lock()?;
        Ok(access::dwords(offset, size, self.table_bytes()).map_or_else(
            || access::all_ones(size),
            |dwords| access::value(dwords.map(|place| state.registers.entries[place / 4][place % 4])),
        ))
    }

    /// Writes the table. An access that section 6.8.2 does not define writes nothing.
    pub fn write_table(&self, offset: u64, data: &[u8]) -> Result {
        self.change(|registers| {
            let dwords = access::dwords(offset, data.len(), self.table_bytes())?;
            registers.write(dwords, data)
        })
    }

    /// As `write_table`, if that waits for nothing: neither for another thread nor for the kernel. Otherwise writes
    /// nothing and returns false.
    pub fn try_write_table(&self, offset: u64, data: &[u8]) -> Result<bool> {
        let Some(mut state) = self.try_lock()? else { return Ok(false) };
        let Some(dwords) = access::dwords(offset, data.len(), self.table_bytes()) else { return Ok(true) };
        // While all vectors are masked or disabled, a mask bit arms and disarms none.
        let waits = reaches_control(&dwords) && state.registers.control == ENABLE;
        if !waits {
            let _of_no_effect = state.registers.write(dwords, data);
        }
        Ok(!waits)
    }

    /// Reads the pending bits (section 6.8.2.10): a bit for each vector, in qwords. The bits beyond the last vector
    /// are 0. Takes no lock.
    pub fn read_pba(&self, offset: u64, size: usize) -> Result<u64> {
        self.vectors().check_open()?;
        Ok(access::dwords(offset, size, self.pba_bytes()).map_or_else(
            || access::all_ones(size),
            |dwords| self.vectors().pending_bits(dwords.start * 32..dwords.end * 32),
        ))
    }

    /// The message control register.
    pub fn message_control(&self) -> Result<u16> {
        Ok(self.lock()?.registers.control | (self.vectors().count() - 1) as u16)
    }

    /// Takes a write to the capability at an offset from its first byte. All but message control's `ENABLE` and
    /// `FUNCTION_MASK` is read-only. An access that is not an aligned byte, word or dword writes nothing.
    pub fn write_message_control(&self, offset: u64, data: &[u8]) -> Result {
        self.change(|registers| {
            let bytes = access::bytes(offset, data.len(), CAPABILITY)?;
            let (_, high) = bytes.zip(data).find(|(place, _)| *place == CONTROL_HIGH)?;
            let control = u16::from(*high) << 8 & (ENABLE | FUNCTION_MASK);
            let before = std::mem::replace(&mut registers.control, control);
            (control != before).then_some(Changed { vectors: 0..self.vectors().count(), messages: false })
        })
    }

    /// The capability for configuration space (sections 6.8.2.1 to 6.8.2.5). Its next pointer is 0.
    pub fn capability(
        &self,
        (table_bar, table_offset): (u64, u64),
        (pba_bar, pba_offset): (u64, u64),
    ) -> Result<[u8; CAPABILITY]> {
        let table = place("table", table_bar, table_offset, self.table_bytes())?;
        let pba = place("pba", pba_bar, pba_offset, self.pba_bytes())?;
        if table_bar == pba_bar && table.start < pba.end && pba.start < table.end {
            return Err(Error::Invalid(format!(
                "pba_offset {pba_offset:#x} puts the pending bits over the table, which has BAR {table_bar} from \
                 {:#x} to {:#x}",
                table.start,
                table.end - 1
            )));
        }
        let [low, high] = self.message_control()?.to_le_bytes();
        let mut bytes = [CAPABILITY_ID, 0, low, high, 0, 0, 0, 0, 0, 0, 0, 0];
        bytes[4..8].copy_from_slice(&((table_offset | table_bar) as u32).to_le_bytes());
        bytes[8..12].copy_from_slice(&((pba_offset | pba_bar) as u32).to_le_bytes());
        Ok(bytes)
    }
}

/// The bytes of a structure in its BAR.
fn place(name: &str, bar: u64, offset: u64, length: usize) -> Result<Range<u64>> {
    if bar >= BARS {
        return Err(Error::Invalid(format!("{name}_bar {bar} is out of range; a device has BARs 0 to 5")));
    }
    if offset % 8 != 0 {
        return Err(Error::Invalid(format!("{name}_offset {offset:#x} is not a multiple of 8")));
    }
    match offset.checked_add(length as u64) {
        Some(end) if end <= 1 << 32 => Ok(offset..end),
        _ => Err(Error::Invalid(format!(
            "{name}_offset {offset:#x} is too large; the {length} bytes there must end at 4 GiB at most"
        ))),
    }
}
