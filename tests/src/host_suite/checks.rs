//! Streams, bypass and mappings.

use pgtable_formats::{AccessKind, Gpa, Iova, IovaRange, Pasid};
use viommu_device::host::{
    FaultCause, Host, HostError, Invalidation, MapError, Scope, SpaceSpec, Stream, TableKinds, UnmapError,
};
use viommu_device::mapping::{MapFlags, Mapping};
use viommu_wire::{Caches, EndpointId};

use super::abilities::can;
use super::tables::{Handover, kinds};
use super::{Ability, Attempt, HostUnderTest};

pub(super) type Space<T> = <<T as HostUnderTest>::Host as Host>::Space;

pub(super) fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::from_length(Iova(first << 12), count << 12).expect("a range")
}

pub(super) fn untagged(endpoint: EndpointId) -> Stream {
    Stream::untagged(endpoint)
}

pub(super) fn tagged(endpoint: EndpointId, pasid: u32) -> Stream {
    Stream { endpoint, pasid: Some(Pasid::new(pasid).expect("20 bits")) }
}

fn identity<T: HostUnderTest>(test: &mut T) -> Space<T> {
    test.host().create(SpaceSpec::Identity).expect("a space")
}

fn mapped<T: HostUnderTest>(test: &mut T) -> Space<T> {
    test.host().create(SpaceSpec::Mapped).expect("a space")
}

fn bind<T: HostUnderTest>(test: &mut T, endpoint: EndpointId, space: &mut Space<T>) {
    test.host().bind(untagged(endpoint), Some(space)).expect("bound");
}

