//! Ranges, odd sizes, and the fault log.

use super::super::{MAX_PENDING_FAULTS, Piece};
use super::*;
use crate::mapping::{MapFlags, Mapping};

type Pieces = Vec<(u64, u64, u64)>;

fn collect(host: &mut SoftHost<Memory>, range: IovaRange) -> (Pieces, Result<(), FaultCause>) {
    let mut pieces = Vec::new();
    let stream = Stream::untagged(ENDPOINT);
    let sink = |iova: Iova, output: Gpa, length| pieces.push((iova.0, output.0, length));
    let result = host.translate_range(stream, range, Access::READ, sink);
    (pieces, result)
}

fn mapped(mappings: &[(u64, u64, u64)]) -> SoftHost<Memory> {
    let mut host = SoftHost::new(Memory::new());
    host.add_endpoint(ENDPOINT, EndpointCaps::default()).unwrap();
    let mut space = host.create(SpaceSpec::Mapped).unwrap();
    for &(start, length, output) in mappings {
        let mapping = Mapping { range: range(start, length), output: Gpa(output), flags: MapFlags::READ };
        host.map(&mut space, mapping).unwrap();
    }
    host.bind(Stream::untagged(ENDPOINT), Some(&mut space)).unwrap();
    host
}

#[test]
fn ranges_come_in_as_few_pieces_as_there_are() {
    let mut host = mapped(&[(0x1000, 0x3000, 0x9000), (0x4000, 0x1000, 0xc000), (0x5000, 0x1000, 0x2_0000)]);
    for _ in 0..2 {
        let expected = vec![(0x1800, 0x9800, 0x3800), (0x5000, 0x2_0000, 0x800)];
        assert_eq!(collect(&mut host, range(0x1800, 0x4000)), (expected, Ok(())));
        assert_eq!(collect(&mut host, range(0x5fff, 1)), (vec![(0x5fff, 0x2_0fff, 1)], Ok(())));
    }
}

#[test]
fn a_range_stops_where_it_faults() {
    let mut host = mapped(&[(0x1000, 0x1000, 0x9000), (0x3000, 0x1000, 0xb000)]);
    let (pieces, result) = collect(&mut host, range(0x1000, 0x3000));
    assert_eq!((pieces, result), (vec![(0x1000, 0x9000, 0x1000)], Err(FaultCause::Unmapped)));
    let fault = host.next_fault().unwrap();
    assert_eq!(fault.address, Some(Iova(0x2000)));
    assert_eq!(host.next_fault(), None);
}

#[test]
fn ranges_reach_the_end_of_the_space() {
    let mut host = SoftHost::new(Memory::new());
    host.add_endpoint(ENDPOINT, EndpointCaps::default()).unwrap();
    let mut space = host.create(SpaceSpec::Identity).unwrap();
    host.bind(Stream::untagged(ENDPOINT), Some(&mut space)).unwrap();
    let (pieces, result) = collect(&mut host, IovaRange::ALL);
    // 2^64 bytes have no length in 64 bits.
    assert_eq!((pieces.len(), result), (2, Ok(())));
    let (pieces, _) = collect(&mut host, range(u64::MAX, 1));
    assert_eq!(pieces, [(u64::MAX, u64::MAX, 1)]);
}

#[test]
fn mappings_of_any_size_and_alignment_are_exact() {
    // Bytes, and outputs that are not aligned like inputs.
    let mut host = mapped(&[(0x1001, 3, 0x9000), (0x2000, 0x4000, 0xa080), (0x6000, 0x4000, 0x1_0000)]);
    let stream = Stream::untagged(ENDPOINT);
    let mut at =
        |iova| host.translate(stream, Iova(iova), Access::READ, |piece| (piece.output.0, piece.length));
    for _ in 0..2 {
        assert_eq!(at(0x1000), Err(FaultCause::Unmapped));
        assert_eq!(at(0x1001), Ok((0x9000, 3)));
        assert_eq!(at(0x1003), Ok((0x9002, 1)));
        assert_eq!(at(0x1004), Err(FaultCause::Unmapped));
        assert_eq!(at(0x5fff), Ok((0xe07f, 1)));
        assert_eq!(at(0x9fff), Ok((0x1_3fff, 1)));
    }
}

