//! Requests: from bytes to meaning on the device's side, from meaning to bytes on the guest's.

use core::ops::Deref;

use pgtable_formats::{Gpa, Iova, IovaRange, Pasid};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::layout::{
    AttachLayout, AttachTableLayout, DetachLayout, HeadLayout, InvalidateLayout, MapLayout, PageResponseLayout,
    ProbeLayout, UnmapLayout,
};
use crate::{DomainId, EndpointId, Invalidate, Status, TableDescriptor, numbers};

/// One request, all its values legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Attach an endpoint to a domain.
    Attach(Attach),
    /// Detach an endpoint from its domain.
    Detach(Detach),
    /// Make a mapping.
    Map(Map),
    /// Remove mappings.
    Unmap(Unmap),
    /// Ask for the properties of an endpoint.
    Probe(Probe),
    /// Bind the guest's own table.
    AttachTable(AttachTable),
    /// Drop what was cached of the guest's own tables.
    Invalidate(Invalidate),
    /// Answer a page request.
    PageResponse(PageResponse),
}

/// Attach `endpoint` to `domain`, which the first ATTACH creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attach {
    /// The domain.
    pub domain: DomainId,
    /// The endpoint.
    pub endpoint: EndpointId,
    /// What kind of domain.
    pub flags: AttachFlags,
}

bitflags::bitflags! {
    /// Flags of ATTACH.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct AttachFlags: u32 {
        /// A bypass domain: identity translation, no mappings. Needs `BYPASS_CONFIG`.
        const BYPASS = 1 << 0;
    }
}

/// Detach `endpoint` from `domain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Detach {
    /// The domain that the endpoint is attached to.
    pub domain: DomainId,
    /// The endpoint.
    pub endpoint: EndpointId,
}

/// Map `virt_start..=virt_end` of `domain` to the guest-physical addresses from `phys_start` on.
///
/// The range may be inverted: the order of checks puts that after the look-up of the domain, see [`Map::range`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// The domain.
    pub domain: DomainId,
    /// First address.
    pub virt_start: Iova,
    /// Last address.
    pub virt_end: Iova,
    /// Where the first address leads.
    pub phys_start: Gpa,
    /// What accesses the mapping permits.
    pub flags: MapFlags,
}

bitflags::bitflags! {
    /// Flags of MAP.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct MapFlags: u32 {
        /// The device may read.
        const READ = 1 << 0;
        /// The device may write.
        const WRITE = 1 << 1;
        /// The target is device registers, not memory. Needs the feature `MMIO`.
        const MMIO = 1 << 2;
    }
}

impl Map {
    /// The range, unless its end lies before its start.
    #[inline]
    pub const fn range(&self) -> Option<IovaRange> {
        IovaRange::new(self.virt_start, self.virt_end)
    }
}

/// Remove every mapping of `domain` inside `virt_start..=virt_end`. As in [`Map`], the range may be inverted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmap {
    /// The domain.
    pub domain: DomainId,
    /// First address.
    pub virt_start: Iova,
    /// Last address.
    pub virt_end: Iova,
}

impl Unmap {
    /// The range, unless its end lies before its start.
    #[inline]
    pub const fn range(&self) -> Option<IovaRange> {
        IovaRange::new(self.virt_start, self.virt_end)
    }
}

/// Ask for the properties of `endpoint`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The endpoint.
    pub endpoint: EndpointId,
}

/// Bind the guest's own table: attach `endpoint` to `domain`, which translates through `table`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachTable {
    /// The domain.
    pub domain: DomainId,
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The table.
    pub table: TableDescriptor,
}

/// Answer all page requests of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageResponse {
    /// The endpoint that asked.
    pub endpoint: EndpointId,
    /// The PASID that it asked for.
    pub pasid: Option<Pasid>,
    /// The group.
    pub group_id: u16,
    /// The answer.
    pub code: PageResponseCode,
}

/// What a page response says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageResponseCode {
    /// The pages are there now: try again.
    Success,
    /// The access is not allowed.
    Invalid,
    /// The fault could not be handled, nor will later ones be.
    Failure,
}

/// The kinds of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestType {
    /// [`Attach`].
    Attach,
    /// [`Detach`].
    Detach,
    /// [`Map`].
    Map,
    /// [`Unmap`].
    Unmap,
    /// [`Probe`].
    Probe,
    /// [`AttachTable`].
    AttachTable,
    /// [`Invalidate`].
    Invalidate,
    /// [`PageResponse`].
    PageResponse,
}

