//! What the demo finds out, scene by scene. Both forms of output are made from this.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

/// All scenes.
#[derive(Serialize)]
pub(super) struct Story {
    pub(super) machine: Machine,
    pub(super) probe: Probe,
    pub(super) smmuv3: Sharing,
    pub(super) vtd: Sharing,
    /// With an SMMUv3, then with a VT-d unit.
    pub(super) paging: [Paging; 2],
    pub(super) comparison: Comparison,
}

/// An address, written as in the text: `0x40000000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hex(pub(super) u64);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Scene 1.
#[derive(Serialize)]
pub(super) struct Machine {
    pub(super) memory_first: Hex,
    pub(super) memory_last: Hex,
    pub(super) memory_bytes: u64,
    pub(super) queues: Vec<Queue>,
    pub(super) features_offered: Vec<&'static str>,
    pub(super) features_accepted: Vec<&'static str>,
    pub(super) endpoints: Vec<Endpoint>,
    /// An access before the guest allowed any.
    pub(super) at_first: Fault,
}

/// A virtqueue.
#[derive(Serialize)]
pub(super) struct Queue {
    pub(super) purpose: &'static str,
    pub(super) entries: u16,
    /// Its descriptor table.
    pub(super) at: Hex,
}

/// An endpoint as the VMM made it.
#[derive(Serialize)]
pub(super) struct Endpoint {
    pub(super) endpoint: u32,
    pub(super) hardware: &'static str,
    /// Its device can wait for memory that is not there.
    pub(super) can_wait: bool,
}

/// Scene 2.
#[derive(Serialize)]
pub(super) struct Probe {
    pub(super) endpoint: u32,
    pub(super) sent: Sent,
    pub(super) hardware: &'static str,
    pub(super) page_sizes: Vec<u64>,
    pub(super) address_bits: u8,
    pub(super) pasid_bits: u8,
    pub(super) table_formats: Vec<u8>,
    pub(super) reserved: Vec<Reserved>,
    pub(super) not_understood: u32,
}

/// Addresses that must not be mapped.
#[derive(Serialize)]
pub(super) struct Reserved {
    pub(super) kind: String,
    pub(super) first: Hex,
    pub(super) last: Hex,
}

/// What went over the request queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Sent {
    pub(super) requests: u64,
    /// Kicks: each is an exit to the hypervisor.
    pub(super) notifications: u64,
    /// Bytes of requests and answers.
    pub(super) bytes: u64,
}

/// Scenes 3 to 5, and scene 6.
#[derive(Serialize)]
pub(super) struct Sharing {
    pub(super) handover: Handover,
    pub(super) change: Change,
    pub(super) faults: Faults,
}

/// Processes whose page tables a device uses.
#[derive(Serialize)]
pub(super) struct Handover {
    pub(super) endpoint: u32,
    pub(super) hardware: &'static str,
    /// The architecture's word for a table with an entry for each PASID.
    pub(super) table_kind: &'static str,
    pub(super) table: Hex,
    pub(super) format: u8,
    /// From nothing to the table being in force.
    pub(super) sent: Sent,
    /// The pointer that every process uses.
    pub(super) pointer: Hex,
    pub(super) processes: Vec<Process>,
    /// While the device copied.
    pub(super) sent_for_copies: Sent,
}

/// One process.
#[derive(Serialize)]
pub(super) struct Process {
    pub(super) name: char,
    pub(super) pasid: u32,
    pub(super) page_table: Hex,
    /// Where the pages from the pointer on lie.
    pub(super) pages: Vec<Hex>,
    /// How the memory starts that the device read there.
    pub(super) text: String,
    /// Bytes that the device copied, all compared.
    pub(super) copied: u64,
}

/// A mapping that changes.
#[derive(Serialize)]
pub(super) struct Change {
    pub(super) process: char,
    pub(super) pasid: u32,
    pub(super) pointer: Hex,
    pub(super) before: Seen,
    /// The page table's own answer once the guest has taken the mapping away.
    pub(super) table_says: String,
    pub(super) sent_for_removal: Sent,
    /// What the device reads all the same.
    pub(super) stale: Seen,
    pub(super) sent_for_invalidation: Sent,
    pub(super) gone: Fault,
    pub(super) sent_for_new_mapping: Sent,
    pub(super) after: Seen,
}

/// What a device read through a pointer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Seen {
    /// Where the pointer led.
    pub(super) page: Hex,
    /// How that memory starts.
    pub(super) text: String,
}

