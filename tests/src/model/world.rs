//! What a device is made of, in plain numbers: what the model knows, and what the real device is made from.

use pgtable_formats::context::{smmuv3, vtd};
use viommu_device::host::{EndpointCaps, TableCaps, TableKinds};
use viommu_device::{DeviceConfig, Limits};
use viommu_wire::{
    DomainId, DomainRange, EndpointId, Features, Iova, IovaRange, ReservedKind, ReservedRegion,
};

/// Bits of the feature word, by the numbers of the specification.
pub mod bit {
    /// INPUT_RANGE.
    pub const INPUT_RANGE: u64 = 1 << 0;
    /// DOMAIN_RANGE.
    pub const DOMAIN_RANGE: u64 = 1 << 1;
    /// MAP_UNMAP.
    pub const MAP_UNMAP: u64 = 1 << 2;
    /// PROBE.
    pub const PROBE: u64 = 1 << 4;
    /// MMIO.
    pub const MMIO: u64 = 1 << 5;
    /// BYPASS_CONFIG.
    pub const BYPASS_CONFIG: u64 = 1 << 6;
    /// ATTACH_TABLE.
    pub const ATTACH_TABLE: u64 = 1 << 7;
    /// All that this device has.
    pub const ALL: u64 = 0b1111_0111;
    /// All that the device type defines: 0 to 7, and PAGE_REQUEST.
    pub const DEVICE_TYPE: u64 = 0xff | 1 << 56;
}

/// A device: configuration, limits, endpoints.
#[derive(Clone, Debug)]
pub struct World {
    /// A name for reports.
    pub name: &'static str,
    /// Feature bits offered.
    pub offered: u64,
    /// Of the configuration space.
    pub page_size_mask: u64,
    /// First and last mappable address.
    pub input: (u64, u64),
    /// First and last domain ID.
    pub domains: (u32, u32),
    /// Of the configuration space.
    pub probe_size: u32,
    /// The first value of `bypass`.
    pub bypass: bool,
    /// How many domains, mappings in one, mappings in all, waiting events, page tables of one endpoint, of all.
    pub limits: Bounds,
    /// By ascending ID.
    pub endpoints: Vec<EndpointSpec>,
    /// Not of the device: what the generator makes most of.
    pub focus: Focus,
}

/// What is generated most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Focus {
    /// Everything alike.
    Everything,
    /// Accesses, table writes and invalidations.
    Tables,
    /// MAP, UNMAP, and accesses.
    Mappings,
}

/// Bounds on what a guest can make grow.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Domains.
    pub domains: usize,
    /// Mappings of one domain.
    pub mappings_per_domain: usize,
    /// Mappings of all.
    pub mappings: usize,
    /// Events that wait.
    pub events: usize,
    /// Page tables for single PASIDs of one endpoint.
    pub pasids_per_endpoint: usize,
    /// Of all.
    pub pasids: usize,
}

/// An endpoint.
#[derive(Clone, Debug)]
pub struct EndpointSpec {
    /// Its number.
    pub id: u32,
    /// Ascending.
    pub reserved: Vec<Region>,
    /// What tables its hardware walks.
    pub tables: Hardware,
}

/// A reserved region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// For interrupts.
    pub msi: bool,
    /// First address.
    pub first: u64,
    /// Last address.
    pub last: u64,
}

/// Hardware that walks a guest's tables. Registers are given twice: decoded, and as PROBE must show them.
#[derive(Clone, Copy, Debug)]
pub enum Hardware {
    /// None.
    None,
    /// An SMMUv3 with the 4 KiB granule, 48-bit input, no stalls, no hardware flag update, TERM_MODEL.
    Smmuv3 {
        /// Bits of a PASID.
        ssid_bits: u8,
        /// Two-level tables of context descriptors.
        two_level: bool,
        /// Bits of an output address.
        oas: u8,
        /// IDR0, IDR1, IDR3, IDR5 as the hardware has them.
        registers: [u32; 4],
        /// IDR0, IDR1, IDR3, IDR5 as PROBE shows them.
        shown: [u32; 4],
    },
    /// A VT-d unit in scalable mode.
    Vtd {
        /// Bits of a PASID.
        pasid_bits: u8,
        /// Bits of a host address.
        haw: u8,
        /// 5-level tables.
        five_levels: bool,
        /// 1 GiB pages.
        giant_pages: bool,
        /// Privileged requests.
        srs: bool,
        /// Extended-accessed flags.
        eafs: bool,
        /// The PASID of untagged requests can be chosen.
        rps: bool,
        /// CAP and ECAP as PROBE shows them.
        shown: [u64; 2],
    },
}

