#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| agent::fuzz::http1_requests(data));
