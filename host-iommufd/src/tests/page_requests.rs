//! Page requests: who has them, their way to the guest and back, and when they end.

use pgtable_formats::AccessKind;
use viommu_device::host::{Answered, GroupResponse, HostError, PageRequestReport};
use viommu_wire::{AccessFlags, PageResponseCode};

use super::*;
use crate::MAX_OPEN_GROUPS_PER_ENDPOINT;
use crate::fake::{FakeSmmuv3, FakeVtd};
use crate::kernel::{Iommufd, ResponseCode};

/// Where tables made by [`Rig::table`] have nothing.
const MISSING: u64 = 0x5000;
const OUTPUT: u64 = 0x4000_3000;

/// A device with all that page requests need, on PCIe or, behind an SMMUv3, beside it.
fn asking(unit: UnitId) -> FakeDevice {
    FakeDevice { ats: true, pri: true, stall: true, ..FakeDevice::on(unit).with_pasids(8) }
}

const fn asks(id: DeviceId) -> Device {
    Device { id, reserved: Vec::new(), may_stall: true, ats: true, pri: true }
}

/// Two endpoints behind one unit, which ask for pages.
fn rig(unit: Unit) -> Rig {
    let mut rig = Rig::new();
    let unit = rig.fake().add_unit(unit);
    for endpoint in [FIRST, SECOND] {
        let device = rig.fake().add_device(asking(unit));
        rig.host.add_endpoint(endpoint, asks(device)).unwrap();
        assert!(rig.host.caps(endpoint).unwrap().page_requests);
    }
    rig
}

/// Faulting transactions of whoever may stall do, as their context says.
fn stalling() -> Unit {
    Unit::Smmuv3(FakeSmmuv3::NEW.with_stall_model(0))
}

const fn stream(endpoint: EndpointId, pasid: Option<Pasid>) -> Stream {
    Stream { endpoint, pasid }
}

fn tagged(pasid: u32) -> Stream {
    stream(FIRST, Some(pasid_of(pasid)))
}

impl Rig {
    /// A table of VT-d, bound.
    fn bound(&mut self, stream: Stream) -> (Space<Kernel>, Pages) {
        let (mut space, pages) = self.table(stream.endpoint, 0x1000, 0x4000_0000);
        self.host.bind(stream, Some(&mut space)).unwrap();
        (space, pages)
    }

    fn access(&self, stream: Stream, kind: AccessKind) -> Result<u64, DmaFault> {
        let pasid = stream.pasid.map(Pasid::value);
        self.dma(stream.endpoint, pasid, MISSING, Access { kind, privileged: false })
    }

    /// The device asks, in a group of one.
    fn ask(&self, stream: Stream, group: u32) {
        let device = self.device(stream.endpoint);
        assert!(self.fake().page_request(device, stream.pasid.map(Pasid::value), group, MISSING, 1, true));
    }

    fn answer(&mut self, report: &PageRequestReport, code: PageResponseCode) -> Answered {
        let response = GroupResponse { stream: report.stream, group: report.group, code };
        self.host.respond(&response).unwrap()
    }

    fn next(&mut self) -> PageRequestReport {
        self.host.next_page_request().expect("a page request")
    }

    fn none_is_left(&mut self) {
        assert_eq!(self.host.next_page_request(), None);
    }

    /// How the groups of an endpoint were answered: by us, or (`None`) by the kernel.
    fn answers(&self, endpoint: EndpointId) -> Vec<(u32, Option<ResponseCode>)> {
        let device = self.device(endpoint);
        let all = self.fake().page_responses().into_iter();
        all.filter(|(of, ..)| *of == device).map(|(_, group, code)| (group, code)).collect()
    }
}

const SUCCESS: PageResponseCode = PageResponseCode::Success;
const INVALID: Option<ResponseCode> = Some(ResponseCode::Invalid);

