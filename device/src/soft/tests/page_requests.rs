//! Accesses that wait for a page.

use pgtable_formats::FaultClass;
use viommu_wire::{AccessFlags, PageResponseCode};

use super::*;
use crate::host::{Answered, GroupResponse, PageRequestReport};
use crate::soft::{AccessError, Answer, MAX_WAITING_PER_ENDPOINT, Ticket};

const IOVA: u64 = 0x12_3000;
const OUTPUT: u64 = 0x4010_0000;

/// A guest as in the other tests, whose endpoints may wait for pages, with a page table for PASIDs 1 and 2.
struct Waiting {
    world: World,
    page_table: PageTable,
}

impl Waiting {
    fn new(arch: Arch) -> Self {
        let mut world = World::new(arch);
        for endpoint in [ENDPOINT, OTHER] {
            world.host.ports.get_mut(&endpoint).unwrap().caps.page_requests = true;
        }
        let page_table = world.page_table();
        world.set_context(1, 1, page_table);
        world.set_context(2, 2, page_table);
        Self { world, page_table }
    }

    fn host(&mut self) -> &mut SoftHost<Memory> {
        &mut self.world.host
    }

    fn access(&mut self, stream: Stream, iova: u64, access: Access) -> Result<u64, AccessError> {
        self.host().access(stream, Iova(iova), access, |piece| piece.output.0)
    }

    #[track_caller]
    fn waits(&mut self, stream: Stream, iova: u64, access: Access) -> Ticket {
        match self.access(stream, iova, access) {
            Err(AccessError::Waits(ticket)) => ticket,
            other => panic!("{other:x?}"),
        }
    }

    fn map(&mut self, attrs: Attrs) {
        self.world.map(self.page_table, IOVA, 0x1000, OUTPUT, attrs);
    }

    #[track_caller]
    fn next(&mut self) -> PageRequestReport {
        self.host().next_page_request().unwrap()
    }

    fn respond(&mut self, request: &PageRequestReport, code: PageResponseCode) {
        let PageRequestReport { stream, group, .. } = *request;
        let answered = self.host().respond(&GroupResponse { stream, group, code });
        assert_eq!(answered, Ok(Answered::Taken));
    }
}

fn both(check: impl Fn(Waiting)) {
    [Arch::Arm, Arch::Vtd].into_iter().for_each(|arch| check(Waiting::new(arch)));
}

#[test]
fn an_access_waits_and_goes_on() {
    both(|mut guest| {
        let ticket = guest.waits(tagged(1), IOVA + 0x123, Access::WRITE);
        assert_eq!(guest.host().answer(ticket), None);
        let request = guest.next();
        let expected = PageRequestReport {
            stream: tagged(1),
            address: Iova(IOVA + 0x123),
            access: AccessFlags::WRITE,
            group: request.group,
            last: true,
            private_data: None,
            fault: request.fault,
        };
        assert_eq!(request, expected);
        let Some(FaultCause::Table(fault)) = request.fault else { panic!("{request:?}") };
        assert_eq!(fault.class(), FaultClass::NotMapped);
        assert_eq!(guest.host().next_page_request(), None);
        assert_eq!(guest.host().answer(ticket), None);
        guest.map(Attrs::READ_WRITE);
        guest.respond(&request, PageResponseCode::Success);
        for _ in 0..2 {
            assert_eq!(guest.host().answer(ticket), Some(Answer::Retry));
        }
        assert_eq!(guest.access(tagged(1), IOVA + 0x123, Access::WRITE), Ok(OUTPUT + 0x123));
        assert_eq!(guest.host().next_fault(), None);
        assert_eq!(guest.host().waiting(ENDPOINT), 0);
    });
}