fn unbind<T: HostUnderTest>(test: &mut T, endpoint: EndpointId) {
    test.host().bind(untagged(endpoint), None).expect("unbound");
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

/// Makes an access and checks where it leads (`None`: it faults), unless the host cannot make it. Answers whether it was
/// made.
pub(super) fn expect_at<T: HostUnderTest>(
    test: &mut T,
    stream: Stream,
    iova: u64,
    kind: AccessKind,
    wanted: Option<u64>,
) -> bool {
    let of_kind = if kind == AccessKind::Write { Ability::Writes } else { Ability::Reads };
    let made =
        can(test, &[Ability::Dma, of_kind]) && (stream.pasid.is_none() || can(test, &[Ability::Pasids]));
    if made {
        let seen = test.access(stream, iova, kind);
        assert_eq!(seen, wanted, "{kind:?} at {iova:#x} by {stream:?}: {seen:#x?}, not {wanted:#x?}");
        assert_eq!(test.host().next_page_request(), None, "an access that does not wait");
    }
    made
}

/// An access to a page, of whatever kind the endpoint can make.
pub(super) fn leads<T: HostUnderTest>(
    test: &mut T,
    stream: Stream,
    page: u64,
    target: impl Into<Option<u64>>,
) -> bool {
    let wanted = target.into().map(|number| test.page(number));
    let lacks_reads = test.cannot().iter().any(|(ability, _)| *ability == Ability::Reads);
    let kind = if lacks_reads { AccessKind::Write } else { AccessKind::Read };
    expect_at(test, stream, page << 12, kind, wanted)
}

/// Reading and writing a page, each with what it reaches.
fn reaches<T: HostUnderTest>(
    test: &mut T,
    endpoint: EndpointId,
    page: u64,
    read: Option<u64>,
    write: Option<u64>,
) {
    for (kind, target) in [(AccessKind::Read, read), (AccessKind::Write, write)] {
        let wanted = target.map(|number| test.page(number));
        expect_at(test, untagged(endpoint), page << 12, kind, wanted);
    }
}

fn rw() -> MapFlags {
    MapFlags::READ | MapFlags::WRITE
}

/// A stream that is bound to nothing reaches nothing, with a PASID or without.
pub fn unbound_streams_fault<T: HostUnderTest>(test: &mut T) {
    for endpoint in test.endpoints() {
        assert!(test.host().caps(endpoint).is_some());
        for stream in [untagged(endpoint), tagged(endpoint, 0), tagged(endpoint, 5)] {
            let target = test.page(1);
            expect_at(test, stream, target, AccessKind::Read, None);
            expect_at(test, stream, target, AccessKind::Write, None);
        }
    }
    assert!(test.host().caps(EndpointId(u32::MAX)).is_none());
}

/// Identity: output equals input, for reads, writes, and every PASID.
pub fn identity_leads_where_it_says<T: HostUnderTest>(test: &mut T) {
    let [first, second] = test.endpoints();
    let mut space = identity(test);
    for endpoint in [first, second] {
        bind(test, endpoint, &mut space);
        for number in [0, 1, 77] {
            let target = test.page(number);
            let tagged = can(test, &[Ability::PasidBypass]).then(|| tagged(endpoint, 9));
            for stream in [Some(untagged(endpoint)), tagged].into_iter().flatten() {
                expect_at(test, stream, target, AccessKind::Read, Some(target));
                expect_at(test, stream, target + 0xfff, AccessKind::Write, Some(target + 0xfff));
            }
        }
        if can(test, &[Ability::BypassBeyondMemory]) {
            for beyond in [0, 0x1000, 0xff_ffff] {
                expect_at(test, untagged(endpoint), beyond, AccessKind::Read, Some(beyond));
            }
        }
    }
    for endpoint in [first, second] {
        unbind(test, endpoint);
    }
    test.host().destroy(space);
}

/// Mappings lead where they say, to the last byte and not beyond, and permit what they say.
pub fn mappings_translate_and_permit<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let mut space = mapped(test);
    bind(test, endpoint, &mut space);
    map(test, &mut space, 0x10, 3, 5, rw()).expect("mapped");
    map(test, &mut space, 0x20, 1, 9, MapFlags::READ).expect("mapped");
    let output = test.page(5);
    for (iova, offset) in [(0x1_0000, 0), (0x1_0fff, 0xfff), (0x1_1234, 0x1234), (0x1_2fff, 0x2fff)] {
        for kind in [AccessKind::Read, AccessKind::Write] {
            expect_at(test, untagged(endpoint), iova, kind, Some(output + offset));
        }
    }
    for iova in [0xffff, 0x1_3000, 0, u64::MAX] {
        for kind in [AccessKind::Read, AccessKind::Write] {
            expect_at(test, untagged(endpoint), iova, kind, None);
        }
    }
    reaches(test, endpoint, 0x20, Some(9), None);
    leads(test, tagged(endpoint, 5), 0x20, None);
}

/// What is only to be written is not read.
pub fn write_only_mappings<T: HostUnderTest>(test: &mut T) {
    if !can(test, &[Ability::WriteOnly]) {
        return;
    }
    let [endpoint, _] = test.endpoints();
    let mut space = mapped(test);
    bind(test, endpoint, &mut space);
    map(test, &mut space, 0x20, 1, 9, MapFlags::WRITE).expect("mapped");
    reaches(test, endpoint, 0x20, None, Some(9));
}

/// MAP over a mapping is refused, and what was there stays (D-31).
pub fn overlap_changes_nothing<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let mut space = mapped(test);
    bind(test, endpoint, &mut space);
    map(test, &mut space, 4, 2, 10, rw()).expect("mapped");
    map(test, &mut space, 8, 2, 20, rw()).expect("mapped");
    for (first, count) in [(4, 2), (4, 1), (5, 1), (3, 2), (5, 2), (3, 4), (5, 4), (0, 16), (9, 1)] {
        assert_eq!(map(test, &mut space, first, count, 40, rw()), Err(MapError::Overlap), "{first} {count}");
    }
    for (page, target) in [(4, 10), (5, 11), (8, 20), (9, 21)] {
        leads(test, untagged(endpoint), page, target);
    }
    for page in [3, 6, 7, 10] {
        leads(test, untagged(endpoint), page, None);
    }
    map(test, &mut space, 6, 2, 40, rw()).expect("the gap is free");
    assert!(test.host().overlaps(&space, pages(4, 6)));
}