impl RequestType {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Attach,
        Self::Detach,
        Self::Map,
        Self::Unmap,
        Self::Probe,
        Self::AttachTable,
        Self::Invalidate,
        Self::PageResponse,
    ];

    /// The kind with this number; `None` where there is none.
    #[inline]
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            numbers::T_ATTACH => Self::Attach,
            numbers::T_DETACH => Self::Detach,
            numbers::T_MAP => Self::Map,
            numbers::T_UNMAP => Self::Unmap,
            numbers::T_PROBE => Self::Probe,
            numbers::T_ATTACH_TABLE => Self::AttachTable,
            numbers::T_INVALIDATE => Self::Invalidate,
            numbers::T_PAGE_RESP => Self::PageResponse,
            _ => return None,
        })
    }

    /// The number on the wire.
    pub const fn number(self) -> u8 {
        match self {
            Self::Attach => numbers::T_ATTACH,
            Self::Detach => numbers::T_DETACH,
            Self::Map => numbers::T_MAP,
            Self::Unmap => numbers::T_UNMAP,
            Self::Probe => numbers::T_PROBE,
            Self::AttachTable => numbers::T_ATTACH_TABLE,
            Self::Invalidate => numbers::T_INVALIDATE,
            Self::PageResponse => numbers::T_PAGE_RESP,
        }
    }

    /// The specification's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Attach => "ATTACH",
            Self::Detach => "DETACH",
            Self::Map => "MAP",
            Self::Unmap => "UNMAP",
            Self::Probe => "PROBE",
            Self::AttachTable => "ATTACH_TABLE",
            Self::Invalidate => "INVALIDATE",
            Self::PageResponse => "PAGE_RESP",
        }
    }

    /// Length in bytes of the device-readable part.
    pub const fn readable_len(self) -> usize {
        match self {
            Self::Attach => size_of::<AttachLayout>(),
            Self::Detach => size_of::<DetachLayout>(),
            Self::Map => size_of::<MapLayout>(),
            Self::Unmap => size_of::<UnmapLayout>(),
            Self::Probe => size_of::<ProbeLayout>(),
            Self::AttachTable => size_of::<AttachTableLayout>(),
            Self::Invalidate => size_of::<InvalidateLayout>(),
            Self::PageResponse => size_of::<PageResponseLayout>(),
        }
    }
}

/// Why bytes are not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There is not even a head.
    #[error("request of {length} bytes has no head")]
    NoHead {
        /// Length in bytes of the device-readable part.
        length: usize,
    },
    /// The type is not known (D-10).
    #[error("unknown request type {kind}")]
    UnknownType {
        /// The number found.
        kind: u8,
    },
    /// The device-readable part ends too early.
    #[error("{} of {length} bytes is too short", kind.name())]
    Short {
        /// The kind of request.
        kind: RequestType,
        /// Length in bytes of the device-readable part.
        length: usize,
    },
    /// Reserved bytes that must be zero are not (D-17 and the like).
    #[error("{}: reserved bytes are not zero", kind.name())]
    Reserved {
        /// The kind of request.
        kind: RequestType,
    },
    /// Flags that the specification does not define (D-18, D-32).
    #[error("{}: unknown flags {flags:#x}", kind.name())]
    UnknownFlags {
        /// The kind of request.
        kind: RequestType,
        /// The undefined bits.
        flags: u64,
    },
    /// A field that selects has a value without meaning.
    #[error("{}: {field} has no meaning {value:#x}", kind.name())]
    BadSelector {
        /// The kind of request.
        kind: RequestType,
        /// The field's name in the specification.
        field: &'static str,
        /// The value found.
        value: u64,
    },
    /// INVALIDATE names no pages, pages of no size, or a range that leaves the 64-bit space.
    #[error("INVALIDATE: no such address range")]
    BadAddressRange,
    /// A PASID needs more than 20 bits.
    #[error("{}: PASID {pasid:#x} is wider than 20 bits", kind.name())]
    WidePasid {
        /// The kind of request.
        kind: RequestType,
        /// The value found.
        pasid: u32,
    },
}

impl DecodeError {
    /// The status that the guest gets; `None` where the request is returned unwritten (D-10, D-11).
    pub const fn status(&self) -> Option<Status> {
        match self {
            Self::NoHead { .. } | Self::UnknownType { .. } => None,
            Self::WidePasid { kind: RequestType::AttachTable, .. } => Some(Status::Unsupp),
            Self::Short { .. }
            | Self::Reserved { .. }
            | Self::UnknownFlags { .. }
            | Self::BadSelector { .. }
            | Self::BadAddressRange
            | Self::WidePasid { .. } => Some(Status::Inval),
        }
    }
}

impl Request {
    /// Longest device-readable part of any request, in bytes.
    pub const MAX_READABLE_LEN: usize = size_of::<AttachTableLayout>();

