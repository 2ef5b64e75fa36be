//! One endpoint that works for processes: PASIDs come and go.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use viommu_wire::{DomainId, EndpointId, Event, Features, PageRequestFlags, PageResponse, Pasid};

use super::SvaError;
use super::groups::{GroupCounters, GroupLimits, Groups};
use super::process::{FaultHandler, ProcessId, Processes};
use super::serve::ServeCounters;
use crate::Driver;
use crate::hal::{Platform, Transport};
use crate::probe::Endpoint;
use crate::tables::{AddressSpace, PasidTable, SpaceOptions, TableError, TableOptions};

/// How an endpoint works for processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SvaOptions {
    /// How its PASIDs are handed over: by default, in the way that the device prefers.
    pub table: TableOptions,
    /// The domain; `None` takes a new one. Endpoints that share one must each have an [`Sva`] in it, and should not have
    /// page requests: what invalidates a PASID of one ends the page requests that another has with the same number.
    pub domain: Option<DomainId>,
    /// Give untagged DMA an address space, see [`Sva::untagged`]. Without, it faults, and so do the interrupts of an
    /// endpoint behind an SMMUv3.
    pub untagged: bool,
    /// Bounds on the page requests that are kept.
    pub limits: GroupLimits,
}

impl Default for SvaOptions {
    fn default() -> Self {
        Self { table: TableOptions::default(), domain: None, untagged: true, limits: GroupLimits::default() }
    }
}

/// A binding that was given: goes back by [`Sva::unbind`]. Dropping it leaves the process bound.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "only the handle can unbind the process"]
pub struct Handle {
    endpoint: EndpointId,
    pasid: Pasid,
    process: ProcessId,
}

impl Handle {
    /// What the endpoint tags its accesses with.
    pub const fn pasid(&self) -> Pasid {
        self.pasid
    }

    /// Whose addresses these are.
    pub const fn process(&self) -> ProcessId {
        self.process
    }

    /// The endpoint.
    pub const fn endpoint(&self) -> EndpointId {
        self.endpoint
    }
}

/// One endpoint that works for processes.
///
/// Dropping it leaks its tables, because the hardware may still read them; [`release`](Self::release) gives them back.
#[derive(Debug)]
pub struct Sva {
    pub(super) table: PasidTable,
    /// Of untagged DMA.
    untagged: Option<AddressSpace>,
    has_page_requests: bool,
    by_pasid: BTreeMap<Pasid, Binding>,
    by_process: BTreeMap<ProcessId, Pasid>,
    pub(super) groups: Groups,
    pub(super) counters: ServeCounters,
    /// Responses to be sent; empty in between, unless a handler panicked and the embedder went on. Kept for its memory.
    pub(super) answers: Vec<PageResponse>,
}

/// A PASID that is taken.
#[derive(Clone, Copy, Debug)]
struct Binding {
    process: ProcessId,
    /// Handles that are out. 0: it is to go.
    handles: u32,
}

impl Sva {
    /// Hands `endpoint` over to the tables of this library: from here on all its DMA goes through them.
    ///
    /// # Errors
    /// [`SvaError::NoPasids`], [`SvaError::NoDomain`], [`SvaError::Table`]. What could not be taken back is leaked then,
    /// because the hardware may use it.
    pub fn new<P: Platform, T: Transport>(
        driver: &mut Driver<P, T>,
        endpoint: &Endpoint,
        options: SvaOptions,
    ) -> Result<Self, SvaError> {
        let properties = endpoint.properties();
        if properties.pasid_bits == 0 {
            return Err(SvaError::NoPasids(endpoint.id()));
        }
        let has_page_requests = driver.features().contains(Features::PAGE_REQUEST)
            && properties.page_requests.contains(PageRequestFlags::SUPPORTED);
        let domain = options.domain.or_else(|| driver.new_domain_id()).ok_or(SvaError::NoDomain)?;
        let table = PasidTable::new(driver, endpoint, domain, options.table)?;
        let mut sva = Self {
            table,
            untagged: None,
            has_page_requests,
            by_pasid: BTreeMap::new(),
            by_process: BTreeMap::new(),
            groups: Groups::new(endpoint.id(), options.limits),
            counters: ServeCounters::default(),
            answers: Vec::new(),
        };
        match sva.set_up(driver, endpoint, options.untagged) {
            Ok(()) => Ok(sva),
            Err(error) => {
                // What the device does not give back now it does not give back later: nobody has it.
                drop(sva.release(driver));
                Err(error)
            }
        }
    }

