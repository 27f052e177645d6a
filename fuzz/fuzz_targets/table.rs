//! Any sets and drops on the image of a routing table: the image holds the last entry set for each GSI.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use mshv_irqfd::hypervisor::fuzzing;

fuzz_target!(|input: (u8, Vec<(u16, Option<u32>)>)| {
    let (fixed, changes) = input;
    let fixed: Vec<_> = (0..u32::from(fixed % 4)).collect();
    let changes: Vec<_> = changes.into_iter().map(|(gsi, set)| (u32::from(gsi % 4096), set)).collect();
    let mut model = BTreeMap::new();
    for (gsi, set) in &changes {
        match set {
            Some(value) => model.insert(*gsi, *value),
            None => model.remove(gsi),
        };
    }
    let (kept, mut entries) = fuzzing::table_after(&fixed, &changes);
    entries.sort_unstable();
    assert_eq!(kept, fixed);
    assert_eq!(entries, model.into_iter().collect::<Vec<_>>());
});
