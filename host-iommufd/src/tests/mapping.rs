//! MAP and UNMAP.

use viommu_device::host::{HostError, MapError, UnmapError};

use super::*;
use crate::kernel::Backing;

const UNITS: [fn() -> Unit; 3] = [Unit::smmuv3, Unit::vtd, || Unit::Plain];

fn rig(unit: fn() -> Unit) -> (Rig, Space<Kernel>) {
    let mut rig = Rig::two(unit());
    let mut space = rig.mapped();
    rig.bind(FIRST, &mut space);
    rig.kernel.take();
    (rig, space)
}

#[test]
fn one_mapping_may_span_regions_of_memory_and_is_one_for_unmap() {
    for unit in UNITS {
        let (mut rig, mut space) = rig(unit);
        rig.host.map(&mut space, mapping(0x10_0000, 0x4000, 0x403f_e000, READ_WRITE)).unwrap();
        assert_eq!(rig.count(Call::Map), 2);
        for at in [0, 0x1fff, 0x2000, 0x3fff] {
            assert_eq!(rig.read(FIRST, 0x10_0000 + at), Ok(0x403f_e000 + at));
        }
        let part = range(0x10_0000, 0x2000);
        assert_eq!(rig.host.unmap(&mut space, part), Err(UnmapError::Split));
        assert_eq!(rig.host.unmap(&mut space, IovaRange::ALL), Ok(1));
        assert_eq!(rig.count(Call::Unmap), 1);
        assert!(rig.read(FIRST, 0x10_0000).is_err());
        assert_eq!(rig.host.unmap(&mut space, IovaRange::ALL), Ok(0));
        assert_eq!(rig.count(Call::Unmap), 1);
    }
}

#[test]
fn what_is_not_memory_is_refused_and_nothing_of_it_mapped() {
    let (mut rig, mut space) = rig(Unit::smmuv3);
    for (output, length, flags) in [
        (0x407f_f000, 0x2000, READ_WRITE),
        (0x5000_0000, 0x1000, READ_WRITE),
        (0x900_0000, 0x1000, READ_WRITE | MapFlags::MMIO),
        (0xffff_ffff_ffff_f000, 0x2000, MapFlags::READ),
    ] {
        let result = rig.host.map(&mut space, mapping(0x1000, length, output, flags));
        assert_eq!(result, Err(MapError::Host(HostError::BadAddress)));
    }
    assert_eq!(rig.count(Call::Map), 0);
    assert!(!rig.host.overlaps(&space, IovaRange::ALL));
}

/// D-35: no write without WRITE. One that permits nothing is there for UNMAP, and for overlaps.
#[test]
fn mappings_permit_what_they_say() {
    for unit in UNITS {
        let (mut rig, mut space) = rig(unit);
        rig.host.map(&mut space, mapping(0x1000, 0x1000, 0x4000_0000, MapFlags::READ)).unwrap();
        rig.host.map(&mut space, mapping(0x2000, 0x1000, 0x4000_0000, MapFlags::WRITE)).unwrap();
        rig.host.map(&mut space, mapping(0x3000, 0x1000, 0x4000_0000, MapFlags::empty())).unwrap();
        assert_eq!(rig.count(Call::Map), 2);
        assert_eq!(rig.dma(FIRST, None, 0x1000, Access::READ), Ok(0x4000_0000));
        assert!(rig.dma(FIRST, None, 0x1000, Access::WRITE).is_err());
        assert_eq!(rig.dma(FIRST, None, 0x2000, Access::WRITE), Ok(0x4000_0000));
        assert!(rig.dma(FIRST, None, 0x3000, Access::READ).is_err());
        let again = rig.host.map(&mut space, mapping(0x3000, 0x1000, 0x4000_0000, READ_WRITE));
        assert_eq!(again, Err(MapError::Overlap));
        assert_eq!(rig.host.unmap(&mut space, range(0x3000, 0x1000)), Ok(1));
        assert_eq!(rig.host.unmap(&mut space, IovaRange::ALL), Ok(2));
    }
}

#[test]
fn a_mapping_whose_second_piece_fails_is_not_there() {
    let (mut rig, mut space) = rig(Unit::smmuv3);
    let spanning = mapping(0x1000, 0x4000, 0x403f_e000, READ_WRITE);
    rig.failing().fail_nth(1, Errno::ENOMEM);
    let result = rig.host.map(&mut space, spanning);
    assert_eq!(result, Err(MapError::Host(HostError::NoMemory)));
    assert!(rig.read(FIRST, 0x1000).is_err());
    rig.failing().heal();
    rig.host.map(&mut space, spanning).unwrap();
    assert_eq!(rig.read(FIRST, 0x3000), Ok(0x4040_0000));
}

