//! The device against the reference model: any requests, accesses, table writes, resets, in any order.
//!
//! `VIOMMU_MODEL_REQUESTS=300000 cargo test --release -p viommu-tests --test model` runs until that many requests were
//! executed by each test; `PROPTEST_CASES` and the other variables of proptest work as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, reason = "a test")]

use std::io::Write;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

use arbitrary::Unstructured;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest};
use viommu_tests::model::generate::{Hints, op};
use viommu_tests::model::world::Focus;
use viommu_tests::model::{Counts, Direct, Harness, Made, Model, Op, Queued, Subject, World, bit};

/// Steps of one sequence.
const STEPS: std::ops::Range<usize> = 1..160;

/// What generates: the model alone. Of guest memory it knows where it is, which is all that requests depend on; what
/// depends on the device's choices is chosen when it is done.
struct Reference<S>(PhantomData<S>);

impl<S: Subject + Place> ReferenceStateMachine for Reference<S> {
    type State = Model;
    type Transition = Op;

    fn init_state() -> BoxedStrategy<Model> {
        let mut worlds: Vec<Arc<World>> = S::worlds().into_iter().map(Arc::new).collect();
        // What caches may say takes the longest to find out, and what becomes of page requests.
        for world in worlds.clone() {
            match world.focus {
                Focus::Tables => worlds.extend([(); 3].map(|()| Arc::clone(&world))),
                Focus::Requests => worlds.extend([(); 2].map(|()| Arc::clone(&world))),
                Focus::Everything | Focus::Mappings => {}
            }
        }
        prop::sample::select(worlds)
            .prop_map(|world| {
                let mut model = Model::new(world);
                assert!(model.accept(model.world.offered & bit::ALL));
                model
            })
            .boxed()
    }

    fn transitions(model: &Model) -> BoxedStrategy<Op> {
        let hints = Hints::new(model);
        any::<[u64; 20]>()
            .prop_map(move |seed| {
                let bytes: Vec<u8> = seed.iter().flat_map(|word| word.to_le_bytes()).collect();
                op(&mut Unstructured::new(&bytes), &hints)
            })
            .boxed()
    }

    fn apply(mut model: Model, op: &Op) -> Model {
        model.foresee(op);
        model
    }
}

/// What executes.
struct Compared<S>(PhantomData<S>);

/// Steps of all cases of one test.
static COUNTS: Mutex<[Option<Counts>; 4]> = Mutex::new([None, None, None, None]);

trait Place: 'static {
    const PLACE: usize;
}

impl Place for Direct {
    const PLACE: usize = 0;
}

impl Place for Queued {
    const PLACE: usize = 1;
}

impl Place for Direct<Made> {
    const PLACE: usize = 2;
}

impl Place for Queued<Made> {
    const PLACE: usize = 3;
}

impl<S: Subject + Place> StateMachineTest for Compared<S> {
    type SystemUnderTest = Harness<S>;
    type Reference = Reference<S>;

    fn init_test(model: &Model) -> Harness<S> {
        let mut harness = Harness::new(&model.world);
        harness.prepare();
        harness
    }

    fn apply(mut harness: Harness<S>, model: &Model, op: Op) -> Harness<S> {
        harness.step(&op);
        assert_eq!(harness.model.domains.len(), model.domains.len(), "what was generated from");
        assert_eq!(harness.model.mappings(), model.mappings(), "what was generated from");
        harness
    }

    fn teardown(mut harness: Harness<S>, _: Model) {
        harness.finish();
        COUNTS.lock().unwrap()[S::PLACE].get_or_insert_default().add(&harness.counts);
    }
}

/// Runs sequences: as many as asked for, or until as many requests were executed.
fn run<S: Subject + Place>(name: &str, cases: u32) {
    let wanted: Option<u64> = std::env::var("VIOMMU_MODEL_REQUESTS").ok().map(|count| count.parse().unwrap());
    let is_set = std::env::var_os("PROPTEST_CASES").is_some();
    let config = Config::default();
    let config =
        Config { cases: if is_set { config.cases } else { cases }, failure_persistence: None, ..config };
    let done = || COUNTS.lock().unwrap()[S::PLACE].clone().unwrap_or_default();
    loop {
        let mut runner = TestRunner::new(config.clone());
        let result = runner.run(&Reference::<S>::sequential_strategy(STEPS), |(model, ops, seen)| {
            Compared::<S>::test_sequential(config.clone(), model, ops, seen);
            Ok(())
        });
        if let Err(failure) = result {
            panic!("{failure}");
        }
        if done().requests >= wanted.unwrap_or(0) {
            break;
        }
    }
    report(name, &done());
}

/// To the standard error itself, so that it is seen when the test passes.
fn report(name: &str, counts: &Counts) {
    let Counts { requests, accesses, through_tables, stale, events, page_requests, resets, any, .. } = counts;
    let mut text = format!(
        "MODEL {name} requests={requests} accesses={accesses} through_tables={through_tables} stale={stale} \
         events={events} page_requests={page_requests} resets={resets} unmodelled={any}\n"
    );
    if std::env::var_os("VIOMMU_MODEL_VERBOSE").is_some() {
        for ((kind, status), count) in &counts.statuses {
            text += &format!("{count:>9} type {kind}, {}\n", status_name(*status));
        }
        for ((format, status), count) in &counts.formats {
            text += &format!("{count:>9} ATTACH_TABLE of format {format:#x}, {}\n", status_name(*status));
        }
        for (what, count) in &counts.faults {
            text += &format!("{count:>9} fault {what}\n");
        }
        for (what, count) in &counts.asking {
            text += &format!("{count:>9} {what}\n");
        }
    }
    std::io::stderr().write_all(text.as_bytes()).unwrap();
}