#[test]
fn a_refusal_is_no_fault() {
    for code in [PageResponseCode::Invalid, PageResponseCode::Failure] {
        both(|mut guest| {
            let ticket = guest.waits(tagged(1), IOVA, Access::READ);
            let request = guest.next();
            guest.respond(&request, code);
            assert_eq!(guest.host().answer(ticket), Some(Answer::Failed));
            assert_eq!(guest.host().next_fault(), None);
            // Whoever tries nevertheless asks anew.
            assert_ne!(guest.waits(tagged(1), IOVA, Access::READ), ticket);
        });
    }
}

#[test]
fn a_missing_permission_waits_too() {
    both(|mut guest| {
        guest.map(Attrs::READ);
        assert_eq!(guest.access(tagged(1), IOVA, Access::READ), Ok(OUTPUT));
        guest.waits(tagged(1), IOVA, Access::WRITE);
        let request = guest.next();
        assert_eq!(request.access, AccessFlags::WRITE);
        let Some(FaultCause::Table(fault)) = request.fault else { panic!("{request:?}") };
        assert_eq!(fault.class(), FaultClass::Permission);
    });
}

#[test]
fn accesses_to_a_page_share_a_ticket() {
    both(|mut guest| {
        let read = guest.waits(tagged(1), IOVA, Access::READ);
        assert_eq!(guest.waits(tagged(1), IOVA + 0xfff, Access::READ), read);
        // Where a read is refused, so would be a write.
        assert_eq!(guest.waits(tagged(1), IOVA, Access::WRITE), read);
        let mut others = vec![
            guest.waits(tagged(1), IOVA + 0x1000, Access::READ),
            guest.waits(tagged(2), IOVA, Access::READ),
        ];
        // A PASID entry that does not enable privileged accesses is nothing that a page could change.
        match guest.access(tagged(1), IOVA, Access { privileged: true, ..Access::READ }) {
            Err(AccessError::Waits(ticket)) => others.push(ticket),
            other => assert!(matches!(other, Err(AccessError::Fault(FaultCause::Table(_))))),
        }
        assert_eq!(others.len(), if guest.world.arch == Arch::Arm { 3 } else { 2 });
        assert!(!others.contains(&read));
        let requests = core::iter::from_fn(|| guest.host().next_page_request()).count();
        assert_eq!(requests, 1 + others.len());
        // Told or not.
        assert_eq!(guest.waits(tagged(1), IOVA, Access::READ), read);
    });
}

#[test]
fn a_read_does_not_share_the_fate_of_a_write() {
    both(|mut guest| {
        let write = guest.waits(tagged(1), IOVA, Access::WRITE);
        let read = guest.waits(tagged(1), IOVA, Access::READ);
        assert_ne!(read, write);
        let requests = [guest.next(), guest.next()];
        assert_ne!(requests[0].group, requests[1].group);
        guest.respond(&requests[0], PageResponseCode::Invalid);
        guest.map(Attrs::READ);
        guest.respond(&requests[1], PageResponseCode::Success);
        assert_eq!(guest.host().answer(write), Some(Answer::Failed));
        assert_eq!(guest.host().answer(read), Some(Answer::Retry));
        assert_eq!(guest.access(tagged(1), IOVA, Access::READ), Ok(OUTPUT));
    });
}

