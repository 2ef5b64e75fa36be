//! Every number of the protocol, in one table, each with where it comes from.
//!
//! *ratified*: virtio 1.2 to 1.4. *proposal*: the 2023 ATTACH_TABLE proposal. *private*: ours; no other
//! implementation is known to use it, and a later version of the standard may number it otherwise.

/// Device type of an IOMMU (ratified).
pub const DEVICE_ID: u32 = 23;
/// Index of the request queue (ratified).
pub const REQUEST_QUEUE: u16 = 0;
/// Index of the event queue (ratified).
pub const EVENT_QUEUE: u16 = 1;

/// ATTACH (ratified).
pub const T_ATTACH: u8 = 1;
/// DETACH (ratified).
pub const T_DETACH: u8 = 2;
/// MAP (ratified).
pub const T_MAP: u8 = 3;
/// UNMAP (ratified).
pub const T_UNMAP: u8 = 4;
/// PROBE (ratified).
pub const T_PROBE: u8 = 5;
/// ATTACH_TABLE (proposal).
pub const T_ATTACH_TABLE: u8 = 6;
/// INVALIDATE (proposal).
pub const T_INVALIDATE: u8 = 7;
/// PAGE_RESP (**private**; the number is that of the 2021 draft, the layout is ours).
pub const T_PAGE_RESP: u8 = 8;

/// End of the property list (ratified).
pub const PROBE_NONE: u16 = 0;
/// A reserved region (ratified).
pub const PROBE_RESV_MEM: u16 = 1;
/// SMMUv3 ID registers (proposal).
pub const PROBE_HW_ARM_SMMU3: u16 = 2;
/// VT-d capability registers (number: proposal; layout: **private**).
pub const PROBE_HW_INTEL_VTD: u16 = 3;
/// Width of the endpoint's PASIDs (**private**).
pub const PROBE_PASID_SIZE: u16 = 0x800;
/// Formats that ATTACH_TABLE takes for the endpoint (**private**).
pub const PROBE_TABLE_FORMATS: u16 = 0x801;
/// What the endpoint does with page requests (**private**).
pub const PROBE_PAGE_REQUESTS: u16 = 0x802;

/// RESV_MEM subtype: never to be mapped (ratified).
pub const RESV_MEM_RESERVED: u8 = 0;
/// RESV_MEM subtype: the doorbell of message-signalled interrupts (ratified).
pub const RESV_MEM_MSI: u8 = 1;

/// ATTACH_TABLE format: takes back the table of one PASID (**private**).
pub const FORMAT_NONE: u8 = 0;
/// ATTACH_TABLE format: SMMUv3 context-descriptor table, as two STE words (proposal).
pub const FORMAT_ARM_SMMU3: u8 = 1;
/// ATTACH_TABLE format: VT-d first-stage page table for one PASID (number: proposal; layout: **private**).
pub const FORMAT_INTEL_PT: u8 = 2;
/// ATTACH_TABLE format: VMSAv8-64 stage-1 page table for one PASID (**private**).
pub const FORMAT_ARM_PT: u8 = 0x80;
/// ATTACH_TABLE format: VT-d scalable-mode PASID directory (**private**).
pub const FORMAT_INTEL_PASID_TABLE: u8 = 0x81;
