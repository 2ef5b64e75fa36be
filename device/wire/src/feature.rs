//! Feature bits.

bitflags::bitflags! {
    /// Feature bits of the IOMMU device, and those of the transport that its queues know.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// `input_range` in the configuration is valid (ratified).
        const INPUT_RANGE = 1 << 0;
        /// `domain_range` in the configuration is valid (ratified).
        const DOMAIN_RANGE = 1 << 1;
        /// MAP and UNMAP are available (ratified).
        const MAP_UNMAP = 1 << 2;
        /// Unattached endpoints are in bypass; superseded by `BYPASS_CONFIG` (ratified).
        const BYPASS = 1 << 3;
        /// PROBE is available and `probe_size` valid (ratified).
        const PROBE = 1 << 4;
        /// The MMIO flag of MAP is available (ratified).
        const MMIO = 1 << 5;
        /// `bypass` in the configuration and the BYPASS flag of ATTACH are available (ratified).
        const BYPASS_CONFIG = 1 << 6;
        /// ATTACH_TABLE and INVALIDATE are available (proposal).
        const ATTACH_TABLE = 1 << 7;
        /// Page requests and PAGE_RESP are available (**private**).
        const PAGE_REQUEST = 1 << 56;

        /// Descriptors may point to tables of descriptors (virtio transport).
        const RING_INDIRECT_DESC = 1 << 28;
        /// Notifications are suppressed by index (virtio transport).
        const RING_EVENT_IDX = 1 << 29;
        /// The device is a modern one (virtio transport); the IOMMU device exists in no other form.
        const VERSION_1 = 1 << 32;
        /// The device sees memory through the platform's own translation (virtio transport).
        const ACCESS_PLATFORM = 1 << 33;
    }
}

impl Features {
    /// The bits that the device type defines; the rest belongs to the transport.
    pub const DEVICE: Self = Self::INPUT_RANGE
        .union(Self::DOMAIN_RANGE)
        .union(Self::MAP_UNMAP)
        .union(Self::BYPASS)
        .union(Self::PROBE)
        .union(Self::MMIO)
        .union(Self::BYPASS_CONFIG)
        .union(Self::ATTACH_TABLE)
        .union(Self::PAGE_REQUEST);
}
