//! What every [`Host`] has to hold, written once: a second host runs the same checks.
//!
//! For tests: the checks are assertions.

#![allow(clippy::expect_used, reason = "a check fails by panicking")]

use pgtable_formats::{Access, Gpa, Iova, IovaRange};
use viommu_wire::{Caches, EndpointId};

use crate::host::{
    FaultCause, Host, HostError, Invalidation, MapError, Scope, SpaceSpec, Stream, UnmapError,
};
use crate::mapping::{MapFlags, Mapping};

/// A host under test, and how an access of a device gets to it.
pub trait Rig {
    /// The host.
    type Host: Host;

    /// The host.
    fn host(&mut self) -> &mut Self::Host;

    /// Two endpoints, bound to nothing, whose reserved regions lie outside of `0..=0xff_ffff`; guest memory or
    /// something else that may be mapped is at the output addresses `0x4000_0000..=0x40ff_ffff`.
    fn endpoints(&self) -> [EndpointId; 2];

    /// A number that is no endpoint's.
    fn no_endpoint(&self) -> EndpointId;

    /// One access of a device: where it leads, or why it faults.
    ///
    /// # Errors
    /// The fault. It must come out of [`Host::next_fault`] as well.
    fn dma(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Gpa, FaultCause>;
}

/// Every check; `rig` makes a fresh host for each.
///
/// # Panics
/// Where the host does not hold what [`Host`] promises.
pub fn check<R: Rig>(rig: impl Fn() -> R) {
    check_unbound(rig());
    check_identity(rig());
    check_mapped(rig());
    check_sharing(rig());
    check_refusals(rig());
    check_faults(rig());
}

/// A stream that is bound to nothing faults, and does so again after it was unbound.
fn check_unbound<R: Rig>(mut rig: R) {
    let [endpoint, _] = rig.endpoints();
    let stream = Stream::untagged(endpoint);
    assert_eq!(rig.dma(stream, Iova(0x1000), Access::READ), Err(FaultCause::Unattached));
    let mut space = rig.host().create(SpaceSpec::Identity).expect("identity");
    rig.host().bind(stream, Some(&mut space)).expect("bind");
    assert_eq!(rig.dma(stream, Iova(0x1000), Access::READ), Ok(Gpa(0x1000)));
    rig.host().bind(stream, None).expect("unbind");
    assert_eq!(rig.dma(stream, Iova(0x1000), Access::READ), Err(FaultCause::Unattached));
    rig.host().destroy(space);
}

/// Output equals input, at both ends of a page and for writes.
fn check_identity<R: Rig>(mut rig: R) {
    let [endpoint, _] = rig.endpoints();
    let mut space = rig.host().create(SpaceSpec::Identity).expect("identity");
    rig.host().bind(Stream::untagged(endpoint), Some(&mut space)).expect("bind");
    for address in [0, 0x0fff, 0x1000, 0xff_ffff] {
        for access in [Access::READ, Access::WRITE] {
            let output = rig.dma(Stream::untagged(endpoint), Iova(address), access);
            assert_eq!(output, Ok(Gpa(address)));
        }
    }
}

/// Mappings begin and end where they were asked to, permit what they say, and refuse to overlap or to be split.
fn check_mapped<R: Rig>(mut rig: R) {
    let [endpoint, _] = rig.endpoints();
    let stream = Stream::untagged(endpoint);
    let mut space = rig.host().create(SpaceSpec::Mapped).expect("space");
    rig.host().map(&mut space, mapping(0x1000, 0x3000, MapFlags::READ)).expect("map before bind");
    rig.host().bind(stream, Some(&mut space)).expect("bind");
    rig.host().map(&mut space, mapping(0x4000, 0x1000, MapFlags::WRITE)).expect("map after bind");

    let expected = [
        (0x0fff, Access::READ, Err(FaultCause::Unmapped)),
        (0x1000, Access::READ, Ok(Gpa(0x4000_1000))),
        (0x3fff, Access::READ, Ok(Gpa(0x4000_3fff))),
        (0x3fff, Access::WRITE, Err(FaultCause::Permission)),
        (0x4000, Access::WRITE, Ok(Gpa(0x4000_4000))),
        (0x4000, Access::READ, Err(FaultCause::Permission)),
        (0x4fff, Access::WRITE, Ok(Gpa(0x4000_4fff))),
        (0x5000, Access::WRITE, Err(FaultCause::Unmapped)),
    ];
    let as_expected = |rig: &mut R| {
        for (address, access, answer) in expected {
            assert_eq!(rig.dma(stream, Iova(address), access), answer, "{address:#x}");
        }
    };
    as_expected(&mut rig);
    let overlap = rig.host().map(&mut space, mapping(0x3000, 0x1000, MapFlags::READ));
    assert_eq!(overlap, Err(MapError::Overlap));
    for touched in [range(0x1000, 0x1000), range(0x3000, 0x2000), range(0, 0x2000)] {
        assert_eq!(rig.host().unmap(&mut space, touched), Err(UnmapError::Split), "{touched}");
    }
    as_expected(&mut rig);
    assert_eq!(rig.host().unmap(&mut space, range(0x5000, 0x1000)), Ok(0));
    assert_eq!(rig.host().unmap(&mut space, range(0x4000, 0x1000)), Ok(1));
    assert_eq!(rig.dma(stream, Iova(0x4000), Access::WRITE), Err(FaultCause::Unmapped));
    assert_eq!(rig.dma(stream, Iova(0x3fff), Access::READ), Ok(Gpa(0x4000_3fff)));
    assert_eq!(rig.host().unmap(&mut space, IovaRange::ALL), Ok(1));
    assert_eq!(rig.dma(stream, Iova(0x3fff), Access::READ), Err(FaultCause::Unmapped));
}

/// Two endpoints in one space see its changes; one that moves to another space leaves the other where it was.
fn check_sharing<R: Rig>(mut rig: R) {
    let [first, second] = rig.endpoints().map(Stream::untagged);
    let mut shared = rig.host().create(SpaceSpec::Mapped).expect("space");
    let mut own = rig.host().create(SpaceSpec::Mapped).expect("space");
    for stream in [first, second] {
        rig.host().bind(stream, Some(&mut shared)).expect("bind");
    }
    rig.host().map(&mut shared, mapping(0x1000, 0x1000, MapFlags::READ)).expect("map");
    for stream in [first, second] {
        assert_eq!(rig.dma(stream, Iova(0x1000), Access::READ), Ok(Gpa(0x4000_1000)));
    }
    assert_eq!(rig.host().unmap(&mut shared, IovaRange::ALL), Ok(1));
    for stream in [first, second] {
        assert_eq!(rig.dma(stream, Iova(0x1000), Access::READ), Err(FaultCause::Unmapped));
    }
    rig.host().map(&mut shared, mapping(0x1000, 0x1000, MapFlags::READ)).expect("map");
    assert_eq!(rig.dma(second, Iova(0x1000), Access::READ), Ok(Gpa(0x4000_1000)));
    rig.host().bind(second, Some(&mut own)).expect("move");
    assert_eq!(rig.dma(first, Iova(0x1000), Access::READ), Ok(Gpa(0x4000_1000)));
    assert_eq!(rig.dma(second, Iova(0x1000), Access::READ), Err(FaultCause::Unmapped));
    rig.host().bind(first, None).expect("unbind");
    rig.host().destroy(shared);
}

/// What is refused changes nothing.
fn check_refusals<R: Rig>(mut rig: R) {
    let [endpoint, _] = rig.endpoints();
    let stream = Stream::untagged(endpoint);
    let nobody = Stream::untagged(rig.no_endpoint());
    assert!(rig.host().caps(nobody.endpoint).is_none());
    assert!(rig.host().caps(endpoint).is_some());
    let endpoints = rig.host().endpoints();
    assert!(endpoints.is_sorted() && endpoints.contains(&endpoint));

    let mut space = rig.host().create(SpaceSpec::Identity).expect("identity");
    rig.host().bind(stream, Some(&mut space)).expect("bind");
    assert!(rig.host().bind(nobody, Some(&mut space)).is_err());
    let refused = rig.host().map(&mut space, mapping(0x1000, 0x1000, MapFlags::READ));
    assert_eq!(refused, Err(MapError::Host(HostError::Unsupported)));
    let refused = rig.host().unmap(&mut space, IovaRange::ALL);
    assert_eq!(refused, Err(UnmapError::Host(HostError::Unsupported)));
    assert_eq!(rig.dma(stream, Iova(0x1000), Access::READ), Ok(Gpa(0x1000)));

    let everything = |endpoint| Invalidation {
        endpoint,
        scope: Scope::Endpoint,
        caches: Caches::all(),
        leaf: false,
        tag: None,
        global: true,
    };
    assert_eq!(rig.host().invalidate(&[everything(endpoint)]), Ok(()));
    let stopped = rig.host().invalidate(&[everything(endpoint), everything(nobody.endpoint)]);
    assert_eq!(stopped.map_err(|stopped| stopped.done), Err(1));
}

/// Faults come out in order, once.
fn check_faults<R: Rig>(mut rig: R) {
    let [first, second] = rig.endpoints().map(Stream::untagged);
    assert!(rig.host().next_fault().is_none());
    for (stream, address, access) in [(first, 0x1234, Access::READ), (second, 0x5678, Access::WRITE)] {
        assert_eq!(rig.dma(stream, Iova(address), access), Err(FaultCause::Unattached));
    }
    for (stream, address, access) in [(first, 0x1234, Access::READ), (second, 0x5678, Access::WRITE)] {
        let fault = rig.host().next_fault().expect("a fault for each access");
        assert_eq!((fault.stream, fault.cause), (stream, FaultCause::Unattached));
        assert_eq!((fault.kind, fault.privileged), (access.kind, false));
        assert!(fault.address.is_none_or(|seen| seen == Iova(address)));
    }
    assert!(rig.host().next_fault().is_none());
}

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::from_length(Iova(start), length).expect("a range")
}

/// To the output address that lies 1 GiB higher.
fn mapping(start: u64, length: u64, flags: MapFlags) -> Mapping {
    Mapping { range: range(start, length), output: Gpa(0x4000_0000 + start), flags }
}