/// IDR0: S1P, TTF=AArch64, ASID16, CD2L, TTENDIAN=little, STALL_MODEL=never, TERM_MODEL, ST_LEVEL=1.
const IDR0: u32 = 1 << 1 | 2 << 2 | 1 << 12 | 1 << 19 | 2 << 21 | 1 << 24 | 1 << 26 | 1 << 27;
const CD2L: u32 = 1 << 19;
/// COHACC and BTM: not for a guest.
const IDR0_HIDDEN: u32 = 1 << 4 | 1 << 5;
/// RIL, BBML=2.
const IDR3: u32 = 1 << 10 | 2 << 11;
const GRAN4K: u32 = 1 << 4;
const GRAN16K: u32 = 1 << 5;
const GRAN64K: u32 = 1 << 6;

const SMMU_LARGE: Hardware = Hardware::Smmuv3 {
    ssid_bits: 20,
    two_level: true,
    oas: 48,
    registers: [IDR0 | IDR0_HIDDEN, 32 | 20 << 6, IDR3, 5 | GRAN4K | GRAN16K | GRAN64K],
    shown: [IDR0, 32 | 20 << 6, IDR3, 5 | GRAN4K | GRAN16K | GRAN64K],
};
const SMMU_SMALL: Hardware = Hardware::Smmuv3 {
    ssid_bits: 4,
    two_level: false,
    oas: 40,
    registers: [IDR0 & !CD2L | IDR0_HIDDEN, 16 | 4 << 6, IDR3, 2 | GRAN4K],
    shown: [IDR0 & !CD2L, 16 | 4 << 6, IDR3, 2 | GRAN4K],
};

/// CAP: ND=6, MGAW, PSI, MAMV=20.
const fn cap(mgaw: u64) -> u64 {
    6 | mgaw << 16 | 1 << 39 | 20 << 48
}
/// ECAP: PSS, PASID, SMTS, FSTS, SMPWC.
const fn ecap(pss: u64) -> u64 {
    pss << 35 | 1 << 40 | 1 << 43 | 1 << 47 | 1 << 48
}

const VTD_LARGE: Hardware = Hardware::Vtd {
    pasid_bits: 20,
    haw: 52,
    five_levels: true,
    giant_pages: true,
    srs: true,
    eafs: true,
    rps: true,
    shown: [cap(51) | 1 << 56 | 1 << 60, ecap(19) | 1 << 31 | 1 << 34 | 1 << 49],
};
const VTD_SMALL: Hardware = Hardware::Vtd {
    pasid_bits: 8,
    haw: 39,
    five_levels: false,
    giant_pages: false,
    srs: false,
    eafs: false,
    rps: false,
    shown: [cap(38), ecap(7)],
};

impl World {
    /// Everything offered, ordinary limits.
    pub fn ordinary() -> Self {
        let spec = |id, reserved: &[Region], tables| EndpointSpec { id, reserved: reserved.to_vec(), tables };
        Self {
            name: "ordinary",
            offered: bit::ALL,
            page_size_mask: !0xfff,
            input: (0, (1 << 48) - 1),
            domains: (0, u32::MAX),
            probe_size: 512,
            bypass: false,
            limits: Bounds {
                domains: 100,
                mappings_per_domain: 1000,
                mappings: 1000,
                events: 100,
                pasids_per_endpoint: 100,
                pasids: 100,
            },
            endpoints: vec![
                spec(8, &[region(true, 0x800_0000, 0x80f_ffff)], SMMU_LARGE),
                spec(9, &[], SMMU_SMALL),
                spec(16, &[region(true, 0xfee0_0000, 0xfeef_ffff)], VTD_LARGE),
                spec(17, &[], VTD_SMALL),
                spec(24, &[], Hardware::None),
                spec(25, &[region(false, 0x3000, 0x4fff), region(true, 0x8000, 0x8fff)], Hardware::None),
                spec(u32::MAX, &[region(false, 0xffff_ffff_0000_0000, u64::MAX)], SMMU_LARGE),
            ],
            focus: Focus::Everything,
        }
    }

    /// Every limit is soon reached; ranges are narrow; endpoints start in bypass.
    pub fn narrow() -> Self {
        Self {
            name: "narrow",
            input: (0x2000, 0x9fff),
            domains: (1, 4),
            probe_size: 200,
            bypass: true,
            limits: Bounds {
                domains: 2,
                mappings_per_domain: 3,
                mappings: 4,
                events: 3,
                pasids_per_endpoint: 2,
                pasids: 3,
            },
            ..Self::ordinary()
        }
    }

