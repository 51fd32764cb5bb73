#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| agent::fuzz::pod_manifest(data));
