//! Devices that the VMM emulates, behind the IOMMU: [`vm_memory::Iommu`] for each stream.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use pgtable_formats::{Access, AccessKind, Iova, IovaRange};
use viommu_device::Device;
use viommu_device::host::{FaultCause, Host, Stream};
use viommu_device::soft::{SoftHost, Stage2};
use vm_memory::iommu::{Error, IotlbIterator, IovaRange as VmIovaRange};
use vm_memory::{GuestAddress, Iommu, Iotlb, Permissions};

use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::virtio_iommu::VirtioIommu;

/// Longest single access, in bytes: it is translated page by page while others wait.
pub const MAX_ACCESS: usize = 1 << 30;

/// How long a new translation gives way to a [`SharedIommu::lock`] that waits.
pub const GIVE_WAY: Duration = Duration::from_millis(20);

/// Something with a software MMU in it, which translates what emulated devices access.
pub trait Translate {
    /// Guest memory, as that MMU has it.
    type Memory: Stage2;

    /// The MMU.
    fn mmu(&mut self) -> &mut SoftHost<Self::Memory>;
}

impl<M: Stage2> Translate for SoftHost<M> {
    type Memory = M;

    fn mmu(&mut self) -> &mut Self {
        self
    }
}

impl<H: Host + Translate> Translate for Device<H> {
    type Memory = H::Memory;

    fn mmu(&mut self) -> &mut SoftHost<H::Memory> {
        self.host_mut().mmu()
    }
}

impl<H: Host + Translate> Translate for VirtioIommu<H> {
    type Memory = H::Memory;

    fn mmu(&mut self) -> &mut SoftHost<H::Memory> {
        self.device_mut().mmu()
    }
}

/// An IOMMU that the thread of its queues shares with the threads of the devices behind it. Clones share the same one.
///
/// # Locking
/// Whatever changes translations (requests, resets, invalidation) needs the value exclusively, through
/// [`lock`](Self::lock). A translation that a device is using *pins* it, and `lock` waits until none is pinned: an UNMAP is
/// not answered while an access through the old mapping is under way, for the guest may give the page to somebody else
/// once it is. Any number of translations may be pinned at once. While a `lock` waits, new ones give way to it, so that
/// devices which are never all idle do not keep it waiting; but only for [`GIVE_WAY`] each, so that a thread which holds
/// a translation may make another.
///
/// A translation is pinned as long as the iterator of [`GuestMemory::get_slices`](vm_memory::GuestMemory::get_slices)
/// lives, which covers the whole of each `read`, `write`, `load` and `store` of [`Bytes`](vm_memory::Bytes). It does
/// not cover slices that are kept after their iterator is gone, as `virtio_queue`'s `Reader` and `Writer` keep them:
/// a device that keeps them must let go of them before its VMM calls `lock`. A thread that calls `lock` while it holds
/// such an iterator deadlocks.
///
/// Whoever waits for a page ([`PagedIommu`](crate::PagedIommu)) has neither the lock nor a pin meanwhile, and looks for
/// the answer when a `lock` ends.
pub struct SharedIommu<T> {
    pub(crate) inner: Arc<Inner<T>>,
}

pub(crate) struct Inner<T> {
    state: Mutex<State<T>>,
    /// The last pin is gone.
    unpinned: Condvar,
    /// No thread waits for that any more.
    let_in: Condvar,
    /// Somebody had the value exclusively: page requests may have been answered.
    pub(crate) answered: Condvar,
    pub(crate) on_fault: Box<dyn Fn() + Send + Sync>,
}

pub(crate) struct State<T> {
    pub(crate) value: T,
    /// Translations in use.
    pins: usize,
    /// Threads that wait for the answer to a page request. They have no pin.
    pub(crate) parked: usize,
    /// Threads in [`SharedIommu::lock`] that wait for that to be 0. To notify nobody costs a system call, too.
    waiting: usize,
}

impl<T> SharedIommu<T> {
    /// Shares `value`.
    pub fn new(value: T) -> Self {
        Self::with_fault_notice(value, || ())
    }

