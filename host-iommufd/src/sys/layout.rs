//! Golden sizes and offsets of the structures that the kernel and this crate exchange.
//!
//! Origin: `include/uapi/linux/iommufd.h` and `vfio.h` of Linux 7.3, read by hand, not taken from the bindings.

use std::mem::offset_of;

use iommufd_bindings::iommufd::*;
use vfio_bindings::bindings::vfio::*;

use super::record::{PAGE_FAULT_LENGTH, RESPONSE_LENGTH, SMMUV3_RECORD_LENGTH};

macro_rules! layout {
    ($($structure:ident $size:literal { $($field:ident $offset:literal)* })*) => {
        $(
            assert_eq!(size_of::<$structure>(), $size, stringify!($structure));
            $(assert_eq!(
                offset_of!($structure, $field), $offset,
                concat!(stringify!($structure), ".", stringify!($field))
            );)*
        )*
    };
}

#[test]
fn iommufd_structures() {
    layout! {
        iommu_destroy 8 { size 0 id 4 }
        iommu_ioas_alloc 12 { size 0 flags 4 out_ioas_id 8 }
        iommu_iova_range 16 { start 0 last 8 }
        iommu_ioas_iova_ranges 32 { size 0 ioas_id 4 num_iovas 8 allowed_iovas 16 out_iova_alignment 24 }
        iommu_ioas_map 40 { size 0 flags 4 ioas_id 8 user_va 16 length 24 iova 32 }
        iommu_ioas_map_file 40 { size 0 flags 4 ioas_id 8 fd 12 start 16 length 24 iova 32 }
        iommu_ioas_unmap 24 { size 0 ioas_id 4 iova 8 length 16 }
        iommu_hw_info 40 { size 0 flags 4 dev_id 8 data_len 12 data_uptr 16 __bindgen_anon_1 24 out_max_pasid_log2 28 out_capabilities 32 }
        iommu_hw_info_vtd 24 { flags 0 cap_reg 8 ecap_reg 16 }
        iommu_hw_info_arm_smmuv3 40 { flags 0 idr 8 iidr 32 aidr 36 }
        iommu_hw_info_amd 16 { efr 0 efr2 8 }
        iommu_hwpt_alloc 48 { size 0 flags 4 dev_id 8 pt_id 12 out_hwpt_id 16 data_type 24 data_len 28 data_uptr 32 fault_id 40 }
        iommu_hwpt_vtd_s1 24 { flags 0 pgtbl_addr 8 addr_width 16 }
        iommu_hwpt_arm_smmuv3 16 { ste 0 }
        iommu_hwpt_invalidate 32 { size 0 hwpt_id 4 data_uptr 8 data_type 16 entry_len 20 entry_num 24 }
        iommu_hwpt_vtd_s1_invalidate 24 { addr 0 npages 8 flags 16 }
        iommu_viommu_arm_smmuv3_invalidate 16 { cmd 0 }
        iommu_fault_alloc 16 { size 0 flags 4 out_fault_id 8 out_fault_fd 12 }
        iommu_hwpt_pgfault 40 { flags 0 dev_id 4 pasid 8 grpid 12 perm 16 addr 24 length 32 cookie 36 }
        iommu_hwpt_page_response 8 { cookie 0 code 4 }
        iommu_viommu_alloc 40 { size 0 flags 4 type_ 8 dev_id 12 hwpt_id 16 out_viommu_id 20 data_len 24 data_uptr 32 }
        iommu_vdevice_alloc 24 { size 0 viommu_id 4 dev_id 8 out_vdevice_id 12 virt_id 16 }
        iommu_veventq_alloc 32 { size 0 flags 4 viommu_id 8 type_ 12 veventq_depth 16 out_veventq_id 20 out_veventq_fd 24 }
        iommufd_vevent_header 8 { flags 0 sequence 4 }
        iommu_vevent_arm_smmuv3 32 { evt 0 }
    }
}

#[test]
fn vfio_structures() {
    layout! {
        vfio_device_bind_iommufd 24 { argsz 0 flags 4 iommufd 8 out_devid 12 token_uuid_ptr 16 }
        vfio_device_attach_iommufd_pt 16 { argsz 0 flags 4 pt_id 8 pasid 12 }
        vfio_device_detach_iommufd_pt 12 { argsz 0 flags 4 pasid 8 }
    }
}

#[test]
fn records() {
    assert_eq!((SMMUV3_RECORD_LENGTH, PAGE_FAULT_LENGTH, RESPONSE_LENGTH), (40, 40, 8));
}

#[test]
fn numbers() {
    assert_eq!((IOMMUFD_TYPE, VFIO_BASE), (0x3b, 100));
    assert_eq!(
        (IOMMUFD_CMD_DESTROY, IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_FAULT_QUEUE_ALLOC),
        (0x80, 0x84, 0x8e)
    );
    assert_eq!((IOMMUFD_CMD_IOAS_MAP_FILE, IOMMUFD_CMD_VEVENTQ_ALLOC), (0x8f, 0x93));
    assert_eq!((VFIO_DEVICE_ATTACH_PASID, VFIO_DEVICE_DETACH_PASID), (1, 1));
}
