//! The checks. Each is a function, and each starts from a machine of its own.

mod budget;
mod faults;
mod interrupts;
mod invalidate;
mod kinds;
mod lifetime;
mod modes;
mod pair;
mod tables;
mod translate;

pub(super) use lifetime::work;

use super::bench::Bench;
use super::check::{Check, Run};

/// Every check, in the order in which they run.
pub(super) fn all<B: Bench>() -> Vec<Check<B>> {
    let device = |name, claim, work| Check { name, claim, run: Run::Device(work) };
    let pair = |name, claim, work| Check { name, claim, run: Run::Pair(work) };
    vec![
        device("probe", "PROBE names the hardware, its formats and the MSI window", translate::probe),
        device("unattached", "a device that is attached to nothing reaches nothing", modes::unattached),
        device("table-write", "a DMA write goes through the guest's table and stage 2", translate::write),
        device("table-read", "a DMA read goes through the guest's table and stage 2", translate::read),
        device(
            "table-scattered",
            "pages that do not follow each other are put together",
            translate::scattered,
        ),
        device("table-block", "a mapping of 2 MiB is reached at both of its ends", translate::block),
        device("map-later", "a mapping that is added is used without any request", translate::map_later),
        device("stale-translation", "a translation stays in use until INVALIDATE", invalidate::stale),
        device("invalidate-address", "INVALIDATE of one page ends its old translation", invalidate::address),
        device("invalidate-range", "INVALIDATE of many pages ends their old translations", invalidate::range),
        device("invalidate-pasid", "INVALIDATE of a PASID ends all its old translations", invalidate::pasid),
        device(
            "invalidate-domain",
            "INVALIDATE of a domain ends all its old translations",
            invalidate::domain,
        ),
        device(
            "invalidate-pasid-cache",
            "INVALIDATE of the PASID cache ends the use of an old table",
            invalidate::pasid_cache,
        ),
        device("unmap", "what was unmapped and invalidated is reached no more", invalidate::unmap),
        device(
            "fault-unmapped",
            "an access without a mapping is refused, and an event tells endpoint and address",
            faults::unmapped,
        ),
        device(
            "fault-read-only",
            "a write to a read-only page is refused, and an event tells",
            faults::read_only,
        ),
        device(
            "fault-privileged",
            "a page that only privileged accesses may use refuses the device",
            faults::privileged,
        ),
        device("fault-recovery", "after a fault the device works on", faults::recovery),
        device(
            "bypass-domain",
            "in a bypass domain the device reaches guest-physical memory",
            modes::bypass_domain,
        ),
        device(
            "bypass-unattached",
            "with `bypass` set, an unattached device reaches guest-physical memory",
            modes::bypass_unattached,
        ),
        device("detach", "a detached device reaches nothing", modes::detach),
        device("rebind", "another table takes the place of the first in one step", modes::rebind),
        device(
            "rebind-same-tag",
            "a table with the tag of one before it has none of its translations",
            modes::rebind_same_tag,
        ),
        device("map-unmap", "MAP and UNMAP requests work on the same device", modes::map_unmap),
        device("map-read-only", "a MAP without WRITE refuses writes", modes::map_read_only),
        device("between-modes", "table, mappings and bypass take turns on one device", modes::between),
        device(
            "mediated-table",
            "the kind of table that the hardware does not take works as its own, to the end",
            kinds::mediated,
        ),
        device("mediated-turns", "both kinds of table take turns on one device", kinds::between),
        device("mediated-window", "no DMA changes a table of the machine's own", kinds::window),
        device(
            "msi-mapped",
            "an MSI arrives through the guest's table where the window is mapped",
            interrupts::mapped,
        ),
        device(
            "msi-unmapped",
            "an MSI does not arrive where the window is not mapped, and an event tells",
            interrupts::unmapped,
        ),
        device(
            "virtio-reset",
            "after a reset of the IOMMU nothing passes, and it can be brought up again",
            lifetime::virtio_reset,
        ),
        device(
            "device-reset",
            "after a reset of the device its table is still in force",
            lifetime::device_reset,
        ),
        device("nothing-leaks", "a machine that ends gives all kernel objects back", lifetime::nothing_leaks),
        device(
            "killed-process",
            "a process that is killed in mid-work leaves the device usable",
            lifetime::killed,
        ),
        device(
            "ioctl-budget",
            "at most 2 ioctls for an INVALIDATE, 1 HWPT_ALLOC for an ATTACH_TABLE",
            budget::ioctls,
        ),
        device(
            "random-tables",
            "random tables translate as on the software host, access by access",
            tables::random,
        ),
        device(
            "captured-tables",
            "tables that a real kernel built translate as on the software host",
            tables::captured,
        ),
        device("comparison", "MAP/UNMAP requests and handover do the same work", budget::compare),
        pair("pair-one-domain", "two devices use one page table at once", pair::one_domain),
        pair(
            "pair-two-tables",
            "two devices use different tables at once, and faults name the right one",
            pair::two_tables,
        ),
        pair("pair-invalidate", "INVALIDATE reaches both devices of a domain", pair::invalidate),
        pair("pair-detach-one", "detaching one device leaves the other at work", pair::detach_one),
    ]
}