/// UNMAP removes whole mappings or nothing, and passes over what is not mapped (D-41, D-42).
pub fn unmap_splits_nothing<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let mut space = mapped(test);
    bind(test, endpoint, &mut space);
    for (first, count) in [(1, 1), (4, 4), (10, 1)] {
        map(test, &mut space, first, count, first, rw()).expect("mapped");
    }
    for (first, count) in [(4, 1), (7, 1), (5, 2), (0, 6), (6, 5), (7, 8), (1, 4)] {
        let unmapped = test.host().unmap(&mut space, pages(first, count));
        assert_eq!(unmapped, Err(UnmapError::Split), "{first} {count}");
        for page in [1, 4, 5, 6, 7, 10] {
            leads(test, untagged(endpoint), page, page);
        }
    }
    assert_eq!(test.host().unmap(&mut space, pages(20, 9)), Ok(0));
    assert_eq!(test.host().unmap(&mut space, pages(2, 7)), Ok(1));
    assert_eq!(test.host().unmap(&mut space, IovaRange::ALL), Ok(2));
    for page in [1, 4, 7, 10] {
        leads(test, untagged(endpoint), page, None);
    }
}

/// When `unmap` returns, no endpoint uses the mapping, however warm its caches were; the addresses are free.
pub fn unmap_takes_effect_at_once<T: HostUnderTest>(test: &mut T) {
    let endpoints = test.endpoints();
    let mut space = mapped(test);
    for endpoint in endpoints {
        bind(test, endpoint, &mut space);
    }
    for round in 0..8 {
        map(test, &mut space, 7, 2, 10 + round, rw()).expect("mapped");
        for endpoint in endpoints {
            for _ in 0..2 {
                reaches(test, endpoint, 7, Some(10 + round), Some(10 + round));
            }
        }
        assert_eq!(test.host().unmap(&mut space, pages(7, 2)), Ok(1));
        for endpoint in endpoints {
            reaches(test, endpoint, 7, None, None);
            reaches(test, endpoint, 8, None, None);
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
    bind(test, first, &mut one);
    bind(test, second, &mut two);
    map(test, &mut two, 2, 1, 21, rw()).expect("mapped");
    leads(test, untagged(first), 1, 10);
    leads(test, untagged(second), 1, 20);
    leads(test, untagged(second), 2, 21);
    leads(test, untagged(first), 2, None);
    assert_eq!(test.host().unmap(&mut two, IovaRange::ALL), Ok(2));
    leads(test, untagged(first), 1, 10);
    leads(test, untagged(second), 1, None);
    bind(test, second, &mut one);
    leads(test, untagged(second), 1, 10);
    // Changes of the shared space are seen by both.
    map(test, &mut one, 3, 1, 12, rw()).expect("mapped");
    leads(test, untagged(first), 3, 12);
    leads(test, untagged(second), 3, 12);
    assert_eq!(test.host().unmap(&mut one, IovaRange::ALL), Ok(2));
    leads(test, untagged(first), 3, None);
    leads(test, untagged(second), 1, None);
}

/// `bind` replaces: nothing of the old space is used any more.
pub fn bind_replaces_in_one_step<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let mut identity = identity(test);
    let (mut one, mut two) = (mapped(test), mapped(test));
    let target = test.page(3);
    map(test, &mut one, target >> 12, 1, 30, rw()).expect("mapped");
    map(test, &mut two, target >> 12, 1, 40, rw()).expect("mapped");
    for _ in 0..2 {
        for (space, number) in [(&mut one, 30), (&mut identity, 3), (&mut two, 40)] {
            bind(test, endpoint, space);
            reaches(test, endpoint, target >> 12, Some(number), Some(number));
        }
    }
}

/// After `bind` to nothing all accesses fault, and the other endpoint notices nothing.
pub fn unbind_closes<T: HostUnderTest>(test: &mut T) {
    let [first, second] = test.endpoints();
    let mut space = mapped(test);
    map(test, &mut space, 1, 1, 10, rw()).expect("mapped");
    for endpoint in [first, second] {
        bind(test, endpoint, &mut space);
    }
    leads(test, untagged(first), 1, 10);
    unbind(test, first);
    leads(test, untagged(first), 1, None);
    leads(test, untagged(second), 1, 10);
    unbind(test, second);
    test.host().destroy(space);
    leads(test, untagged(second), 1, None);
}

/// A space keeps its mappings while nothing is bound to it.
pub fn spaces_outlive_their_streams<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let mut space = mapped(test);
    map(test, &mut space, 1, 1, 10, rw()).expect("mapped");
    for _ in 0..3 {
        bind(test, endpoint, &mut space);
        leads(test, untagged(endpoint), 1, 10);
        unbind(test, endpoint);
    }
    assert_eq!(map(test, &mut space, 1, 1, 20, rw()), Err(MapError::Overlap));
    assert_eq!(test.host().unmap(&mut space, IovaRange::ALL), Ok(1));
}

