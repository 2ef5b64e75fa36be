//! Streams are bound, and bound to something else.

use viommu_device::host::HostError;

use super::*;

#[test]
fn one_table_is_allocated_for_one_table_and_one_ioctl_binds_it() {
    for unit in [Unit::smmuv3(), Unit::vtd()] {
        let mut rig = Rig::two(unit);
        rig.kernel.take();
        let (mut space, _) = rig.table(FIRST, 0x1000, 0x4000_0000);
        assert_eq!((rig.count(Call::AllocHwpt), rig.kernel.counts().ioctls()), (1, 1));
        rig.bind(FIRST, &mut space);
        assert_eq!((rig.count(Call::Attach), rig.kernel.counts().ioctls()), (1, 2));
        assert_eq!(rig.read(FIRST, 0x1234), Ok(0x4000_0234));
        assert!(rig.read(SECOND, 0x1234).is_err());
        let [mut second, mut first] = [(); 2].map(|()| rig.identity());
        rig.bind(SECOND, &mut second);
        rig.bind(FIRST, &mut first);
        assert_eq!(rig.read(FIRST, 0x6000_0000), Ok(0x6000_0000));
        assert_eq!(rig.fake().violations(), [""; 0]);
    }
}

#[test]
fn a_space_that_is_let_go_too_early_goes_when_the_stream_has_left() {
    for unit in [Unit::smmuv3(), Unit::vtd(), Unit::Plain] {
        let mut rig = Rig::two(unit);
        let before = rig.fake().describe();
        let mut mapped = rig.mapped();
        rig.host.map(&mut mapped, mapping(0x1000, 0x1000, 0x4000_0000, READ_WRITE)).unwrap();
        rig.bind(FIRST, &mut mapped);
        rig.host.destroy(mapped);
        assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_0000));
        rig.host.bind(Stream::untagged(FIRST), None).unwrap();
        assert!(rig.read(FIRST, 0x1000).is_err());
        assert_eq!(rig.fake().describe(), before);
    }
}

#[test]
fn a_table_of_mappings_is_there_while_it_is_used() {
    let mut rig = Rig::two(Unit::smmuv3());
    let mut mapped = rig.mapped();
    let before = rig.fake().objects();
    for endpoint in [FIRST, SECOND] {
        rig.bind(endpoint, &mut mapped);
        assert_eq!(rig.fake().objects(), before + 1);
    }
    rig.host.bind(Stream::untagged(FIRST), None).unwrap();
    assert_eq!(rig.fake().objects(), before + 1);
    rig.host.bind(Stream::untagged(SECOND), None).unwrap();
    assert_eq!(rig.fake().objects(), before);
}

#[test]
fn tables_are_for_their_endpoint_and_for_the_streams_that_they_serve() {
    let tagged = |pasid| Stream { endpoint: FIRST, pasid: Some(pasid_of(pasid)) };
    let unsupported = Err(HostError::Unsupported);
    let mut rig = Rig::two(Unit::smmuv3());
    let (mut space, _) = rig.table(FIRST, 0x1000, 0x4000_0000);
    assert_eq!(rig.host.bind(Stream::untagged(SECOND), Some(&mut space)), unsupported);
    assert_eq!(rig.host.bind(tagged(1), Some(&mut space)), unsupported);
    let mut rig = Rig::two(Unit::vtd());
    let (mut space, _) = rig.table(FIRST, 0x1000, 0x4000_0000);
    assert_eq!(rig.host.bind(tagged(0), Some(&mut space)), unsupported);
    assert_eq!(rig.host.bind(tagged(1), Some(&mut space)), Ok(()));
    assert_eq!(rig.host.bind(tagged(2), None), Ok(()));
}

