//! The machine below the device: what the device does with it is seen, and it makes up what software never does.

use std::collections::{BTreeSet, VecDeque};

use pgtable_formats::IovaRange;
use viommu_device::host::{
    Answered, EndpointCaps, FaultCause, FaultReport, GroupResponse, Host, HostError, Invalidation, MapError,
    PageRequestReport, Scope, SpaceSpec, Stopped, Stream, UnmapError,
};
use viommu_device::mapping::Mapping;
use viommu_device::mediated::{Mediated, MediationLimits, Window};
use viommu_device::soft::SoftHost;
use viommu_queue::GuestTables;
use viommu_wire::{AccessFlags, Caches, EndpointId, Gpa, Iova, PageResponseCode, Pasid};

use super::super::asking::{Ask, Key, Seen};
use super::super::world::World;
use super::stream_of;
use crate::rig::Memory;

/// A machine that translates in software at last.
pub trait Machine: Host + Send + 'static {
    /// With the endpoints of `world`.
    fn make(world: &World, memory: &Memory) -> Self;

    /// What translates.
    fn soft(&mut self) -> &mut SoftHost<GuestTables>;

    /// The worlds that it is for.
    fn worlds() -> Vec<World>;
}

/// Every kind of table.
pub type Native = SoftHost<GuestTables>;
/// One kind for each architecture; the device makes the other of it.
pub type Made = Mediated<Native, GuestTables>;

impl Machine for Native {
    fn make(world: &World, memory: &Memory) -> Self {
        let mut host = SoftHost::new(memory.tables().clone());
        for (id, caps) in world.device_endpoints() {
            host.add_endpoint(EndpointId(id), caps).expect("an endpoint");
        }
        host
    }

    fn soft(&mut self) -> &mut SoftHost<GuestTables> {
        self
    }

    fn worlds() -> Vec<World> {
        World::native().into()
    }
}

impl Machine for Made {
    fn make(world: &World, memory: &Memory) -> Self {
        let host = Native::make(world, memory);
        let (first, last) = world.mediated.expect("a window");
        let window = Window::new(Gpa(first), last - first + 1).expect("pages");
        let limits = MediationLimits::DEFAULT;
        Self::new(host, memory.tables().clone(), Some(window), limits).expect("a window in memory")
    }

    fn soft(&mut self) -> &mut SoftHost<GuestTables> {
        self.host_mut()
    }

    fn worlds() -> Vec<World> {
        World::made().into()
    }
}

/// A machine whose page requests, and their answers, are noted.
pub struct Observed<H> {
    /// The machine.
    pub inner: H,
    /// What happened since somebody looked.
    pub seen: Vec<Seen>,
    /// Requests of no access, which go before those of the machine.
    made_up: VecDeque<Ask>,
    /// Their groups that are open, taken over or not, and whether all of it was made up.
    open: Vec<Key>,
    /// Those of which the device took something over: only these can be answered.
    taken: Vec<Key>,
    /// Streams with a PASID that are bound on their own.
    own: BTreeSet<(u32, u32)>,
    /// The next answer fails.
    pub fails: bool,
}

impl<H> Observed<H> {
    /// Nothing happened.
    pub const fn new(inner: H) -> Self {
        Self {
            inner,
            seen: Vec::new(),
            made_up: VecDeque::new(),
            open: Vec::new(),
            taken: Vec::new(),
            own: BTreeSet::new(),
            fails: false,
        }
    }

    /// Makes up a page request. Its group has a number that the machine below does not reach.
    pub fn make_up(&mut self, ask: Ask) {
        let key = (ask.id, ask.pasid, ask.number.expect("a number"));
        if !self.open.contains(&key) {
            self.open.push(key);
        }
        self.made_up.push_back(ask);
    }

    /// Answers a group of its own by itself.
    pub fn forget(&mut self, key: Key) {
        self.close(|other| other == key);
    }

    /// Groups of its own that are open.
    pub fn open(&self) -> Vec<Key> {
        let mut open = self.open.clone();
        open.sort_unstable();
        open
    }

    fn close(&mut self, is_over: impl Fn(Key) -> bool) {
        self.open.retain(|&key| !is_over(key));
        self.taken.retain(|&key| !is_over(key));
        self.made_up.retain(|ask| !is_over((ask.id, ask.pasid, ask.number.unwrap_or(0))));
    }
}

/// Page requests end as the trait says.
impl<H: Host> Host for Observed<H> {
    type Space = H::Space;

