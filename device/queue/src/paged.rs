//! Devices that the VMM emulates and that wait for pages: an access to what is not there asks the guest for it.

use std::fmt;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use pgtable_formats::{Access, Iova, IovaRange};
use viommu_device::host::{FaultCause, Stream};
use viommu_device::soft::{AccessError, Answer, Piece, Ticket};
use vm_memory::iommu::{Error, IotlbIterator, IovaRange as VmIovaRange};
use vm_memory::{Bytes, GuestAddress, Iommu, Iotlb, Permissions};

use crate::translated::{MAX_ACCESS, Pinned, StreamIommu, Translate, kinds};

/// The accesses of one stream, untagged or with a PASID, of a device that can wait for a page.
///
/// An access that the guest's page table does not let through becomes a page request, where the endpoint has those
/// ([`EndpointCaps::page_requests`](viommu_device::host::EndpointCaps)); for others this is a [`StreamIommu`]. There are
/// two forms:
///
/// - *Polling*: [`try_read`](Self::try_read), [`try_write`](Self::try_write), [`try_translate`](Self::try_translate) give a
///   [`Ticket`] at once, and the device model tries again once [`answer`](Self::answer) says so. For a device on the thread
///   that handles the guest's requests there is no other.
/// - *Blocking*: [`translate_waiting`](Self::translate_waiting), and [`vm_memory::Iommu`], so that any device on
///   [`IommuMemory`](vm_memory::IommuMemory) gets it. The thread sleeps until the answer is there or its patience ends.
///
/// Either way the guest has to be told: [`SharedIommu::with_fault_notice`](crate::SharedIommu::with_fault_notice) is called
/// for each access that has to wait, and the VMM kicks the event queue then.
///
/// # While it waits
/// An access that waits has neither the lock nor a pin: requests, other devices and the answer itself pass by. An access to
/// several pages waits for one after the other, and is translated anew from its start after each, so that what is pinned in
/// the end was all in force at one moment. Nothing is moved before that.
///
/// The answer may also be that there is none any more: when DETACH, an unbind or a reset has taken away what the stream
/// translated through, what waited for it has failed, and no access reaches the old table from then on.
///
/// A thread that waits while it holds another translation keeps the guest's requests from being handled, the answer among
/// them: it waits as long as it is patient.
///
/// # Time
/// Patience is of one access, for all its pages. When it ends, the access has failed and lets go of its ticket; the
/// page request stays with the guest, as one of hardware would, until the guest answers it or
/// [`page_request_timeout_ns`](viommu_device::DeviceConfig::page_request_timeout_ns) ends.
///
/// ```
/// use std::time::Duration;
///
/// use pgtable_formats::{Pasid, context::{Canonical, vtd}};
/// use viommu_device::EndpointId;
/// use viommu_device::host::{EndpointCaps, GroupResponse, Host, SpaceSpec, Stream, TableCaps};
/// use viommu_device::soft::{Answer, SoftHost};
/// use viommu_device::wire::PageResponseCode;
/// use viommu_queue::{DmaError, GuestTables, SharedIommu};
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x4000_0000), 0x1_0000)])?;
/// let endpoint = EndpointId(16);
/// let caps = vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE);
/// let mut host = SoftHost::new(GuestTables::new(&memory));
/// let tables = Some(TableCaps::Vtd(caps));
/// host.add_endpoint(endpoint, EndpointCaps { tables, page_requests: true, ..EndpointCaps::default() })?;
///
/// // A process with an empty page table, by PASID 5.
/// let flags = vtd::FirstStageFlags::empty();
/// let root = pgtable_formats::Gpa(0x4000_0000);
/// let table = Canonical::VtdFirstStage(vtd::FirstStage::new(root, flags, 48, &caps)?);
/// let mut space = host.create(SpaceSpec::GuestTable { endpoint, table: &table })?;
/// let stream = Stream { endpoint, pasid: Pasid::new(5) };
/// host.bind(stream, Some(&mut space))?;
/// let iommu = SharedIommu::new(host);
///
/// let dma = iommu.stream(stream).paged(Duration::from_secs(1));
/// let Err(DmaError::Waits(ticket)) = dma.try_write(&memory, GuestAddress(0x1000), &[1; 16]) else {
///     return Err("there is no page".into());
/// };
/// assert_eq!(dma.answer(ticket), None);
///
/// // What the device does for the guest: an event, and its PAGE_RESP.
/// let asked = iommu.lock().next_page_request().ok_or("no request")?;
/// let code = PageResponseCode::Invalid;
/// iommu.lock().respond(&GroupResponse { stream, group: asked.group, code })?;
/// assert_eq!(dma.answer(ticket), Some(Answer::Failed));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PagedIommu<T> {
    stream: StreamIommu<T>,
    patience: Duration,
}

