//! The tree against a plain ordered map, its shape after each step, and its memory under fills made to hurt.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use pgtable_formats::{Gpa, Iova, IovaRange};
use proptest::prelude::*;

use super::tree::Tree;
use super::{MapFlags, Mapping, Mappings, Overlap, Split};

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

fn mapping(start: u64, last: u64) -> Mapping {
    Mapping { range: range(start, last), output: Gpa(!start), flags: MapFlags::READ | MapFlags::MMIO }
}

fn filled(ranges: &[(u64, u64)]) -> Mappings {
    let mut mappings = Mappings::new();
    for &(start, last) in ranges {
        mappings.insert(mapping(start, last)).unwrap();
    }
    mappings
}

fn left(mappings: &Mappings) -> Vec<(u64, u64)> {
    mappings.iter().map(|mapping| (mapping.range.start().0, mapping.range.last().0)).collect()
}

/// The examples of the UNMAP section of the standard, in their order.
#[test]
fn d41_d42_reference_cases() {
    let split = |start, last| Err(Split { mapping: range(start, last) });
    type Case = (&'static [(u64, u64)], (u64, u64), Result<usize, Split>, &'static [(u64, u64)]);
    let cases: [Case; 7] = [
        (&[], (0, 4), Ok(0), &[]),
        (&[(0, 9)], (0, 9), Ok(1), &[]),
        (&[(0, 4), (5, 9)], (0, 9), Ok(2), &[]),
        (&[(0, 9)], (0, 4), split(0, 9), &[(0, 9)]),
        (&[(0, 4), (5, 9)], (0, 4), Ok(1), &[(5, 9)]),
        (&[(0, 4)], (0, 9), Ok(1), &[]),
        (&[(0, 4), (10, 14)], (0, 14), Ok(2), &[]),
    ];
    for (number, (before, (start, last), answer, after)) in (1..).zip(cases) {
        let mut mappings = filled(before);
        assert_eq!(mappings.remove(range(start, last)), answer, "case {number}");
        assert_eq!(left(&mappings), after, "case {number}");
    }
}

#[test]
fn d41_a_split_at_either_end_removes_nothing() {
    let ranges = [(0x1000, 0x1fff), (0x2000, 0x2fff), (0x3000, 0x3fff)];
    for (start, last, hit) in
        [(0x1001, 0x3fff, 0), (0x1fff, 0x3fff, 0), (0x1000, 0x3ffe, 2), (0, 0x3000, 2), (0x2001, 0x2ffe, 1)]
    {
        let mut mappings = filled(&ranges);
        let (from, to) = ranges[hit];
        assert_eq!(mappings.remove(range(start, last)), Err(Split { mapping: range(from, to) }));
        assert_eq!(left(&mappings), ranges);
    }
}

#[test]
fn d31_names_the_lowest_mapping_in_the_way() {
    let mut mappings = filled(&[(10, 19), (30, 39)]);
    for (start, last, existing) in
        [(0, 10, 10), (19, 29, 10), (12, 15, 10), (0, u64::MAX, 10), (20, 30, 30), (39, 39, 30)]
    {
        let overlap = Overlap { existing: range(existing, existing + 9) };
        assert_eq!(mappings.insert(mapping(start, last)), Err(overlap));
        assert!(mappings.overlaps(range(start, last)));
    }
    for (start, last) in [(0, 9), (20, 29), (40, u64::MAX)] {
        assert!(!mappings.overlaps(range(start, last)));
        assert_eq!(mappings.insert(mapping(start, last)), Ok(()));
    }
    assert_eq!(left(&mappings), [(0, 9), (10, 19), (20, 29), (30, 39), (40, u64::MAX)]);
}

#[test]
fn the_whole_address_space_is_one_mapping() {
    let mut mappings = Mappings::new();
    let all = Mapping { range: IovaRange::ALL, output: Gpa(0), flags: MapFlags::READ };
    mappings.insert(all).unwrap();
    assert_eq!(mappings.insert(mapping(u64::MAX, u64::MAX)), Err(Overlap { existing: IovaRange::ALL }));
    assert_eq!(mappings.remove(range(0, u64::MAX - 1)), Err(Split { mapping: IovaRange::ALL }));
    assert_eq!(mappings.remove(range(1, u64::MAX)), Err(Split { mapping: IovaRange::ALL }));
    for iova in [0, 1, u64::MAX] {
        assert_eq!(mappings.lookup(Iova(iova)), Some(all));
        assert_eq!(all.translate(Iova(iova)), Some(Gpa(iova)));
    }
    assert_eq!(mappings.remove(IovaRange::ALL), Ok(1));
    assert!(mappings.is_empty());
    assert_eq!(mappings.lookup(Iova(0)), None);
}