    /// Shares `value`, and calls `on_fault` on the thread of an access that faulted, after the fault was recorded, or
    /// that has to wait for a page: the place to wake the thread that delivers events. It must not use the value itself.
    pub fn with_fault_notice(value: T, on_fault: impl Fn() + Send + Sync + 'static) -> Self {
        let state = Mutex::new(State { value, pins: 0, parked: 0, waiting: 0 });
        Self {
            inner: Arc::new(Inner {
                state,
                unpinned: Condvar::new(),
                let_in: Condvar::new(),
                answered: Condvar::new(),
                on_fault: Box::new(on_fault),
            }),
        }
    }

    /// Waits until no translation is in use, and keeps new ones from being made.
    pub fn lock(&self) -> Exclusive<'_, T> {
        let mut state = self.inner.state();
        if state.pins > 0 {
            state.waiting += 1;
            let unpinned = self.inner.unpinned.wait_while(state, |state| state.pins > 0);
            state = unpinned.unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
            if state.waiting == 0 {
                self.inner.let_in.notify_all();
            }
        }
        Exclusive { inner: &self.inner, state }
    }

    /// The accesses of `stream`, unprivileged ones.
    pub fn stream(&self, stream: Stream) -> StreamIommu<T> {
        StreamIommu { shared: self.clone(), stream, privileged: false }
    }
}

impl<T> Inner<T> {
    /// A thread that panicked in the middle of something has not changed the pins; and to let nobody in any more
    /// would only move the panic.
    pub(crate) fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a new translation: lets threads in [`SharedIommu::lock`] go first, for a while.
    pub(crate) fn state_after_others(&self) -> MutexGuard<'_, State<T>> {
        let state = self.state();
        if state.waiting == 0 {
            return state;
        }
        let waited = self.let_in.wait_timeout_while(state, GIVE_WAY, |state| state.waiting > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Pins what `iotlb` holds, which was looked up in `state`.
    pub(crate) fn pin<'a>(&'a self, mut state: MutexGuard<'a, State<T>>, iotlb: Iotlb) -> Pinned<'a, T> {
        state.pins += 1;
        Pinned { inner: self, iotlb }
    }
}

impl<T> Clone for SharedIommu<T> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<T> fmt::Debug for SharedIommu<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedIommu").finish_non_exhaustive()
    }
}

/// The shared value, to one user, while no translation is in use.
pub struct Exclusive<'a, T> {
    inner: &'a Inner<T>,
    state: MutexGuard<'a, State<T>>,
}

impl<T> Deref for Exclusive<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.state.value
    }
}

impl<T> DerefMut for Exclusive<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.state.value
    }
}

impl<T> Drop for Exclusive<'_, T> {
    /// Answers come from here alone.
    fn drop(&mut self) {
        if self.state.parked > 0 {
            self.inner.answered.notify_all();
        }
    }
}

/// The accesses of one stream, untagged or with a PASID, for [`vm_memory::IommuMemory`].
///
/// ```
/// use viommu_device::EndpointId;
/// use viommu_device::host::{EndpointCaps, Host, SpaceSpec, Stream};
/// use viommu_device::soft::SoftHost;
/// use viommu_queue::{GuestTables, SharedIommu};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, IommuMemory};
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x4000_0000), 0x1_0000)])?;
/// let mut host = SoftHost::new(GuestTables::new(&memory));
/// host.add_endpoint(EndpointId(8), EndpointCaps::default())?;
/// let iommu = SharedIommu::new(host);
///
/// // What the emulated device uses instead of `memory`:
/// let stream = Stream::untagged(EndpointId(8));
/// let dma = IommuMemory::new(memory, iommu.stream(stream), true, ());
/// assert!(dma.read_obj::<u32>(GuestAddress(0x4000_0000)).is_err());
///
/// let mut host = iommu.lock();
/// let mut space = host.create(SpaceSpec::Identity)?;
/// host.bind(stream, Some(&mut space))?;
/// drop(host);
/// assert!(dma.read_obj::<u32>(GuestAddress(0x4000_0000)).is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct StreamIommu<T> {
    pub(crate) shared: SharedIommu<T>,
    stream: Stream,
    privileged: bool,
}

