//! Accesses that wait for a page, and the answers to them. Each check is made with each kind of table.

use std::collections::BTreeSet;

use pgtable_formats::format::Attrs;
use pgtable_formats::{AccessKind, Pasid};
use viommu_device::host::{
    Answered, GroupResponse, Host, PageRequestReport, Scope, SpaceSpec, Stream, TableKinds,
};
use viommu_device::soft::Answer;
use viommu_wire::{AccessFlags, Caches, PageResponseCode};

use super::abilities::can;
use super::checks::{Space, tagged, untagged};
use super::tables::{Handover, kinds};
use super::{Ability, Attempt, HostUnderTest, Waiting};

/// First page of those that are missing.
const MISSING: u64 = 0x40;

/// The kinds of tables; none where accesses do not wait.
fn asking<T: HostUnderTest>(test: &mut T) -> Vec<TableKinds> {
    if !can(test, &[Ability::PageRequests]) {
        return Vec::new();
    }
    for endpoint in test.endpoints() {
        assert!(
            test.host().caps(endpoint).is_some_and(|caps| caps.page_requests),
            "not denied, and not told"
        );
    }
    kinds(test)
}

/// An access that has to wait.
fn waits<T: HostUnderTest>(test: &mut T, stream: Stream, page: u64, kind: AccessKind) -> Waiting {
    match test.attempt(stream, page << 12, kind) {
        Attempt::Waits(waiting) => waiting,
        other => panic!("{kind:?} of page {page:#x} by {stream:?} does not wait: {other:?}"),
    }
}

/// An access that fails at once: its page is nobody's to bring.
fn fails<T: HostUnderTest>(test: &mut T, stream: Stream, page: u64) {
    let attempt = test.attempt(stream, page << 12, AccessKind::Write);
    assert!(matches!(attempt, Attempt::Fails), "page {page:#x} by {stream:?}: {attempt:?}");
    assert_eq!(test.host().next_page_request(), None);
    while test.told().is_some() {}
}

/// The next request. Each is a group by itself here.
fn next<T: HostUnderTest>(test: &mut T) -> PageRequestReport {
    let request = test.host().next_page_request().expect("a page request");
    assert!(request.last, "{request:?}");
    request
}

fn nobody_asks<T: HostUnderTest>(test: &mut T) {
    assert_eq!(test.host().next_page_request(), None);
}

fn respond<T: HostUnderTest>(test: &mut T, request: &PageRequestReport, code: PageResponseCode) -> Answered {
    let PageRequestReport { stream, group, .. } = *request;
    test.host().respond(&GroupResponse { stream, group, code }).expect("a machine that works")
}

/// That no access waits any more, and that whoever answers it nevertheless hears so.
fn is_over<T: HostUnderTest>(test: &mut T, waiting: &[Waiting], requests: &[PageRequestReport]) {
    for &waiting in waiting {
        assert_eq!(test.answer(waiting), Some(Answer::Failed));
    }
    for request in requests {
        assert_eq!(respond(test, request, PageResponseCode::Success), Answered::Gone, "{request:?}");
    }
}

