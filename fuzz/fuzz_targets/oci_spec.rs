#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| guest_init::fuzz::oci_spec(data));
