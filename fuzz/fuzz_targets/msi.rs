//! Any address and data: an accepted MSI keeps every bit, and the architecture defines it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mshv_irqfd::irqfd::MsiRoute;

fuzz_target!(|bits: (u64, u64)| {
    // Unchanged, and moved to the range where most are accepted.
    for (address, data) in [bits, (0xFEE0_0000 | bits.0 & 0xF_FFFF, bits.1 & 0xFFFF)] {
        let Ok(msi) = MsiRoute::new(address, data) else { continue };
        let (raw, target) = (msi.raw(), msi.target());
        assert_eq!((u64::from(raw.address), u64::from(raw.data)), (address, data));
        assert!((0xFEE0_0000..=0xFEEF_FFFF).contains(&address) && address & 0xFF3 == 0);
        assert!(![3, 6].contains(&target.delivery_mode));
        assert!(target.delivery_mode > 1 || msi.vector() >= 16);
        assert_eq!(u64::from(target.destination), address >> 12 & 0xFF);
    }
});
