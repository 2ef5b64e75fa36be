//! What every [`Host`] has to prove, written once.
//!
//! A host comes as a [`HostUnderTest`]: the host itself, two endpoints behind it, memory for guest tables, and a way to
//! let an endpoint access memory. Each function is one property of the contract of [`Host`]; a test target calls them
//! all with a fresh host each, see [`host_suite!`](crate::host_suite!).

mod tables;

use pgtable_formats::{AccessKind, Gpa, Iova, IovaRange, Pasid, TableAlloc, TableMem};
use viommu_device::host::{Host, MapError, SpaceSpec, Stream, UnmapError};
use viommu_device::mapping::{MapFlags, Mapping};
use viommu_wire::EndpointId;

pub use tables::*;

/// A host with what is around it.
pub trait HostUnderTest {
    /// The host.
    type Host: Host;
    /// The guest's memory, with an allocator for tables. Addresses from it are those that the host walks.
    type Memory: TableMem + TableAlloc;

    /// The host. No stream is bound when a test starts.
    fn host(&mut self) -> &mut Self::Host;

    /// The memory.
    fn memory(&mut self) -> &mut Self::Memory;

    /// Two endpoints that take the same tables, or none. The lowest 256 pages, and the pages of [`page`](Self::page), lie
    /// in no reserved region of theirs.
    fn endpoints(&self) -> [EndpointId; 2];

    /// Where an access of an endpoint leads; `None` where it faults.
    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64>;

    /// Addresses in guest memory that mappings may lead to: the page of this number, at least 256 of them.
    fn page(&self, number: u64) -> u64;

    /// Whether a cached translation is certain to stay visible until it is invalidated. Where it is not, the suite only
    /// checks that it is gone afterwards.
    fn shows_stale(&self) -> bool;
}

/// Makes one test of each function of the suite: `host_suite!(make_a_host);`
#[macro_export]
macro_rules! host_suite {
    ($make:expr) => {
        $crate::host_suite!(
            $make,
            unbound_streams_fault,
            identity_leads_where_it_says,
            mappings_translate_and_permit,
            overlap_changes_nothing,
            unmap_splits_nothing,
            unmap_takes_effect_at_once,
            mappings_live_in_their_space,
            bind_replaces_in_one_step,
            unbind_closes,
            spaces_outlive_their_streams,
            a_table_outside_memory_is_refused,
            tables_serve_pasids,
            single_tables_serve_one_pasid,
            stale_until_invalidated,
            invalidation_by_range,
            invalidation_of_contexts,
            invalidation_by_tag,
            rebinding_starts_clean,
            many_spaces
        );
    };
    ($make:expr, $($name:ident),*) => {$(
        #[test]
        fn $name() {
            $crate::host_suite::$name(&mut $make);
        }
    )*};
}

type Space<T> = <<T as HostUnderTest>::Host as Host>::Space;

fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::from_length(Iova(first << 12), count << 12).expect("a range")
}

fn untagged(endpoint: EndpointId) -> Stream {
    Stream::untagged(endpoint)
}

fn tagged(endpoint: EndpointId, pasid: u32) -> Stream {
    Stream { endpoint, pasid: Some(Pasid::new(pasid).expect("20 bits")) }
}

fn mapped<T: HostUnderTest>(test: &mut T) -> Space<T> {
    test.host().create(SpaceSpec::Mapped).expect("a space")
}

/// Maps `count` pages from `first` on to pages from `target` on.
fn map<T: HostUnderTest>(
    test: &mut T,
    space: &mut Space<T>,
    first: u64,
    count: u64,
    target: u64,
    flags: MapFlags,
) -> Result<(), MapError> {
    let output = Gpa(test.page(target));
    test.host().map(space, Mapping { range: pages(first, count), output, flags })
}

fn read<T: HostUnderTest>(test: &mut T, stream: Stream, page: u64) -> Option<u64> {
    test.access(stream, page << 12, AccessKind::Read)
}

fn write<T: HostUnderTest>(test: &mut T, stream: Stream, page: u64) -> Option<u64> {
    test.access(stream, page << 12, AccessKind::Write)
}

fn rw() -> MapFlags {
    MapFlags::READ | MapFlags::WRITE
}

/// A stream that is bound to nothing reaches nothing, with a PASID or without, and its faults are told.
pub fn unbound_streams_fault<T: HostUnderTest>(test: &mut T) {
    for endpoint in test.endpoints() {
        assert!(test.host().caps(endpoint).is_some());
        for stream in [untagged(endpoint), tagged(endpoint, 0), tagged(endpoint, 5)] {
            let target = test.page(1);
            assert_eq!(test.access(stream, target, AccessKind::Read), None);
            assert_eq!(test.access(stream, target, AccessKind::Write), None);
        }
    }
    assert!(test.host().caps(EndpointId(u32::MAX)).is_none());
}

