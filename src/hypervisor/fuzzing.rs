//! Entry points for the fuzz targets, compiled only with `--cfg fuzzing`.

use super::event::Info;
use super::table::Table;

/// A field of a text in the form of /proc/self/fdinfo.
pub fn fdinfo_field(text: &str, name: &str) -> Option<u64> {
    Info(text.to_owned()).field(name)
}

/// A table's fixed entries and its other entries after `changes`, which set or drop entries by GSI (below 4096).
pub fn table_after(fixed: &[u32], changes: &[(u32, Option<u32>)]) -> (Vec<u32>, Vec<(u32, u32)>) {
    let fixed: Vec<_> = fixed.iter().map(|value| [u32::MAX, *value]).collect();
    let mut table = Table::new(&fixed);
    for (gsi, value) in changes {
        match value {
            Some(value) => table.set(*gsi, [*gsi, *value]),
            None => table.drop(*gsi),
        }
    }
    let (fixed, others) = table.image().entries().split_at(fixed.len());
    (fixed.iter().map(|entry| entry[1]).collect(), others.iter().map(|[gsi, value]| (*gsi, *value)).collect())
}