impl<T> StreamIommu<T> {
    /// The same stream's accesses in privileged mode (PCIe: Privileged Mode Requested).
    #[must_use]
    pub fn privileged(self) -> Self {
        Self { privileged: true, ..self }
    }

    /// Whose accesses.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// Whether they are privileged ones.
    pub fn is_privileged(&self) -> bool {
        self.privileged
    }
}

impl<T> Clone for StreamIommu<T> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), ..*self }
    }
}

impl<T> fmt::Debug for StreamIommu<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamIommu")
            .field("stream", &self.stream)
            .field("privileged", &self.privileged)
            .finish_non_exhaustive()
    }
}

impl<T: Translate + Send> Iommu for StreamIommu<T> {
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
        self.translate_observed(iova, length, access, |_| ())
    }
}

impl<T: Translate + Send> StreamIommu<T> {
    /// [`Iommu::translate`]; `observe` gets what came out, while the value is locked.
    // Always: what it returns is large, and is not to be copied for the sake of an observer that is not there.
    #[inline(always)]
    pub(crate) fn translate_observed(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
        observe: impl FnOnce(Result<(), FaultCause>),
    ) -> Result<IotlbIterator<Pinned<'_, T>>, Error> {
        let inner = &*self.shared.inner;
        let refuse =
            |reason: String| Error::CannotResolve { iova_range: VmIovaRange { base: iova, length }, reason };
        // vm-memory's ranges end behind their last address, which therefore cannot be 2^64-1.
        if iova.0.checked_add(length as u64).is_none() {
            return Err(refuse("the range leaves the 64-bit space".into()));
        }
        if length > MAX_ACCESS {
            return Err(refuse(format!("an access may have {MAX_ACCESS} bytes")));
        }
        let mut iotlb = Iotlb::new();
        let mut state = inner.state_after_others();
        if let Some(range) = IovaRange::from_length(Iova(iova.0), length as u64) {
            let result = self.fill(&mut state.value, range, access, &mut iotlb);
            observe(result);
            if let Err(cause) = result {
                drop(state);
                (inner.on_fault)();
                return Err(refuse(cause.to_string()));
            }
        }
        let pinned = inner.pin(state, iotlb);
        Iotlb::lookup(pinned, iova, length, access).map_err(|_| refuse("the answer has a gap".into()))
    }
}

impl<T: Translate> StreamIommu<T> {
    fn fill(
        &self,
        value: &mut T,
        range: IovaRange,
        access: Permissions,
        iotlb: &mut Iotlb,
    ) -> Result<(), FaultCause> {
        for &kind in kinds(access) {
            let access_of_kind = Access { kind, privileged: self.privileged };
            // The guest may change its tables between the two: the later answer counts.
            iotlb.invalidate_all();
            value.mmu().translate_range(self.stream, range, access_of_kind, |iova, output, length| {
                let Ok(length) = usize::try_from(length) else { return };
                let set = iotlb.set_mapping(GuestAddress(iova.0), GuestAddress(output.0), length, access);
                debug_assert!(set.is_ok());
            })?;
        }
        Ok(())
    }
}

/// What an access does, one after the other.
pub(crate) const fn kinds(access: Permissions) -> &'static [AccessKind] {
    match access {
        // Whether there is anything at all.
        Permissions::No | Permissions::Read => &[AccessKind::Read],
        Permissions::Write => &[AccessKind::Write],
        Permissions::ReadWrite => &[AccessKind::Read, AccessKind::Write],
    }
}

/// A translation in use: while it lives, nobody has the shared value exclusively.
pub struct Pinned<'a, T> {
    inner: &'a Inner<T>,
    iotlb: Iotlb,
}

impl<T> Deref for Pinned<'_, T> {
    type Target = Iotlb;

    fn deref(&self) -> &Iotlb {
        &self.iotlb
    }
}

impl<T> Drop for Pinned<'_, T> {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        state.pins -= 1;
        if state.pins == 0 && state.waiting > 0 {
            self.inner.unpinned.notify_all();
        }
    }
}