/// An access to a page that is not there, or that does not permit it, asks for it. With success it is tried again, and
/// arrives; with anything else it has failed. What no page could help fails at once.
pub fn missing_pages_are_asked_for<T: HostUnderTest>(test: &mut T) {
    for kind in asking(test) {
        let bound = Handover::new(test, kind);
        let mut page = MISSING;
        for index in 0..bound.pages.len() {
            let stream = bound.stream(index);
            for kind in [AccessKind::Read, AccessKind::Write] {
                for code in [PageResponseCode::Success, PageResponseCode::Invalid, PageResponseCode::Failure]
                {
                    page += 1;
                    let waiting = waits(test, stream, page, kind);
                    let request = next(test);
                    nobody_asks(test);
                    assert!(test.told().is_none(), "it has not failed");
                    assert_eq!((request.stream, request.address.0 >> 12), (stream, page));
                    let asked =
                        if kind == AccessKind::Write { AccessFlags::WRITE } else { AccessFlags::READ };
                    assert!(request.access.contains(asked), "{request:?}");
                    assert_eq!(test.answer(waiting), None);
                    let output = test.page(page);
                    if code == PageResponseCode::Success {
                        let pages = &bound.pages[index];
                        pages.map(test.memory(), page << 12, output, 0x1000, Attrs::READ_WRITE);
                    }
                    assert_eq!(respond(test, &request, code), Answered::Taken);
                    if code == PageResponseCode::Success {
                        assert_eq!(test.answer(waiting), Some(Answer::Retry));
                        assert_eq!(test.attempt(stream, page << 12, kind), Attempt::Reaches(output));
                    } else {
                        assert_eq!(test.answer(waiting), Some(Answer::Failed));
                    }
                    nobody_asks(test);
                    assert_eq!(respond(test, &request, code), Answered::Gone, "it was answered");
                }
            }
            read_only_pages_are_asked_for(test, &bound, index);
        }
        if can(test, &[Ability::Pasids]) {
            fails(test, tagged(bound.endpoint, 6), MISSING);
        }
        let endpoint = bound.endpoint;
        bound.end(test);
        fails(test, untagged(endpoint), MISSING);
    }
}

/// A page that can be read and not written.
fn read_only_pages_are_asked_for<T: HostUnderTest>(test: &mut T, bound: &Handover<Space<T>>, index: usize) {
    const PAGE: u64 = MISSING + 0x20;
    let (stream, pages, output) = (bound.stream(index), &bound.pages[index], test.page(PAGE));
    pages.map(test.memory(), PAGE << 12, output, 0x1000, Attrs::READ);
    assert_eq!(test.attempt(stream, PAGE << 12, AccessKind::Read), Attempt::Reaches(output));
    let waiting = waits(test, stream, PAGE, AccessKind::Write);
    let request = next(test);
    pages.remap(test.memory(), PAGE << 12, output, 0x1000);
    // Permissions were added to what may be cached.
    bound.invalidate(test, Scope::Pasid(stream.pasid), Caches::TLB);
    assert_eq!(test.answer(waiting), None, "translations were dropped, and nothing else");
    assert_eq!(respond(test, &request, PageResponseCode::Success), Answered::Taken);
    assert_eq!(test.answer(waiting), Some(Answer::Retry));
    assert_eq!(test.attempt(stream, PAGE << 12, AccessKind::Write), Attempt::Reaches(output));
}

/// Several groups are open at a time, and each answer is about its own, in whatever order they come. A number that was
/// answered is not the next one's.
pub fn groups_are_answered_in_any_order<T: HostUnderTest>(test: &mut T) {
    for kind in asking(test) {
        let bound = Handover::new(test, kind);
        let mut open = Vec::new();
        for page in MISSING..MISSING + 4 {
            for index in 0..bound.pages.len() {
                let stream = bound.stream(index);
                open.push((index, page, waits(test, stream, page, AccessKind::Write)));
            }
        }
        let mut requests: Vec<PageRequestReport> = open.iter().map(|_| next(test)).collect();
        nobody_asks(test);
        let groups: BTreeSet<_> = requests.iter().map(|request| (request.stream, request.group)).collect();
        assert_eq!(groups.len(), requests.len(), "two groups of one number: {requests:?}");
        bound.invalidate(test, Scope::Endpoint, Caches::TLB);

        // The last ones first.
        while let Some((index, page, waiting)) = open.pop() {
            assert_eq!(test.answer(waiting), None);
            let is_this = |request: &PageRequestReport| {
                (request.stream, request.address.0 >> 12) == (bound.stream(index), page)
            };
            let place = requests.iter().position(is_this).expect("a request of each");
            let request = requests.swap_remove(place);
            let succeeds = (page + index as u64).is_multiple_of(2);
            if succeeds {
                let output = test.page(page);
                bound.pages[index].map(test.memory(), page << 12, output, 0x1000, Attrs::READ_WRITE);
            }
            let (code, answer) = match succeeds {
                true => (PageResponseCode::Success, Answer::Retry),
                false => (PageResponseCode::Invalid, Answer::Failed),
            };
            assert_eq!(respond(test, &request, code), Answered::Taken);
            assert_eq!(test.answer(waiting), Some(answer));
            for &(.., other) in &open {
                assert_eq!(test.answer(other), None, "another group's answer");
            }
        }
        let waiting = waits(test, bound.stream(0), MISSING + 8, AccessKind::Write);
        let request = next(test);
        assert!(!groups.contains(&(request.stream, request.group)), "{request:?}: a number of before");
        assert_eq!(respond(test, &request, PageResponseCode::Failure), Answered::Taken);
        assert_eq!(test.answer(waiting), Some(Answer::Failed));
        bound.end(test);
    }
}

