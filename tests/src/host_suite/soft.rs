//! `SoftHost` as a [`HostUnderTest`]: as it is, or restricted as hardware through Linux is and mediated.

use pgtable_formats::{Access, AccessKind, Gpa, Iova};
use viommu_device::host::{EndpointCaps, FaultReport, Host, Stream, TableKinds};
use viommu_device::mediated::{Mediated, MediationLimits, Window};
use viommu_device::soft::{AccessError, Answer, SoftHost, Ticket};
use viommu_queue::GuestTables;
use viommu_wire::EndpointId;

use super::restricted::Restricted;
use super::{Ability, Attempt, Denied, HostUnderTest, Waiting};
use crate::rig::{Alloc, Memory, default_endpoints};

/// Behind an SMMUv3: nothing is left out.
pub const ARM: &[Denied] = &[];
/// Behind VT-d.
pub const INTEL: &[Denied] = &[(Ability::Tags, "VT-d has no tag but the PASID")];
/// Behind an SMMUv3, where accesses do not wait.
pub const IMPATIENT: &[Denied] = &[(Ability::PageRequests, "the endpoint's accesses do not wait")];
/// Behind nothing that takes tables.
pub const NO_TABLES: &[Denied] = &[
    (Ability::PasidTables, "the endpoint takes no tables"),
    (Ability::PageTables, "the endpoint takes no tables"),
    (Ability::Tags, "the endpoint takes no tables"),
    (Ability::PageRequests, "the endpoint takes no tables"),
];

/// Endpoints behind an SMMUv3.
pub const SMMUV3: [u32; 2] = [8, 9];
/// Endpoints behind VT-d.
pub const VTD: [u32; 2] = [16, 17];
/// Endpoints behind nothing that takes tables.
pub const PLAIN: [u32; 2] = [24, 25];

/// First page of the window that [`Soft::mediated`] has for tables of the device's own; behind it, to the middle of
/// memory, lie 8 MiB.
pub const WINDOW_PAGE: u64 = 0x1800;
/// Its bytes.
pub const WINDOW_BYTES: u64 = 1 << 20;

/// A software host, or one that is made of it.
pub trait OverSoft: Host {
    /// The host below all.
    fn soft(&mut self) -> &mut SoftHost<GuestTables>;
}

impl OverSoft for SoftHost<GuestTables> {
    fn soft(&mut self) -> &mut Self {
        self
    }
}

impl OverSoft for Mediated<Restricted, GuestTables> {
    fn soft(&mut self) -> &mut SoftHost<GuestTables> {
        &mut self.host_mut().inner
    }
}

/// A software host, and two of its endpoints.
pub struct Soft<H> {
    /// The host.
    pub host: H,
    /// An allocator of guest memory.
    pub memory: Alloc,
    /// Guest memory.
    pub guest: Memory,
    endpoints: [EndpointId; 2],
    is_strict: bool,
    cannot: &'static [Denied],
    told: Option<FaultReport>,
    /// Those that were given out, by number.
    tickets: Vec<Ticket>,
}

/// One that takes one kind of table, as hardware through Linux does, and mediation over it.
pub type MediatedSoft = Soft<Mediated<Restricted, GuestTables>>;

impl Soft<SoftHost<GuestTables>> {
    /// The host as it is.
    pub fn native(endpoints: [u32; 2], strict: bool, cannot: &'static [Denied]) -> Self {
        let guest = Memory::new(64 << 20);
        let mut host = SoftHost::new(guest.tables().clone());
        host.set_strict(strict);
        let waits = cannot.iter().all(|(ability, _)| *ability != Ability::PageRequests);
        for (id, caps) in default_endpoints() {
            let page_requests = waits && caps.tables.is_some();
            host.add_endpoint(EndpointId(id), EndpointCaps { page_requests, ..caps }).expect("an endpoint");
        }
        Self::over(host, guest, endpoints, strict, cannot)
    }
}