/// What is refused changes nothing; of a batch of invalidations, those before the refused one are done.
pub fn refusals_change_nothing<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let nobody = EndpointId(u32::MAX);
    let endpoints = test.host().endpoints();
    assert!(endpoints.is_sorted() && endpoints.contains(&endpoint));
    let mut space = identity(test);
    bind(test, endpoint, &mut space);
    assert!(test.host().bind(untagged(nobody), Some(&mut space)).is_err());
    let refused = map(test, &mut space, 1, 1, 1, rw());
    assert_eq!(refused, Err(MapError::Host(HostError::Unsupported)));
    let refused = test.host().unmap(&mut space, IovaRange::ALL);
    assert_eq!(refused, Err(UnmapError::Host(HostError::Unsupported)));
    let page = test.page(1) >> 12;
    leads(test, untagged(endpoint), page, 1);
    let everything = |endpoint| Invalidation {
        endpoint,
        scope: Scope::Endpoint,
        caches: Caches::all(),
        leaf: false,
        tag: None,
        global: true,
    };
    assert_eq!(test.host().invalidate(&[everything(endpoint)]), Ok(()));
    let stopped = test.host().invalidate(&[everything(endpoint), everything(nobody)]);
    assert_eq!(stopped.map_err(|stopped| stopped.done), Err(1));
    leads(test, untagged(endpoint), page, 1);
}

/// Faults come out with what is known of them, once.
pub fn faults_are_told<T: HostUnderTest>(test: &mut T) {
    let [first, second] = test.endpoints();
    let kinds = [(first, AccessKind::Read), (second, AccessKind::Write)];
    if can(test, &[Ability::UnboundFaults]) {
        for (endpoint, kind) in kinds {
            if expect_at(test, untagged(endpoint), 0x1000, kind, None) {
                told(test, untagged(endpoint), 0x1000, kind, FaultCause::Unattached);
            }
        }
    }
    if can(test, &[Ability::MappingFaults]) {
        let mut space = mapped(test);
        map(test, &mut space, 1, 1, 10, MapFlags::READ).expect("mapped");
        for (endpoint, kind) in kinds {
            bind(test, endpoint, &mut space);
            if expect_at(test, untagged(endpoint), 0x5000, kind, None) {
                told(test, untagged(endpoint), 0x5000, kind, FaultCause::Unmapped);
            }
        }
        if expect_at(test, untagged(first), 0x1008, AccessKind::Write, None) {
            told(test, untagged(first), 0x1008, AccessKind::Write, FaultCause::Permission);
        }
    }
    assert!(test.told().is_none());
}

