//! The suite through a kernel that is made up.

use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, Pasid};
use viommu_device::host::{Host, SpaceSpec, Stream};
use viommu_tests::host_suite::HostUnderTest;
use viommu_tests::host_suite::iommufd::{ENDPOINTS, Layout};
use viommu_tests::host_suite::mediated::MediatedFakes;
use viommu_tests::host_suite::memory::WINDOW;
use viommu_tests::tables::PageTable;

mod smmuv3 {
    use super::{Layout, MediatedFakes};
    viommu_tests::host_suite!(MediatedFakes::smmuv3(Layout::OneUnit));
}

mod two_smmuv3 {
    use super::{Layout, MediatedFakes};
    viommu_tests::host_suite!(MediatedFakes::smmuv3(Layout::TwoUnits));
}

mod vtd {
    use super::{Layout, MediatedFakes};
    viommu_tests::host_suite!(MediatedFakes::vtd(Layout::OneUnit));
}

mod vtd_asking {
    use super::{Layout, MediatedFakes};
    viommu_tests::host_suite!(MediatedFakes::vtd_asking(Layout::OneUnit));
}

mod two_vtd {
    use super::{Layout, MediatedFakes};
    viommu_tests::host_suite!(MediatedFakes::vtd(Layout::TwoUnits));
}

/// Not even a guest that maps the window reaches it to write.
#[test]
fn dma_does_not_write_the_window() {
    let mut test = MediatedFakes::smmuv3(Layout::OneUnit);
    let caps = test.host.caps(ENDPOINTS[0]).and_then(|caps| caps.tables.clone()).expect("tables");
    let table = PageTable::new(&caps, 1, &mut test.fakes.memory);
    table.map(&mut test.fakes.memory, 0x1000, WINDOW, 0x1000, Attrs::READ_WRITE);
    let canonical = table.canonical().expect("page tables");
    let spec = SpaceSpec::GuestTable { endpoint: ENDPOINTS[0], table: &canonical };
    let mut space = test.host.create(spec).expect("a space");
    let stream = Stream { endpoint: ENDPOINTS[0], pasid: Pasid::new(5) };
    test.host.bind(stream, Some(&mut space)).expect("bound");
    assert_eq!(test.access(stream, 0x1000, AccessKind::Read), Some(WINDOW));
    assert_eq!(test.access(stream, 0x1000, AccessKind::Write), None);
}

/// When all is gone the kernel has no object left.
#[test]
fn nothing_stays_behind() {
    for make in [MediatedFakes::smmuv3, MediatedFakes::vtd, MediatedFakes::vtd_asking] {
        for (name, check) in viommu_tests::host_suite::suite::<MediatedFakes>() {
            let mut test = make(Layout::OneUnit);
            viommu_tests::host_suite::run(name, check, &mut test);
            let MediatedFakes { fakes, host, .. } = test;
            drop(host.into_inner());
            assert_eq!(fakes.fake.violations(), [""; 0], "{name}");
        }
    }
}
