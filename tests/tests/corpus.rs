//! Every fuzz target over its corpus, and over a bounded number of mutations of it, the same each time.
#![allow(clippy::expect_used, clippy::cast_possible_truncation, missing_docs, reason = "a test")]

use std::path::{Path, PathBuf};

use viommu_tests::fuzz;

/// Mutations of each file.
const MUTATIONS: u64 = 150;

#[test]
fn wire() {
    run("wire");
}

#[test]
fn device_sequences() {
    run("device_sequences");
}

#[test]
fn queue_bytes() {
    run("queue_bytes");
}

#[test]
fn walker() {
    run("walker");
}

#[test]
fn context_tables() {
    run("context_tables");
}

/// Each target has a binary, a corpus and a test here.
#[test]
fn targets_are_complete() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let source = include_str!("corpus.rs");
    for (name, _) in fuzz::TARGETS {
        assert!(fuzz.join("fuzz_targets").join(name).with_extension("rs").exists(), "{name}");
        assert!(files(name).len() >= 4, "{name} has a corpus");
        assert!(source.contains(&format!("run(\"{name}\")")), "{name} is run here");
    }
}

fn run(name: &str) {
    let (_, target) = fuzz::TARGETS.into_iter().find(|(known, _)| *known == name).expect("a target");
    let inputs: Vec<Vec<u8>> = files(name).iter().map(|path| std::fs::read(path).expect("a file")).collect();
    for (number, input) in (0_u64..).zip(&inputs) {
        target(input);
        let mut random = Random(number << 32);
        for _ in 0..MUTATIONS {
            let other = &inputs[random.below(inputs.len())];
            target(&mutated(input, other, &mut random));
        }
    }
}

fn files(name: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let entries = folder.read_dir().expect("a corpus");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

/// A few changes: bits, bytes, pieces of another input, shorter, longer.
fn mutated(input: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(6) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.next() as u8),
            2 => {
                let from = random.below(other.len() + 1);
                let piece = other[from..].iter().take(random.below(64)).copied();
                bytes.splice(at..at, piece);
            }
            3 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = random.next() as u8),
            4 => bytes.iter_mut().skip(at).take(8).for_each(|byte| *byte = [0, 0xff][random.below(2)]),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
        }
    }
    bytes
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}