/// What is missing, one thing at a time; and that the endpoint works without, with nothing left of the try.
#[test]
fn page_requests_are_where_all_that_they_need_is() {
    let newest = fake::Kernel::NEWEST;
    let has = |kernel, unit, device: fn(FakeDevice) -> FakeDevice, told: fn(Device) -> Device| {
        let ranges = MEMORY.map(|(start, size)| (GuestAddress(start), size));
        let mut rig = Rig::with_memory(&GuestMemoryMmap::from_ranges(&ranges).unwrap(), kernel);
        let unit = rig.fake().add_unit(unit);
        let device = rig.fake().add_device(device(asking(unit)));
        rig.host.add_endpoint(FIRST, told(asks(device))).unwrap();
        let has = rig.host.caps(FIRST).unwrap().page_requests;
        let queues = rig.fake().describe().iter().filter(|object| object.contains("FaultQueue")).count();
        assert_eq!((queues, rig.fake().attached(device, Some(1))), (usize::from(has), None));
        let is_smmuv3 = |unit: &Arc<crate::unit::Unit<_>>| matches!(unit.kind, crate::unit::Kind::Smmuv3(_));
        let event_queues = rig.host.units.iter().filter(|unit| is_smmuv3(unit)).count();
        assert_eq!(rig.host.queue_fds().len(), queues + event_queues);
        assert!(rig.read(FIRST, 0x1000).is_err(), "attached to nothing that leads anywhere");
        if rig.host.caps(FIRST).unwrap().tables.is_some() {
            let (mut space, _) = rig.table(FIRST, 0x1000, 0x4000_0000);
            rig.bind(FIRST, &mut space);
            assert_eq!(rig.read(FIRST, 0x1000), Ok(0x4000_0000));
        }
        has
    };
    let Unit::Vtd(vtd) = Unit::vtd() else { panic!() };
    let without = |bit: u64| Unit::Vtd(FakeVtd { ecap: vtd.ecap & !(1 << bit), ..vtd });
    let old = fake::Kernel { fault_queues: false, ..newest };
    assert!(has(newest, Unit::vtd(), |is| is, |is| is));
    assert!(has(fake::Kernel { pasids: false, ..newest }, Unit::vtd(), |is| is, |is| is));
    assert!(!has(old, Unit::vtd(), |is| is, |is| is), "ENOTTY");
    assert!(!has(newest, without(29), |is| is, |is| is), "PRS");
    assert!(!has(newest, without(26), |is| is, |is| is), "NEST");
    assert!(!has(newest, Unit::vtd(), |is| is, |is| Device { pri: false, ..is }));
    assert!(!has(newest, Unit::vtd(), |is| is, |is| Device { ats: false, ..is }));
    assert!(!has(newest, Unit::vtd(), |is| FakeDevice { ats: false, ..is }, |is| is));
    assert!(!has(newest, Unit::vtd(), |is| FakeDevice { pri: false, ..is }, |is| is), "ENODEV");
    let function = |is| FakeDevice { virtual_function: true, ..is };
    assert!(!has(newest, Unit::vtd(), function, |is| is), "EINVAL");
    // On Arm there is no PRI; what stalls is no device on PCI.
    for (model, expected) in [(0, true), (1, false), (2, true)] {
        let unit = Unit::Smmuv3(FakeSmmuv3::NEW.with_stall_model(model));
        // A context that must stall is what model 2 needs: see `Guest::table`.
        if model == 2 {
            let mut rig = Rig::new();
            let unit = rig.fake().add_unit(unit);
            let device = rig.fake().add_device(asking(unit));
            rig.host.add_endpoint(FIRST, asks(device)).unwrap();
            assert!(rig.host.caps(FIRST).unwrap().page_requests);
            continue;
        }
        assert_eq!(has(newest, unit, |is| is, |is| is), expected);
        assert!(!has(newest, unit, |is| is, |is| Device { may_stall: false, ..is }), "PCIe");
        assert!(!has(old, unit, |is| is, |is| is));
    }
    assert!(!has(newest, Unit::Plain, |is| is.with_pasids(0), |is| is));
}

