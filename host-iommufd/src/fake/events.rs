//! Event queues: what a guest is told of its faults.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::graph::{Object, State};
use crate::kernel::{Event, ObjectId};

/// The largest depth that a queue may have.
const MOST: u32 = 1 << 19;
/// Records that one read hands out.
const READ: usize = 16;

/// A vEVENTQ.
#[derive(Debug)]
pub(super) struct EventQueue {
    pub(super) viommu: ObjectId,
    depth: usize,
    events: VecDeque<Event>,
    /// Number of the last event that was lost, if nothing came after it.
    lost: Option<u32>,
    next: u32,
    pub(super) bell: Bell,
}

impl EventQueue {
    /// A full queue loses what comes, and says so at its end; later the numbers have a gap there.
    pub(super) fn push(&mut self, record: [u64; 4]) {
        let sequence = self.next;
        self.next = (self.next + 1) & 0x7fff_ffff;
        if self.events.len() == self.depth {
            self.lost = Some(sequence);
        } else {
            self.lost = None;
            self.events.push_back(Event::Smmuv3 { sequence, record });
        }
        self.bell.set(true);
    }

    pub(super) fn read(&mut self) -> Vec<Event> {
        let mut read: Vec<Event> = self.events.drain(..self.events.len().min(READ)).collect();
        if self.events.is_empty() {
            read.extend(self.lost.take().map(|sequence| Event::Lost { sequence }));
            self.bell.set(false);
        }
        read
    }
}

impl State {
    pub(super) fn alloc_event_queue(&mut self, viommu: ObjectId, depth: u32) -> Result<ObjectId, Errno> {
        if depth == 0 || depth > MOST {
            return Err(Errno::EINVAL);
        }
        self.viommu(viommu)?;
        let of = |object: &Object| matches!(object, Object::EventQueue(queue) if queue.viommu == viommu);
        if self.objects.values().any(of) {
            return Err(Errno::EEXIST);
        }
        let depth = usize::try_from(depth).map_err(|_| Errno::EINVAL)?;
        let (events, bell) = (VecDeque::new(), Bell::new()?);
        Ok(self.insert(Object::EventQueue(EventQueue { viommu, depth, events, lost: None, next: 0, bell })))
    }

    /// `false` where nobody listens.
    pub(super) fn tell(&mut self, viommu: ObjectId, record: [u64; 4]) -> bool {
        let queue = self.objects.values_mut().find_map(|object| match object {
            Object::EventQueue(queue) if queue.viommu == viommu => Some(queue),
            _ => None,
        });
        queue.map(|queue| queue.push(record)).is_some()
    }
}

/// A descriptor that can be read while there is something to fetch.
#[derive(Debug)]
pub(super) struct Bell(EventFd);

impl Bell {
    pub(super) fn new() -> Result<Self, Errno> {
        EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).map(Self)
    }

    pub(super) fn set(&self, rings: bool) {
        // Reading one that does not ring, or ringing one that does, is no failure.
        let _ = if rings { self.0.write(1).map(drop) } else { self.0.read().map(drop) };
    }

    pub(super) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
