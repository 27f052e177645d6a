//! Sets of virtual processors.

/// The APIC ids that have a virtual processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VpSet([u64; 4]);

impl VpSet {
    /// 0xFF is the broadcast destination, so the highest index of a VP is one below.
    pub const MAX: u8 = 254;

    pub fn insert(&mut self, index: u8) {
        self.0[usize::from(index / 64)] |= 1 << (index % 64);
    }

    pub fn contains(&self, index: u8) -> bool {
        self.0[usize::from(index / 64)] & 1 << (index % 64) != 0
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub fn iter(&self) -> impl Iterator<Item = u8> + '_ {
        (0..=Self::MAX).filter(|index| self.contains(*index))
    }
}

impl std::fmt::Display for VpSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let indexes: Vec<_> = self.iter().map(|index| index.to_string()).collect();
        f.write_str(if indexes.is_empty() { "none".into() } else { indexes.join(", ") }.as_str())
    }
}

impl FromIterator<u8> for VpSet {
    fn from_iter<I: IntoIterator<Item = u8>>(indexes: I) -> Self {
        let mut set = Self::default();
        indexes.into_iter().for_each(|index| set.insert(index));
        set
    }
}
