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
    /// Spare GSIs. They are not allocated; their entries hold messages that routes are likely to want next.
    pub spares: Vec<Range<u32>>,
    /// Where a push may meet armed irqfds: the number of entries in a table whose push takes as long as one move
    /// (disarming an irqfd and arming it at another GSI). 0 if a move is always better.
    pub entries_per_move: usize,
}

impl Config {
    /// A partition made here, with the backend's defaults and no spare GSIs.
    pub fn new(backend: Backend, gsis: Range<u32>) -> Self {
        Self {
            backend,
            gsis,
            vps: None,
            adopted: false,
            quiesce: backend.needs_quiesced_push(),
            allow_missing_vp: false,
            keep: Vec::new(),
            spares: Vec::new(),
            entries_per_move: backend.entries_per_move(),
        }
    }

    /// The spare GSIs, as many as fit into a table beside all other entries.
    pub(super) fn spare_gsis(&self, pins: bool) -> Vec<u16> {
        let room = entries(pins, self.keep.len()).saturating_sub(self.gsis.len());
        self.spares.iter().cloned().flatten().take(room).map(|gsi| gsi as u16).collect()
    }
}

/// The room of a table, in entries, beside the fixed ones.
fn entries(pins: bool, kept: usize) -> usize {
    (MAX_GSIS as usize - if pins { PIN_ENTRIES } else { 0 }).saturating_sub(kept)
}

/// All GSIs outside `gsis` that an MSI may have by custom: 0 to 23 are the IOAPIC's pins.
pub(super) fn other_gsis(gsis: &Range<u32>) -> Vec<Range<u32>> {
    [PIN_GSIS..gsis.start, gsis.end.max(PIN_GSIS)..MAX_GSIS].into_iter().filter(|range| !range.is_empty()).collect()
}

/// Checks that the kernel accepts a range of GSIs beside `kept` other entries.
pub(super) fn check_gsis(backend: Backend, pins: bool, gsis: &Range<u32>, kept: usize) -> Result {
    let Range { start, end } = allowed_gsis(pins);
    let most = entries(pins, kept);
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

/// Checks that the kernel accepts the spare GSIs, and that they are in no other use.
pub(super) fn check_spares(config: &Config, pins: bool) -> Result {
    let (most, asked) = (entries(pins, config.keep.len()), config.spares.iter().map(Range::len).sum::<usize>());
    if config.adopted && asked > 0 && config.gsis.len() + asked > most {
        return Err(Error::Invalid(format!(
            "{asked} spare GSIs and {} of gsis exceed the {most} entries that a routing table of {} has beside its fixed \
             ones",
            config.gsis.len(),
            config.backend
        )));
    }
    for (at, spares) in config.spares.iter().enumerate() {
        let shown = format!("spare range({}, {})", spares.start, spares.end);
        let Range { start, end } = allowed_gsis(pins);
        if spares.is_empty() {
            continue;
        }
        if spares.start < start || spares.end > end {
            let backend = config.backend;
            return Err(Error::Invalid(format!(
                "{shown} goes outside {start}-{}, the GSIs that {backend} accepts",
                end - 1
            )));
        }
        if spares.start < config.gsis.end && config.gsis.start < spares.end {
            return Err(Error::Invalid(format!(
                "{shown} overlaps gsis range({}, {}), which routes are allocated from",
                config.gsis.start, config.gsis.end
            )));
        }
        let twice = |other: &&Range<u32>| spares.start < other.end && other.start < spares.end;
        if let Some(other) = config.spares[..at].iter().filter(|other| !other.is_empty()).find(twice) {
            return Err(Error::Invalid(format!("{shown} overlaps spare range({}, {})", other.start, other.end)));
        }
        if let Some((gsi, _)) = config.keep.iter().find(|(gsi, _)| spares.contains(gsi)) {
            return Err(Error::Invalid(format!("{shown} has GSI {gsi}, which is in keep")));
        }
    }
    Ok(())
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