    /// The whole 64-bit space in bytes; as few features as there can be while there are mappings.
    pub fn bytes() -> Self {
        Self {
            name: "bytes",
            offered: bit::MAP_UNMAP | bit::BYPASS_CONFIG,
            page_size_mask: 1,
            input: (0, u64::MAX),
            limits: Bounds { mappings: 1 << 20, mappings_per_domain: 1 << 20, ..Self::ordinary().limits },
            ..Self::ordinary()
        }
    }

    /// What a driver of guest tables alone expects: no MAP_UNMAP.
    pub fn tables() -> Self {
        Self {
            name: "tables",
            offered: bit::PROBE | bit::ATTACH_TABLE | bit::DOMAIN_RANGE,
            domains: (0, 200),
            probe_size: 104,
            ..Self::ordinary()
        }
    }

    /// Two endpoints with guest tables, and a generator that stays with them.
    pub fn caches() -> Self {
        let mut world = Self { name: "caches", focus: Focus::Tables, ..Self::ordinary() };
        world.endpoints.retain(|spec| matches!(spec.id, 8 | 16));
        world
    }

    /// Limits on mappings that are soon reached, and a generator that reaches them.
    pub fn mappings() -> Self {
        Self { name: "mappings", focus: Focus::Mappings, domains: (0, u32::MAX), ..Self::narrow() }
    }

    /// All of the above.
    pub fn all() -> [Self; 6] {
        [Self::ordinary(), Self::narrow(), Self::bytes(), Self::tables(), Self::caches(), Self::mappings()]
    }

    /// The endpoint of this number.
    pub fn endpoint(&self, id: u32) -> Option<&EndpointSpec> {
        self.endpoints.iter().find(|endpoint| endpoint.id == id)
    }

    /// Bytes of the granule of MAP.
    pub const fn granule(&self) -> u64 {
        1 << self.page_size_mask.trailing_zeros()
    }

    /// The same for the device.
    pub fn device_config(&self) -> DeviceConfig {
        let Bounds { domains, mappings_per_domain, mappings, events, pasids_per_endpoint, pasids } =
            self.limits;
        DeviceConfig {
            features: Features::from_bits_retain(self.offered),
            page_size_mask: self.page_size_mask,
            input_range: IovaRange::new(Iova(self.input.0), Iova(self.input.1)).expect("a range"),
            domain_range: DomainRange::new(DomainId(self.domains.0), DomainId(self.domains.1))
                .expect("a range"),
            probe_size: self.probe_size,
            bypass: self.bypass,
            limits: Limits {
                max_domains: domains,
                max_mappings_per_domain: mappings_per_domain,
                max_mappings: mappings,
                max_pending_events: events,
                max_bound_pasids_per_endpoint: pasids_per_endpoint,
                max_bound_pasids: pasids,
                ..Limits::DEFAULT
            },
            ..DeviceConfig::default()
        }
    }

    /// The endpoints for the host.
    pub fn device_endpoints(&self) -> Vec<(u32, EndpointCaps)> {
        self.endpoints.iter().map(|endpoint| (endpoint.id, endpoint.caps())).collect()
    }
}

impl EndpointSpec {
    /// The same for the host.
    pub fn caps(&self) -> EndpointCaps {
        let reserved = self.reserved.iter().map(|region| ReservedRegion {
            kind: if region.msi { ReservedKind::Msi } else { ReservedKind::Reserved },
            range: IovaRange::new(Iova(region.first), Iova(region.last)).expect("a range"),
        });
        let tables = match self.tables {
            Hardware::None => None,
            Hardware::Smmuv3 { registers: [idr0, idr1, idr3, idr5], .. } => {
                let registers = smmuv3::IdRegisters { idr0, idr1, idr3, idr5 };
                Some(TableCaps::Smmuv3(smmuv3::Caps::from_registers(registers)))
            }
            Hardware::Vtd { shown: [cap, ecap], .. } => {
                let registers = vtd::CapRegisters { cap, ecap };
                Some(TableCaps::Vtd(vtd::Caps::from_registers(registers)))
            }
        };
        // The model knows no page tables of single PASIDs on an SMMUv3.
        let kinds = match self.tables {
            Hardware::Smmuv3 { .. } => TableKinds::PASID_TABLE,
            Hardware::None | Hardware::Vtd { .. } => TableKinds::all(),
        };
        EndpointCaps { tables, kinds, reserved: reserved.collect(), ..EndpointCaps::default() }
    }

    /// As the wire names it.
    pub const fn endpoint_id(&self) -> EndpointId {
        EndpointId(self.id)
    }

    /// The reserved region that holds `iova`.
    pub fn region(&self, iova: u64) -> Option<Region> {
        self.reserved.iter().copied().find(|region| region.first <= iova && iova <= region.last)
    }
}

const fn region(msi: bool, first: u64, last: u64) -> Region {
    Region { msi, first, last }
}
