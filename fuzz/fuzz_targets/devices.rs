#![no_main]
#![allow(missing_docs, reason = "the macro's main has no place for docs")]

libfuzzer_sys::fuzz_target!(|data: &[u8]| trellis_fuzz::devices::target(data));
