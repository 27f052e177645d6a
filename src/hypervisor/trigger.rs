//! The writes of a guest that ring a doorbell.

use std::fmt;

/// The writes of a guest that ring a doorbell: those to one address, of one size or of any, with one value or with any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Trigger {
    pub address: u64,
    /// The size of the write in bytes; 0: any size.
    pub length: u32,
    /// The value written; `None`: any value.
    pub datamatch: Option<u64>,
    /// Whether the address is an I/O port. Otherwise it is a guest-physical address (MMIO).
    pub port: bool,
}

impl Trigger {
    /// Whether a write of this size and value to this guest-physical address rings.
    pub fn matches(&self, address: u64, size: u32, value: u64) -> bool {
        !self.port
            && self.address == address
            && (self.length == 0 || self.length == size)
            && self.datamatch.is_none_or(|wanted| wanted == value)
    }

    /// Whether one write could ring both. This is KVM's rule (virt/kvm/eventfd.c, `ioeventfd_check_collision`). The mshv
    /// driver compares doorbells of equal length only, so it does not see a doorbell of any size beside one of 4 bytes.
    pub fn collides(&self, other: &Self) -> bool {
        let values_meet = match (self.datamatch, other.datamatch) {
            (Some(one), Some(another)) => one == another,
            _ => true,
        };
        let sizes_meet = self.length == 0 || other.length == 0 || (self.length == other.length && values_meet);
        self.port == other.port && self.address == other.address && sizes_meet
    }
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x}", if self.port { "port" } else { "MMIO" }, self.address)?;
        match self.length {
            0 => write!(f, ", any size")?,
            1 => write!(f, ", 1 byte")?,
            bytes => write!(f, ", {bytes} bytes")?,
        }
        self.datamatch.map_or(Ok(()), |value| write!(f, ", value {value:#x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trigger(address: u64, length: u32, datamatch: Option<u64>) -> Trigger {
        Trigger { address, length, datamatch, port: false }
    }

    #[test]
    fn a_write_rings_by_address_size_and_value() {
        for (it, address, size, value, rings) in [
            (trigger(0x1000, 4, None), 0x1000, 4, 9, true),
            (trigger(0x1000, 4, None), 0x1001, 4, 9, false),
            (trigger(0x1000, 4, None), 0x1000, 2, 9, false),
            (trigger(0x1000, 0, None), 0x1000, 2, 9, true),
            (trigger(0x1000, 4, Some(7)), 0x1000, 4, 7, true),
            (trigger(0x1000, 4, Some(7)), 0x1000, 4, 9, false),
            (Trigger { port: true, ..trigger(0x1000, 4, None) }, 0x1000, 4, 9, false),
        ] {
            assert_eq!(it.matches(address, size, value), rings, "{it}: {size} bytes of {value} at {address:#x}");
        }
    }

    /// Two triggers collide exactly if some write rings both.
    #[test]
    fn triggers_collide_exactly_if_one_write_could_ring_both() {
        let lengths = [0, 1, 2, 4, 8];
        let values = [None, Some(1), Some(2)];
        let mut all = Vec::new();
        for address in [0x1000, 0x1004] {
            for length in lengths {
                all.extend(values.iter().map(|value| trigger(address, length, *value)));
            }
        }
        // No kernel takes a value without a length.
        all.retain(|it| it.length != 0 || it.datamatch.is_none());
        for one in &all {
            for other in &all {
                let rings_both =
                    |size, value| one.matches(one.address, size, value) && other.matches(one.address, size, value);
                let some = [1, 2, 4, 8].iter().any(|size| (0..4).any(|value| rings_both(*size, value)));
                assert_eq!(one.collides(other), some, "{one} and {other}");
            }
        }
        let mmio = trigger(0x1000, 4, None);
        assert!(!mmio.collides(&Trigger { port: true, ..mmio }));
    }

    #[test]
    fn its_text_names_what_it_compares() {
        for (it, text) in [
            (trigger(0xD000_0000, 0, None), "MMIO 0xd0000000, any size"),
            (trigger(0xD000_0000, 1, None), "MMIO 0xd0000000, 1 byte"),
            (Trigger { port: true, ..trigger(0x510, 2, Some(7)) }, "port 0x510, 2 bytes, value 0x7"),
        ] {
            assert_eq!(it.to_string(), text);
        }
    }
}