    /// Decodes the device-readable part. Bytes beyond what the type needs are ignored.
    ///
    /// # Errors
    /// The first rule that the bytes break: length, then reserved bytes and flags, then values.
    #[inline]
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let kind = Self::peek(bytes)?;
        match kind {
            RequestType::Attach => Attach::from_layout(&layout(kind, bytes)?).map(Self::Attach),
            RequestType::Detach => Ok(Self::Detach(Detach::from_layout(&layout(kind, bytes)?))),
            RequestType::Map => Map::from_layout(&layout(kind, bytes)?).map(Self::Map),
            RequestType::Unmap => Unmap::from_layout(&layout(kind, bytes)?).map(Self::Unmap),
            RequestType::Probe => {
                let layout: ProbeLayout = layout(kind, bytes)?;
                Ok(Self::Probe(Probe { endpoint: EndpointId(layout.endpoint.get()) }))
            }
            RequestType::AttachTable => AttachTable::from_layout(&layout(kind, bytes)?).map(Self::AttachTable),
            RequestType::Invalidate => Invalidate::from_layout(&layout(kind, bytes)?).map(Self::Invalidate),
            RequestType::PageResponse => PageResponse::from_layout(&layout(kind, bytes)?).map(Self::PageResponse),
        }
    }

    /// The kind that the head names, without a look at the rest.
    ///
    /// # Errors
    /// [`DecodeError::NoHead`] and [`DecodeError::UnknownType`].
    #[inline]
    pub fn peek(bytes: &[u8]) -> Result<RequestType, DecodeError> {
        let Ok((head, _)) = HeadLayout::read_from_prefix(bytes) else {
            return Err(DecodeError::NoHead { length: bytes.len() });
        };
        RequestType::from_number(head.kind).ok_or(DecodeError::UnknownType { kind: head.kind })
    }

    /// The kind of this request.
    pub const fn kind(&self) -> RequestType {
        match self {
            Self::Attach(_) => RequestType::Attach,
            Self::Detach(_) => RequestType::Detach,
            Self::Map(_) => RequestType::Map,
            Self::Unmap(_) => RequestType::Unmap,
            Self::Probe(_) => RequestType::Probe,
            Self::AttachTable(_) => RequestType::AttachTable,
            Self::Invalidate(_) => RequestType::Invalidate,
            Self::PageResponse(_) => RequestType::PageResponse,
        }
    }

    /// The device-readable part, as a driver sends it.
    pub fn encode(&self) -> Encoded {
        let head = HeadLayout { kind: self.kind().number(), reserved: [0; 3] };
        match self {
            Self::Attach(attach) => Encoded::new(&AttachLayout {
                head,
                domain: attach.domain.0.into(),
                endpoint: attach.endpoint.0.into(),
                flags: attach.flags.bits().into(),
                reserved: [0; 4],
            }),
            Self::Detach(detach) => Encoded::new(&DetachLayout {
                head,
                domain: detach.domain.0.into(),
                endpoint: detach.endpoint.0.into(),
                reserved: [0; 8],
            }),
            Self::Map(map) => Encoded::new(&MapLayout {
                head,
                domain: map.domain.0.into(),
                virt_start: map.virt_start.0.into(),
                virt_end: map.virt_end.0.into(),
                phys_start: map.phys_start.0.into(),
                flags: map.flags.bits().into(),
            }),
            Self::Unmap(unmap) => Encoded::new(&UnmapLayout {
                head,
                domain: unmap.domain.0.into(),
                virt_start: unmap.virt_start.0.into(),
                virt_end: unmap.virt_end.0.into(),
                reserved: [0; 4],
            }),
            Self::Probe(probe) => {
                Encoded::new(&ProbeLayout { head, endpoint: probe.endpoint.0.into(), reserved: [0; 64] })
            }
            Self::AttachTable(attach) => {
                let (format, descriptor) = attach.table.encode();
                Encoded::new(&AttachTableLayout {
                    head,
                    domain: attach.domain.0.into(),
                    endpoint: attach.endpoint.0.into(),
                    format,
                    reserved: [0; 3],
                    descriptor,
                })
            }
            Self::Invalidate(invalidate) => Encoded::new(&invalidate.layout(head)),
            Self::PageResponse(response) => Encoded::new(&PageResponseLayout {
                head,
                endpoint: response.endpoint.0.into(),
                flags: u32::from(response.pasid.is_some()).into(),
                pasid: response.pasid.map_or(0, Pasid::value).into(),
                group_id: response.group_id.into(),
                code: response.code.number().into(),
                reserved: [0; 8],
            }),
        }
    }
}

/// The bytes of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoded {
    bytes: [u8; Request::MAX_READABLE_LEN],
    length: usize,
}

