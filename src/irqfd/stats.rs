//! Statistics of a partition.

/// Counts since a partition was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartitionStats {
    /// Pushes that the kernel accepted.
    pub pushes: u64,
    /// Entries in those pushes, including fixed entries (KVM's pins and the caller's own).
    pub entries_pushed: u64,
    /// Changes, of one route or by a batch, that needed no push.
    pub pushes_skipped: u64,
    /// irqfds armed, including those of quiesced pushes.
    pub arms: u64,
    /// irqfds disarmed, including those of quiesced pushes.
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
