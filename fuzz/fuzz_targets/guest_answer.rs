#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shim::fuzz::guest_answer(data));
