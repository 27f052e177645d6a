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
}