#[test]
fn pasids_of_vt_d_come_and_go_one_by_one() {
    let mut rig = Rig::two(Unit::vtd());
    let before = rig.fake().describe();
    let streams = [1, 5].map(|pasid| Stream { endpoint: FIRST, pasid: Some(pasid_of(pasid)) });
    let mut spaces = [0x4000_0000, 0x4000_1000].map(|output| rig.table(FIRST, 0x1000, output).0);
    for (stream, space) in streams.into_iter().zip(&mut spaces) {
        rig.host.bind(stream, Some(space)).unwrap();
    }
    let read = |rig: &Rig, pasid| rig.dma(FIRST, Some(pasid), 0x1000, Access::READ);
    assert_eq!((read(&rig, 1), read(&rig, 5)), (Ok(0x4000_0000), Ok(0x4000_1000)));
    assert!(rig.read(FIRST, 0x1000).is_err());
    rig.host.bind(streams[0], Some(&mut spaces[1])).unwrap();
    assert_eq!(read(&rig, 1), Ok(0x4000_1000));
    rig.host.bind(streams[0], None).unwrap();
    assert!(read(&rig, 1).is_err());
    assert_eq!(read(&rig, 5), Ok(0x4000_1000));
    rig.host.bind(streams[1], None).unwrap();
    for space in spaces {
        rig.host.destroy(space);
    }
    assert_eq!(rig.fake().describe(), before);
}

#[test]
fn a_table_outside_of_memory_is_refused() {
    for unit in [Unit::smmuv3(), Unit::vtd()] {
        let mut rig = Rig::two(unit);
        let caps = rig.caps(FIRST);
        let table = match &caps {
            TableCaps::Smmuv3(caps) => {
                Canonical::Smmuv3(smmuv3::CdTable::from_ste(0x5000_0000, 0, caps).unwrap())
            }
            TableCaps::Vtd(caps) => {
                let flags = vtd::FirstStageFlags::empty();
                Canonical::VtdFirstStage(vtd::FirstStage::new(Gpa(0x5000_0000), flags, 48, caps).unwrap())
            }
        };
        let spec = SpaceSpec::GuestTable { endpoint: FIRST, table: &table };
        assert_eq!(rig.host.create(spec).err(), Some(HostError::BadAddress));
    }
}

/// F1.7: replacing a nested table of an SMMUv3 leaves what is cached under the guest's tags. From table to table the
/// device core drops it; from a table to something else the host does.
#[test]
fn surprise_7_nothing_of_a_table_is_cached_once_it_was_left() {
    let mut rig = Rig::two(Unit::smmuv3());
    let (mut space, pages) = rig.table(FIRST, 0x1000, 0x4000_0000);
    rig.bind(FIRST, &mut space);
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_0000));
    rig.kernel.take();
    rig.host.bind(Stream::untagged(FIRST), None).unwrap();
    assert_eq!((rig.count(Call::Attach), rig.count(Call::Invalidate)), (1, 2));
    pages.remap(&mut rig.guest, 0x1000, 0x4000_1000);
    rig.bind(FIRST, &mut space);
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_1000));
}

#[test]
fn faults_of_a_table_come_out_once() {
    // Without ATS: a device that asks for translations is told the fault, and nobody else.
    let mut rig = Rig::two(Unit::emulated_smmuv3());
    let (mut space, _) = rig.table(SECOND, 0x1000, 0x4000_0000);
    rig.bind(SECOND, &mut space);
    for page in 2..40 {
        assert!(rig.dma(SECOND, None, page << 12, Access::WRITE).is_err());
    }
    let reports = std::iter::from_fn(|| rig.host.next_fault());
    let seen: Vec<_> =
        reports.map(|report| (report.stream, report.address, report.cause.is_mapping())).collect();
    let expected: Vec<_> =
        (2..40).map(|page| (Stream::untagged(SECOND), Some(Iova(page << 12)), true)).collect();
    assert_eq!(seen, expected);
    assert_eq!((rig.host.lost_events(), rig.host.ignored_events()), (0, 0));
}