#[test]
fn what_no_page_can_cure_is_a_fault() {
    both(|mut guest| {
        // Without an entry for the PASID, bound to nothing, no endpoint.
        for stream in [tagged(9), Stream::untagged(OTHER), Stream::untagged(EndpointId(99))] {
            let Err(AccessError::Fault(cause)) = guest.access(stream, IOVA, Access::READ) else { panic!() };
            assert!(!cause.is_recoverable());
            let report = guest.host().next_fault().map(|fault| (fault.stream, fault.cause));
            assert_eq!(report, (stream.endpoint != EndpointId(99)).then_some((stream, cause)));
        }
        // A table that leads out of memory.
        guest.world.map(guest.page_table, IOVA, 0x1000, OUTPUT, Attrs::READ);
        let root = Gpa(0x7000_0000);
        let elsewhere = match guest.page_table {
            PageTable::Arm { .. } => PageTable::Arm { root },
            PageTable::Vtd(_) => {
                let flags = vtd::FirstStageFlags::empty();
                PageTable::Vtd(vtd::FirstStage::new(root, flags, 48, &vtd_caps()).unwrap())
            }
        };
        guest.world.set_context(3, 3, elsewhere);
        assert!(matches!(guest.access(tagged(3), IOVA, Access::READ), Err(AccessError::Fault(_))));
        // Mappings are the device's matter.
        let mut space = guest.host().create(SpaceSpec::Mapped).unwrap();
        guest.host().bind(Stream::untagged(OTHER), Some(&mut space)).unwrap();
        let refused = guest.access(Stream::untagged(OTHER), IOVA, Access::READ);
        assert_eq!(refused, Err(AccessError::Fault(FaultCause::Unmapped)));
        assert_eq!(guest.host().next_page_request(), None);
    });
}

#[test]
fn who_cannot_wait_faults() {
    both(|mut guest| {
        guest.host().ports.get_mut(&ENDPOINT).unwrap().caps.page_requests = false;
        let Err(AccessError::Fault(cause)) = guest.access(tagged(1), IOVA, Access::READ) else { panic!() };
        assert_eq!(guest.host().next_fault().map(|fault| fault.cause), Some(cause));
        assert_eq!(guest.world.read(1, IOVA), Err(cause));
        assert_eq!(guest.host().next_page_request(), None);
    });
}

#[test]
fn through_translate_every_fault_is_final() {
    both(|mut guest| {
        assert!(guest.world.read(1, IOVA).is_err());
        assert!(guest.host().next_fault().is_some());
        assert_eq!(guest.host().next_page_request(), None);
    });
}

#[test]
fn so_many_pages_and_no_more() {
    both(|mut guest| {
        let page = |at: usize| IOVA + ((at as u64) << 12);
        for at in 0..MAX_WAITING_PER_ENDPOINT {
            guest.waits(tagged(1), page(at), Access::READ);
        }
        let beyond = page(MAX_WAITING_PER_ENDPOINT);
        assert!(matches!(guest.access(tagged(1), beyond, Access::READ), Err(AccessError::Fault(_))));
        assert!(guest.host().next_fault().is_some());
        guest.waits(tagged(1), page(3), Access::READ);
        assert_eq!(guest.host().waiting(ENDPOINT), MAX_WAITING_PER_ENDPOINT);
        // Each has a number of its own, and an answer makes room.
        let mut groups = alloc::collections::BTreeSet::new();
        while let Some(request) = guest.host().next_page_request() {
            assert!(groups.insert(request.group));
            guest.respond(&request, PageResponseCode::Success);
        }
        assert_eq!(groups.len(), MAX_WAITING_PER_ENDPOINT);
        guest.waits(tagged(1), beyond, Access::READ);
    });
}

#[test]
fn numbers_go_round_past_those_in_use() {
    both(|mut guest| {
        let first = guest.waits(tagged(1), IOVA, Access::READ);
        let held = guest.next().group;
        for _ in 0..70_000u32 {
            guest.waits(tagged(2), IOVA, Access::READ);
            let request = guest.next();
            assert_ne!(request.group, held);
            guest.respond(&request, PageResponseCode::Success);
        }
        assert_eq!(guest.host().answer(first), None);
    });
}

#[test]
fn old_tickets_say_to_try_again() {
    both(|mut guest| {
        let mut tickets = Vec::new();
        for _ in 0..5000 {
            tickets.push(guest.waits(tagged(1), IOVA, Access::READ));
            let request = guest.next();
            guest.respond(&request, PageResponseCode::Invalid);
        }
        assert_eq!(guest.host().answer(tickets[0]), Some(Answer::Retry));
        assert_eq!(guest.host().answer(tickets[4999]), Some(Answer::Failed));
    });
}

