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
///   [`Ticket`] at once, with which the device model tries again: [`retry_read`](Self::retry_read),
///   [`retry_write`](Self::retry_write), [`retry_translate`](Self::retry_translate). For a device on the thread that handles
///   the guest's requests there is no other.
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
/// The answer may also be that there is none any more: when ATTACH, ATTACH_TABLE, DETACH, an unbind or a reset has taken away
/// what the stream translated through, or an INVALIDATE of the PASID cache has named its entry, what waited for it has
/// failed. No access reaches the old table from then on, and none that waited for it, answered or not, reaches the new one:
/// whether a ticket still holds is looked up under the same lock as the translation.
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
/// let retried = dma.retry_write(ticket, &memory, GuestAddress(0x1000), &[1; 16]);
/// assert_eq!(retried, Err(DmaError::Refused));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PagedIommu<T, O = ()> {
    stream: StreamIommu<T>,
    patience: Duration,
    pub(crate) observer: O,
}

/// Is told what comes of the accesses of a [`PagedIommu`]: a [`record::Recording`](crate::record::Recording), or `()`,
/// which costs nothing. It is called while the IOMMU is locked, which it must not use itself.
pub trait Observe: fmt::Debug + Send + Sync {
    /// An access was translated, has faulted, or has to wait.
    fn tried(&self, attempt: &Attempt, outcome: Result<(), AccessError>);

    /// Who waited for a page goes on; `None`: its patience has ended. With the polling form, each time that the device
    /// model asks or tries again.
    fn waited(&self, stream: Stream, ticket: Ticket, answer: Option<Answer>);
}

impl Observe for () {
    #[inline]
    fn tried(&self, _: &Attempt, _: Result<(), AccessError>) {}

    #[inline]
    fn waited(&self, _: Stream, _: Ticket, _: Option<Answer>) {}
}

/// An access that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Whose.
    pub stream: Stream,
    /// In privileged mode.
    pub privileged: bool,
    /// From its first address to its last one.
    pub range: IovaRange,
    /// What kind.
    pub access: Permissions,
}

/// Why an access of a [`PagedIommu`] did not get through. Nothing was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The guest was asked for a page, or has not answered yet: try again with the ticket. Only from the polling form.
    #[error("waits for a page")]
    Waits(Ticket),
    /// It faulted; the guest was told.
    #[error("{0}")]
    Fault(FaultCause),
    /// The guest said no, or what the stream translated through when it was asked is gone. Not from an access that is
    /// tried for the first time.
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
        PagedIommu { stream: self, patience, observer: () }
    }
}

impl<T> PagedIommu<T> {
    /// The same accesses, of which `observer` is told.
    pub fn observed<O: Observe>(self, observer: O) -> PagedIommu<T, O> {
        PagedIommu { stream: self.stream, patience: self.patience, observer }
    }
}

impl<T, O> PagedIommu<T, O> {
    /// Whose accesses.
    pub fn stream(&self) -> Stream {
        self.stream.stream()
    }

    /// How long an access waits that blocks.
    pub fn patience(&self) -> Duration {
        self.patience
    }
}

