//! PROBE properties.

use core::fmt;

use pgtable_formats::{Iova, IovaRange};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{
    HwArmSmmu3Layout, HwIntelVtdLayout, PageRequestsLayout, PasidSizeLayout, PropertyHeadLayout,
    ReservedRegionLayout, TableFormatsLayout,
};
use crate::numbers;

const KIND_MASK: u16 = 0xfff;
const HEAD_LEN: usize = size_of::<PropertyHeadLayout>();

/// One property of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    /// Addresses that the driver must not map.
    ReservedRegion(ReservedRegion),
    /// SMMUv3 hardware that walks the guest's tables: ID registers 0, 1, 3 and 5 (IHI 0070, 6.3).
    HwArmSmmu3 {
        /// SMMU_IDR0.
        idr0: u32,
        /// SMMU_IDR1.
        idr1: u32,
        /// SMMU_IDR3.
        idr3: u32,
        /// SMMU_IDR5.
        idr5: u32,
    },
    /// VT-d hardware that walks the guest's tables.
    HwIntelVtd {
        /// Capability Register.
        cap: u64,
        /// Extended Capability Register.
        ecap: u64,
    },
    /// Width of the endpoint's PASIDs in bits; absent where it has none.
    PasidSize {
        /// 1 to 20.
        bits: u8,
    },
    /// The formats that ATTACH_TABLE takes.
    TableFormats(TableFormats),
    /// What the endpoint does with page requests.
    PageRequests(PageRequestFlags),
}

bitflags::bitflags! {
    /// What an endpoint does with page requests (private). Bits that are not known are ignored.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PageRequestFlags: u32 {
        /// Its accesses can wait for a page.
        const SUPPORTED = 1 << 0;
        /// A response has to repeat the PASID of the request.
        const PASID_IN_RESPONSE = 1 << 1;
    }
}

/// A region of I/O virtual addresses that the driver must not map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedRegion {
    /// What is there.
    pub kind: ReservedKind,
    /// Where.
    pub range: IovaRange,
}

/// What a reserved region is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReservedKind {
    /// Not usable at all.
    Reserved,
    /// The doorbell of message-signalled interrupts, which needs no mapping.
    Msi,
}

/// Formats of ATTACH_TABLE, by number (see [`numbers`](crate::numbers)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableFormats([u8; 8]);

impl TableFormats {
    /// At most eight formats; `None` for more, or for format 0, which marks unused places.
    pub fn new(formats: &[u8]) -> Option<Self> {
        let mut places = [0; 8];
        places.get_mut(..formats.len())?.copy_from_slice(formats);
        (!formats.contains(&numbers::FORMAT_NONE)).then_some(Self(places))
    }

    /// Whether ATTACH_TABLE takes `format`.
    pub fn contains(self, format: u8) -> bool {
        self.iter().any(|known| known == format)
    }

    /// The formats, in the device's order of preference.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        self.0.into_iter().filter(|&format| format != numbers::FORMAT_NONE)
    }
}

impl fmt::Display for ReservedKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reserved => "reserved",
            Self::Msi => "msi",
        })
    }
}

impl Property {
    /// Length in bytes with its header.
    pub const fn encoded_len(&self) -> usize {
        HEAD_LEN
            + match self {
                Self::ReservedRegion(_) => size_of::<ReservedRegionLayout>(),
                Self::HwArmSmmu3 { .. } => size_of::<HwArmSmmu3Layout>(),
                Self::HwIntelVtd { .. } => size_of::<HwIntelVtdLayout>(),
                Self::PasidSize { .. } => size_of::<PasidSizeLayout>(),
                Self::TableFormats(_) => size_of::<TableFormatsLayout>(),
                Self::PageRequests(_) => size_of::<PageRequestsLayout>(),
            }
    }

    /// Writes the property to the start of `area` and gives its length; `None`, and nothing written, where it does
    /// not fit. The next property starts right behind it (D-48).
    pub fn encode(&self, area: &mut [u8]) -> Option<usize> {
        let area = area.get_mut(..self.encoded_len())?;
        match self {
            Self::ReservedRegion(region) => put(
                area,
                numbers::PROBE_RESV_MEM,
                &ReservedRegionLayout {
                    subtype: match region.kind {
                        ReservedKind::Reserved => numbers::RESV_MEM_RESERVED,
                        ReservedKind::Msi => numbers::RESV_MEM_MSI,
                    },
                    reserved: [0; 3], // D-51
                    start: region.range.start().0.into(),
                    end: region.range.last().0.into(),
                },
            ),
            Self::HwArmSmmu3 { idr0, idr1, idr3, idr5 } => put(
                area,
                numbers::PROBE_HW_ARM_SMMU3,
                &HwArmSmmu3Layout {
                    reserved0: [0; 4],
                    idr0: u64::from(*idr0).into(),
                    idr1: u64::from(*idr1).into(),
                    reserved2: 0.into(),
                    idr3: u64::from(*idr3).into(),
                    reserved4: 0.into(),
                    idr5: u64::from(*idr5).into(),
                },
            ),
            Self::HwIntelVtd { cap, ecap } => put(
                area,
                numbers::PROBE_HW_INTEL_VTD,
                &HwIntelVtdLayout { reserved: [0; 4], cap: (*cap).into(), ecap: (*ecap).into() },
            ),
            Self::PasidSize { bits } => {
                put(area, numbers::PROBE_PASID_SIZE, &PasidSizeLayout { bits: *bits, reserved: [0; 3] })
            }
            Self::TableFormats(formats) => put(
                area,
                numbers::PROBE_TABLE_FORMATS,
                &TableFormatsLayout { reserved: [0; 4], formats: formats.0 },
            ),
            Self::PageRequests(flags) => {
                put(area, numbers::PROBE_PAGE_REQUESTS, &PageRequestsLayout { flags: flags.bits().into() })
            }
        }
    }