    /// Untagged DMA first, so that interrupts find their way from the first moment on.
    fn set_up<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        endpoint: &Endpoint,
        untagged: bool,
    ) -> Result<(), SvaError> {
        if untagged {
            let space = AddressSpace::new(driver, endpoint, SpaceOptions::default())?;
            let space = self.untagged.insert(space);
            self.table.bind_at(driver, None, space)?;
        }
        Ok(self.table.attach(driver)?)
    }

    /// The endpoint.
    pub const fn endpoint(&self) -> EndpointId {
        self.table.endpoint()
    }

    /// The domain that it is in.
    pub const fn domain(&self) -> DomainId {
        self.table.domain()
    }

    /// The format that its tables are handed over in, as ATTACH_TABLE numbers it.
    pub const fn format(&self) -> u8 {
        self.table.format()
    }

    /// Whether its accesses wait for pages that are not there. Without, what it uses has to be there before:
    /// [`DemandPaged::pin`](super::DemandPaged::pin).
    pub const fn has_page_requests(&self) -> bool {
        self.has_page_requests
    }

    /// The address space of its untagged DMA: for its rings and descriptors. Empty at first but for the window of
    /// interrupts; nobody answers for its pages.
    pub const fn untagged(&mut self) -> Option<&mut AddressSpace> {
        self.untagged.as_mut()
    }

    /// How many processes are bound, those included whose unbind has not succeeded.
    pub fn bound(&self) -> usize {
        self.by_pasid.len()
    }

    /// The PASID that a process has here.
    pub fn pasid_of(&self, process: ProcessId) -> Option<Pasid> {
        self.by_process.get(&process).copied()
    }

    /// What became of page requests on their way to a handler.
    pub const fn group_counters(&self) -> &GroupCounters {
        self.groups.counters()
    }

    /// What became of answers.
    pub const fn serve_counters(&self) -> &ServeCounters {
        &self.counters
    }

    /// Groups of page requests that are not answered.
    pub fn open_groups(&self) -> usize {
        self.groups.open()
    }

    /// Lets the endpoint work for `process`: its accesses with the handle's PASID go through the process's page table.
    /// Binding a process once more gives the same PASID; each handle is to be unbound.
    ///
    /// An endpoint without [page requests](Self::has_page_requests) takes processes only whose memory is
    /// [pinned](super::FaultHandler::is_pinned): its accesses fault where a page is missing.
    ///
    /// # Errors
    /// [`SvaError::NoProcess`], [`SvaError::Ended`], [`SvaError::NotPinned`], [`SvaError::Unbinding`];
    /// [`SvaError::Table`], where [`NoPasid`](TableError::NoPasid) says that all PASIDs are taken, and
    /// [`Mismatch`](TableError::Mismatch) that the process's address space was made for other hardware, or with pages that
    /// this endpoint's hardware does not have.
    pub fn bind<P: Platform, T: Transport, H: FaultHandler<P, T>>(
        &mut self,
        driver: &mut Driver<P, T>,
        processes: &mut Processes<H>,
        process: ProcessId,
    ) -> Result<Handle, SvaError> {
        let bound = processes.get_mut(process).ok_or(SvaError::NoProcess(process))?;
        if bound.has_ended() {
            return Err(SvaError::Ended(process));
        }
        if !self.has_page_requests && !bound.handler().is_pinned() {
            return Err(SvaError::NotPinned(process));
        }
        let endpoint = self.endpoint();
        if let Some(&pasid) = self.by_process.get(&process) {
            let binding = self.by_pasid.get_mut(&pasid).filter(|binding| binding.handles != 0);
            let binding = binding.ok_or(SvaError::Unbinding(process))?;
            binding.handles = binding.handles.checked_add(1).ok_or(SvaError::InUse)?;
            return Ok(Handle { endpoint, pasid, process });
        }
        let (space, _) = bound.parts();
        match self.table.bind_or_tell(driver, space) {
            Ok(pasid) => {
                self.note(pasid, Binding { process, handles: 1 });
                Ok(Handle { endpoint, pasid, process })
            }
            Err((taken, error)) => {
                // The hardware may use the process nevertheless.
                if let Some(pasid) = taken {
                    self.note(pasid, Binding { process, handles: 0 });
                }
                Err(error.into())
            }
        }
    }

    /// Takes a handle back. The last one of a process unbinds it, in the [order](super#the-order-of-things) that the
    /// module states: when this returns, no access of the endpoint reaches the process's memory, no page request of it is
    /// left, and its PASID is free.
    ///
    /// # Errors
    /// The handle with [`SvaError::NotBound`]; with [`SvaError::Table`], [`SvaError::Events`], [`SvaError::Queue`], where
    /// the PASID stays taken, its page requests are answered INVALID, and another attempt goes on.
    pub fn unbind<P: Platform, T: Transport, H>(
        &mut self,
        driver: &mut Driver<P, T>,
        processes: &mut Processes<H>,
        handle: Handle,
    ) -> Result<(), (Handle, SvaError)> {
        let binding = self
            .by_pasid
            .get_mut(&handle.pasid)
            .filter(|binding| binding.process == handle.process && handle.endpoint == self.table.endpoint());
        let Some(binding) = binding else {
            return Err((handle, SvaError::NotBound));
        };
        if binding.handles > 1 {
            binding.handles -= 1;
            return Ok(());
        }
        binding.handles = 0;
        self.finish_unbind(driver, processes, handle.pasid).map_err(|error| (handle, error))
    }

    /// Tries again what [`unbind`](Self::unbind), or a [`bind`](Self::bind) that failed, could not finish: for those who
    /// have no handle any more. Stops at the first that fails again.
    ///
    /// # Errors
    /// As [`unbind`](Self::unbind).
    pub fn retry_unbinds<P: Platform, T: Transport, H>(
        &mut self,
        driver: &mut Driver<P, T>,
        processes: &mut Processes<H>,
    ) -> Result<(), SvaError> {
        let unfinished: Vec<Pasid> = self
            .by_pasid
            .iter()
            .filter(|(_, binding)| binding.handles == 0)
            .map(|(pasid, _)| *pasid)
            .collect();
        unfinished.into_iter().try_for_each(|pasid| self.finish_unbind(driver, processes, pasid))
    }

    /// Detaches the endpoint and gives the tables back.
    ///
    /// # Errors
    /// The endpoint itself with [`SvaError::InUse`] where a process is bound; with what else is in the way: another
    /// attempt goes on.
    #[expect(clippy::result_large_err, reason = "the tables must not be lost")]
    pub fn release<P: Platform, T: Transport>(
        mut self,
        driver: &mut Driver<P, T>,
    ) -> Result<(), (Self, SvaError)> {
        if !self.by_pasid.is_empty() {
            return Err((self, SvaError::InUse));
        }
        if let Err(error) = self.release_untagged(driver) {
            return Err((self, error));
        }
        match self.table.release(driver) {
            Ok(()) => Ok(()),
            Err((table, error)) => {
                self.table = table;
                Err((self, error.into()))
            }
        }
    }

    /// The process that page requests of `pasid` are for; `None` where nobody answers for it, or not any more.
    pub(super) fn serves(&self, pasid: Option<Pasid>) -> Option<(Pasid, ProcessId)> {
        let pasid = pasid?;
        let binding = self.by_pasid.get(&pasid).filter(|binding| binding.handles != 0)?;
        Some((pasid, binding.process))
    }

    fn note(&mut self, pasid: Pasid, binding: Binding) {
        self.by_pasid.insert(pasid, binding);
        self.by_process.insert(binding.process, pasid);
    }

    /// Steps 3 to 6. Step 2 was to leave the binding without handles.
    fn finish_unbind<P: Platform, T: Transport, H>(
        &mut self,
        driver: &mut Driver<P, T>,
        processes: &mut Processes<H>,
        pasid: Pasid,
    ) -> Result<(), SvaError> {
        let process = self.by_pasid.get(&pasid).ok_or(SvaError::NotBound)?.process;
        // A process is removed only when nobody uses its space.
        if let Some(bound) = processes.get_mut(process) {
            let (space, _) = bound.parts();
            if self.table.uses(Some(pasid), space) {
                self.table.take_away(driver, Some(pasid), space)?;
            }
        }
        self.drain(driver, pasid)?;
        self.groups.forget_pasid(pasid);
        // Left by a handler that did not return.
        self.answers.retain(|answer| answer.pasid != Some(pasid));
        self.by_pasid.remove(&pasid);
        self.by_process.remove(&process);
        self.table.give_back(Some(pasid));
        Ok(())
    }

    /// Takes what the device has told of `pasid` out of the event queue, and takes the rest of this endpoint's in.
    ///
    /// When a table was taken away, the device tells of no page request for it any more. So all that it has told
    /// lies in buffers by now, and there are no more than the queue has: to look once is enough.
    fn drain<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        pasid: Pasid,
    ) -> Result<(), SvaError> {
        if !self.has_page_requests {
            return Ok(());
        }
        driver.sweep_events(|event| match event {
            Event::PageRequest(request) if request.endpoint == self.endpoint() => {
                if request.pasid == Some(pasid) {
                    self.groups.drain();
                } else {
                    self.take_in(request);
                }
                None
            }
            event => Some(event),
        })?;
        Ok(())
    }

    fn release_untagged<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
    ) -> Result<(), SvaError> {
        let Some(mut space) = self.untagged.take() else {
            return Ok(());
        };
        let unbound = match self.table.unbind(driver, None, &mut space) {
            Err(error) if !matches!(error, TableError::NotBound(_)) => Err(error),
            _ => Ok(()),
        };
        match unbound {
            Ok(()) => space.release(driver).map_err(|(space, error)| {
                self.untagged = Some(space);
                error.into()
            }),
            Err(error) => {
                self.untagged = Some(space);
                Err(error.into())
            }
        }
    }
}