/// Even the way back may fail: what stays is removed before anything else happens in the space.
#[test]
fn what_a_failed_mapping_left_goes_before_the_next() {
    let (mut rig, mut space) = rig(Unit::smmuv3);
    let spanning = mapping(0x1000, 0x4000, 0x403f_e000, READ_WRITE);
    rig.failing().fail_run(1, u64::MAX, Errno::ENOMEM);
    for _ in 0..2 {
        let result = rig.host.map(&mut space, spanning);
        assert_eq!(result, Err(MapError::Host(HostError::NoMemory)));
        assert!(rig.host.unmap(&mut space, IovaRange::ALL).is_err());
    }
    rig.failing().heal();
    rig.host.map(&mut space, mapping(0x1000, 0x1000, 0x6000_0000, READ_WRITE)).unwrap();
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x6000_0000));
    assert!(rig.read(FIRST, 0x2000).is_err());
}

#[test]
fn mappings_that_were_not_unmapped_are_still_there() {
    let (mut rig, mut space) = rig(Unit::smmuv3);
    for page in [1, 2, 4] {
        rig.host.map(&mut space, mapping(page << 12, 0x1000, 0x4000_0000, READ_WRITE)).unwrap();
    }
    rig.failing().fail_nth(0, Errno::EBUSY);
    let failed = UnmapError::Host(HostError::Failed(Errno::EBUSY as i32));
    assert_eq!(rig.host.unmap(&mut space, range(0x1000, 0x2000)), Err(failed));
    rig.failing().heal();
    for page in [1, 2, 4] {
        assert_eq!(rig.read(FIRST, page << 12), Ok(0x4000_0000));
    }
    assert_eq!(rig.host.unmap(&mut space, range(0x1000, 0x2000)), Ok(2));
    assert!(rig.read(FIRST, 0x1000).is_err());
    assert_eq!(rig.read(FIRST, 0x4000), Ok(0x4000_0000));
}

/// A kernel that removed some and then stopped: what is gone is mapped anew.
#[test]
fn an_unmap_that_stopped_half_way_is_undone() {
    let (mut rig, mut space) = rig(Unit::smmuv3);
    for page in [1, 2] {
        rig.host.map(&mut space, mapping(page << 12, 0x1000, 0x4000_0000, READ_WRITE)).unwrap();
    }
    let crate::space::Kind::Mapped(mapped) = &space.0 else { panic!() };
    mapped.unmap_behind_its_back(range(0x1000, 0x1000));
    assert!(rig.read(FIRST, 0x1000).is_err());
    rig.failing().fail_nth(0, Errno::EBUSY);
    assert!(rig.host.unmap(&mut space, IovaRange::ALL).is_err());
    assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_0000));
}

/// Memory that is a file goes to the kernel as such, from whatever offset; where it takes no files, by address.
#[test]
fn memory_that_is_a_file_is_mapped_as_one_or_by_address() {
    for map_file in [true, false] {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len(9 << 20).unwrap();
        let file = Arc::new(file);
        let ranges = MEMORY.map(|(start, size)| {
            let offset = (start & 0xfff_ffff) + 0x1000;
            let file = vm_memory::FileOffset::from_arc(Arc::clone(&file), offset);
            (GuestAddress(start), size, Some(file))
        });
        // The third would overlap the first in the file.
        let [first, second, _] = ranges;
        let memory = GuestMemoryMmap::from_ranges_with_files([first, second]).unwrap();
        let mut rig = Rig::with_memory(&memory, fake::Kernel { map_file, ..fake::Kernel::NEWEST });
        assert_eq!(rig.count(Call::Map), if map_file { 2 } else { 4 });
        let unit = rig.fake().add_unit(Unit::smmuv3());
        let device = rig.add(FIRST, unit);
        let mut space = rig.mapped();
        rig.bind(FIRST, &mut space);
        rig.host.map(&mut space, mapping(0x1000, 0x2000, 0x403f_f000, READ_WRITE)).unwrap();
        assert_eq!((rig.read(FIRST, 0x1008), rig.read(FIRST, 0x2008)), (Ok(0x403f_f008), Ok(0x4040_0008)));
        let backing = rig.fake().dma(device, None, 0x2000, Access::READ).unwrap();
        assert_eq!(matches!(backing, Backing::File { offset: 0x40_1000, .. }), map_file);
    }
}