/// The access waits, the guest is asked, maps the page, answers, and the access is done.
#[test]
fn a_missing_page_is_asked_for_and_the_access_goes_on() {
    for pasid in [None, Some(pasid_of(5))] {
        for kind in [AccessKind::Read, AccessKind::Write] {
            let mut rig = rig(Unit::vtd());
            let stream = stream(FIRST, pasid);
            let (_space, pages) = rig.bound(stream);
            assert_eq!(rig.access(stream, kind), Err(DmaFault::Stalled));
            assert_eq!(rig.access(stream, kind), Err(DmaFault::Stalled), "one request");
            let report = rig.next();
            let access = if kind == AccessKind::Read { AccessFlags::READ } else { AccessFlags::WRITE };
            assert_eq!((report.stream, report.address), (stream, Iova(MISSING)));
            assert_eq!((report.access, report.last, report.private_data), (access, true, None));
            rig.none_is_left();
            pages.map(&mut rig.guest, MISSING, OUTPUT);
            assert_eq!(rig.access(stream, kind), Err(DmaFault::Stalled), "not answered yet");
            assert_eq!(rig.answer(&report, SUCCESS), Answered::Taken);
            assert_eq!(rig.access(stream, kind), Ok(OUTPUT));
            assert_eq!(rig.answer(&report, SUCCESS), Answered::Gone, "once");
            rig.none_is_left();
        }
    }
}

#[test]
fn a_stall_is_asked_for_and_the_transaction_goes_on() {
    let mut rig = rig(stalling());
    let caps = rig.caps(FIRST);
    let (table, pages) = rig.guest.table(&caps, 0x1000, 0x4000_0000);
    // CD.S
    let Canonical::Smmuv3(cds) = &table else { panic!() };
    let at = cds.extents().0;
    let word = rig.guest.load(at).unwrap();
    rig.guest.compare_exchange(at, word, word | 1 << 44).unwrap().unwrap();
    let spec = SpaceSpec::GuestTable { endpoint: FIRST, table: &table };
    let mut space = rig.host.create(spec).unwrap();
    rig.bind(FIRST, &mut space);
    let stream = Stream::untagged(FIRST);
    assert_eq!(rig.access(stream, AccessKind::Write), Err(DmaFault::Stalled));
    let report = rig.next();
    assert_eq!((report.stream, report.address, report.access), (stream, Iova(MISSING), AccessFlags::WRITE));
    pages.map(&mut rig.guest, MISSING, OUTPUT);
    assert_eq!(rig.answer(&report, SUCCESS), Answered::Taken);
    assert_eq!(rig.access(stream, AccessKind::Write), Ok(OUTPUT));
    // PASIDs go with the stream's table.
    let device = rig.device(FIRST);
    assert!(rig.fake().page_request(device, Some(3), 9, 0, 2, true));
    rig.host.bind(stream, None).unwrap();
    rig.none_is_left();
    assert_eq!(rig.answers(FIRST).last(), Some(&(9, None)));
    assert_eq!(rig.fake().violations(), [""; 0]);
}

/// iommufd has no word for FAILURE.
#[test]
fn what_the_guest_refuses_fails() {
    for code in [PageResponseCode::Invalid, PageResponseCode::Failure] {
        let mut rig = rig(Unit::vtd());
        let stream = tagged(5);
        let (_space, _) = rig.bound(stream);
        assert_eq!(rig.access(stream, AccessKind::Read), Err(DmaFault::Stalled));
        let report = rig.next();
        assert_eq!(rig.answer(&report, code), Answered::Taken);
        assert!(matches!(rig.access(stream, AccessKind::Read), Err(DmaFault::Stage1(_))));
        assert_eq!(rig.access(stream, AccessKind::Read), Err(DmaFault::Stalled), "asked again");
    }
}

/// What the kernel gives as a whole stays together; groups are answered in any order, and have numbers of ours.
#[test]
fn groups_are_whole_and_answered_in_any_order() {
    let mut rig = rig(Unit::vtd());
    let streams = [Stream::untagged(FIRST), tagged(5)];
    let _spaces = streams.map(|stream| rig.bound(stream));
    let device = rig.device(FIRST);
    for (pasid, group) in [(None, 7), (Some(5), 7), (Some(5), 8)] {
        for (page, permissions) in [(0x5000, 1), (0x6000, 3), (0x7000, 0xf)] {
            assert!(rig.fake().page_request(device, pasid, group, page, permissions, page == 0x7000));
        }
    }
    let reports: Vec<_> = (0..9).map(|_| rig.next()).collect();
    rig.none_is_left();
    for group in reports.chunks(3) {
        let flags = [AccessFlags::READ, AccessFlags::READ | AccessFlags::WRITE, AccessFlags::all()];
        for (index, report) in group.iter().enumerate() {
            let expected = (0x5000 + 0x1000 * index as u64, flags[index], index == 2);
            assert_eq!((report.address.0, report.access, report.last), expected);
            assert_eq!((report.stream, report.group), (group[0].stream, group[0].group));
        }
    }
    let heads = [reports[0], reports[3], reports[6]];
    assert_eq!(heads.map(|head| head.stream), [streams[0], streams[1], streams[1]]);
    for index in [1, 2, 0] {
        // Under another PASID there is no such group.
        let stranger = PageRequestReport { stream: tagged(6), ..heads[index] };
        assert_eq!(rig.answer(&stranger, SUCCESS), Answered::Gone);
        assert_eq!(rig.answer(&heads[index], SUCCESS), Answered::Taken);
    }
    let taken = Some(ResponseCode::Success);
    assert_eq!(rig.answers(FIRST), [(7, taken), (8, taken), (7, taken)]);
}