/// How what a stream translates through is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// Its page table alone.
    Cleared,
    /// The same, by another.
    Replaced,
    /// INVALIDATE of its entry, which is what it was.
    Invalidated,
    /// All of the endpoint's.
    Unbound,
    /// The same, by bypass.
    Bypassed,
}

/// What is unbound, replaced, or drained by an invalidation of its PASID, waits no more; its requests are not reported
/// any more, and an answer to one that was is told so. Others wait on.
pub fn what_is_taken_away_asks_no_more<T: HostUnderTest>(test: &mut T) {
    for kind in asking(test) {
        for closing in
            [Closing::Cleared, Closing::Replaced, Closing::Invalidated, Closing::Unbound, Closing::Bypassed]
        {
            close(test, kind, closing);
        }
    }
}

fn close<T: HostUnderTest>(test: &mut T, kind: TableKinds, closing: Closing) {
    let mut bound = Handover::new(test, kind);
    let (main, endpoint) = (bound.main(), bound.endpoint);
    let all = |test: &mut T, bound: &Handover<Space<T>>, page| -> Vec<Waiting> {
        let streams = 0..bound.pages.len();
        streams.map(|index| waits(test, bound.stream(index), page, AccessKind::Write)).collect()
    };
    // Some that were reported, and some that were not.
    let told = all(test, &bound, MISSING);
    let requests: Vec<PageRequestReport> = told.iter().map(|_| next(test)).collect();
    let untold = all(test, &bound, MISSING + 1);

    let pasid = bound.main_pasid();
    let is_table = kind == TableKinds::PASID_TABLE;
    let mut bypass = None;
    match closing {
        Closing::Cleared => bound.clear(test, main, Scope::Pasid(pasid)),
        Closing::Replaced => {
            let other = bound.pages[0];
            bound.replace(test, main, &other);
        }
        Closing::Invalidated => bound.invalidate(test, Scope::Pasid(pasid), Caches::PASID),
        Closing::Unbound => bound.unbind(test),
        Closing::Bypassed => {
            if !is_table {
                bound.unbind(test);
            }
            let mut space = test.host().create(SpaceSpec::Identity).expect("a space");
            test.host().bind(untagged(endpoint), Some(&mut space)).expect("bound");
            bypass = Some(space);
        }
    }
    let is_one = matches!(closing, Closing::Cleared | Closing::Replaced | Closing::Invalidated);
    let closes = |index: usize| index == main || !is_one;
    let streams: Vec<Stream> = (0..bound.pages.len()).map(|index| bound.stream(index)).collect();
    for (index, stream) in streams.iter().enumerate().filter(|(index, _)| closes(*index)) {
        let of_it: Vec<PageRequestReport> =
            requests.iter().copied().filter(|request| request.stream == *stream).collect();
        is_over(test, &[told[index], untold[index]], &of_it);
    }
    // The others' are still open, and the device hears of the rest.
    for index in (0..streams.len()).filter(|&index| !closes(index)) {
        assert_eq!([told[index], untold[index]].map(|waiting| test.answer(waiting)), [None; 2]);
        assert_ne!(next(test).stream, streams[main], "{closing:?}");
    }
    nobody_asks(test);
    match closing {
        // It asks anew.
        Closing::Replaced | Closing::Invalidated => {
            let waiting = waits(test, streams[main], MISSING, AccessKind::Write);
            let request = next(test);
            assert_eq!(respond(test, &request, PageResponseCode::Invalid), Answered::Taken);
            assert_eq!(test.answer(waiting), Some(Answer::Failed));
        }
        Closing::Cleared => fails(test, streams[main], MISSING),
        Closing::Unbound | Closing::Bypassed => {}
    }
    if let Some(space) = bypass {
        test.host().bind(untagged(endpoint), None).expect("unbound");
        test.host().destroy(space);
    }
    bound.end(test);
    is_over(test, &told, &requests);
    is_over(test, &untold, &[]);
    nobody_asks(test);
}

