//! The MSI-X capability: its table, its pending bits and its message control register.
//!
//! PCI Local Bus 3.0 section 6.8.2 has the structures, section 6.8.3 how they work; PCI Express 5.0 has the structures in
//! section 7.7.2. The numbers below are those of PCI Local Bus 3.0.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::access;
use super::vectors::{Faults, Vectors};
use crate::irqfd::{Error, IrqFdRoute, MsiRoute, Partition, Result};

/// The most vectors of a device: the size field has 11 bits (section 6.8.2.3).
pub const MAX_VECTORS: usize = 2048;

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

const WHAT: &str = "the MSI-X table";

/// The MSI-X capability of a device. Dropping it closes it.
///
/// A vector is armed while MSI-X is enabled and neither its mask bit nor the function mask is set. Its route gets
/// the message that the entry had when that became so, as section 6.8.3.5 demands.
///
/// Locks are taken in this order: the table's, a route's, the partition's.
#[derive(Debug)]
pub struct MsixTable {
    vectors: Vectors,
    registers: Mutex<Registers>,
}

#[derive(Debug)]
struct Registers {
    entries: Box<[Entry]>,
    /// `ENABLE` and `FUNCTION_MASK`.
    control: u16,
    faults: Faults,
}

impl Registers {
    /// Whether the function lets its unmasked vectors send messages.
    fn is_open(&self) -> bool {
        self.control == ENABLE
    }

    /// Whether a vector may send its message.
    fn is_live(&self, index: usize) -> bool {
        self.is_open() && self.entries[index][CONTROL] & MASK == 0
    }

    /// The message of an entry.
    fn message(&self, index: usize) -> Result<MsiRoute> {
        let [low, high, data, _] = self.entries[index];
        Ok(MsiRoute::new(u64::from(high) << 32 | u64::from(low), data.into())?)
    }
}

impl MsixTable {
    /// A table in its reset state: MSI-X disabled, every vector masked.
    ///
    /// `events` are the caller's eventfds, for the vectors that have one: those take a GSI at once, the others when
    /// they are first unmasked.
    pub fn new(partition: Arc<Partition>, vectors: usize, events: &[(usize, RawFd)]) -> Result<Self> {
        if !(1..=MAX_VECTORS).contains(&vectors) {
            return Err(Error::Invalid(format!(
                "vectors {vectors} is out of range; an MSI-X table has 1 to {MAX_VECTORS}"
            )));
        }
        if let Some((index, _)) = events.iter().find(|(index, _)| *index >= vectors) {
            return Err(Error::Invalid(format!(
                "events has an eventfd for vector {index}; this table has vectors 0 to {}",
                vectors - 1
            )));
        }
        let registers = Registers { entries: vec![RESET; vectors].into(), control: 0, faults: Faults::default() };
        Ok(Self { vectors: Vectors::new(partition, vectors, events)?, registers: Mutex::new(registers) })
    }

    pub fn partition(&self) -> &Arc<Partition> {
        self.vectors.partition()
    }

    /// The number of vectors.
    pub fn vectors(&self) -> usize {
        self.vectors.len()
    }

