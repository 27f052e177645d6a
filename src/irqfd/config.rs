//! A partition's configuration, and the checks against the limits of its kernel.

use std::ops::Range;

use super::error::{Error, Result};
use super::vps::VpSet;
use crate::hypervisor::{Backend, MAX_GSIS, PIN_ENTRIES, PIN_GSIS, RawMsi};

/// A partition's configuration.
#[derive(Clone, Debug)]
pub struct Config {
    pub backend: Backend,
    pub gsis: Range<u32>,
    /// The VPs of an adopted partition, if known.
    pub vps: Option<VpSet>,
    /// Whether another VMM made the partition, and makes its VPs.
    pub adopted: bool,
    pub quiesce: bool,
    pub allow_missing_vp: bool,
    /// The caller's own entries, which every push keeps.
    pub keep: Vec<(u32, RawMsi)>,
}

/// Checks that the kernel accepts a range of GSIs beside `kept` other entries.
pub(super) fn check_gsis(backend: Backend, pins: bool, gsis: &Range<u32>, kept: usize) -> Result {
    let Range { start, end } = allowed_gsis(pins);
    let most = (MAX_GSIS as usize - if pins { PIN_ENTRIES } else { 0 }).saturating_sub(kept);
    if gsis.is_empty() {
        return Err(Error::Invalid(format!("gsis range({}, {}) is empty", gsis.start, gsis.end)));
    }
    if gsis.start < start || gsis.end > end {
        let pins = if pins { " (0-23 are the IOAPIC's pins)" } else { "" };
        return Err(Error::Invalid(format!(
            "gsis range({}, {}) goes outside {start}-{}, the GSIs that {backend} accepts{pins}",
            gsis.start,
            gsis.end,
            end - 1
        )));
    }
    if gsis.len() > most {
        return Err(Error::Invalid(format!(
            "gsis range({}, {}) has {} GSIs; at most {most} fit in a routing table of {backend} beside its fixed \
             entries",
            gsis.start,
            gsis.end,
            gsis.len()
        )));
    }
    Ok(())
}

fn allowed_gsis(pins: bool) -> Range<u32> {
    if pins { PIN_GSIS..MAX_GSIS } else { 0..MAX_GSIS }
}

/// Checks that the kept entries have distinct GSIs, none of which is to be allocated.
pub(super) fn check_keep(backend: Backend, pins: bool, gsis: &Range<u32>, keep: &[(u32, RawMsi)]) -> Result {
    let mut seen = std::collections::HashSet::new();
    for (gsi, _) in keep {
        if !allowed_gsis(pins).contains(gsi) {
            return Err(Error::Invalid(format!("keep: {backend} accepts no MSI on GSI {gsi} of this partition")));
        }
        if gsis.contains(gsi) {
            return Err(Error::Invalid(format!(
                "keep: GSI {gsi} is in gsis range({}, {}), which routes are allocated from",
                gsis.start, gsis.end
            )));
        }
        if !seen.insert(gsi) {
            return Err(Error::Invalid(format!("keep: GSI {gsi} appears twice")));
        }
    }
    Ok(())
}