/// Identity: output equals input, for reads, writes, and every PASID.
pub fn identity_leads_where_it_says<T: HostUnderTest>(test: &mut T) {
    let [first, second] = test.endpoints();
    let mut space = test.host().create(SpaceSpec::Identity).expect("a space");
    for endpoint in [first, second] {
        test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
        for number in [0, 1, 77] {
            let target = test.page(number);
            for stream in [untagged(endpoint), tagged(endpoint, 9)] {
                assert_eq!(test.access(stream, target, AccessKind::Read), Some(target));
                assert_eq!(test.access(stream, target + 0xfff, AccessKind::Write), Some(target + 0xfff));
            }
        }
    }
    for endpoint in [first, second] {
        test.host().bind(untagged(endpoint), None).expect("unbound");
    }
    test.host().destroy(space);
}

/// Mappings lead where they say, to the last byte and not beyond, and permit what they say.
pub fn mappings_translate_and_permit<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let mut space = mapped(test);
    test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
    map(test, &mut space, 0x10, 3, 5, rw()).expect("mapped");
    map(test, &mut space, 0x20, 1, 9, MapFlags::READ).expect("mapped");
    let output = test.page(5);
    for (iova, offset) in [(0x1_0000, 0), (0x1_0fff, 0xfff), (0x1_1234, 0x1234), (0x1_2fff, 0x2fff)] {
        for kind in [AccessKind::Read, AccessKind::Write] {
            assert_eq!(test.access(untagged(endpoint), iova, kind), Some(output + offset), "{iova:#x}");
        }
    }
    for iova in [0xffff, 0x1_3000, 0, u64::MAX] {
        assert_eq!(test.access(untagged(endpoint), iova, AccessKind::Read), None, "{iova:#x}");
    }
    let output = test.page(9);
    assert_eq!(read(test, untagged(endpoint), 0x20), Some(output));
    assert_eq!(write(test, untagged(endpoint), 0x20), None);
    assert_eq!(read(test, tagged(endpoint, 5), 0x20), None, "mappings are for untagged accesses");
}

/// MAP over a mapping is refused, and what was there stays (D-31).
pub fn overlap_changes_nothing<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let mut space = mapped(test);
    test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
    map(test, &mut space, 4, 2, 10, rw()).expect("mapped");
    map(test, &mut space, 8, 2, 20, rw()).expect("mapped");
    for (first, count) in [(4, 2), (4, 1), (5, 1), (3, 2), (5, 2), (3, 4), (5, 4), (0, 16), (9, 1)] {
        assert_eq!(map(test, &mut space, first, count, 40, rw()), Err(MapError::Overlap), "{first} {count}");
    }
    let outputs = [10, 11, 20, 21].map(|number| Some(test.page(number)));
    let seen: Vec<_> = [4, 5, 8, 9].map(|page| read(test, untagged(endpoint), page)).into();
    assert_eq!(seen, outputs);
    for page in [3, 6, 7, 10] {
        assert_eq!(read(test, untagged(endpoint), page), None);
    }
    map(test, &mut space, 6, 2, 40, rw()).expect("the gap is free");
    assert!(test.host().overlaps(&space, pages(4, 6)));
}

/// UNMAP removes whole mappings or nothing, and passes over what is not mapped (D-41, D-42).
pub fn unmap_splits_nothing<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let mut space = mapped(test);
    test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
    for (first, count) in [(1, 1), (4, 4), (10, 1)] {
        map(test, &mut space, first, count, first, rw()).expect("mapped");
    }
    for (first, count) in [(4, 1), (7, 1), (5, 2), (0, 6), (6, 5), (7, 8), (1, 4)] {
        let unmapped = test.host().unmap(&mut space, pages(first, count));
        assert_eq!(unmapped, Err(UnmapError::Split), "{first} {count}");
        for page in [1, 4, 5, 6, 7, 10] {
            let output = test.page(page);
            assert_eq!(read(test, untagged(endpoint), page), Some(output));
        }
    }
    assert_eq!(test.host().unmap(&mut space, pages(20, 9)), Ok(0));
    assert_eq!(test.host().unmap(&mut space, pages(2, 7)), Ok(1));
    assert_eq!(test.host().unmap(&mut space, IovaRange::ALL), Ok(2));
    for page in [1, 4, 7, 10] {
        assert_eq!(read(test, untagged(endpoint), page), None);
    }
}