    fn lock(&self) -> Result<MutexGuard<'_, Registers>> {
        self.vectors.check_open(WHAT)?;
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have been closed while this thread waited.
        self.vectors.check_open(WHAT)?;
        Ok(registers)
    }

    /// Reads the table. An access that section 6.8.2 does not define reads as all ones.
    pub fn read_table(&self, offset: u64, size: usize) -> Result<u64> {
        let registers = self.lock()?;
        let dwords = access::dwords(offset, size, registers.entries.len() * ENTRY);
        Ok(dwords.map_or_else(
            || access::all_ones(size),
            |dwords| access::value(dwords.map(|place| registers.entries[place / 4][place % 4])),
        ))
    }

    /// Writes the table. An access that section 6.8.2 does not define writes nothing.
    pub fn write_table(&self, offset: u64, data: &[u8]) -> Result {
        let mut registers = self.lock()?;
        let Some(dwords) = access::dwords(offset, data.len(), registers.entries.len() * ENTRY) else {
            return Ok(());
        };
        // A qword does not reach into the next entry.
        let index = dwords.start / 4;
        let was_live = registers.is_live(index);
        for (place, bytes) in dwords.zip(data.chunks_exact(4)) {
            let value = bytes.iter().rev().fold(0, |high, low| high << 8 | u32::from(*low));
            let writable = if place % 4 == CONTROL { MASK } else { u32::MAX };
            registers.entries[index][place % 4] = value & writable;
        }
        self.follow(&mut registers, index..index + 1, was_live);
        Ok(())
    }

    /// Arms or disarms the unmasked ones of some vectors, if they were not live and are now, or the other way
    /// round.
    fn follow(&self, registers: &mut Registers, vectors: Range<usize>, were_live: bool) {
        let mut faults = std::mem::take(&mut registers.faults);
        if were_live {
            self.vectors.disarm(&mut faults, vectors.filter(|index| !registers.is_live(*index)));
        } else {
            let live = vectors.filter(|index| registers.is_live(*index));
            self.vectors.arm(&mut faults, live.map(|index| (index, registers.message(index))));
        }
        registers.faults = faults;
    }

    /// Reads the pending bits (section 6.8.2.10): a bit for each vector, in qwords. The bits beyond the last vector
    /// are 0.
    pub fn read_pba(&self, offset: u64, size: usize) -> Result<u64> {
        self.vectors.check_open(WHAT)?;
        let length = self.vectors.len().div_ceil(64) * 8;
        let Some(dwords) = access::dwords(offset, size, length) else { return Ok(access::all_ones(size)) };
        let vectors = (dwords.start * 32..dwords.end * 32).take_while(|index| *index < self.vectors.len());
        // A route that is closed, or whose eventfd other code has closed, will never send anything.
        let pending = vectors.filter(|index| self.vectors.pending(*index).unwrap_or(false));
        Ok(pending.fold(0, |bits, index| bits | 1 << (index - dwords.start * 32)))
    }

    /// The message control register.
    pub fn message_control(&self) -> Result<u16> {
        let registers = self.lock()?;
        Ok(registers.control | (self.vectors.len() - 1) as u16)
    }

    /// Takes a write to the capability at an offset from its first byte. All but message control's `ENABLE` and
    /// `FUNCTION_MASK` is read-only. An access that is not an aligned byte, word or dword writes nothing.
    pub fn write_message_control(&self, offset: u64, data: &[u8]) -> Result {
        let mut registers = self.lock()?;
        let bytes = access::bytes(offset, data.len(), CAPABILITY).unwrap_or_default();
        let Some((_, high)) = bytes.zip(data).find(|(place, _)| *place == CONTROL_HIGH) else { return Ok(()) };
        let was_open = registers.is_open();
        registers.control = u16::from(*high) << 8 & (ENABLE | FUNCTION_MASK);
        if registers.is_open() != was_open {
            self.follow(&mut registers, 0..self.vectors.len(), was_open);
        }
        Ok(())
    }

    /// The capability for configuration space (sections 6.8.2.1 to 6.8.2.5). Its next pointer is 0.
    pub fn capability(
        &self,
        (table_bar, table_offset): (u64, u64),
        (pba_bar, pba_offset): (u64, u64),
    ) -> Result<[u8; CAPABILITY]> {
        let table = place("table", table_bar, table_offset, self.vectors.len() * ENTRY)?;
        let pba = place("pba", pba_bar, pba_offset, self.vectors.len().div_ceil(64) * 8)?;
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

    /// Returns to the reset state: disarms every vector, and takes away what is pending. Vectors keep their routes.
    pub fn reset(&self) -> Result {
        let mut registers = self.lock()?;
        registers.entries.fill(RESET);
        registers.control = 0;
        registers.faults.clear();
        self.vectors.disarm(&mut registers.faults, 0..self.vectors.len());
        for index in 0..self.vectors.len() {
            // Fails only if the route was closed by itself, or its eventfd by other code. Then nothing is pending.
            let _taken = self.vectors.consume_pending(index);
        }
        Ok(())
    }

    /// The vectors that are not armed or disarmed as the guest asked, with the reason.
    pub fn faults(&self) -> Result<Vec<(usize, Arc<Error>)>> {
        let registers = self.lock()?;
        let mut faults = registers.faults.clone();
        for index in (0..self.vectors.len()).filter(|index| registers.is_live(*index)) {
            if !faults.contains_key(&index) {
                faults.extend(self.vectors.lost_arming(index).map(|error| (index, Arc::new(error))));
            }
        }
        Ok(faults.into_iter().collect())
    }

    /// Signals a vector: sends its message if it is armed, otherwise leaves a signal pending. Takes no lock.
    pub fn signal(&self, index: usize) -> Result {
        self.vectors.signal(index, WHAT)
    }

    /// Whether the vector's mask bit or the function mask is set (section 6.8.3.5).
    pub fn masked(&self, index: usize) -> Result<bool> {
        let registers = self.lock()?;
        Ok(registers.control & FUNCTION_MASK != 0 || registers.entries[index][CONTROL] & MASK != 0)
    }

    /// Whether a signal waits for the vector to be armed. Takes no lock.
    pub fn pending(&self, index: usize) -> Result<bool> {
        self.vectors.check_open(WHAT)?;
        self.vectors.pending(index)
    }

    /// Takes the pending signals of a vector, and returns whether there were any. For devices whose interrupt's
    /// cause has gone (section 6.8.3.5).
    pub fn consume_pending(&self, index: usize) -> Result<bool> {
        self.vectors.check_open(WHAT)?;
        self.vectors.consume_pending(index)
    }

    /// The vector's route, if it has been taken. Takes no lock.
    pub fn route(&self, index: usize) -> Option<&Arc<IrqFdRoute>> {
        self.vectors.route(index)
    }

    /// The vector's route, taken now if need be.
    pub fn take_route(&self, index: usize) -> Result<&Arc<IrqFdRoute>> {
        let _registers = self.lock()?;
        self.vectors.take_masked(index)
    }

    /// The vectors whose routes have been taken. Takes no lock.
    pub fn taken(&self) -> impl Iterator<Item = (usize, &Arc<IrqFdRoute>)> {
        self.vectors.taken()
    }

    pub fn is_closed(&self) -> bool {
        self.vectors.is_closed()
    }

    /// Closes the vectors' routes. Continues past errors and reports them at the end.
    pub fn close(&self) -> Result {
        self.partition().check_owner()?;
        let _registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        self.vectors.close()
    }

    /// For finalizers: closes. In a forked child closes only the descriptors.
    pub fn abandon(&self) -> Result {
        if self.partition().check_owner().is_ok() { self.close() } else { self.vectors.abandon() }
    }
}

/// The bytes of a structure in its BAR.
fn place(name: &str, bar: u64, offset: u64, length: usize) -> Result<Range<u64>> {
    if bar >= BARS {
        return Err(Error::Invalid(format!("{name}_bar {bar} is out of range; a device has BARs 0 to 5")));
    }
    if !offset.is_multiple_of(8) {
        return Err(Error::Invalid(format!("{name}_offset {offset:#x} is not a multiple of 8")));
    }
    match offset.checked_add(length as u64) {
        Some(end) if end <= 1 << 32 => Ok(offset..end),
        _ => Err(Error::Invalid(format!(
            "{name}_offset {offset:#x} is too large; the {length} bytes there must end at 4 GiB at most"
        ))),
    }
}
