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
use viommu_tests::model::{Counts, Direct, Harness, Model, Op, Queued, Subject, World, bit};

/// Steps of one sequence.
const STEPS: std::ops::Range<usize> = 1..160;

/// What generates: the model alone. Of guest memory it knows where it is, which is all that requests depend on.
struct Reference;

impl ReferenceStateMachine for Reference {
    type State = Model;
    type Transition = Op;

    fn init_state() -> BoxedStrategy<Model> {
        let mut worlds: Vec<Arc<World>> = World::all().map(Arc::new).into();
        // What caches may say takes the longest to find out.
        worlds.extend([(); 4].map(|()| Arc::new(World::caches())));
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
static COUNTS: Mutex<[Option<Counts>; 2]> = Mutex::new([None, None]);

trait Place {
    const PLACE: usize;
}

impl Place for Direct {
    const PLACE: usize = 0;
}

impl Place for Queued {
    const PLACE: usize = 1;
}

impl<S: Subject + Place> StateMachineTest for Compared<S> {
    type SystemUnderTest = Harness<S>;
    type Reference = Reference;

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
        let result = runner.run(&Reference::sequential_strategy(STEPS), |(model, ops, seen)| {
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
    let Counts { requests, accesses, through_tables, stale, events, resets, any, .. } = counts;
    let mut text = format!(
        "MODEL {name} requests={requests} accesses={accesses} through_tables={through_tables} stale={stale} \
         events={events} resets={resets} unmodelled={any}\n"
    );
    if std::env::var_os("VIOMMU_MODEL_VERBOSE").is_some() {
        text += &format!("{:?}\n{:?}\n", counts.statuses, counts.faults);
    }
    std::io::stderr().write_all(text.as_bytes()).unwrap();
}

#[test]
fn the_device_does_what_the_model_says() {
    run::<Direct>("direct", 3000);
}

#[test]
fn the_device_behind_queues_does_what_the_model_says() {
    run::<Queued>("queued", 600);
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
        Op::Access { id, pasid: None, iova, access: Access { kind: Kind::Read, privileged: false } }
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