/// Why an access of a [`PagedIommu`] did not get through. Nothing was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The guest was asked for a page: try again once [`PagedIommu::answer`] says so. Only from the polling form.
    #[error("waits for a page")]
    Waits(Ticket),
    /// It faulted; the guest was told.
    #[error("{0}")]
    Fault(FaultCause),
    /// The guest said no, or what the stream translated through is gone. Only from the blocking form: the other one finds
    /// [`Answer::Failed`].
    #[error("the page was refused")]
    Refused,
    /// The guest took longer than the device is patient. Only from the blocking form.
    #[error("no answer to a page request in time")]
    TimedOut,
    /// It leaves the 64-bit space, or has more than [`MAX_ACCESS`] bytes.
    #[error("no such range, or more than {MAX_ACCESS} bytes")]
    Range,
    /// The guest's table leads to where the VMM has no memory.
    #[error("leads to no memory")]
    NoMemory,
}

impl<T> StreamIommu<T> {
    /// The same accesses, of a device that waits for pages: each for at most `patience` where it blocks.
    pub fn paged(self, patience: Duration) -> PagedIommu<T> {
        PagedIommu { stream: self, patience }
    }
}

impl<T> PagedIommu<T> {
    /// Whose accesses.
    pub fn stream(&self) -> Stream {
        self.stream.stream()
    }

    /// How long an access waits that blocks.
    pub fn patience(&self) -> Duration {
        self.patience
    }
}

