#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| agent::fuzz::registry_documents(data));
