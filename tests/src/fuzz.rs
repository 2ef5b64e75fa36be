//! What the fuzz targets do with their bytes. Each function panics where something is not as it must be.
//!
//! `fuzz/` runs them under `cargo fuzz`; the test `corpus` runs them over the corpus in git, and over a bounded number of
//! its mutations, under `cargo test`.

mod contexts;
mod lookups;
mod queue;
mod tables;
mod wire;
mod words;

use std::sync::Arc;

use arbitrary::Unstructured;

use crate::model::generate::{Hints, op};
use crate::model::{Direct, Harness, Made, Native, Subject, World};

pub use queue::queue_bytes;
pub use tables::walker;
pub use wire::wire;

/// A target: panics where something is not as it must be.
pub type Target = fn(&[u8]);

/// Every target, by name.
pub const TARGETS: [(&str, Target); 5] = [
    ("wire", wire),
    ("device_sequences", device_sequences),
    ("queue_bytes", queue_bytes),
    ("walker", walker),
    ("context_tables", context_tables),
];

/// Context-descriptor tables, PASID directories and page tables of any words, over memory of any kind.
pub fn context_tables(bytes: &[u8]) {
    contexts::context_tables(bytes);
    lookups::lookups(bytes);
}

/// Operations of one input.
const MAX_OPS: usize = 400;

/// Any operations on a device, next to the model, over a machine that takes every kind of table or one.
pub fn device_sequences(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let native = World::native();
    let worlds: Vec<World> = native.into_iter().chain(World::made()).collect();
    let chosen = bytes.choose_index(8 * worlds.len()).unwrap_or(0);
    let world = Arc::new(worlds[chosen / 8].clone());
    // Looking at everything takes as long as many operations.
    let looks = chosen % 8 == 7;
    match world.mediated {
        None => sequence::<Direct<Native>>(&world, &mut bytes, looks),
        Some(_) => sequence::<Direct<Made>>(&world, &mut bytes, looks),
    }
}

fn sequence<S: Subject>(world: &Arc<World>, bytes: &mut Unstructured<'_>, looks: bool) {
    let mut harness = Harness::<S>::new(world);
    harness.prepare();
    for _ in 0..MAX_OPS {
        if bytes.is_empty() {
            break;
        }
        let hints = Hints::new(&harness.model);
        harness.step(&op(bytes, &hints));
    }
    if looks {
        harness.finish();
    }
}

/// Memory with a few of the input's words at places of the input's choice, the rest made of them.
pub(crate) struct Filler {
    state: u64,
}

impl Filler {
    pub(crate) const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next of a sequence that the seed determines (SplitMix64).
    pub(crate) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }
}