impl Encoded {
    fn new<L: IntoBytes + Immutable>(layout: &L) -> Self {
        const { assert!(size_of::<L>() <= Request::MAX_READABLE_LEN) };
        let mut bytes = [0; Request::MAX_READABLE_LEN];
        let length = size_of::<L>();
        bytes[..length].copy_from_slice(layout.as_bytes());
        Self { bytes, length }
    }
}

impl Deref for Encoded {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl AsRef<[u8]> for Encoded {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

#[inline]
fn layout<L: FromBytes + KnownLayout + Immutable + Unaligned>(
    kind: RequestType,
    bytes: &[u8],
) -> Result<L, DecodeError> {
    match L::read_from_prefix(bytes) {
        Ok((layout, _)) => Ok(layout),
        Err(_) => Err(DecodeError::Short { kind, length: bytes.len() }),
    }
}

/// Whether all bytes are zero.
#[inline]
pub(crate) fn zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

impl Attach {
    #[inline]
    fn from_layout(layout: &AttachLayout) -> Result<Self, DecodeError> {
        let kind = RequestType::Attach;
        if !zero(&layout.reserved) {
            return Err(DecodeError::Reserved { kind }); // D-17
        }
        let flags = AttachFlags::from_bits(layout.flags.get()).ok_or(DecodeError::UnknownFlags {
            kind,
            flags: u64::from(layout.flags.get() & !AttachFlags::all().bits()),
        })?; // D-18
        Ok(Self { domain: DomainId(layout.domain.get()), endpoint: EndpointId(layout.endpoint.get()), flags })
    }
}

impl Detach {
    /// Reserved bytes are ignored (D-25).
    #[inline]
    fn from_layout(layout: &DetachLayout) -> Self {
        Self { domain: DomainId(layout.domain.get()), endpoint: EndpointId(layout.endpoint.get()) }
    }
}

impl Map {
    #[inline]
    fn from_layout(layout: &MapLayout) -> Result<Self, DecodeError> {
        let flags = MapFlags::from_bits(layout.flags.get()).ok_or(DecodeError::UnknownFlags {
            kind: RequestType::Map,
            flags: u64::from(layout.flags.get() & !MapFlags::all().bits()),
        })?; // D-32
        Ok(Self {
            domain: DomainId(layout.domain.get()),
            virt_start: Iova(layout.virt_start.get()),
            virt_end: Iova(layout.virt_end.get()),
            phys_start: Gpa(layout.phys_start.get()),
            flags,
        })
    }
}

impl Unmap {
    #[inline]
    fn from_layout(layout: &UnmapLayout) -> Result<Self, DecodeError> {
        if !zero(&layout.reserved) {
            return Err(DecodeError::Reserved { kind: RequestType::Unmap }); // D-38
        }
        Ok(Self {
            domain: DomainId(layout.domain.get()),
            virt_start: Iova(layout.virt_start.get()),
            virt_end: Iova(layout.virt_end.get()),
        })
    }
}

impl AttachTable {
    fn from_layout(layout: &AttachTableLayout) -> Result<Self, DecodeError> {
        if !zero(&layout.reserved) {
            return Err(DecodeError::Reserved { kind: RequestType::AttachTable });
        }
        Ok(Self {
            domain: DomainId(layout.domain.get()),
            endpoint: EndpointId(layout.endpoint.get()),
            table: TableDescriptor::decode(layout.format, &layout.descriptor)?,
        })
    }
}

impl PageResponse {
    const PASID_VALID: u32 = 1;

    fn from_layout(layout: &PageResponseLayout) -> Result<Self, DecodeError> {
        let kind = RequestType::PageResponse;
        if !zero(&layout.reserved) {
            return Err(DecodeError::Reserved { kind });
        }
        let unknown = layout.flags.get() & !Self::PASID_VALID;
        if unknown != 0 {
            return Err(DecodeError::UnknownFlags { kind, flags: unknown.into() });
        }
        let pasid = match layout.flags.get() & Self::PASID_VALID {
            0 => None,
            _ => Some(pasid(kind, layout.pasid.get())?),
        };
        let code = PageResponseCode::from_number(layout.code.get()).ok_or(DecodeError::BadSelector {
            kind,
            field: "resp_code",
            value: layout.code.get().into(),
        })?;
        Ok(Self { endpoint: EndpointId(layout.endpoint.get()), pasid, group_id: layout.group_id.get(), code })
    }
}

impl PageResponseCode {
    const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            0 => Self::Success,
            1 => Self::Invalid,
            2 => Self::Failure,
            _ => return None,
        })
    }

    const fn number(self) -> u16 {
        match self {
            Self::Success => 0,
            Self::Invalid => 1,
            Self::Failure => 2,
        }
    }
}

pub(crate) fn pasid(kind: RequestType, value: u32) -> Result<Pasid, DecodeError> {
    Pasid::new(value).ok_or(DecodeError::WidePasid { kind, pasid: value })
}
