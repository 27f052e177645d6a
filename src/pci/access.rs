//! Guest accesses: which are well-formed, and what the others read.

use std::ops::Range;

/// The dwords of an access to a structure in a BAR: an aligned dword or qword inside it. PCI Local Bus 3.0 section
/// 6.8.2 leaves all other accesses undefined; here they read as all ones and write nothing.
pub(super) fn dwords(offset: u64, size: usize, length: usize) -> Option<Range<usize>> {
    let aligned = matches!(size, 4 | 8) && offset % (size as u64) == 0;
    let end = offset.checked_add(size as u64).filter(|end| aligned && *end <= length as u64)?;
    Some(offset as usize / 4..end as usize / 4)
}

/// The bytes of an access to configuration space: 1, 2 or 4 of one dword, aligned.
pub(super) fn bytes(offset: u64, size: usize, length: usize) -> Option<Range<usize>> {
    let aligned = matches!(size, 1 | 2 | 4) && offset % (size as u64) == 0;
    let end = offset.checked_add(size as u64).filter(|end| aligned && *end <= length as u64)?;
    Some(offset as usize..end as usize)
}

/// The result of a read that is not well-formed: all ones, in as many bytes as were asked for, at most eight.
pub(super) fn all_ones(size: usize) -> u64 {
    u64::MAX.checked_shr(64 - 8 * size.min(8) as u32).unwrap_or(0)
}

/// The value of dwords, the first lowest.
pub(super) fn value(dwords: impl DoubleEndedIterator<Item = u32>) -> u64 {
    dwords.rev().fold(0, |high, low| high << 32 | u64::from(low))
}
