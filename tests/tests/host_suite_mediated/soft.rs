//! The suite on the software host.

use viommu_tests::host_suite::soft::{ARM, INTEL, SMMUV3, Soft, VTD};

mod smmuv3 {
    use super::{ARM, SMMUV3, Soft};
    viommu_tests::host_suite!(Soft::mediated(SMMUV3, false, ARM));
}

mod strict_smmuv3 {
    use super::{ARM, SMMUV3, Soft};
    viommu_tests::host_suite!(Soft::mediated(SMMUV3, true, ARM));
}

mod vtd {
    use super::{INTEL, Soft, VTD};
    viommu_tests::host_suite!(Soft::mediated(VTD, false, INTEL));
}

mod strict_vtd {
    use super::{INTEL, Soft, VTD};
    viommu_tests::host_suite!(Soft::mediated(VTD, true, INTEL));
}