    fn decode(kind: u16, value: &[u8]) -> Result<Self, PropertyError> {
        match kind {
            numbers::PROBE_RESV_MEM => {
                let layout: ReservedRegionLayout = read(kind, value)?;
                let range = IovaRange::new(Iova(layout.start.get()), Iova(layout.end.get()))
                    .ok_or(PropertyError::Value { kind })?;
                // An unknown subtype counts as RESERVED, reserved bytes are ignored.
                let kind = match layout.subtype {
                    numbers::RESV_MEM_MSI => ReservedKind::Msi,
                    _ => ReservedKind::Reserved,
                };
                Ok(Self::ReservedRegion(ReservedRegion { kind, range }))
            }
            numbers::PROBE_HW_ARM_SMMU3 => {
                let layout: HwArmSmmu3Layout = read(kind, value)?;
                let register = |value: u64| u32::try_from(value).map_err(|_| PropertyError::Value { kind });
                Ok(Self::HwArmSmmu3 {
                    idr0: register(layout.idr0.get())?,
                    idr1: register(layout.idr1.get())?,
                    idr3: register(layout.idr3.get())?,
                    idr5: register(layout.idr5.get())?,
                })
            }
            numbers::PROBE_HW_INTEL_VTD => {
                let layout: HwIntelVtdLayout = read(kind, value)?;
                Ok(Self::HwIntelVtd { cap: layout.cap.get(), ecap: layout.ecap.get() })
            }
            numbers::PROBE_PASID_SIZE => {
                let layout: PasidSizeLayout = read(kind, value)?;
                match layout.bits {
                    bits @ 1..=20 => Ok(Self::PasidSize { bits }),
                    _ => Err(PropertyError::Value { kind }),
                }
            }
            numbers::PROBE_TABLE_FORMATS => {
                let layout: TableFormatsLayout = read(kind, value)?;
                Ok(Self::TableFormats(TableFormats(layout.formats)))
            }
            numbers::PROBE_PAGE_REQUESTS => {
                let layout: PageRequestsLayout = read(kind, value)?;
                Ok(Self::PageRequests(PageRequestFlags::from_bits_truncate(layout.flags.get())))
            }
            kind => Err(PropertyError::Unknown { kind }),
        }
    }
}

/// Why a property was skipped; the ones behind it are still good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PropertyError {
    /// A type that this version does not know.
    #[error("unknown property type {kind:#x}")]
    Unknown {
        /// The type.
        kind: u16,
    },
    /// Reserved header bits are set.
    #[error("property type {kind:#x} has reserved bits set")]
    Reserved {
        /// The type.
        kind: u16,
    },
    /// The value is shorter than its type needs.
    #[error("property type {kind:#x} is too short")]
    Short {
        /// The type.
        kind: u16,
    },
    /// The value has no meaning.
    #[error("property type {kind:#x} has a value without meaning")]
    Value {
        /// The type.
        kind: u16,
    },
    /// The list itself is cut off: nothing follows.
    #[error("property list is cut off")]
    Cut,
}

/// The properties that a PROBE answered, in order.
#[derive(Clone, Debug)]
pub struct Properties<'a> {
    area: &'a [u8],
}

impl<'a> Properties<'a> {
    /// Over the properties area: `probe_size` bytes.
    pub const fn new(area: &'a [u8]) -> Self {
        Self { area }
    }
}

impl Iterator for Properties<'_> {
    type Item = Result<Property, PropertyError>;

    /// Ends at type NONE or at the end of the area; each step uses up at least a header.
    fn next(&mut self) -> Option<Self::Item> {
        let (head, rest) = PropertyHeadLayout::read_from_prefix(self.area).ok()?;
        let kind = head.kind.get() & KIND_MASK;
        if kind == numbers::PROBE_NONE {
            self.area = &[];
            return None;
        }
        let Some((value, rest)) = rest.split_at_checked(head.length.get().into()) else {
            self.area = &[];
            return Some(Err(PropertyError::Cut));
        };
        self.area = rest;
        if head.kind.get() & !KIND_MASK != 0 {
            return Some(Err(PropertyError::Reserved { kind }));
        }
        Some(Property::decode(kind, value))
    }
}

fn put<L: IntoBytes + Immutable>(area: &mut [u8], kind: u16, value: &L) -> Option<usize> {
    // D-46, D-47: the length leaves the header out.
    let length = u16::try_from(size_of::<L>()).ok()?;
    let head = PropertyHeadLayout { kind: kind.into(), length: length.into() };
    let (head_area, value_area) = area.split_at_mut_checked(HEAD_LEN)?;
    head_area.copy_from_slice(head.as_bytes());
    value_area.copy_from_slice(value.as_bytes());
    Some(area.len())
}

/// The length comes from the property, not from its type: a longer value is a later version's.
fn read<L: FromBytes + KnownLayout + Immutable + Unaligned>(
    kind: u16,
    value: &[u8],
) -> Result<L, PropertyError> {
    L::read_from_prefix(value).map(|(layout, _)| layout).map_err(|_| PropertyError::Short { kind })
}