/// An endpoint that asks for pages without end, and is never answered, keeps no other from asking and being answered.
pub fn a_flood_starves_nobody<T: HostUnderTest>(test: &mut T) {
    const FLOOD: u64 = 400;
    for kind in asking(test) {
        let [first, second] = test.endpoints();
        let flooding = Handover::of(test, kind, first);
        let other = Handover::of(test, kind, second);
        let flood: Vec<Waiting> = (0..FLOOD)
            .filter_map(|page| {
                match test.attempt(flooding.stream(0), (MISSING + page) << 12, AccessKind::Write) {
                    Attempt::Waits(waiting) => Some(waiting),
                    Attempt::Fails => None,
                    other => panic!("{other:?}"),
                }
            })
            .collect();
        assert!(!flood.is_empty());
        while test.told().is_some() {}
        for round in 0..3 {
            let waiting = waits(test, other.stream(0), MISSING + round, AccessKind::Write);
            let reported = std::iter::from_fn(|| test.host().next_page_request()).take(2 * FLOOD as usize);
            let request = reported.filter(|request| request.stream.endpoint == second).last();
            let request = request.expect("the other's request, behind however many");
            let output = test.page(MISSING + round);
            let pages = &other.pages[0];
            pages.map(test.memory(), (MISSING + round) << 12, output, 0x1000, Attrs::READ_WRITE);
            assert_eq!(respond(test, &request, PageResponseCode::Success), Answered::Taken);
            assert_eq!(test.answer(waiting), Some(Answer::Retry));
        }
        // Whatever was too much has failed.
        let answers: Vec<Option<Answer>> = flood.iter().map(|&waiting| test.answer(waiting)).collect();
        assert!(answers.contains(&None) && !answers.contains(&Some(Answer::Retry)), "{answers:?}");
        other.end(test);
        flooding.end(test);
        is_over(test, &flood, &[]);
        nobody_asks(test);
    }
}

/// The PASID of no stream here is in use elsewhere: answers with another are to nobody.
pub fn answers_of_others_are_to_nobody<T: HostUnderTest>(test: &mut T) {
    for kind in asking(test) {
        let bound = Handover::new(test, kind);
        let [_, second] = test.endpoints();
        let waiting = waits(test, bound.stream(0), MISSING, AccessKind::Write);
        let request = next(test);
        let elsewhere = [
            (Stream { pasid: Pasid::new(9), ..request.stream }, request.group),
            (Stream { endpoint: second, ..request.stream }, request.group),
            (request.stream, request.group.wrapping_add(1)),
        ];
        for (stream, group) in elsewhere {
            let response = GroupResponse { stream, group, code: PageResponseCode::Success };
            assert_eq!(test.host().respond(&response), Ok(Answered::Gone), "{response:?}");
        }
        assert_eq!(test.answer(waiting), None);
        bound.end(test);
        assert_eq!(test.answer(waiting), Some(Answer::Failed));
    }
}
