//! Failing: what becomes of everything when one call fails.

use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use pgtable_formats::{IovaRange, Pasid};

use crate::counted::Call;
use crate::kernel::{
    Commands, DeviceId, Event, HwInfo, HwptSpec, InvalidateError, IoasMapping, Iommufd, IovaRanges, ObjectId,
    PageFault, ResponseCode, ViommuKind,
};

/// Passes calls on, except those that it was told to fail: they have no effect.
///
/// `destroy` and `detach` fail only where that was asked for by kind: the kernel does not fail them unless the caller
/// is wrong, and nobody can do anything about it.
#[derive(Debug)]
pub struct Failing<K> {
    kernel: K,
    plan: Mutex<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    /// How many calls that may fail were made.
    made: u64,
    rule: Option<Rule>,
    /// The call that has failed.
    failed: Option<Call>,
}

#[derive(Clone, Copy, Debug)]
enum Rule {
    /// The call of this number, and as many after it as make `count`.
    Run { number: u64, count: u64, errno: Errno },
    /// Every call of a kind.
    Kind { call: Call, errno: Errno },
}

impl<K> Failing<K> {
    /// Passes everything on until it is told otherwise.
    pub fn new(kernel: K) -> Self {
        Self { kernel, plan: Mutex::default() }
    }

    /// Whom calls are passed on to.
    pub const fn inner(&self) -> &K {
        &self.kernel
    }

    /// Fails the `number`-th call from now on, counted from 0, and no other.
    pub fn fail_nth(&self, number: u64, errno: Errno) {
        self.fail_run(number, 1, errno);
    }

    /// Fails `count` calls in a row, from the `number`-th from now on, counted from 0.
    pub fn fail_run(&self, number: u64, count: u64, errno: Errno) {
        self.set(Some(Rule::Run { number, count, errno }));
    }

    /// Fails every call of a kind.
    pub fn fail_kind(&self, call: Call, errno: Errno) {
        self.set(Some(Rule::Kind { call, errno }));
    }

    /// Fails nothing any more.
    pub fn heal(&self) {
        self.set(None);
    }

    /// The first call that has failed since it was told what to fail.
    pub fn failed(&self) -> Option<Call> {
        self.lock().failed
    }

    fn set(&self, rule: Option<Rule>) {
        *self.lock() = Plan { rule, ..Plan::default() };
    }

    fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a call passes.
    fn admit(&self, call: Call) -> Result<&K, Errno> {
        let mut plan = self.lock();
        let may_fail = !matches!(call, Call::Destroy | Call::Detach);
        let failure = plan.rule.and_then(|rule| match rule {
            Rule::Run { number, count, errno } => {
                let is_next = plan.made.checked_sub(number).is_some_and(|after| after < count);
                (may_fail && is_next).then_some(errno)
            }
            Rule::Kind { call: kind, errno } => (kind == call).then_some(errno),
        });
        plan.made += u64::from(may_fail);
        match failure {
            Some(errno) => {
                plan.failed.get_or_insert(call);
                Err(errno)
            }
            None => Ok(&self.kernel),
        }
    }
}

impl<K: Iommufd> Iommufd for Failing<K> {
    fn destroy(&self, object: ObjectId) -> Result<(), Errno> {
        self.admit(Call::Destroy)?.destroy(object)
    }

    fn alloc_ioas(&self) -> Result<ObjectId, Errno> {
        self.admit(Call::AllocIoas)?.alloc_ioas()
    }

    fn iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges, Errno> {
        self.admit(Call::IovaRanges)?.iova_ranges(ioas)
    }

    fn map(&self, ioas: ObjectId, mapping: &IoasMapping) -> Result<(), Errno> {
        self.admit(Call::Map)?.map(ioas, mapping)
    }

    fn unmap(&self, ioas: ObjectId, range: IovaRange) -> Result<u64, Errno> {
        self.admit(Call::Unmap)?.unmap(ioas, range)
    }

    fn hw_info(&self, device: DeviceId) -> Result<HwInfo, Errno> {
        self.admit(Call::HwInfo)?.hw_info(device)
    }

    fn alloc_hwpt(&self, spec: &HwptSpec) -> Result<ObjectId, Errno> {
        self.admit(Call::AllocHwpt)?.alloc_hwpt(spec)
    }

    fn invalidate(&self, object: ObjectId, commands: Commands<'_>) -> Result<(), InvalidateError> {
        let kernel = self.admit(Call::Invalidate).map_err(|errno| InvalidateError { done: 0, errno })?;
        kernel.invalidate(object, commands)
    }

    fn alloc_viommu(&self, kind: ViommuKind, device: DeviceId, parent: ObjectId) -> Result<ObjectId, Errno> {
        self.admit(Call::AllocViommu)?.alloc_viommu(kind, device, parent)
    }

    fn alloc_vdevice(&self, viommu: ObjectId, device: DeviceId, virtual_id: u64) -> Result<ObjectId, Errno> {
        self.admit(Call::AllocVdevice)?.alloc_vdevice(viommu, device, virtual_id)
    }

    fn alloc_event_queue(&self, viommu: ObjectId, kind: ViommuKind, depth: u32) -> Result<ObjectId, Errno> {
        self.admit(Call::AllocEventQueue)?.alloc_event_queue(viommu, kind, depth)
    }

    fn read_events(&self, queue: ObjectId) -> Result<Vec<Event>, Errno> {
        self.admit(Call::ReadEvents)?.read_events(queue)
    }

    fn alloc_fault_queue(&self) -> Result<ObjectId, Errno> {
        self.admit(Call::AllocFaultQueue)?.alloc_fault_queue()
    }

    fn read_page_faults(&self, queue: ObjectId) -> Result<Vec<PageFault>, Errno> {
        self.admit(Call::ReadPageFaults)?.read_page_faults(queue)
    }

    fn respond(&self, queue: ObjectId, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        self.admit(Call::Respond)?.respond(queue, cookie, code)
    }

    fn queue_fd(&self, queue: ObjectId) -> Option<RawFd> {
        self.kernel.queue_fd(queue)
    }

    fn attach(&self, device: DeviceId, pasid: Option<Pasid>, table: ObjectId) -> Result<(), Errno> {
        self.admit(Call::Attach)?.attach(device, pasid, table)
    }

    fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<(), Errno> {
        self.admit(Call::Detach)?.detach(device, pasid)
    }
}