#[test]
fn translate_stays_inside_of_both_address_spaces() {
    let high =
        Mapping { range: range(0x1000, 0x2fff), output: Gpa(u64::MAX - 0xfff), flags: MapFlags::empty() };
    assert_eq!(high.translate(Iova(0x1fff)), Some(Gpa(u64::MAX)));
    for outside in [0xfff, 0x2000, 0x3000] {
        assert_eq!(high.translate(Iova(outside)), None);
    }
}

#[test]
fn a_mapping_keeps_its_flags() {
    for bits in 0..=MapFlags::all().bits() {
        let flags = MapFlags::from_bits(bits).unwrap();
        let mut mappings = Mappings::new();
        mappings.insert(Mapping { range: range(0, 9), output: Gpa(0), flags }).unwrap();
        assert_eq!(mappings.lookup(Iova(5)).map(|mapping| mapping.flags), Some(flags));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Insert(IovaRange),
    Remove(IovaRange),
    /// Neighbouring mappings, upwards or downwards, which the finger serves.
    Run(u64, u64, bool),
    Lookup(u64),
}

fn small_range(span: u64, longest: u64) -> impl Strategy<Value = IovaRange> {
    // Both ends of the address space are in play.
    (0..span, 0..longest, any::<bool>()).prop_map(move |(start, more, high)| {
        let base = if high { u64::MAX - (span + longest) } else { 0 };
        range(base + start, base + start + more)
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => small_range(300, 3).prop_map(Step::Insert),
        1 => small_range(300, 40).prop_map(Step::Insert),
        4 => small_range(300, 4).prop_map(Step::Remove),
        2 => small_range(300, 300).prop_map(Step::Remove),
        3 => (0..300u64, 1..40u64, any::<bool>()).prop_map(|(start, count, up)| Step::Run(start, count, up)),
        3 => (0..310u64).prop_map(Step::Lookup),
        1 => Just(Step::Remove(range(100, u64::MAX))),
        1 => Just(Step::Remove(range(0, u64::MAX - 100))),
    ]
}

/// Slow and obvious.
#[derive(Default)]
struct Model(BTreeMap<u64, Mapping>);

impl Model {
    fn overlapping(&self, range: IovaRange) -> Vec<Mapping> {
        self.0.values().filter(|mapping| mapping.range.overlaps(range)).copied().collect()
    }

    fn insert(&mut self, mapping: Mapping) -> Result<(), Overlap> {
        if let Some(first) = self.overlapping(mapping.range).first() {
            return Err(Overlap { existing: first.range });
        }
        self.0.insert(mapping.range.start().0, mapping);
        Ok(())
    }

    fn remove(&mut self, range: IovaRange) -> Result<usize, Split> {
        let touched = self.overlapping(range);
        if let Some(split) = touched.iter().find(|mapping| !range.covers(mapping.range)) {
            return Err(Split { mapping: split.range });
        }
        for mapping in &touched {
            self.0.remove(&mapping.range.start().0);
        }
        Ok(touched.len())
    }
}

fn agree<const LEAF: usize, const INNER: usize>(steps: Vec<Step>) {
    let mut tree = Tree::<LEAF, INNER>::new();
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Insert(range) => {
                let new = mapping(range.start().0, range.last().0);
                assert_eq!(tree.insert(new), model.insert(new));
            }
            Step::Remove(range) => assert_eq!(tree.remove(range), model.remove(range)),
            Step::Run(start, count, up) => {
                for offset in 0..count {
                    let at = start + if up { offset } else { count - offset };
                    assert_eq!(tree.insert(mapping(at, at)), model.insert(mapping(at, at)));
                    tree.check();
                }
            }
            Step::Lookup(at) => {
                for at in [at, u64::MAX - at] {
                    let all: Vec<_> = model.overlapping(range(at, at));
                    assert_eq!(tree.lookup(Iova(at)), all.first().copied());
                    let from: Vec<_> = tree.from(Iova(at)).collect();
                    assert_eq!(from, model.overlapping(range(at, u64::MAX)));
                }
            }
        }
        tree.check();
        assert_eq!(tree.len(), model.0.len());
    }
    assert_eq!(tree.from(Iova(0)).collect::<Vec<_>>(), model.0.into_values().collect::<Vec<_>>());
    tree.clear();
    assert_eq!((tree.len(), tree.memory_bytes()), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn small_nodes_agree_with_the_model(steps in prop::collection::vec(step(), 1..120)) {
        agree::<4, 4>(steps);
    }

    #[test]
    fn unlike_nodes_agree_with_the_model(steps in prop::collection::vec(step(), 1..120)) {
        agree::<5, 7>(steps);
    }

    #[test]
    fn real_nodes_agree_with_the_model(steps in prop::collection::vec(step(), 1..120)) {
        agree::<{ super::LEAF }, { super::INNER }>(steps);
    }
}

/// The first child of an inner node is emptied: the next one then has to cover its keys, on every level.
#[test]
fn keys_of_an_emptied_first_child_are_found_again() {
    agree::<5, 7>(alloc::vec![
        Step::Run(31, 4, false),
        Step::Run(235, 27, false),
        Step::Remove(range(29, 257)),
        Step::Run(20, 30, true),
        Step::Lookup(30),
    ]);
}

/// Inner nodes that give children to a neighbour bring small nodes together.
#[test]
fn small_nodes_that_meet_below_an_inner_node_are_joined() {
    agree::<4, 4>(alloc::vec![
        Step::Insert(range(0, 0)),
        Step::Insert(range(u64::MAX, u64::MAX)),
        Step::Run(1, 14, true),
        Step::Run(0, 18, false),
        Step::Run(223, 40, true),
        Step::Run(100, 39, false),
        Step::Remove(range(5, 210)),
        Step::Run(3, 39, false),
    ]);
}

/// Numbers without a visible order, the same in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }
}