/// A number comes again after all others.
#[test]
fn numbers_come_in_rotation() {
    let mut rig = rig(Unit::vtd());
    let stream = tagged(5);
    let _space = rig.bound(stream);
    rig.ask(stream, 0);
    let kept = rig.next();
    let mut last = kept.group;
    for _ in 0..=u32::from(u16::MAX) {
        rig.ask(stream, 1);
        let report = rig.next();
        let skipped = last.wrapping_add(1) == kept.group;
        assert_eq!(report.group, last.wrapping_add(1 + u16::from(skipped)));
        assert_eq!(rig.answer(&report, SUCCESS), Answered::Taken);
        last = report.group;
    }
    assert_eq!(rig.answer(&kept, SUCCESS), Answered::Taken);
}

/// Whoever has no page requests, or does not exist, has no groups.
#[test]
fn a_group_of_nobody_is_gone() {
    let mut rig = Rig::two(Unit::vtd());
    for endpoint in [FIRST, EndpointId(999)] {
        let response = GroupResponse { stream: Stream::untagged(endpoint), group: 0, code: SUCCESS };
        assert_eq!(rig.host.respond(&response), Ok(Answered::Gone));
    }
    rig.none_is_left();
}

/// Replaced or taken away: what waited for it is over, read or not, and its cookies are soon somebody else's.
#[test]
fn what_is_replaced_takes_its_page_requests_along() {
    for (with, other) in [(Stream::untagged(FIRST), tagged(5)), (tagged(5), Stream::untagged(FIRST))] {
        for replace in [true, false] {
            let mut rig = rig(Unit::vtd());
            let _spaces = [rig.bound(with), rig.bound(other)];
            rig.ask(with, 1);
            rig.ask(other, 2);
            rig.ask(with, 3);
            let reports = [rig.next(), rig.next()];
            rig.ask(with, 4);
            rig.ask(other, 5);
            let (mut space, _) = rig.table(FIRST, 0x1000, 0x4000_0000);
            rig.host.bind(with, replace.then_some(&mut space)).unwrap();
            // Unread ones first.
            assert_eq!(rig.answers(FIRST), [4, 1, 3].map(|group| (group, None)), "by the kernel");
            // The next one read has the cookie of the first.
            let next = rig.next();
            assert_eq!((next.stream, reports[0].stream, reports[1].stream), (other, with, other));
            rig.none_is_left();
            assert_eq!(rig.answer(&reports[0], PageResponseCode::Invalid), Answered::Gone);
            assert_eq!(rig.answers(FIRST).len(), 3, "nobody else is answered");
            assert_eq!(rig.answer(&reports[1], SUCCESS), Answered::Taken);
            assert_eq!(rig.answer(&next, SUCCESS), Answered::Taken);
            let taken = Some(ResponseCode::Success);
            assert_eq!(rig.answers(FIRST)[3..], [(2, taken), (5, taken)]);
            // What is asked of the new table is asked.
            if replace {
                rig.ask(with, 6);
                assert_eq!(rig.next().stream, with);
            }
        }
    }
}

/// To bind the same table again is nothing to the kernel; here it ends what waits.
#[test]
fn the_same_table_bound_again_ends_what_waits() {
    for stream in [Stream::untagged(FIRST), tagged(5)] {
        let mut rig = rig(Unit::vtd());
        let (mut space, _) = rig.bound(stream);
        rig.ask(stream, 1);
        let report = rig.next();
        rig.ask(stream, 2);
        rig.host.bind(stream, Some(&mut space)).unwrap();
        assert_eq!(rig.answers(FIRST), [(1, INVALID), (2, INVALID)]);
        rig.none_is_left();
        assert_eq!(rig.answer(&report, SUCCESS), Answered::Gone);
    }
}

