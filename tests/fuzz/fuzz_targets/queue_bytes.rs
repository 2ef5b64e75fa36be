#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| viommu_tests::fuzz::queue_bytes(data));