/// Accesses that are refused.
#[derive(Serialize)]
pub(super) struct Faults {
    pub(super) events: Vec<Fault>,
    /// Bytes that the device copied for the same process afterwards.
    pub(super) copied_afterwards: u64,
}

/// An access that was refused, and the event that told the guest.
#[derive(Serialize)]
pub(super) struct Fault {
    /// In words, what was wrong with it.
    pub(super) what: &'static str,
    pub(super) access: &'static str,
    pub(super) endpoint: u32,
    pub(super) pasid: Option<u32>,
    pub(super) address: Hex,
    /// As the event has it: DOMAIN, MAPPING, UNKNOWN.
    pub(super) reason: &'static str,
    /// The architecture's own name; where no table of the guest was asked, the device's.
    pub(super) architecture: String,
    /// What that name means.
    pub(super) meaning: &'static str,
}

/// Scene 7: a device that waits for memory.
#[derive(Serialize)]
pub(super) struct Paging {
    pub(super) endpoint: u32,
    pub(super) hardware: &'static str,
    pub(super) format: u8,
    /// One table of all PASIDs was handed over; else each page table by itself.
    pub(super) one_table: bool,
    /// Where each process may have memory.
    pub(super) area_first: Hex,
    pub(super) area_bytes: u64,
    /// Where the copy goes; it is made from the start of the area.
    pub(super) target: Hex,
    /// Bytes to copy for each process, and at a time.
    pub(super) length: u64,
    pub(super) burst: u64,
    /// How often everybody had a turn.
    pub(super) rounds: u32,
    /// How often the device moved bytes for another process than the time before.
    pub(super) switches: u32,
    /// While it copied.
    pub(super) sent: Sent,
    pub(super) processes: Vec<PagedProcess>,
    /// In the order in which the device asked.
    pub(super) requests: Vec<PageRequest>,
    pub(super) kill: Kill,
}

/// A process with memory on demand.
#[derive(Serialize)]
pub(super) struct PagedProcess {
    pub(super) name: char,
    pub(super) pasid: u32,
    /// Pages that it came to have, for itself or for the device.
    pub(super) pages_made: u64,
    /// Bytes that the device copied; if it finished, all compared.
    pub(super) copied: u64,
    pub(super) finished: bool,
}

/// A page that the device asked for.
#[derive(Serialize)]
pub(super) struct PageRequest {
    pub(super) process: char,
    pub(super) pasid: u32,
    pub(super) access: &'static str,
    pub(super) address: Hex,
    /// What the answer names.
    pub(super) group: u16,
    /// What the device was told: SUCCESS, INVALID.
    pub(super) answer: &'static str,
}

/// A process that was killed while the device worked for it.
#[derive(Serialize)]
pub(super) struct Kill {
    pub(super) process: char,
    pub(super) pasid: u32,
    /// Bytes that the device had copied.
    pub(super) copied: u64,
    /// Accesses that waited then.
    pub(super) waiting: u64,
    pub(super) sent_for_exit: Sent,
    pub(super) sent_for_unbind: Sent,
    /// Groups that waited, by who answered them INVALID.
    pub(super) answered_by_guest: u64,
    pub(super) answered_by_device: u64,
    /// Accesses that the device tried all the same; none passed.
    pub(super) refused_afterwards: u64,
    pub(super) refusal: String,
    /// Bytes of memory that had been the process's, compared at the end: none was changed.
    pub(super) watched: u64,
}

/// Scene 8.
#[derive(Serialize)]
pub(super) struct Comparison {
    pub(super) endpoint: u32,
    pub(super) buffers: u64,
    pub(super) buffer_bytes: u64,
    pub(super) ways: Vec<Way>,
}

/// One way to let a device use buffers.
#[derive(Serialize)]
pub(super) struct Way {
    pub(super) way: &'static str,
    /// Buffers in use at a time: they are mapped together and unmapped together.
    pub(super) batch: u64,
    /// Requests by kind, for all buffers.
    pub(super) kinds: BTreeMap<&'static str, u64>,
    pub(super) sent: Sent,
    pub(super) per_buffer: PerBuffer,
    /// Once before the first buffer.
    pub(super) before: Sent,
    /// Once after the last one.
    pub(super) after: Sent,
    /// Bytes that the device wrote into buffers, all compared.
    pub(super) moved: u64,
    /// Buffers that the device could not reach any more after they were unmapped.
    pub(super) closed: u64,
}

/// [`Sent`], divided by the number of buffers.
#[derive(Serialize)]
pub(super) struct PerBuffer {
    pub(super) requests: f64,
    pub(super) notifications: f64,
    pub(super) bytes: f64,
}
