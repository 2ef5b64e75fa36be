//! The files of event and fault queues.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::errno::io_errno;
use super::record;
use crate::kernel::{Event, PageFault, ResponseCode, ViommuKind};

/// A queue's file.
pub(super) struct Queue {
    file: File,
    kind: QueueKind,
}

/// What a queue is of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum QueueKind {
    Events(ViommuKind),
    PageFaults,
}

/// More page requests than a group can have (the PCI group index has 9 bits); a bound for the buffer.
const MAX_FAULTS: usize = 1 << 15;

impl Queue {
    pub(super) const fn new(file: File, kind: QueueKind) -> Self {
        Self { file, kind }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// `EINVAL` where it is a queue of page requests.
    pub(super) fn read_events(&self) -> Result<Vec<Event>, Errno> {
        let QueueKind::Events(ViommuKind::Smmuv3) = self.kind else { return Err(Errno::EINVAL) };
        let mut bytes = [0; 64 * record::SMMUV3_RECORD_LENGTH];
        let read = read(&self.file, &mut bytes)?;
        record::smmuv3_events(read).ok_or(Errno::EPROTO)
    }

    /// `EINVAL` where it is a queue of events.
    pub(super) fn read_page_faults(&self) -> Result<Vec<PageFault>, Errno> {
        if self.kind != QueueKind::PageFaults {
            return Err(Errno::EINVAL);
        }
        read_groups(|bytes| read(&self.file, bytes).map(<[u8]>::len), || self.is_readable())
    }

    fn is_readable(&self) -> Result<bool, Errno> {
        let mut file = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        poll(&mut file, PollTimeout::ZERO).map(|ready| ready != 0)
    }

    pub(super) fn respond(&self, cookie: u32, code: ResponseCode) -> Result<(), Errno> {
        let bytes = record::response(cookie, code);
        match (&self.file).write(&bytes) {
            Ok(written) if written == bytes.len() => Ok(()),
            Ok(_) => Err(Errno::EIO),
            Err(error) => Err(io_errno(&error)),
        }
    }
}

/// Reads whole groups, with as much room as the first one needs. `EMSGSIZE` where that is more than any group has.
fn read_groups(
    mut read: impl FnMut(&mut [u8]) -> Result<usize, Errno>,
    is_readable: impl Fn() -> Result<bool, Errno>,
) -> Result<Vec<PageFault>, Errno> {
    let mut count = 128;
    loop {
        let mut bytes = vec![0; count * record::PAGE_FAULT_LENGTH];
        match read(&mut bytes) {
            // The first group does not fit. Some kernels say EINVAL, others read nothing, as if the queue were empty.
            Err(Errno::EINVAL) => {}
            Ok(0) => {
                if !is_readable()? {
                    return Ok(vec![]);
                }
            }
            Ok(length) => {
                return bytes.get(..length).and_then(record::page_faults).ok_or(Errno::EPROTO);
            }
            Err(errno) => return Err(errno),
        }
        if count >= MAX_FAULTS {
            return Err(Errno::EMSGSIZE);
        }
        count *= 4;
    }
}

/// Reads what there is: an empty queue reads as nothing, or as `EAGAIN` where the file does not block.
fn read<'a>(mut file: &File, bytes: &'a mut [u8]) -> Result<&'a [u8], Errno> {
    let length = loop {
        match file.read(bytes).map_err(|error| io_errno(&error)) {
            Ok(length) => break length,
            Err(Errno::EAGAIN) => break 0,
            Err(Errno::EINTR) => (),
            Err(errno) => return Err(errno),
        }
    };
    bytes.get(..length).ok_or(Errno::EIO)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A queue whose first group has `requests`; what a kernel answers where there is no room for it.
    fn first_group(requests: usize, no_room: Result<usize, Errno>) -> Result<usize, Errno> {
        let length = requests * record::PAGE_FAULT_LENGTH;
        let read = |bytes: &mut [u8]| if bytes.len() < length { no_room } else { Ok(length) };
        read_groups(read, || Ok(requests != 0)).map(|read| read.len())
    }

    #[test]
    fn a_group_gets_the_room_that_it_needs() {
        for no_room in [Ok(0), Err(Errno::EINVAL)] {
            for requests in [0, 1, 128, 129, 200, 512, 2049, MAX_FAULTS] {
                assert_eq!(first_group(requests, no_room), Ok(requests), "{no_room:?}");
            }
            assert_eq!(first_group(MAX_FAULTS + 1, no_room), Err(Errno::EMSGSIZE), "{no_room:?}");
        }
        assert_eq!(first_group(129, Err(Errno::EFAULT)), Err(Errno::EFAULT));
    }
}
