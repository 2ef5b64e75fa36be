//! The window of mediation, on a kernel that is given it as memory without the right to write: whatever a guest does,
//! no DMA changes a descriptor of the device's own. Devices read what the SMMU reads; nothing there but addresses that
//! the guest gave is to be seen.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "helpers of tests")]

use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, Gpa, Iova, IovaRange, Pasid};
use viommu_device::host::{Host, HostError, MapError, SpaceSpec, Stream};
use viommu_device::mapping::{MapFlags, Mapping};
use viommu_tests::host_suite::HostUnderTest;
use viommu_tests::host_suite::iommufd::{ENDPOINTS, Layout};
use viommu_tests::host_suite::mediated::MediatedFakes;
use viommu_tests::host_suite::memory::WINDOW;
use viommu_tests::tables::PageTable;

/// Those whose page tables need the window. A VT-d unit does not; where it has erratum 772415, it would write it, too.
fn machines() -> [MediatedFakes; 2] {
    [Layout::OneUnit, Layout::TwoUnits].map(MediatedFakes::smmuv3)
}

fn untagged() -> Stream {
    Stream::untagged(ENDPOINTS[0])
}

#[test]
fn bypass_does_not_write_it() {
    for mut test in machines() {
        let mut identity = test.host().create(SpaceSpec::Identity).expect("a space");
        test.host().bind(untagged(), Some(&mut identity)).expect("bound");
        assert_eq!(test.access(untagged(), WINDOW, AccessKind::Write), None);
        let page = test.page(16);
        assert_eq!(test.access(untagged(), page, AccessKind::Write), Some(page), "what is beside it");
    }
}

#[test]
fn no_mapping_leads_there() {
    for mut test in machines().into_iter().chain([MediatedFakes::vtd(Layout::OneUnit)]) {
        let mut mapped = test.host().create(SpaceSpec::Mapped).expect("a space");
        test.host().bind(untagged(), Some(&mut mapped)).expect("bound");
        let range = IovaRange::from_length(Iova(0x10_0000), 0x1000).expect("a range");
        let mapping = Mapping { range, output: Gpa(WINDOW), flags: MapFlags::READ | MapFlags::WRITE };
        let refused = test.host().map(&mut mapped, mapping);
        assert_eq!(refused, Err(MapError::Host(HostError::BadAddress)));
        for kind in [AccessKind::Read, AccessKind::Write] {
            assert_eq!(test.access(untagged(), 0x10_0000, kind), None);
        }
    }
}

/// Outputs of a guest's own page table, untagged and for a PASID.
#[test]
fn outputs_do_not_write_it() {
    for mut test in machines() {
        let caps = test.host().caps(ENDPOINTS[0]).and_then(|caps| caps.tables.clone()).expect("tables");
        for (asid, pasid) in [(1, None), (2, Pasid::new(5))] {
            let table = PageTable::new(&caps, asid, test.memory());
            let beside = test.page(16);
            table.map(test.memory(), 0x1000, WINDOW, 0x1000, Attrs::READ_WRITE);
            table.map(test.memory(), 0x2000, beside, 0x1000, Attrs::READ_WRITE);
            let canonical = table.canonical().expect("page tables");
            let spec = SpaceSpec::GuestTable { endpoint: ENDPOINTS[0], table: &canonical };
            let mut space = test.host().create(spec).expect("a space");
            let stream = Stream { endpoint: ENDPOINTS[0], pasid };
            test.host().bind(stream, Some(&mut space)).expect("bound");
            assert_eq!(test.access(stream, 0x1000, AccessKind::Write), None, "{pasid:?}");
            assert_eq!(test.access(stream, 0x2000, AccessKind::Write), Some(beside), "{pasid:?}");
        }
    }
}