/// The PASID cache of one PASID: its page requests end, no others do, and no other invalidation ends any.
#[test]
fn a_pasid_that_is_taken_back_is_drained() {
    let of = |scope, caches| Invalidation { scope, caches, ..all_of(FIRST) };
    let pasid = Scope::Pasid(Some(pasid_of(5)));
    let mut rig = rig(Unit::vtd());
    let streams = [Stream::untagged(FIRST), tagged(5), tagged(6)];
    let _spaces = streams.map(|stream| rig.bound(stream));
    let ask_all = |rig: &Rig, group| streams.map(|stream| rig.ask(stream, group));
    ask_all(&rig, 1);
    let first = [rig.next(), rig.next(), rig.next()];
    ask_all(&rig, 2);
    let second = rig.next();
    ask_all(&rig, 3);
    for wider in [of(Scope::Endpoint, Caches::all()), of(pasid, Caches::TLB)] {
        rig.host.invalidate(&[wider]).unwrap();
        assert_eq!(rig.answers(FIRST), []);
    }
    rig.host.invalidate(&[of(pasid, Caches::PASID)]).unwrap();
    assert_eq!(rig.answers(FIRST), [1, 2, 3].map(|group| (group, INVALID)));
    assert_eq!(rig.answer(&first[1], SUCCESS), Answered::Gone);
    let rest = [rig.next(), rig.next(), rig.next()];
    rig.none_is_left();
    assert_eq!(rest.map(|report| report.stream), [streams[2], streams[0], streams[2]]);
    for report in [first[0], first[2], second, rest[0], rest[1], rest[2]] {
        assert_eq!(rig.answer(&report, SUCCESS), Answered::Taken);
    }
    // It is as it was before: what is asked now is asked.
    rig.ask(streams[1], 4);
    assert_eq!(rig.next().stream, streams[1]);
    rig.host.invalidate(&[of(Scope::Pasid(None), Caches::PASID)]).unwrap();
    assert_eq!(rig.answers(FIRST).len(), 9);
}

/// What cannot be read or answered is not done, and is told.
#[test]
fn a_drain_that_fails_is_told_and_done_again() {
    let one = Invalidation { scope: Scope::Pasid(Some(pasid_of(5))), caches: Caches::PASID, ..all_of(FIRST) };
    for call in [Call::ReadPageFaults, Call::Respond] {
        let mut rig = rig(Unit::vtd());
        let (mut space, _) = rig.bound(tagged(5));
        rig.ask(tagged(5), 1);
        let report = rig.next();
        rig.ask(tagged(5), 2);
        rig.failing().fail_kind(call, Errno::EIO);
        let stopped = rig.host.invalidate(&[page_of(FIRST, 0x1000), one]).unwrap_err();
        assert_eq!((stopped.done, stopped.error), (1, HostError::Failed(Errno::EIO as i32)));
        assert!(rig.host.bind(tagged(5), Some(&mut space)).is_err());
        assert_eq!(rig.answers(FIRST), []);
        assert!(rig.dma(FIRST, Some(5), 0x1000, Access::READ).is_ok(), "bound as it was");
        rig.failing().heal();
        rig.host.invalidate(&[one]).unwrap();
        assert_eq!(rig.answers(FIRST), [(1, INVALID), (2, INVALID)]);
        assert_eq!(rig.answer(&report, SUCCESS), Answered::Gone);
        rig.none_is_left();
    }
}

#[test]
fn an_answer_that_fails_leaves_the_group() {
    let mut rig = rig(Unit::vtd());
    let _space = rig.bound(tagged(5));
    rig.ask(tagged(5), 1);
    rig.failing().fail_kind(Call::ReadPageFaults, Errno::EIO);
    rig.none_is_left();
    rig.failing().heal();
    let report = rig.next();
    rig.failing().fail_kind(Call::Respond, Errno::EIO);
    let response = GroupResponse { stream: report.stream, group: report.group, code: SUCCESS };
    assert_eq!(rig.host.respond(&response), Err(HostError::Failed(Errno::EIO as i32)));
    rig.failing().heal();
    assert_eq!(rig.host.respond(&response), Ok(Answered::Taken));
    // The kernel says that there is no such group: so it is.
    rig.ask(tagged(5), 1);
    let report = rig.next();
    rig.failing().fail_kind(Call::Respond, Errno::EINVAL);
    assert_eq!(rig.answer(&report, SUCCESS), Answered::Gone);
}

