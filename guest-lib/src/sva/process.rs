//! Processes: address spaces that devices may share, and who answers for their pages.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use core::fmt;

use viommu_wire::{EndpointId, PageRequest, PageResponseCode, Pasid};

use super::{ExitError, Token};
use crate::Driver;
use crate::hal::{Platform, Transport};
use crate::tables::AddressSpace;

/// Names a process of [`Processes`]. No two ever have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(u64);

/// The processes of a guest that devices may work for, each with what answers its page requests.
#[derive(Debug)]
pub struct Processes<H> {
    by_id: BTreeMap<ProcessId, Process<H>>,
    next: u64,
}

/// An address space that any number of endpoints may share, and its handler.
#[derive(Debug)]
pub struct Process<H> {
    space: AddressSpace,
    handler: H,
}

/// Page requests that one answer serves.
#[derive(Clone, Copy, Debug)]
pub struct PageGroup<'a> {
    /// Who asks.
    pub endpoint: EndpointId,
    /// With which PASID.
    pub pasid: Pasid,
    /// For what, in the order in which the device asked; never empty. Of more than
    /// [`GroupLimits::requests_per_group`](super::GroupLimits::requests_per_group) requests these are the first: the
    /// device asks again for the others when it tries again.
    pub requests: &'a [PageRequest],
    /// Names the group to [`Sva::answer`](super::Sva::answer).
    pub token: Token,
}

/// What a [`FaultHandler`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// Every page is there: the device tries again.
    Success,
    /// An access is not allowed, or cannot be made possible: the device gives up on the group.
    Invalid,
    /// As [`Invalid`](Self::Invalid), and nothing later will succeed either: the endpoint may stop to ask for anything,
    /// for other processes, too. For a process that has no memory left this is too strong.
    Failure,
    /// Not yet: [`Sva::answer`](super::Sva::answer) follows.
    Later,
}

impl Answer {
    pub(super) const fn code(self) -> Option<PageResponseCode> {
        Some(match self {
            Self::Success => PageResponseCode::Success,
            Self::Invalid => PageResponseCode::Invalid,
            Self::Failure => PageResponseCode::Failure,
            Self::Later => return None,
        })
    }
}

/// Answers for the pages of a process.
pub trait FaultHandler<P: Platform, T: Transport> {
    /// Whether all memory of the process that devices may use is there and stays there, so that an endpoint without page
    /// requests may work for it. [`Sva::bind`](super::Sva::bind) asks.
    fn is_pinned(&self) -> bool {
        false
    }

    /// Makes the pages of `group` present in `space`, with the permissions that the accesses need, and answers.
    ///
    /// A page that was not mapped is mapped; nothing has to be invalidated. One that is mapped with too little is changed
    /// by [`AddressSpace::protect`], which invalidates.
    fn handle(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
        group: &PageGroup<'_>,
    ) -> Answer;
}

/// A handler for processes whose memory is always there: every page request is INVALID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unpaged;

impl<P: Platform, T: Transport> FaultHandler<P, T> for Unpaged {
    fn is_pinned(&self) -> bool {
        true
    }

    fn handle(&mut self, _: &mut Driver<P, T>, _: &mut AddressSpace, _: &PageGroup<'_>) -> Answer {
        Answer::Invalid
    }
}

impl<P: Platform, T: Transport, H: FaultHandler<P, T> + ?Sized> FaultHandler<P, T> for Box<H> {
    fn is_pinned(&self) -> bool {
        (**self).is_pinned()
    }

    fn handle(
        &mut self,
        driver: &mut Driver<P, T>,
        space: &mut AddressSpace,
        group: &PageGroup<'_>,
    ) -> Answer {
        (**self).handle(driver, space, group)
    }
}

impl<H> Processes<H> {
    /// None yet.
    pub const fn new() -> Self {
        Self { by_id: BTreeMap::new(), next: 0 }
    }

    /// A new process.
    pub fn add(&mut self, space: AddressSpace, handler: H) -> ProcessId {
        let id = ProcessId(self.next);
        // 2^64 processes are never made.
        self.next = self.next.wrapping_add(1);
        self.by_id.insert(id, Process { space, handler });
        id
    }

    /// A process.
    pub fn get(&self, id: ProcessId) -> Option<&Process<H>> {
        self.by_id.get(&id)
    }

    /// A process, to be changed.
    pub fn get_mut(&mut self, id: ProcessId) -> Option<&mut Process<H>> {
        self.by_id.get_mut(&id)
    }

    /// All of them.
    pub fn ids(&self) -> impl Iterator<Item = ProcessId> {
        self.by_id.keys().copied()
    }

    /// Ends a process, bound or not: its page table is emptied for good, and when this returns no access of any device
    /// reaches its memory any more. Page requests that come later are answered INVALID. Each endpoint that is bound still
    /// has to [`unbind`](super::Sva::unbind).
    ///
    /// # Errors
    /// [`ExitError`]: nothing can be mapped any more, but devices may still reach what was.
    pub fn exit<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        id: ProcessId,
    ) -> Result<(), ExitError> {
        let process = self.by_id.get_mut(&id).ok_or(ExitError::NoProcess(id))?;
        Ok(process.space.close(driver)?)
    }

    /// Removes a process that no endpoint is bound to, ended or not, and gives its page table back to the allocator.
    /// No device can reach what its handler has of memory.
    ///
    /// # Errors
    /// [`ExitError`]; the process is still there.
    pub fn remove<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
        id: ProcessId,
    ) -> Result<H, ExitError> {
        let Process { space, handler } = self.by_id.remove(&id).ok_or(ExitError::NoProcess(id))?;
        match space.release(driver) {
            Ok(()) => Ok(handler),
            Err((space, error)) => {
                self.by_id.insert(id, Process { space, handler });
                Err(error.into())
            }
        }
    }
}

impl<H> Default for Processes<H> {
    fn default() -> Self {
        Self::new()
    }
}

impl<H> Process<H> {
    /// Its address space.
    pub const fn space(&self) -> &AddressSpace {
        &self.space
    }

    /// Its handler.
    pub const fn handler(&self) -> &H {
        &self.handler
    }

    /// Both, to be changed: mappings come and go by the methods of [`AddressSpace`], at every endpoint that is bound. No
    /// other space may be put in the place of this one.
    pub const fn parts(&mut self) -> (&mut AddressSpace, &mut H) {
        (&mut self.space, &mut self.handler)
    }

    /// Whether it has ended.
    pub const fn has_ended(&self) -> bool {
        self.space.is_closed()
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.0)
    }
}