type Real = Tree<{ super::LEAF }, { super::INNER }>;
const PAGE: u64 = 0x1000;
const COUNT: u64 = 200_000;

fn insert_page(tree: &mut Real, page: u64) -> bool {
    tree.insert(mapping(page * PAGE, page * PAGE + (PAGE - 1))).is_ok()
}

fn remove_page(tree: &mut Real, page: u64) -> bool {
    tree.remove(range(page * PAGE, page * PAGE + (PAGE - 1))) == Ok(1)
}

#[track_caller]
fn assert_bytes_per_mapping(tree: &Real, most: f64) {
    tree.check();
    let bytes = tree.memory_bytes() as f64 / tree.len() as f64;
    assert!(bytes <= most, "{bytes:.1} bytes for each of {} mappings", tree.len());
}

#[test]
fn memory_of_runs() {
    let (mut up, mut down, mut streams) = (Real::new(), Real::new(), Real::new());
    for page in 0..COUNT {
        assert!(insert_page(&mut up, page));
        assert!(insert_page(&mut down, COUNT - page));
        // Eight runs side by side, half of them downwards.
        let (stream, step) = (page % 8, page / 8);
        let start = stream << 30;
        assert!(insert_page(&mut streams, if stream % 2 == 0 { start + step } else { start - step }));
    }
    for tree in [up, down, streams] {
        assert_bytes_per_mapping(&tree, 28.0);
    }
}

#[test]
fn memory_of_random_fills() {
    let mut numbers = Numbers(1);
    let mut tree = Real::new();
    while (tree.len() as u64) < COUNT {
        insert_page(&mut tree, numbers.below(1 << 40));
    }
    assert_bytes_per_mapping(&tree, 36.0);
    // Half of the pages of a space come and go.
    let mut tree = Real::new();
    for _ in 0..8 * COUNT {
        let page = numbers.below(COUNT);
        if !insert_page(&mut tree, page) {
            assert!(remove_page(&mut tree, page));
        }
    }
    assert_bytes_per_mapping(&tree, 48.0);
}

/// Removal that leaves as little as it can in each node, on the shapes that insertion can make.
#[test]
fn memory_stays_bounded_under_hostile_removal() {
    for keep in [2, 3, 5, 7, 16, 28, 31, 33, 57, 64, 100, 1000] {
        let mut tree = Real::new();
        for page in 0..COUNT {
            insert_page(&mut tree, page);
        }
        for page in (0..COUNT).filter(|page| page % keep != 0) {
            assert!(remove_page(&mut tree, page));
        }
        let constant = 8192.0 / tree.len() as f64;
        assert_bytes_per_mapping(&tree, 64.0 + constant);
    }
}

/// Full leaves and lone mappings in turn, of which the full ones are then thinned out as far as joining tolerates.
#[test]
fn memory_of_the_sparsest_shape() {
    let mut tree = Real::new();
    let leaf = super::LEAF as u64;
    let joined = leaf - leaf / 8;
    for group in 0..COUNT / leaf {
        for page in 0..=leaf {
            insert_page(&mut tree, group * 2 * leaf + page);
        }
    }
    for group in 0..COUNT / leaf {
        for page in joined..leaf {
            remove_page(&mut tree, group * 2 * leaf + page);
        }
    }
    assert_bytes_per_mapping(&tree, 64.0);
}

#[test]
fn one_removal_takes_many_leaves() {
    let mut tree = Real::new();
    for page in 0..COUNT {
        insert_page(&mut tree, page);
    }
    assert_eq!(tree.remove(range(1000 * PAGE, 1512 * PAGE - 1)), Ok(512));
    tree.check();
    let before = tree.len();
    assert_eq!(tree.remove(range(PAGE, (COUNT - 1) * PAGE - 1)), Ok(before - 2));
    tree.check();
    assert_eq!(tree.len(), 2);
    assert!(tree.memory_bytes() < 8192, "{} bytes for 2 mappings", tree.memory_bytes());
    assert_eq!(tree.remove(IovaRange::ALL), Ok(2));
    tree.check();
    assert!(insert_page(&mut tree, 7));
    tree.check();
}