    fn endpoints(&self) -> Vec<EndpointId> {
        self.inner.endpoints()
    }

    fn caps(&self, endpoint: EndpointId) -> Option<&EndpointCaps> {
        self.inner.caps(endpoint)
    }

    fn create(&mut self, spec: SpaceSpec<'_>) -> Result<H::Space, HostError> {
        self.inner.create(spec)
    }

    fn destroy(&mut self, space: H::Space) {
        self.inner.destroy(space);
    }

    fn map(&mut self, space: &mut H::Space, mapping: Mapping) -> Result<(), MapError> {
        self.inner.map(space, mapping)
    }

    fn unmap(&mut self, space: &mut H::Space, range: IovaRange) -> Result<usize, UnmapError> {
        self.inner.unmap(space, range)
    }

    fn overlaps(&self, space: &H::Space, range: IovaRange) -> bool {
        self.inner.overlaps(space, range)
    }

    fn bind(&mut self, stream: Stream, space: Option<&mut H::Space>) -> Result<(), HostError> {
        let is_bound = space.is_some();
        self.inner.bind(stream, space)?;
        let Stream { endpoint: EndpointId(id), pasid } = stream;
        let pasid = pasid.map(Pasid::value);
        if let Some(pasid) = pasid {
            if is_bound {
                self.own.insert((id, pasid))
            } else {
                self.own.remove(&(id, pasid))
            };
            self.close(|key| (key.0, key.1) == (id, Some(pasid)));
        } else {
            let own = std::mem::take(&mut self.own);
            let has_own = |pasid: Option<u32>| pasid.is_some_and(|pasid| own.contains(&(id, pasid)));
            self.close(|key| key.0 == id && !has_own(key.1));
            self.own = own;
        }
        Ok(())
    }

    fn invalidate(&mut self, batch: &[Invalidation]) -> Result<(), Stopped> {
        self.inner.invalidate(batch)?;
        for one in batch.iter().filter(|one| one.caches.contains(Caches::PASID)) {
            if let Scope::Pasid(pasid) = one.scope {
                let name = (one.endpoint.0, pasid.map(Pasid::value));
                self.close(|key| (key.0, key.1) == name);
            }
        }
        Ok(())
    }

    fn next_fault(&mut self) -> Option<FaultReport> {
        self.inner.next_fault()
    }

    fn next_page_request(&mut self) -> Option<PageRequestReport> {
        let report = match self.made_up.pop_front() {
            Some(ask) => {
                self.taken.push((ask.id, ask.pasid, ask.number.unwrap_or(0)));
                report(&ask)
            }
            None => self.inner.next_page_request()?,
        };
        self.seen.push(Seen::Taken(ask(&report)));
        Some(report)
    }

    fn respond(&mut self, response: &GroupResponse) -> Result<Answered, HostError> {
        let GroupResponse { stream, group, code } = *response;
        let key = (stream.endpoint.0, stream.pasid.map(Pasid::value), group);
        let number = match code {
            PageResponseCode::Success => 0,
            PageResponseCode::Invalid => 1,
            PageResponseCode::Failure => 2,
        };
        if std::mem::take(&mut self.fails) {
            self.seen.push(Seen::Failed(key, number));
            return Err(HostError::Failed(5));
        }
        let answered = match self.taken.contains(&key) {
            true => {
                self.close(|other| other == key);
                Answered::Taken
            }
            false => self.inner.respond(response)?,
        };
        self.seen.push(match answered {
            Answered::Taken => Seen::Answered(key, number),
            Answered::Gone => Seen::Gone(key, number),
        });
        Ok(answered)
    }
}

fn report(ask: &Ask) -> PageRequestReport {
    PageRequestReport {
        stream: stream_of(ask.id, ask.pasid),
        address: Iova(ask.address),
        access: AccessFlags::from_bits_retain(ask.flags),
        group: ask.number.unwrap_or(0),
        last: ask.last,
        private_data: ask.private,
        fault: Some(FaultCause::Unmapped),
    }
}

fn ask(report: &PageRequestReport) -> Ask {
    let PageRequestReport { stream, address, access, group, last, private_data: private, .. } = *report;
    Ask {
        id: stream.endpoint.0,
        pasid: stream.pasid.map(Pasid::value),
        address: address.0,
        flags: access.bits(),
        last,
        private,
        number: Some(group),
    }
}