fn status_name(status: Option<u8>) -> &'static str {
    match status {
        None => "unwritten",
        Some(0) => "OK",
        Some(2) => "UNSUPP",
        Some(3) => "DEVERR",
        Some(4) => "INVAL",
        Some(5) => "RANGE",
        Some(6) => "NOENT",
        Some(8) => "NOMEM",
        Some(_) => "another status",
    }
}

#[test]
fn the_device_does_what_the_model_says() {
    run::<Direct>("direct", 3000);
}

#[test]
fn the_device_behind_queues_does_what_the_model_says() {
    run::<Queued>("queued", 600);
}

#[test]
fn the_device_that_makes_tables_does_what_the_model_says() {
    run::<Direct<Made>>("mediated", 1500);
}

#[test]
fn the_device_that_makes_tables_behind_queues_does_what_the_model_says() {
    run::<Queued<Made>>("mediated, queued", 300);
}

/// What was found once: sequences that a device got wrong.
mod found {
    use viommu_tests::model::words::{Access, Kind};

    use super::*;

    fn harness(world: World) -> Harness<Direct> {
        let mut harness = Harness::new(&Arc::new(world));
        harness.prepare();
        harness
    }

    fn access(id: u32, iova: u64) -> Op {
        let access = Access { kind: Kind::Read, privileged: false };
        Op::Access { id, pasid: None, iova, access, waits: false }
    }

    /// More faults than events may wait: the host still held some of them.
    #[test]
    fn a_reset_forgets_every_fault() {
        let mut harness = harness(World::narrow());
        harness.step(&Op::WriteConfig { offset: 36, bytes: vec![0] });
        for n in 0..8 {
            harness.step(&access(24, n << 12));
        }
        harness.step(&Op::Reset { system: false, accept: bit::ALL });
        harness.step(&Op::TakeEvent { len: 24 });
    }

    fn request(words: &[u8], rest: &[u8]) -> Op {
        let mut readable = words.to_vec();
        readable.extend(rest);
        readable.resize(124, 0);
        Op::Request { readable, writable: 4, cut: 1 }
    }

    /// A PASID directory of endpoint 16.
    fn directory(at: u64) -> Op {
        let mut body = at.to_le_bytes().to_vec();
        body.extend([0, 0, 0, 0, 7]);
        request(&[6, 0, 0, 0, 1, 0, 0, 0, 16, 0, 0, 0, 0x81, 0, 0, 0], &body)
    }

    fn waits(pasid: Option<u32>, iova: u64, privileged: bool) -> Op {
        Op::Access { id: 16, pasid, iova, access: Access { kind: Kind::Read, privileged }, waits: true }
    }

    /// no entry of a page table enables privileged accesses.
    #[test]
    fn what_the_pasid_entry_forbids_does_not_wait() {
        let mut harness = harness(World::requests());
        harness.step(&directory(0x4040_0000));
        harness.step(&waits(None, 0x4000, true));
        harness.step(&waits(None, 1 << 47, false));
        harness.finish();
    }

    /// accesses with PASID 0 have what serves untagged ones, and page requests of their own.
    #[test]
    fn a_new_pasid_table_ends_the_requests_of_pasid_0() {
        let mut harness = Harness::<Direct<Made>>::new(&Arc::new(World::requests().mediated()));
        harness.prepare();
        harness.step(&directory(0x4040_0000));
        harness.step(&waits(Some(0), 0x4000, false));
        harness.step(&directory(0x4048_0000));
        harness.finish();
    }

    /// a driver that takes ATTACH_TABLE back is told of no page request any more.
    #[test]
    fn without_tables_there_are_no_page_requests() {
        let mut harness = harness(World::requests());
        harness.step(&directory(0x4040_0000));
        harness.step(&waits(Some(1), 0x4000, false));
        harness.step(&Op::TakeEvent { len: 0 });
        harness.step(&Op::Accept { features: bit::PAGE_REQUEST });
        harness.finish();
    }

    /// ECAP.RPS is 0: untagged requests use PASID 0.
    #[test]
    fn the_pasid_of_untagged_requests_is_not_always_a_choice() {
        let mut harness = harness(World::ordinary());
        let mut readable = vec![6, 0, 0, 0, 1, 0, 0, 0, 17, 0, 0, 0, 0x81, 0, 0, 0];
        readable.extend(0x4040_0000_u64.to_le_bytes());
        readable.extend([0, 0, 0, 0, 7]);
        readable.resize(124, 0);
        for untagged in [0, 7] {
            readable[24] = untagged;
            harness.step(&Op::Request { readable: readable.clone(), writable: 4, cut: 1 });
        }
        harness.finish();
    }
}
