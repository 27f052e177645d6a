//! Parses any text as /proc/self/fdinfo: it finds a field if the field is there, and never panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mshv_irqfd::hypervisor::fuzzing;

fuzz_target!(|text: &str| {
    let count = fuzzing::fdinfo_field(text, "eventfd-count");
    if !text.contains("eventfd-count") {
        assert_eq!(count, None);
    }
    let _id = fuzzing::fdinfo_field(text, "eventfd-id");
    let whole = format!("pos:\t0\neventfd-count: {:16x}\neventfd-id: 7\n{text}", text.len());
    assert_eq!(fuzzing::fdinfo_field(&whole, "eventfd-count"), Some(text.len() as u64));
    assert_eq!(fuzzing::fdinfo_field(&whole, "eventfd-id"), Some(7));
});