fn told<T: HostUnderTest>(test: &mut T, stream: Stream, iova: u64, kind: AccessKind, cause: FaultCause) {
    let fault = test.told().expect("a fault that is told");
    assert_eq!((fault.stream, fault.kind, fault.cause), (stream, kind, cause));
    assert!(fault.address.is_none_or(|address| address == Iova(iova)), "{fault:?}");
    assert!(test.told().is_none(), "one access, one fault");
}

/// Spaces are made and destroyed without end.
pub fn many_spaces<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    for round in 0..200 {
        let mut space = mapped(test);
        map(test, &mut space, round, 1, round % 100, rw()).expect("mapped");
        bind(test, endpoint, &mut space);
        leads(test, untagged(endpoint), round, round % 100);
        if let Some(before) = round.checked_sub(1) {
            leads(test, untagged(endpoint), before, None);
        }
        unbind(test, endpoint);
        test.host().destroy(space);
    }
}

/// What the host says it cannot, it does not do, and does not advertise: so nothing is left out without need.
pub fn what_is_denied_is_refused<T: HostUnderTest>(test: &mut T) {
    let [endpoint, _] = test.endpoints();
    let caps = test.host().caps(endpoint).expect("an endpoint").clone();
    for (ability, reason) in test.cannot().to_vec() {
        assert!(!reason.is_empty());
        match ability {
            Ability::PasidTables => {
                assert!(caps.tables.is_none() || !caps.kinds.contains(TableKinds::PASID_TABLE), "{ability}");
            }
            Ability::PageTables => {
                assert!(caps.tables.is_none() || !caps.kinds.contains(TableKinds::PAGE_TABLE), "{ability}");
            }
            Ability::UnboundFaults => {
                for kind in [AccessKind::Read, AccessKind::Write] {
                    denied_fault(test, untagged(endpoint), kind);
                }
            }
            Ability::MappingFaults => {
                let mut space = mapped(test);
                bind(test, endpoint, &mut space);
                for kind in [AccessKind::Read, AccessKind::Write] {
                    denied_fault(test, untagged(endpoint), kind);
                }
                unbind(test, endpoint);
                test.host().destroy(space);
            }
            Ability::WriteOnly if can(test, &[Ability::Dma, Ability::Reads]) => {
                let mut space = mapped(test);
                bind(test, endpoint, &mut space);
                // The mapping is refused, or can be read as well.
                if map(test, &mut space, 0x20, 1, 9, MapFlags::WRITE).is_ok() {
                    leads(test, untagged(endpoint), 0x20, 9);
                }
                unbind(test, endpoint);
                test.host().destroy(space);
            }
            Ability::PasidBypass if can(test, &[Ability::Dma, Ability::Pasids]) => {
                let mut space = identity(test);
                bind(test, endpoint, &mut space);
                let page = test.page(1) >> 12;
                leads(test, tagged(endpoint, 9), page, None);
                while test.told().is_some() {}
                unbind(test, endpoint);
                test.host().destroy(space);
            }
            Ability::PageRequests => {
                assert!(!caps.page_requests, "{ability}");
                if can(test, &[Ability::Dma, Ability::Writes]) {
                    asks_nobody(test);
                }
            }
            _ => {}
        }
    }
}

/// An access to a page that is not there, by whoever cannot wait for it.
fn asks_nobody<T: HostUnderTest>(test: &mut T) {
    for kind in kinds(test) {
        let bound = Handover::new(test, kind);
        for index in 0..bound.pages.len() {
            let attempt = test.attempt(bound.stream(index), 0x9000, AccessKind::Write);
            assert!(matches!(attempt, Attempt::Fails), "{attempt:?}");
            assert_eq!(test.host().next_page_request(), None);
        }
        bound.end(test);
    }
    while test.told().is_some() {}
}

/// An access that faults, and that nobody hears of.
fn denied_fault<T: HostUnderTest>(test: &mut T, stream: Stream, kind: AccessKind) {
    if expect_at(test, stream, 0x5000, kind, None) {
        assert!(test.told().is_none(), "a fault that was denied");
    }
}