#[test]
fn pieces_tell_the_truth_about_their_length() {
    // Aligned differently: the cached block is smaller than the mapping.
    let mut host = mapped(&[(0x3000, 0x9000, 0x1_1000)]);
    let stream = Stream::untagged(ENDPOINT);
    for _ in 0..2 {
        for iova in (0x3000..0xc000).step_by(0x800) {
            let Piece { output, length } = host.peek(stream, Iova(iova), Access::READ).unwrap();
            assert_eq!(output, Gpa(iova + 0xe000));
            assert!(length >= 0x1000 - (iova & 0xfff) && iova + length <= 0xc000, "{iova:#x} {length:#x}");
        }
    }
}

#[test]
fn unmap_takes_every_page_of_a_mapping() {
    for pages in [1, 3, 1000] {
        let mut host = mapped(&[]);
        let stream = Stream::untagged(ENDPOINT);
        let mut space = host.create(SpaceSpec::Mapped).unwrap();
        host.bind(stream, Some(&mut space)).unwrap();
        let all = range(0x10_0000, pages * 0x1000);
        host.map(&mut space, Mapping { range: all, output: Gpa(0), flags: MapFlags::READ }).unwrap();
        let kept = Mapping { range: range(0, 0x1000), output: Gpa(0x7000), flags: MapFlags::READ };
        host.map(&mut space, kept).unwrap();
        for page in 0..pages {
            assert!(host.peek(stream, Iova(0x10_0000 + page * 0x1000), Access::READ).is_ok());
        }
        assert_eq!(host.unmap(&mut space, all), Ok(1));
        for page in 0..pages {
            let gone = host.peek(stream, Iova(0x10_0000 + page * 0x1000), Access::READ);
            assert_eq!(gone, Err(FaultCause::Unmapped));
        }
        assert!(host.peek(stream, Iova(0xfff), Access::READ).is_ok());
    }
}

#[test]
fn faults_are_bounded_and_the_oldest_are_kept() {
    let mut host = mapped(&[]);
    let stream = Stream::untagged(ENDPOINT);
    for address in 0..MAX_PENDING_FAULTS as u64 + 10 {
        assert_eq!(host.translate(stream, Iova(address), Access::WRITE, |_| ()), Err(FaultCause::Unmapped));
    }
    assert_eq!(host.faults_dropped(), 10);
    for address in 0..MAX_PENDING_FAULTS as u64 {
        assert_eq!(host.next_fault().unwrap().address, Some(Iova(address)));
    }
    assert_eq!(host.next_fault(), None);
    // There is room again.
    assert!(host.translate(stream, Iova(1), Access::WRITE, |_| ()).is_err());
    assert!(host.next_fault().is_some());
    // Looking is not accessing.
    assert!(host.peek(stream, Iova(1), Access::WRITE).is_err());
    assert_eq!(host.next_fault(), None);
}

#[test]
fn faults_carry_the_architecture_s_name() {
    use alloc::string::ToString;
    for (arch, name) in [(Arch::Arm, "F_TRANSLATION"), (Arch::Vtd, "0x71")] {
        let mut world = World::new(arch);
        let table = world.page_table();
        world.set_context(1, 11, table);
        assert_eq!(world.read(1, 0x1234).unwrap_err().to_string(), name);
        let fault = world.host.next_fault().unwrap();
        assert_eq!((fault.stream, fault.address), (tagged(1), Some(Iova(0x1234))));
        assert!(fault.cause.is_mapping());
    }
}

#[test]
fn an_endpoint_that_does_not_exist_makes_no_fault_report() {
    let mut host = SoftHost::new(super::super::NoMemory);
    let stream = Stream::untagged(EndpointId(77));
    assert_eq!(host.translate(stream, Iova(0), Access::READ, |_| ()), Err(FaultCause::Unattached));
    assert_eq!(host.next_fault(), None);
}
