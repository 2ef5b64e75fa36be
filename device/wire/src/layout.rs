//! The bytes, as the specification lists them. No rule lives here; [`Request`](crate::Request) and its kin have them.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

macro_rules! layouts {
    ($($(#[$doc:meta])* $name:ident: $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

layouts! {
    /// First four device-readable bytes of every request (virtio 1.4, 5.13.6).
    HeadLayout: 4 {
        /// `@0` request type.
        kind: u8,
        /// `@1` ignored by the device (D-12).
        reserved: [u8; 3],
    }
    /// Last four device-writable bytes of every request (virtio 1.4, 5.13.6).
    TailLayout: 4 {
        /// `@0` [`Status`](crate::Status).
        status: u8,
        /// `@1` zero (D-13).
        reserved: [u8; 3],
    }
    /// ATTACH, device-readable part (virtio 1.4, 5.13.6.3).
    AttachLayout: 20 {
        /// `@0`.
        head: HeadLayout,
        /// `@4`.
        domain: U32,
        /// `@8`.
        endpoint: U32,
        /// `@12` bit 0: BYPASS.
        flags: U32,
        /// `@16` zero (D-17).
        reserved: [u8; 4],
    }
    /// DETACH, device-readable part (virtio 1.4, 5.13.6.4).
    DetachLayout: 20 {
        /// `@0`.
        head: HeadLayout,
        /// `@4`.
        domain: U32,
        /// `@8`.
        endpoint: U32,
        /// `@12` ignored by the device (D-25).
        reserved: [u8; 8],
    }
    /// MAP, device-readable part (virtio 1.4, 5.13.6.5).
    MapLayout: 36 {
        /// `@0`.
        head: HeadLayout,
        /// `@4`.
        domain: U32,
        /// `@8` first address.
        virt_start: U64,
        /// `@16` last address, inside the range.
        virt_end: U64,
        /// `@24` guest-physical address of `virt_start`.
        phys_start: U64,
        /// `@32` bits 0 READ, 1 WRITE, 2 MMIO.
        flags: U32,
    }
    /// UNMAP, device-readable part (virtio 1.4, 5.13.6.6).
    UnmapLayout: 28 {
        /// `@0`.
        head: HeadLayout,
        /// `@4`.
        domain: U32,
        /// `@8` first address.
        virt_start: U64,
        /// `@16` last address, inside the range.
        virt_end: U64,
        /// `@24` zero (D-38).
        reserved: [u8; 4],
    }
    /// PROBE, device-readable part (virtio 1.4, 5.13.6.7).
    ProbeLayout: 72 {
        /// `@0`.
        head: HeadLayout,
        /// `@4`.
        endpoint: U32,
        /// `@8` ignored by the device (D-43).
        reserved: [u8; 64],
    }
    /// ATTACH_TABLE, device-readable part (2023 proposal).
    AttachTableLayout: 124 {
        /// `@0`.
        head: HeadLayout,
        /// `@4`.
        domain: U32,
        /// `@8`.
        endpoint: U32,
        /// `@12` see [`numbers`](crate::numbers).
        format: u8,
        /// `@13` zero in every format.
        reserved: [u8; 3],
        /// `@16` per format.
        descriptor: [u8; 108],
    }
    /// ATTACH_TABLE descriptor of format ARM_SMMU3 (2023 proposal): the first two words of a stream table entry.
    SmmuTableLayout: 108 {
        /// `@16`.
        ste0: U64,
        /// `@24`.
        ste1: U64,
        /// `@32` zero.
        reserved: [u8; 92],
    }
    /// ATTACH_TABLE descriptor of format INTEL_PT (private layout).
    VtdPageTableLayout: 108 {
        /// `@16` guest-physical address of the root table.
        pgd: U64,
        /// `@24` bits 0 SRE, 1 EAFE, 2 WPE.
        flags: U64,
        /// `@32` input width in bits: 48 or 57.
        addr_width: U32,
        /// `@36` PASID to bind; 0 serves untagged DMA too.
        pasid: U32,
        /// `@40` zero.
        reserved: [u8; 84],
    }
    /// ATTACH_TABLE descriptor of format INTEL_PASID_TABLE (private).
    VtdPasidTableLayout: 108 {
        /// `@16` guest-physical address of the PASID directory.
        directory: U64,
        /// `@24` PASID of untagged DMA (RID_PASID).
        untagged: U32,
        /// `@28` log2 of the number of directory entries (PDTS + 7): 7 to 14.
        directory_lg2: u8,
        /// `@29` zero.
        reserved: [u8; 95],
    }
    /// ATTACH_TABLE descriptor of format ARM_PT (private).
    ArmPageTableLayout: 108 {
        /// `@16` PASID to bind.
        pasid: U32,
        /// `@20` address space identifier.
        asid: U16,
        /// `@22` zero.
        reserved0: [u8; 2],
        /// `@24` as TCR_EL1.
        tcr: U64,
        /// `@32` table of the lower half.
        ttbr0: U64,
        /// `@40` table of the upper half.
        ttbr1: U64,
        /// `@48` as MAIR_EL1.
        mair: U64,
        /// `@56` zero.
        reserved1: [u8; 68],
    }
    /// ATTACH_TABLE descriptor of format NONE (private): takes back the table of one PASID.
    UnbindLayout: 108 {
        /// `@16` PASID to unbind.
        pasid: U32,
        /// `@20` zero.
        reserved: [u8; 104],
    }
    /// INVALIDATE, device-readable part (2023 proposal).
    InvalidateLayout: 60 {
        /// `@0`.
        head: HeadLayout,
        /// `@4` 1 DOMAIN, 2 PASID, 3 ADDRESS.
        scope: u8,
        /// `@5` bits 0 PASID, 1 TLB.
        caches: u8,
        /// `@6` bits 0 LEAF, 1 PASID, 2 ID, 3 GLOBAL.
        flags: U16,
        /// `@8`.
        domain: U32,
        /// `@12`.
        pasid: U32,
        /// `@16` architectural tag; Arm: ASID in bits 15:0.
        id: U64,
        /// `@24` first address.
        address: U64,
        /// `@32` number of pages.
        nr_pages: U64,
        /// `@40` log2 of the page size in bytes.
        page_size: u8,
        /// `@41` zero.
        reserved: [u8; 19],
    }
    /// PAGE_RESP, device-readable part (private).
    PageResponseLayout: 28 {
        /// `@0`.
        head: HeadLayout,
        /// `@4`.
        endpoint: U32,
        /// `@8` bit 0 PASID_VALID.
        flags: U32,
        /// `@12`.
        pasid: U32,
        /// `@16` the group that the page request named.
        group_id: U16,
        /// `@18` 0 SUCCESS, 1 INVALID, 2 FAILURE.
        code: U16,
        /// `@20` zero.
        reserved: [u8; 8],
    }
    /// Header of a PROBE property (virtio 1.4, 5.13.6.7).
    PropertyHeadLayout: 4 {
        /// `@0` bits 11:0 type, 15:12 reserved.
        kind: U16,
        /// `@2` bytes that follow this header.
        length: U16,
    }
    /// RESV_MEM (virtio 1.4, 5.13.6.7.2), after its header.
    ReservedRegionLayout: 20 {
        /// `@4` 0 RESERVED, 1 MSI.
        subtype: u8,
        /// `@5` zero (D-51).
        reserved: [u8; 3],
        /// `@8` first address.
        start: U64,
        /// `@16` last address, inside the region.
        end: U64,
    }
    /// HW_ARM_SMMU3 (2023 proposal), after its header.
    HwArmSmmu3Layout: 52 {
        /// `@4` zero.
        reserved0: [u8; 4],
        /// `@8` SMMU_IDR0, zero-extended.
        idr0: U64,
        /// `@16` SMMU_IDR1.
        idr1: U64,
        /// `@24` zero.
        reserved2: U64,
        /// `@32` SMMU_IDR3.
        idr3: U64,
        /// `@40` zero.
        reserved4: U64,
        /// `@48` SMMU_IDR5.
        idr5: U64,
    }
    /// HW_INTEL_VTD (private layout), after its header.
    HwIntelVtdLayout: 20 {
        /// `@4` zero.
        reserved: [u8; 4],
        /// `@8` Capability Register.
        cap: U64,
        /// `@16` Extended Capability Register.
        ecap: U64,
    }
    /// PASID_SIZE (private), after its header.
    PasidSizeLayout: 4 {
        /// `@4` width of a PASID in bits.
        bits: u8,
        /// `@5` zero.
        reserved: [u8; 3],
    }
    /// TABLE_FORMATS (private), after its header.
    TableFormatsLayout: 12 {
        /// `@4` zero.
        reserved: [u8; 4],
        /// `@8` formats that ATTACH_TABLE takes; unused places are 0.
        formats: [u8; 8],
    }
    /// PAGE_REQUESTS (private), after its header.
    PageRequestsLayout: 4 {
        /// `@4` bits 0 SUPPORTED, 1 PASID_IN_RESPONSE.
        flags: U32,
    }
    /// Fault event (virtio 1.4, 5.13.6.8, with the PASID of the 2023 proposal).
    FaultEventLayout: 24 {
        /// `@0` 0 UNKNOWN, 1 DOMAIN, 2 MAPPING.
        reason: u8,
        /// `@1` zero; a driver ignores the event otherwise.
        reserved: [u8; 3],
        /// `@4` bits 0 READ, 1 WRITE, 2 EXEC, 3 PRIVILEGED, 4 LAST, 5 PAGE_REQ, 8 ADDRESS, 9 PASID, 10 GROUP_ID,
        /// 11 PRIV_DATA.
        flags: U32,
        /// `@8`.
        endpoint: U32,
        /// `@12` valid with flag PASID.
        pasid: U32,
        /// `@16` valid with flag ADDRESS.
        address: U64,
    }
    /// What a page request carries after the 24 bytes of a fault event (private; the 2021 review's layout).
    PageRequestLayout: 24 {
        /// `@24` valid with flag GROUP_ID.
        group_id: U16,
        /// `@26` zero.
        reserved: [u8; 6],
        /// `@32` valid with flag PRIV_DATA.
        private_data: [U64; 2],
    }
    /// Configuration space (virtio 1.4, 5.13.4).
    ConfigLayout: 40 {
        /// `@0` granule and larger page sizes.
        page_size_mask: U64,
        /// `@8` first mappable address.
        input_start: U64,
        /// `@16` last mappable address.
        input_end: U64,
        /// `@24` first domain ID.
        domain_start: U32,
        /// `@28` last domain ID.
        domain_end: U32,
        /// `@32` length of the properties area of PROBE.
        probe_size: U32,
        /// `@36` 0 or 1; the one field that a driver may write.
        bypass: u8,
        /// `@37` zero.
        reserved: [u8; 3],
    }
}