/// A stream whose caches cannot be brought up to date reaches nothing, and waits for nothing.
#[test]
fn what_is_blocked_waits_for_nothing() {
    for stream in [Stream::untagged(FIRST), tagged(5)] {
        let mut rig = rig(Unit::vtd());
        let _space = rig.bound(stream);
        let other = rig.bound(tagged(6));
        rig.ask(stream, 1);
        let report = rig.next();
        rig.ask(stream, 2);
        rig.failing().fail_kind(Call::Invalidate, Errno::EIO);
        let scope = Scope::Pasid(stream.pasid);
        let one = Invalidation { scope, caches: Caches::TLB, ..all_of(FIRST) };
        rig.host.invalidate(&[one]).unwrap_err();
        assert_eq!(rig.answers(FIRST), [(2, None), (1, None)]);
        rig.ask(tagged(6), 3);
        let next = rig.next();
        assert_eq!(next.stream, tagged(6));
        assert_eq!(rig.answer(&report, PageResponseCode::Invalid), Answered::Gone);
        assert_eq!(rig.answer(&next, SUCCESS), Answered::Taken);
        rig.failing().heal();
        rig.host.invalidate(&[one]).unwrap();
        rig.ask(stream, 4);
        assert_eq!(rig.next().stream, stream, "it goes on");
        drop(other);
    }
}

/// Who does not answer fills its own queue, which stays in the kernel then; nothing is lost.
#[test]
fn a_full_endpoint_is_not_read_and_loses_nothing() {
    const MOST: usize = MAX_OPEN_GROUPS_PER_ENDPOINT;
    let mut rig = rig(Unit::vtd());
    let _spaces = [rig.bound(tagged(5)), rig.bound(Stream::untagged(SECOND))];
    let all = MOST + 1000;
    (0..all).for_each(|_| rig.ask(tagged(5), 1));
    let mut open: Vec<_> = std::iter::from_fn(|| rig.host.next_page_request()).collect();
    assert!((MOST..MOST + 128).contains(&open.len()), "{}", open.len());
    rig.kernel.take();
    rig.none_is_left();
    assert_eq!(rig.count(Call::ReadPageFaults), 1, "of the other one");
    rig.ask(Stream::untagged(SECOND), 1);
    assert_eq!(rig.next().stream.endpoint, SECOND);
    let mut answered = 0;
    while let Some(report) = open.pop() {
        assert_eq!(rig.answer(&report, SUCCESS), Answered::Taken);
        answered += 1;
        open.extend(rig.host.next_page_request());
    }
    assert_eq!(answered, all);
    assert_eq!(rig.host.ignored_page_requests(), 0);
}

/// Endpoints take turns, whatever the one has to say.
#[test]
fn an_endpoint_that_floods_delays_nobody() {
    for (loud, quiet) in [(FIRST, SECOND), (SECOND, FIRST)] {
        let mut rig = rig(Unit::vtd());
        let _spaces = [FIRST, SECOND].map(|endpoint| rig.bound(Stream::untagged(endpoint)));
        for group in 0..200 {
            rig.ask(Stream::untagged(loud), group);
        }
        assert_eq!(rig.next().stream.endpoint, loud);
        rig.ask(Stream::untagged(quiet), 1);
        let next = [rig.next(), rig.next()].map(|report| report.stream.endpoint);
        assert!(next.contains(&quiet), "{next:?}");
    }
}

