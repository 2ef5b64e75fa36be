//! `IommufdHost` over a kernel that keeps the rules of Linux: the suite of hosts, what it leaves out, what it costs, and
//! what becomes of it when calls fail.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::type_complexity,
    reason = "helpers of tests"
)]

mod host_iommufd {
    mod calls;
    mod failing;
    mod machine;
    mod page_requests;
    mod skips;
}

use viommu_tests::host_suite::iommufd::{Fakes, Layout};

mod smmuv3 {
    viommu_tests::host_suite!(super::Fakes::smmuv3(super::Layout::OneUnit, false));
}

mod two_smmuv3 {
    viommu_tests::host_suite!(super::Fakes::smmuv3(super::Layout::TwoUnits, false));
}

mod smmuv3_with_ats {
    viommu_tests::host_suite!(super::Fakes::smmuv3(super::Layout::OneUnit, true));
}

mod smmuv3_without_ranges {
    viommu_tests::host_suite!(super::Fakes::smmuv3_without_ranges());
}

mod smmuv3_with_erratum {
    viommu_tests::host_suite!(super::Fakes::smmuv3_with_erratum());
}

mod emulated_smmuv3 {
    viommu_tests::host_suite!(super::Fakes::emulated());
}

mod vtd {
    viommu_tests::host_suite!(super::Fakes::vtd(super::Layout::OneUnit));
}

mod two_vtd {
    viommu_tests::host_suite!(super::Fakes::vtd(super::Layout::TwoUnits));
}

mod plain {
    viommu_tests::host_suite!(super::Fakes::plain(super::Layout::OneUnit));
}

mod two_plain {
    viommu_tests::host_suite!(super::Fakes::plain(super::Layout::TwoUnits));
}