impl<T: Translate> PagedIommu<T> {
    /// Translates an access of `length` bytes without waiting. As long as the iterator lives, the translation is pinned.
    ///
    /// # Errors
    /// [`DmaError`], of which [`Waits`](DmaError::Waits) is no failure yet.
    pub fn try_translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Pinned<'_, T>>, DmaError> {
        // vm-memory's ranges end behind their last address, which therefore cannot be 2^64-1.
        if length > MAX_ACCESS || iova.0.checked_add(length as u64).is_none() {
            return Err(DmaError::Range);
        }
        let inner = &*self.stream.shared.inner;
        let mut iotlb = Iotlb::new();
        let mut state = inner.state_after_others();
        if let Some(range) = IovaRange::from_length(Iova(iova.0), length as u64)
            && let Err(error) = self.fill(&mut state.value, range, access, &mut iotlb)
        {
            drop(state);
            (inner.on_fault)();
            return Err(error.into());
        }
        let pinned = inner.pin(state, iotlb);
        // There are no gaps: each byte was translated.
        Iotlb::lookup(pinned, iova, length, access).map_err(|_| DmaError::Range)
    }

    /// Reads `bytes` from `iova` on, all or nothing, without waiting.
    ///
    /// # Errors
    /// As [`try_translate`](Self::try_translate), and [`DmaError::NoMemory`], after which the contents of `bytes` mean
    /// nothing.
    pub fn try_read<M: Bytes<GuestAddress>>(
        &self,
        memory: &M,
        iova: GuestAddress,
        bytes: &mut [u8],
    ) -> Result<(), DmaError> {
        let mut rest = bytes;
        for piece in self.try_translate(iova, rest.len(), Permissions::Read)? {
            let (now, later) = rest.split_at_mut_checked(piece.length).ok_or(DmaError::Range)?;
            memory.read_slice(now, piece.base).map_err(|_| DmaError::NoMemory)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes `bytes` from `iova` on, without waiting; nothing, if a page is missing.
    ///
    /// # Errors
    /// As [`try_translate`](Self::try_translate), and [`DmaError::NoMemory`], after which a part may be written.
    pub fn try_write<M: Bytes<GuestAddress>>(
        &self,
        memory: &M,
        iova: GuestAddress,
        bytes: &[u8],
    ) -> Result<(), DmaError> {
        let mut rest = bytes;
        for piece in self.try_translate(iova, rest.len(), Permissions::Write)? {
            let (now, later) = rest.split_at_checked(piece.length).ok_or(DmaError::Range)?;
            memory.write_slice(now, piece.base).map_err(|_| DmaError::NoMemory)?;
            rest = later;
        }
        Ok(())
    }

    /// What became of an access that waits; `None`: it still does. See
    /// [`SoftHost::answer`](viommu_device::soft::SoftHost::answer).
    pub fn answer(&self, ticket: Ticket) -> Option<Answer> {
        self.stream.shared.inner.state().value.mmu().answer(ticket)
    }

    /// Translates an access of `length` bytes, and waits for the pages that are missing. As long as the iterator lives, the
    /// translation is pinned.
    ///
    /// # Errors
    /// [`DmaError`].
    pub fn translate_waiting(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Pinned<'_, T>>, DmaError> {
        let mut waits_since: Option<Instant> = None;
        loop {
            let ticket = match self.try_translate(iova, length, access) {
                Err(DmaError::Waits(ticket)) => ticket,
                answer => return answer,
            };
            // A guest that says Success and maps nothing may be fast enough that nobody ever sleeps.
            if waits_since.is_some_and(|since| since.elapsed() >= self.patience) {
                return Err(DmaError::TimedOut);
            }
            self.wait(ticket, *waits_since.get_or_insert_with(Instant::now))?;
        }
    }

    /// Sleeps until the access is to be tried again.
    fn wait(&self, ticket: Ticket, since: Instant) -> Result<(), DmaError> {
        let inner = &*self.stream.shared.inner;
        let mut state = inner.state();
        loop {
            match state.value.mmu().answer(ticket) {
                Some(Answer::Retry) => return Ok(()),
                Some(Answer::Failed) => return Err(DmaError::Refused),
                None => {}
            }
            let left = self.patience.saturating_sub(since.elapsed());
            if left.is_zero() {
                return Err(DmaError::TimedOut);
            }
            state.parked += 1;
            state = inner.answered.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.parked -= 1;
        }
    }

    fn fill(
        &self,
        value: &mut T,
        range: IovaRange,
        access: Permissions,
        iotlb: &mut Iotlb,
    ) -> Result<(), AccessError> {
        // Writes first: a page that was asked for to be written need not be asked for again to be read.
        for &kind in kinds(access).iter().rev() {
            let access_of_kind = Access { kind, privileged: self.stream.is_privileged() };
            // The guest may change its tables between the two: the later answer counts.
            iotlb.invalidate_all();
            let mut at = range.start();
            loop {
                let Piece { output, length } =
                    value.mmu().access(self.stream(), at, access_of_kind, |piece| piece)?;
                let length = length.min((range.last().0 - at.0).saturating_add(1));
                if let Ok(length) = usize::try_from(length) {
                    let set = iotlb.set_mapping(GuestAddress(at.0), GuestAddress(output.0), length, access);
                    debug_assert!(set.is_ok());
                }
                match at.checked_add(length) {
                    Some(next) if next <= range.last() => at = next,
                    _ => break,
                }
            }
        }
        Ok(())
    }
}

/// The blocking form.
impl<T: Translate + Send> Iommu for PagedIommu<T> {
    type IotlbGuard<'a>
        = Pinned<'a, T>
    where
        T: 'a;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Pinned<'_, T>>, Error> {
        self.translate_waiting(iova, length, access).map_err(|error| Error::CannotResolve {
            iova_range: VmIovaRange { base: iova, length },
            reason: error.to_string(),
        })
    }
}

impl From<AccessError> for DmaError {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Fault(cause) => Self::Fault(cause),
            AccessError::Waits(ticket) => Self::Waits(ticket),
        }
    }
}

impl<T> Clone for PagedIommu<T> {
    fn clone(&self) -> Self {
        Self { stream: self.stream.clone(), patience: self.patience }
    }
}

impl<T> fmt::Debug for PagedIommu<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedIommu").field("stream", &self.stream).field("patience", &self.patience).finish()
    }
}