/// What the kernel hands out of a PASID that nobody bound is refused and counted.
#[test]
fn strangers_are_answered_at_once() {
    let mut rig = rig(Unit::vtd());
    let _space = rig.bound(Stream::untagged(FIRST));
    let device = rig.device(FIRST);
    let table = rig.fake().attached(device, None).unwrap();
    rig.fake().attach(device, Pasid::new(7), table).unwrap();
    rig.ask(tagged(7), 1);
    rig.ask(Stream::untagged(FIRST), 2);
    assert_eq!(rig.next().stream, Stream::untagged(FIRST));
    assert_eq!((rig.answers(FIRST), rig.host.ignored_page_requests()), (vec![(1, INVALID)], 1));
    rig.fake().detach(device, Pasid::new(7)).unwrap();
    rig.host.remove_endpoint(FIRST).unwrap();
    assert_eq!(rig.host.ignored_page_requests(), 1);
}

/// Bypass and mappings have no page requests.
#[test]
fn only_guests_tables_ask() {
    let mut rig = rig(Unit::vtd());
    let mut mapped = rig.mapped();
    for mapped in [None, Some(&mut mapped)] {
        rig.host.bind(Stream::untagged(FIRST), mapped).unwrap();
        let device = rig.device(FIRST);
        assert!(!rig.fake().page_request(device, None, 1, MISSING, 1, true));
        rig.none_is_left();
    }
}

/// An endpoint that goes takes its queue along; the kernel answers what was open.
#[test]
fn an_endpoint_that_goes_leaves_no_queue() {
    let mut rig = rig(Unit::vtd());
    let objects = rig.fake().objects();
    let fds = rig.host.queue_fds();
    assert_eq!(fds.len(), 2);
    let (space, _) = rig.bound(tagged(5));
    rig.ask(tagged(5), 1);
    let report = rig.next();
    rig.ask(tagged(5), 2);
    let device = rig.device(FIRST);
    rig.host.remove_endpoint(FIRST).unwrap();
    assert_eq!(rig.host.queue_fds(), fds[1..]);
    rig.none_is_left();
    assert_eq!(rig.answer(&report, SUCCESS), Answered::Gone);
    assert_eq!(rig.fake().page_responses(), [(device, 1, None), (device, 2, None)]);
    drop(space);
    assert_eq!(rig.fake().objects(), objects - 1);
    rig.host.add_endpoint(FIRST, asks(device)).unwrap();
    assert_eq!(rig.host.queue_fds().len(), 2);
    let _space = rig.bound(tagged(5));
    rig.ask(tagged(5), 3);
    assert_eq!(rig.answer(&report, SUCCESS), Answered::Gone);
    assert_eq!(rig.next().group, 0);
}

/// The `n`-th call fails, for every `n`: nothing stays, and the next try succeeds.
#[test]
fn whatever_fails_while_page_requests_are_tried_leaves_nothing_behind() {
    for unit in [Unit::vtd(), stalling()] {
        let mut succeeded = 0;
        for number in 0..40 {
            let mut rig = Rig::new();
            let unit = rig.fake().add_unit(unit);
            let device = rig.fake().add_device(asking(unit));
            let before = rig.fake().describe();
            rig.failing().fail_nth(number, Errno::EIO);
            let result = rig.host.add_endpoint(FIRST, asks(device));
            if rig.failing().failed().is_some() {
                assert!(result.is_err(), "call {number}");
                assert_eq!(rig.fake().describe(), before, "call {number}");
                assert_eq!(rig.fake().attached(device, None), None);
                rig.failing().heal();
                rig.host.add_endpoint(FIRST, asks(device)).unwrap();
            } else {
                succeeded += 1;
            }
            assert!(rig.host.caps(FIRST).unwrap().page_requests);
        }
        assert!((1..30).contains(&succeeded));
    }
}

/// The same with what the kernel says where it has none.
#[test]
fn whatever_is_refused_while_page_requests_are_tried_the_endpoint_works() {
    for errno in [Errno::ENOTTY, Errno::EOPNOTSUPP, Errno::ENODEV, Errno::EINVAL] {
        let mut rig = Rig::new();
        let unit = rig.fake().add_unit(Unit::vtd());
        let device = rig.fake().add_device(asking(unit));
        rig.failing().fail_kind(Call::AllocFaultQueue, errno);
        rig.host.add_endpoint(FIRST, asks(device)).unwrap();
        let caps = rig.host.caps(FIRST).unwrap();
        assert!(caps.tables.is_some() && !caps.page_requests);
        let _space = rig.bound(tagged(5));
        assert_eq!(rig.dma(FIRST, Some(5), 0x1000, Access::READ), Ok(0x4000_0000));
    }
}