#[test]
fn a_late_answer_does_not_replace_one_of_another_ticket() {
    both(|mut guest| {
        let late = guest.waits(tagged(1), IOVA, Access::READ);
        let asked = guest.next();
        let mut recent = Vec::new();
        for _ in 0..4200 {
            recent.push(guest.waits(tagged(2), IOVA, Access::READ));
            let request = guest.next();
            guest.respond(&request, PageResponseCode::Invalid);
        }
        guest.respond(&asked, PageResponseCode::Success);
        assert_eq!(guest.host().answer(late), Some(Answer::Retry));
        for ticket in &recent[4200 - 4096..] {
            assert_eq!(guest.host().answer(*ticket), Some(Answer::Failed), "{ticket:?}");
        }
    });
}

#[test]
fn old_tickets_of_another_address_space_have_failed() {
    both(|mut guest| {
        let old = [tagged(1), tagged(2)].map(|stream| {
            let ticket = guest.waits(stream, IOVA, Access::READ);
            let request = guest.next();
            guest.respond(&request, PageResponseCode::Success);
            ticket
        });
        guest.world.invalidate(entry(Some(1)));
        for _ in 0..5000 {
            guest.waits(tagged(1), IOVA, Access::READ);
            let request = guest.next();
            guest.respond(&request, PageResponseCode::Success);
        }
        assert_eq!(guest.host().answer(old[0]), Some(Answer::Failed));
        assert_eq!(guest.host().answer(old[1]), Some(Answer::Retry));
        guest.host().bind(Stream::untagged(ENDPOINT), None).unwrap();
        assert_eq!(guest.host().answer(old[1]), Some(Answer::Failed));
    });
}

#[test]
fn who_was_told_to_try_again_does_not_meet_another_address_space() {
    both(|mut guest| {
        let [first, second] = [1, 2].map(|pasid| {
            let ticket = guest.waits(tagged(pasid), IOVA, Access::READ);
            let request = guest.next();
            guest.respond(&request, PageResponseCode::Success);
            ticket
        });
        assert_eq!(guest.host().answer(first), Some(Answer::Retry));
        guest.world.invalidate(entry(Some(1)));
        assert_eq!(guest.host().answer(first), Some(Answer::Failed));
        assert_eq!(guest.host().answer(second), Some(Answer::Retry));
        guest.host().bind(Stream::untagged(ENDPOINT), None).unwrap();
        assert_eq!(guest.host().answer(second), Some(Answer::Failed));
    });
}

/// The entry of a PASID, or of untagged accesses, is not what it was.
fn entry(pasid: Option<u32>) -> Invalidation {
    let pasid = pasid.and_then(Pasid::new);
    Invalidation { caches: Caches::PASID | Caches::TLB, ..tlb(Scope::Pasid(pasid)) }
}

#[test]
fn an_entry_that_is_invalidated_by_name_ends_the_waiting() {
    both(|mut guest| {
        let told = guest.waits(tagged(1), IOVA, Access::READ);
        let request = guest.next();
        let untold = guest.waits(tagged(1), IOVA + 0x1000, Access::READ);
        let other = guest.waits(tagged(2), IOVA, Access::READ);
        // Less than the entry, more than this one, another one, another endpoint's.
        let all = entry(Some(1));
        for harmless in [
            tlb(Scope::Pasid(Pasid::new(1))),
            Invalidation { scope: pages(1, IOVA, 0x1000), ..all },
            Invalidation { scope: Scope::Endpoint, ..all },
            entry(None),
            Invalidation { endpoint: OTHER, ..all },
        ] {
            guest.world.invalidate(harmless);
            assert_eq!(guest.host().answer(told), None, "{harmless:?}");
        }
        guest.world.invalidate(all);
        for ticket in [told, untold] {
            assert_eq!(guest.host().answer(ticket), Some(Answer::Failed));
        }
        assert_eq!(guest.host().answer(other), None);
        assert_eq!(guest.next().stream, tagged(2), "what is closed is not reported");
        let response =
            GroupResponse { stream: tagged(1), group: request.group, code: PageResponseCode::Success };
        assert_eq!(guest.host().respond(&response), Ok(Answered::Gone));
        // It can wait again, with another number.
        guest.waits(tagged(1), IOVA, Access::READ);
        assert_ne!(guest.next().group, request.group);
    });
}

