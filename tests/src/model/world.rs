//! What a device is made of, in plain numbers: what the model knows, and what the real device is made from.

use pgtable_formats::context::{smmuv3, vtd};
use viommu_device::host::{EndpointCaps, TableCaps, TableKinds};
use viommu_device::{DeviceConfig, Limits};
use viommu_wire::{
    DomainId, DomainRange, EndpointId, Features, Iova, IovaRange, ReservedKind, ReservedRegion,
};

use super::layout;

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
    /// PAGE_REQUEST.
    pub const PAGE_REQUEST: u64 = 1 << 56;
    /// All that this device has.
    pub const ALL: u64 = 0b1111_0111 | PAGE_REQUEST;
    /// All that the device type defines: 0 to 7, and PAGE_REQUEST.
    pub const DEVICE_TYPE: u64 = 0xff | PAGE_REQUEST;
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
    /// How much of everything.
    pub limits: Bounds,
    /// How long a driver may take to answer page requests, in nanoseconds; `u64::MAX`: for ever.
    pub timeout: u64,
    /// The machine takes one kind of table for each architecture, as hardware through Linux does, and the device makes the
    /// other of it, with its own tables in memory from the first of these addresses to the last.
    pub mediated: Option<(u64, u64)>,
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
    /// Accesses that wait, their answers, and what closes them.
    Requests,
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
    /// Page requests of one endpoint that are not answered.
    pub requests_per_endpoint: usize,
    /// Of all.
    pub requests: usize,
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
    /// Its accesses can wait for a page.
    pub waits: bool,
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

/// Where the device keeps its own tables.
const WINDOW: (u64, u64) = (layout::WINDOW, layout::WINDOW + layout::WINDOW_BYTES - 1);

impl World {
    /// Everything offered, ordinary limits.
    pub fn ordinary() -> Self {
        let spec = |id, reserved: &[Region], tables| EndpointSpec {
            id,
            reserved: reserved.to_vec(),
            tables,
            waits: !matches!(id, 9 | 24 | 25),
        };
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
                requests_per_endpoint: 100,
                requests: 200,
            },
            timeout: 1000,
            mediated: None,
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
                requests_per_endpoint: 2,
                requests: 3,
            },
            timeout: 100,
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

    /// Endpoints that wait for pages, bounds that are soon reached, and a generator that stays with them.
    pub fn requests() -> Self {
        let limits = Bounds { requests_per_endpoint: 4, requests: 6, events: 4, ..Self::ordinary().limits };
        let mut world = Self { name: "requests", focus: Focus::Requests, limits, ..Self::ordinary() };
        world.endpoints.retain(|spec| matches!(spec.id, 8 | 9 | 16 | 17));
        world
    }

    /// The same where a driver may take for ever: bounds are reached, and the queue of events has other turns.
    pub fn patient() -> Self {
        let limits = Bounds { requests_per_endpoint: 5, requests: 7, ..Self::requests().limits };
        Self { name: "patient", timeout: u64::MAX, limits, ..Self::requests() }
    }

    /// Over a machine that takes one kind of table for each architecture, and tells accesses with PASID 0 and untagged
    /// ones apart no more than Linux does: without RPS.
    #[must_use]
    pub fn mediated(mut self) -> Self {
        for spec in &mut self.endpoints {
            if let Hardware::Vtd { rps, shown: [_, ecap], .. } = &mut spec.tables {
                *rps = false;
                *ecap &= !(1 << 49);
            }
        }
        let name = match self.name {
            "ordinary" => "ordinary mediated",
            "caches" => "caches mediated",
            "requests" => "requests mediated",
            _ => "mediated",
        };
        Self { name, mediated: Some(WINDOW), ..self }
    }

    /// Those over a machine that takes every kind of table.
    pub fn native() -> [Self; 8] {
        [
            Self::ordinary(),
            Self::narrow(),
            Self::bytes(),
            Self::tables(),
            Self::caches(),
            Self::mappings(),
            Self::requests(),
            Self::patient(),
        ]
    }

    /// Those over a machine that takes one.
    pub fn made() -> [Self; 4] {
        [Self::ordinary(), Self::narrow(), Self::caches(), Self::requests()].map(Self::mediated)
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
        let Bounds {
            domains,
            mappings_per_domain,
            mappings,
            events,
            pasids_per_endpoint,
            pasids,
            requests_per_endpoint,
            requests,
        } = self.limits;
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
                max_page_requests_per_endpoint: requests_per_endpoint,
                max_page_requests: requests,
            },
            page_request_timeout_ns: self.timeout,
        }
    }

    /// The endpoints for the host.
    pub fn device_endpoints(&self) -> Vec<(u32, EndpointCaps)> {
        let is_made = self.mediated.is_some();
        self.endpoints.iter().map(|endpoint| (endpoint.id, endpoint.caps(is_made))).collect()
    }

    /// The reserved regions that PROBE tells of an endpoint, ascending: its own, and the device's tables on an SMMUv3.
    pub fn reserved(&self, spec: &EndpointSpec) -> Vec<Region> {
        let window = self.mediated.filter(|_| matches!(spec.tables, Hardware::Smmuv3 { .. }));
        let window = window.map(|(first, last)| Region { msi: false, first, last });
        let mut regions: Vec<Region> = spec.reserved.iter().copied().chain(window).collect();
        regions.sort_by_key(|region| region.first);
        regions
    }

    /// Whether any of the addresses from `first` to `last` belongs to the device's own tables.
    pub fn is_own(&self, first: u64, last: u64) -> bool {
        self.mediated.is_some_and(|(start, end)| start <= last && first <= end)
    }
}

impl EndpointSpec {
    /// The same for the host, which takes one kind of table or all.
    pub fn caps(&self, takes_one: bool) -> EndpointCaps {
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
        let kinds = match self.tables {
            Hardware::Smmuv3 { .. } if takes_one => TableKinds::PASID_TABLE,
            Hardware::Vtd { .. } if takes_one => TableKinds::PAGE_TABLE,
            _ => TableKinds::all(),
        };
        EndpointCaps { tables, kinds, native: kinds, reserved: reserved.collect(), page_requests: self.waits }
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