impl<T: Translate, O: Observe> PagedIommu<T, O> {
    /// Translates an access of `length` bytes without waiting. As long as the iterator lives, the translation is pinned.
    ///
    /// # Errors
    /// [`DmaError`], of which [`Waits`](DmaError::Waits) is no failure yet.
    #[inline]
    pub fn try_translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Pinned<'_, T>>, DmaError> {
        self.attempt(None, iova, length, access)
    }

    /// The same for an access that was told to wait with `ticket`.
    ///
    /// # Errors
    /// As [`try_translate`](Self::try_translate), where the guest has answered: perhaps with another ticket. Before, that
    /// it [`Waits`](DmaError::Waits) with this one; and [`DmaError::Refused`].
    #[inline]
    pub fn retry_translate(
        &self,
        ticket: Ticket,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Pinned<'_, T>>, DmaError> {
        self.attempt(Some(&ticket), iova, length, access)
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
        read(memory, self.try_translate(iova, bytes.len(), Permissions::Read), bytes)
    }

    /// The same for an access that was told to wait with `ticket`.
    ///
    /// # Errors
    /// As [`retry_translate`](Self::retry_translate) and [`try_read`](Self::try_read).
    pub fn retry_read<M: Bytes<GuestAddress>>(
        &self,
        ticket: Ticket,
        memory: &M,
        iova: GuestAddress,
        bytes: &mut [u8],
    ) -> Result<(), DmaError> {
        read(memory, self.retry_translate(ticket, iova, bytes.len(), Permissions::Read), bytes)
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
        write(memory, self.try_translate(iova, bytes.len(), Permissions::Write), bytes)
    }

    /// The same for an access that was told to wait with `ticket`.
    ///
    /// # Errors
    /// As [`retry_translate`](Self::retry_translate) and [`try_write`](Self::try_write).
    pub fn retry_write<M: Bytes<GuestAddress>>(
        &self,
        ticket: Ticket,
        memory: &M,
        iova: GuestAddress,
        bytes: &[u8],
    ) -> Result<(), DmaError> {
        write(memory, self.retry_translate(ticket, iova, bytes.len(), Permissions::Write), bytes)
    }

    /// What became of an access that waits; `None`: it still does. See
    /// [`SoftHost::answer`](viommu_device::soft::SoftHost::answer).
    ///
    /// By the time that the access is tried again, it may be another one: only the methods that take the ticket know.
    pub fn answer(&self, ticket: Ticket) -> Option<Answer> {
        self.answer_of(&mut self.stream.shared.inner.state().value, ticket)
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
        match self.try_translate(iova, length, access) {
            Err(DmaError::Waits(ticket)) => self.wait_and_retry(ticket, iova, length, access),
            answer => answer,
        }
    }

    #[cold]
    fn wait_and_retry(
        &self,
        mut ticket: Ticket,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Pinned<'_, T>>, DmaError> {
        let mut waits_since: Option<Instant> = None;
        loop {
            self.sleep(ticket, &mut waits_since)?;
            match self.retry_translate(ticket, iova, length, access) {
                Err(DmaError::Waits(next)) => ticket = next,
                answer => return answer,
            }
        }
    }

    /// Sleeps until there is an answer. Patience begins with the first page that is missing.
    fn sleep(&self, ticket: Ticket, waits_since: &mut Option<Instant>) -> Result<(), DmaError> {
        let inner = &*self.stream.shared.inner;
        let mut state = inner.state();
        // A guest that says Success and maps nothing may be fast enough that nobody ever sleeps: who has waited before
        // looks at the time first.
        let is_late = waits_since.is_some_and(|since| since.elapsed() >= self.patience);
        let since = *waits_since.get_or_insert_with(Instant::now);
        while is_late || state.value.mmu().answer(ticket).is_none() {
            let left = self.patience.saturating_sub(since.elapsed());
            if is_late || left.is_zero() {
                self.observer.waited(self.stream(), ticket, None);
                return Err(DmaError::TimedOut);
            }
            state.parked += 1;
            state = inner.answered.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.parked -= 1;
        }
        Ok(())
    }

    /// Tries an access, one that waits if it has a ticket. Its answer and its translation are looked up under one lock:
    /// in between, its stream could be bound to another table.
    // Never: one copy for both forms, so that the compiler puts all that it calls into it.
    #[inline(never)]
    fn attempt(
        &self,
        ticket: Option<&Ticket>,
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
        if let Some(&ticket) = ticket {
            match self.answer_of(&mut state.value, ticket) {
                Some(Answer::Retry) => {}
                Some(Answer::Failed) => return Err(DmaError::Refused),
                None => return Err(DmaError::Waits(ticket)),
            }
        }
        if let Some(range) = IovaRange::from_length(Iova(iova.0), length as u64) {
            let outcome = self.fill(&mut state.value, range, access, &mut iotlb);
            let (stream, privileged) = (self.stream(), self.stream.is_privileged());
            self.observer.tried(&Attempt { stream, privileged, range, access }, outcome);
            if let Err(error) = outcome {
                drop(state);
                (inner.on_fault)();
                return Err(error.into());
            }
        }
        let pinned = inner.pin(state, iotlb);
        // There are no gaps: each byte was translated.
        Iotlb::lookup(pinned, iova, length, access).map_err(|_| DmaError::Range)
    }

    fn answer_of(&self, value: &mut T, ticket: Ticket) -> Option<Answer> {
        let answer = value.mmu().answer(ticket);
        if answer.is_some() {
            self.observer.waited(self.stream(), ticket, answer);
        }
        answer
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
impl<T: Translate + Send, O: Observe> Iommu for PagedIommu<T, O> {
    type IotlbGuard<'a>
        = Pinned<'a, T>
    where
        T: 'a,
        O: 'a;

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

/// Moves the bytes of one access, if it was translated.
// Always, both: the iterator is large, and is not to be copied.
#[inline(always)]
fn read<T, M: Bytes<GuestAddress>>(
    memory: &M,
    pieces: Result<IotlbIterator<Pinned<'_, T>>, DmaError>,
    bytes: &mut [u8],
) -> Result<(), DmaError> {
    let mut rest = bytes;
    for piece in pieces? {
        let (now, later) = rest.split_at_mut_checked(piece.length).ok_or(DmaError::Range)?;
        memory.read_slice(now, piece.base).map_err(|_| DmaError::NoMemory)?;
        rest = later;
    }
    Ok(())
}

#[inline(always)]
fn write<T, M: Bytes<GuestAddress>>(
    memory: &M,
    pieces: Result<IotlbIterator<Pinned<'_, T>>, DmaError>,
    bytes: &[u8],
) -> Result<(), DmaError> {
    let mut rest = bytes;
    for piece in pieces? {
        let (now, later) = rest.split_at_checked(piece.length).ok_or(DmaError::Range)?;
        memory.write_slice(now, piece.base).map_err(|_| DmaError::NoMemory)?;
        rest = later;
    }
    Ok(())
}

impl From<AccessError> for DmaError {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Fault(cause) => Self::Fault(cause),
            AccessError::Waits(ticket) => Self::Waits(ticket),
        }
    }
}

impl<T, O: Clone> Clone for PagedIommu<T, O> {
    fn clone(&self) -> Self {
        Self { stream: self.stream.clone(), patience: self.patience, observer: self.observer.clone() }
    }
}

impl<T, O: fmt::Debug> fmt::Debug for PagedIommu<T, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedIommu")
            .field("stream", &self.stream)
            .field("patience", &self.patience)
            .field("observer", &self.observer)
            .finish()
    }
}
