//! Target `oci`: see `src/lib.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bothy_fuzz::oci(data, false);
});