impl MediatedSoft {
    /// The host restricted and mediated.
    pub fn mediated(endpoints: [u32; 2], strict: bool, cannot: &'static [Denied]) -> Self {
        Self::mediated_within(endpoints, strict, cannot, WINDOW_BYTES, MediationLimits::DEFAULT)
    }

    /// The same with another window and other limits.
    pub fn mediated_within(
        endpoints: [u32; 2],
        strict: bool,
        cannot: &'static [Denied],
        window: u64,
        limits: MediationLimits,
    ) -> Self {
        let guest = Memory::new(64 << 20);
        let mut host = Restricted::new(&guest);
        host.inner.set_strict(strict);
        let window = Window::new(Memory::page(WINDOW_PAGE), window);
        let host = Mediated::new(host, guest.tables().clone(), window, limits).expect("a window");
        Self::over(host, guest, endpoints, strict, cannot)
    }

    /// Where a read leads.
    pub fn leads(&mut self, stream: Stream, iova: u64) -> Option<Gpa> {
        self.host.soft().peek(stream, Iova(iova), Access::READ).ok().map(|piece| piece.output)
    }
}

impl<H: OverSoft> Soft<H> {
    fn over(host: H, guest: Memory, endpoints: [u32; 2], is_strict: bool, cannot: &'static [Denied]) -> Self {
        let memory = Alloc::new(&guest);
        let endpoints = endpoints.map(EndpointId);
        Self { host, memory, guest, endpoints, is_strict, cannot, told: None, tickets: Vec::new() }
    }

    /// A fault is told, once, and nothing else is.
    fn tell(&mut self, is_fault: bool) {
        self.told = self.host.next_fault();
        assert_eq!((self.told.is_some(), self.host.next_fault()), (is_fault, None));
    }
}

impl<H: OverSoft> HostUnderTest for Soft<H> {
    type Host = H;
    type Memory = Alloc;

    fn host(&mut self) -> &mut H {
        &mut self.host
    }

    fn memory(&mut self) -> &mut Alloc {
        &mut self.memory
    }

    fn endpoints(&self) -> [EndpointId; 2] {
        self.endpoints
    }

    fn access(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Option<u64> {
        let access = Access { kind, privileged: false };
        let output = self.host.soft().translate(stream, Iova(iova), access, |piece| piece.output.0).ok();
        self.tell(output.is_none());
        output
    }

    fn attempt(&mut self, stream: Stream, iova: u64, kind: AccessKind) -> Attempt {
        let access = Access { kind, privileged: false };
        let attempt = self.host.soft().access(stream, Iova(iova), access, |piece| piece.output.0);
        self.tell(matches!(attempt, Err(AccessError::Fault(_))));
        match attempt {
            Ok(at) => Attempt::Reaches(at),
            Err(AccessError::Fault(_)) => Attempt::Fails,
            Err(AccessError::Waits(ticket)) => {
                self.tickets.push(ticket);
                Attempt::Waits(Waiting(self.tickets.len() - 1))
            }
        }
    }

    fn answer(&mut self, waiting: Waiting) -> Option<Answer> {
        let ticket = self.tickets[waiting.0];
        self.host.soft().answer(ticket)
    }

    fn told(&mut self) -> Option<FaultReport> {
        self.told.take()
    }

    fn page(&self, number: u64) -> u64 {
        Memory::page(number).0
    }

    fn shows_stale(&self) -> bool {
        !self.is_strict
    }

    fn cannot(&self) -> &'static [Denied] {
        self.cannot
    }
}

/// What hardware through Linux takes as it is.
pub(super) fn native_kinds(caps: &EndpointCaps) -> TableKinds {
    use viommu_device::host::TableCaps;
    match caps.tables {
        Some(TableCaps::Smmuv3(_)) => TableKinds::PASID_TABLE,
        Some(TableCaps::Vtd(_)) => TableKinds::PAGE_TABLE,
        None => TableKinds::empty(),
    }
}