#[test]
fn only_what_was_reported_can_be_answered() {
    both(|mut guest| {
        let ticket = guest.waits(tagged(1), IOVA, Access::READ);
        for stream in [tagged(1), tagged(2), Stream::untagged(ENDPOINT), Stream::untagged(EndpointId(99))] {
            for group in 0..3 {
                let code = PageResponseCode::Success;
                assert_eq!(guest.host().respond(&GroupResponse { stream, group, code }), Ok(Answered::Gone));
            }
        }
        assert_eq!(guest.host().answer(ticket), None);
        let request = guest.next();
        let other =
            GroupResponse { stream: tagged(2), group: request.group, code: PageResponseCode::Success };
        assert_eq!(guest.host().respond(&other), Ok(Answered::Gone));
        assert_eq!(guest.host().answer(ticket), None, "of another PASID");
    });
}

#[test]
fn an_unbound_stream_waits_for_nothing() {
    both(|mut guest| {
        let told = guest.waits(tagged(1), IOVA, Access::READ);
        let request = guest.next();
        let untold = guest.waits(tagged(2), IOVA, Access::READ);
        guest.host().bind(Stream::untagged(ENDPOINT), None).unwrap();
        for ticket in [told, untold] {
            assert_eq!(guest.host().answer(ticket), Some(Answer::Failed));
        }
        assert_eq!(guest.host().next_page_request(), None);
        let response =
            GroupResponse { stream: tagged(1), group: request.group, code: PageResponseCode::Success };
        assert_eq!(guest.host().respond(&response), Ok(Answered::Gone));
        assert_eq!(guest.host().answer(told), Some(Answer::Failed));
        assert!(matches!(
            guest.access(tagged(1), IOVA, Access::READ),
            Err(AccessError::Fault(FaultCause::Unattached))
        ));
    });
}

#[test]
fn a_binding_of_one_pasid_ends_the_waiting_of_that_one() {
    let mut guest = Waiting::new(Arch::Vtd);
    let PageTable::Vtd(first_stage) = guest.page_table else { panic!() };
    let table = Canonical::VtdFirstStage(first_stage);
    let spec = SpaceSpec::GuestTable { endpoint: ENDPOINT, table: &table };
    let mut space = guest.host().create(spec).unwrap();
    let [one, two] = [1, 2].map(|pasid| guest.waits(tagged(pasid), IOVA, Access::READ));
    guest.host().bind(tagged(1), Some(&mut space)).unwrap();
    assert_eq!(guest.host().answer(one), Some(Answer::Failed));
    assert_eq!(guest.host().answer(two), None);
    // And the table of all PASIDs is not that of one that is bound on its own.
    let one = guest.waits(tagged(1), IOVA, Access::READ);
    guest.host().bind(Stream::untagged(ENDPOINT), None).unwrap();
    assert_eq!(guest.host().answer(one), None);
    assert_eq!(guest.host().answer(two), Some(Answer::Failed));
    guest.host().bind(tagged(1), None).unwrap();
    assert_eq!(guest.host().answer(one), Some(Answer::Failed));
    guest.host().destroy(space);
}

#[test]
fn a_flush_lets_accesses_wait() {
    both(|mut guest| {
        let ticket = guest.waits(tagged(1), IOVA, Access::READ);
        guest.host().flush();
        guest.host().set_strict(true);
        assert_eq!(guest.host().answer(ticket), None);
        assert_eq!(guest.waits(tagged(1), IOVA, Access::READ), ticket);
    });
}
