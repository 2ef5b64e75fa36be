#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| viommu_tests::fuzz::device_sequences(bytes));
