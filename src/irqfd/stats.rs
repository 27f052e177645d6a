//! Statistics of a partition.

/// Counts since a partition was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartitionStats {
    /// Routing tables that the kernel took.
    pub pushes: u64,
    /// Entries in those tables, fixed ones (KVM's pins, kept ones) included.
    pub entries_pushed: u64,
    /// Changes (of one route or by a batch) that needed no push.
    pub pushes_skipped: u64,
    /// irqfds assigned, those of quiesced pushes included.
    pub arms: u64,
    /// irqfds deassigned, likewise.
    pub disarms: u64,
    /// Calls that the kernel refused.
    pub failures: u64,
    /// Messages set on a route that the kernel's table had already.
    pub hits: u64,
    /// Messages set on a route that had to be pushed.
    pub misses: u64,
    /// Spare entries that pushes took along for later.
    pub entries_loaded: u64,
}
