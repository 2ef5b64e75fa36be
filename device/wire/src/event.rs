//! Event records: faults, and page requests.

use pgtable_formats::{Iova, Pasid};
use zerocopy::{FromBytes, IntoBytes};

use crate::EndpointId;
use crate::layout::{FaultEventLayout, PageRequestLayout};
use crate::request::zero;

/// What the device tells the driver unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An access that failed.
    Fault(FaultEvent),
    /// An access that waits for the driver's answer.
    PageRequest(PageRequest),
}

/// An access that failed (virtio 1.4, 5.13.6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultEvent {
    /// Why.
    pub reason: FaultReason,
    /// What the access was.
    pub access: AccessFlags,
    /// Whose it was.
    pub endpoint: EndpointId,
    /// Its PASID, where it was tagged with one.
    pub pasid: Option<Pasid>,
    /// Its address, where known.
    pub address: Option<Iova>,
}

/// Why an access failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultReason {
    /// Unknown, or none of the others.
    Unknown,
    /// The endpoint is not attached to a domain.
    Domain,
    /// There is no mapping, or not the permission.
    Mapping,
}

bitflags::bitflags! {
    /// What an access was.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct AccessFlags: u32 {
        /// A read.
        const READ = 1 << 0;
        /// A write.
        const WRITE = 1 << 1;
        /// An instruction read (proposal).
        const EXEC = 1 << 2;
        /// In privileged mode (**private**).
        const PRIVILEGED = 1 << 3;
    }
}

/// An access that waits for an answer (private; the layout of the 2021 review).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// What the access is.
    pub access: AccessFlags,
    /// Whose it is.
    pub endpoint: EndpointId,
    /// Its PASID, where it is tagged with one.
    pub pasid: Option<Pasid>,
    /// Its address.
    pub address: Iova,
    /// The group that one answer serves.
    pub group_id: u16,
    /// The last request of its group.
    pub last: bool,
    /// VT-d private data.
    pub private_data: Option<[u64; 2]>,
}

const LAST: u32 = 1 << 4;
const PAGE_REQ: u32 = 1 << 5;
const ADDRESS: u32 = 1 << 8;
const PASID: u32 = 1 << 9;
const GROUP_ID: u32 = 1 << 10;
const PRIV_DATA: u32 = 1 << 11;

impl Event {
    /// Length in bytes of the record.
    pub const fn encoded_len(&self) -> usize {
        match self {
            Self::Fault(_) => size_of::<FaultEventLayout>(),
            Self::PageRequest(_) => size_of::<FaultEventLayout>() + size_of::<PageRequestLayout>(),
        }
    }

    /// Writes the record to the start of `buffer` and gives its length. `None`, and nothing written, where it does
    /// not fit: a record never spans buffers nor is cut (D-58).
    pub fn encode(&self, buffer: &mut [u8]) -> Option<usize> {
        let buffer = buffer.get_mut(..self.encoded_len())?;
        let (base, extension) = buffer.split_at_mut_checked(size_of::<FaultEventLayout>())?;
        match self {
            Self::Fault(fault) => base.copy_from_slice(fault.layout().as_bytes()),
            Self::PageRequest(request) => {
                let (first, second) = request.layouts();
                base.copy_from_slice(first.as_bytes());
                extension.copy_from_slice(second.as_bytes());
            }
        }
        Some(buffer.len())
    }

    /// Reads a record. `None` for one that a driver must ignore: too short, or with reserved bytes set.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (base, rest) = FaultEventLayout::read_from_prefix(bytes).ok()?;
        if !zero(&base.reserved) {
            return None;
        }
        let flags = base.flags.get();
        let endpoint = EndpointId(base.endpoint.get());
        let access = AccessFlags::from_bits_truncate(flags);
        let pasid = if flags & PASID != 0 { Some(Pasid::new(base.pasid.get())?) } else { None };
        let address = Iova(base.address.get());
        if flags & PAGE_REQ == 0 {
            let reason = FaultReason::from_number(base.reason);
            let address = (flags & ADDRESS != 0).then_some(address);
            return Some(Self::Fault(FaultEvent { reason, access, endpoint, pasid, address }));
        }
        let (extension, _) = PageRequestLayout::read_from_prefix(rest).ok()?;
        let private_data = extension.private_data.map(zerocopy::little_endian::U64::get);
        Some(Self::PageRequest(PageRequest {
            access,
            endpoint,
            pasid,
            address,
            group_id: extension.group_id.get(),
            last: flags & LAST != 0,
            private_data: (flags & PRIV_DATA != 0).then_some(private_data),
        }))
    }
}

impl FaultReason {
    /// A reason that is not known counts as UNKNOWN.
    const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Domain,
            2 => Self::Mapping,
            _ => Self::Unknown,
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Unknown => 0,
            Self::Domain => 1,
            Self::Mapping => 2,
        }
    }
}

impl FaultEvent {
    fn layout(&self) -> FaultEventLayout {
        let mut flags = self.access.bits();
        if self.address.is_some() {
            flags |= ADDRESS;
        }
        if self.pasid.is_some() {
            flags |= PASID;
        }
        FaultEventLayout {
            reason: self.reason.number(),
            reserved: [0; 3], // D-55
            flags: flags.into(),
            endpoint: self.endpoint.0.into(),
            pasid: self.pasid.map_or(0, Pasid::value).into(),
            address: self.address.map_or(0, |address| address.0).into(),
        }
    }
}

impl PageRequest {
    fn layouts(&self) -> (FaultEventLayout, PageRequestLayout) {
        let fault = FaultEvent {
            reason: FaultReason::Mapping,
            access: self.access,
            endpoint: self.endpoint,
            pasid: self.pasid,
            address: Some(self.address),
        };
        let mut flags = PAGE_REQ | GROUP_ID;
        if self.last {
            flags |= LAST;
        }
        if self.private_data.is_some() {
            flags |= PRIV_DATA;
        }
        let mut base = fault.layout();
        base.flags = (base.flags.get() | flags).into();
        let extension = PageRequestLayout {
            group_id: self.group_id.into(),
            reserved: [0; 6],
            private_data: self.private_data.unwrap_or_default().map(Into::into),
        };
        (base, extension)
    }
}