/// When `unmap` returns, no endpoint uses the mapping, however warm its caches were; the addresses are free.
pub fn unmap_takes_effect_at_once<T: HostUnderTest>(test: &mut T) {
    let endpoints = test.endpoints();
    let mut space = mapped(test);
    for endpoint in endpoints {
        test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
    }
    for round in 0..8 {
        map(test, &mut space, 7, 2, 10 + round, rw()).expect("mapped");
        for endpoint in endpoints {
            let output = test.page(10 + round);
            for _ in 0..2 {
                assert_eq!(write(test, untagged(endpoint), 7), Some(output));
            }
        }
        assert_eq!(test.host().unmap(&mut space, pages(7, 2)), Ok(1));
        for endpoint in endpoints {
            assert_eq!((write(test, untagged(endpoint), 7), read(test, untagged(endpoint), 8)), (None, None));
        }
    }
}

/// Spaces do not share mappings; one space serves several endpoints.
pub fn mappings_live_in_their_space<T: HostUnderTest>(test: &mut T) {
    let [first, second] = test.endpoints();
    let (mut one, mut two) = (mapped(test), mapped(test));
    // Before and after they are bound.
    map(test, &mut one, 1, 1, 10, rw()).expect("mapped");
    map(test, &mut two, 1, 1, 20, rw()).expect("mapped");
    test.host().bind(untagged(first), Some(&mut one)).expect("bound");
    test.host().bind(untagged(second), Some(&mut two)).expect("bound");
    map(test, &mut two, 2, 1, 21, rw()).expect("mapped");
    let (ten, twenty) = (test.page(10), test.page(20));
    assert_eq!((read(test, untagged(first), 1), read(test, untagged(second), 1)), (Some(ten), Some(twenty)));
    assert_eq!(read(test, untagged(first), 2), None);
    assert_eq!(test.host().unmap(&mut two, IovaRange::ALL), Ok(2));
    assert_eq!((read(test, untagged(first), 1), read(test, untagged(second), 1)), (Some(ten), None));
    test.host().bind(untagged(second), Some(&mut one)).expect("bound");
    assert_eq!(read(test, untagged(second), 1), Some(ten));
}

/// `bind` replaces: nothing of the old space is used any more.
pub fn bind_replaces_in_one_step<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let mut identity = test.host().create(SpaceSpec::Identity).expect("a space");
    let (mut one, mut two) = (mapped(test), mapped(test));
    let target = test.page(3);
    map(test, &mut one, target >> 12, 1, 30, rw()).expect("mapped");
    map(test, &mut two, target >> 12, 1, 40, rw()).expect("mapped");
    for _ in 0..2 {
        for (space, number) in [(&mut one, 30), (&mut identity, 3), (&mut two, 40)] {
            test.host().bind(untagged(endpoint), Some(space)).expect("bound");
            let output = test.page(number);
            assert_eq!(test.access(untagged(endpoint), target, AccessKind::Read), Some(output));
            assert_eq!(test.access(untagged(endpoint), target, AccessKind::Write), Some(output));
        }
    }
}

/// After `bind` to nothing all accesses fault, and the other endpoint notices nothing.
pub fn unbind_closes<T: HostUnderTest>(test: &mut T) {
    let [first, second] = test.endpoints();
    let mut space = mapped(test);
    map(test, &mut space, 1, 1, 10, rw()).expect("mapped");
    for endpoint in [first, second] {
        test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
    }
    let output = test.page(10);
    assert_eq!(write(test, untagged(first), 1), Some(output));
    test.host().bind(untagged(first), None).expect("unbound");
    assert_eq!((write(test, untagged(first), 1), write(test, untagged(second), 1)), (None, Some(output)));
    test.host().bind(untagged(second), None).expect("unbound");
    test.host().destroy(space);
    assert_eq!(write(test, untagged(second), 1), None);
}

/// A space keeps its mappings while nothing is bound to it.
pub fn spaces_outlive_their_streams<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let mut space = mapped(test);
    map(test, &mut space, 1, 1, 10, rw()).expect("mapped");
    for _ in 0..3 {
        test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
        let output = test.page(10);
        assert_eq!(read(test, untagged(endpoint), 1), Some(output));
        test.host().bind(untagged(endpoint), None).expect("unbound");
    }
    assert_eq!(map(test, &mut space, 1, 1, 20, rw()), Err(MapError::Overlap));
    assert_eq!(test.host().unmap(&mut space, IovaRange::ALL), Ok(1));
}

/// Spaces are made and destroyed without end.
pub fn many_spaces<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    for round in 0..200 {
        let mut space = mapped(test);
        map(test, &mut space, round, 1, round % 100, rw()).expect("mapped");
        test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
        let output = test.page(round % 100);
        assert_eq!(read(test, untagged(endpoint), round), Some(output));
        assert_eq!(round.checked_sub(1).and_then(|before| read(test, untagged(endpoint), before)), None);
        test.host().bind(untagged(endpoint), None).expect("unbound");
        test.host().destroy(space);
    }
}
