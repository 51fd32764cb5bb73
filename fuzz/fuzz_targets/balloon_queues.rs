#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::fuzz::balloon_queues(data));
