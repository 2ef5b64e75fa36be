//! Small traces, and what must come out.

use pgtable_formats::{Gpa, Iova, Pasid};
use viommu_device::Status;
use viommu_device::host::Stream;
use viommu_queue::record::{
    Accessed, Event, Outcome, PageAsked, Recorder as _, Tape, TraceReader, WaitEnd, Waited,
};
use viommu_wire::{
    AccessFlags, Attach, AttachFlags, Detach, DomainId, EndpointId, Map, MapFlags, PageResponse,
    PageResponseCode, Request, RequestType, Unmap,
};

use super::analysis::{Analysis, analyse};
use super::saving::Sent;
use super::{html, raster, story, text};

const PAGE: u64 = 0x1000;

struct Script(Tape<Vec<u8>>);

impl Script {
    fn new() -> Self {
        Self(Tape::new(Vec::new()))
    }

    fn request(&self, request: Request, status: Status) {
        self.0.record(Event::Request { readable: &request.encode(), status: Some(status) });
    }

    fn kick(&self) {
        self.0.record(Event::Kick { served: 1, notify: true });
    }

    fn attach(&self, endpoint: u32, domain: u32) {
        let (domain, endpoint) = (DomainId(domain), EndpointId(endpoint));
        self.request(Request::Attach(Attach { domain, endpoint, flags: AttachFlags::empty() }), Status::Ok);
    }

    fn map(&self, domain: u32, page: u64, pages: u64, target: u64) {
        let (virt_start, virt_end) = (Iova(page * PAGE), Iova((page + pages) * PAGE - 1));
        let (domain, phys_start) = (DomainId(domain), Gpa(target));
        let map = Map { domain, virt_start, virt_end, phys_start, flags: MapFlags::READ };
        self.request(Request::Map(map), Status::Ok);
    }

    fn unmap(&self, domain: u32, page: u64, pages: u64) {
        let (virt_start, virt_end) = (Iova(page * PAGE), Iova((page + pages) * PAGE - 1));
        self.request(Request::Unmap(Unmap { domain: DomainId(domain), virt_start, virt_end }), Status::Ok);
    }

    fn access(&self, endpoint: u32, pasid: Option<u32>, iova: u64, length: u32, outcome: Outcome) {
        let stream = Stream { endpoint: EndpointId(endpoint), pasid: pasid.and_then(Pasid::new) };
        let access = AccessFlags::READ;
        self.0.record(Event::Access(Accessed { stream, iova: Iova(iova), length, access, outcome }));
    }

    fn stream(pasid: u32) -> Stream {
        Stream { endpoint: EndpointId(8), pasid: Pasid::new(pasid) }
    }

    /// A page that is not there, and of which the driver is told.
    fn faults(&self, pasid: u32, page: u64, group: u16) {
        self.access(8, Some(pasid), page * PAGE + 8, 8, Outcome::Waits { group });
        let (address, access) = (Iova(page * PAGE + 8), AccessFlags::READ);
        let asked = PageAsked { stream: Self::stream(pasid), address, access, group, last: true };
        self.0.record(Event::PageRequest(asked));
    }

    fn responds(&self, pasid: u32, group: u16, code: PageResponseCode) {
        let (endpoint, pasid) = (EndpointId(8), Pasid::new(pasid));
        self.request(
            Request::PageResponse(PageResponse { endpoint, pasid, group_id: group, code }),
            Status::Ok,
        );
    }

    fn goes_on(&self, pasid: u32, group: u16, end: WaitEnd) {
        self.0.record(Event::Waited(Waited { stream: Self::stream(pasid), group, end }));
    }

    fn bytes(self) -> Vec<u8> {
        self.0.finish().unwrap();
        self.0.into_sink()
    }

    fn analyse(self) -> Analysis {
        let bytes = self.bytes();
        analyse(&mut TraceReader::new(&bytes[..]).unwrap(), 4, false).unwrap()
    }
}

fn kinds(sent: &Sent) -> Vec<(&'static str, u64)> {
    sent.kinds.iter().map(|(&kind, &count)| (kind, count)).collect()
}

/// A driver that maps a buffer, lets the device use it, and unmaps it; three times, with two buffers' memory.
fn buffers() -> Script {
    let script = Script::new();
    script.attach(8, 1);
    script.kick();
    for (page, target) in [(0x100, 0x1_0000), (0x101, 0x2_0000), (0x102, 0x1_0000)] {
        script.map(1, page, 1, target);
        script.kick();
        script.access(8, None, page * PAGE, 0x1000, Outcome::Passed);
        script.unmap(1, page, 1);
        script.kick();
    }
    script.access(8, None, 0x100 * PAGE, 8, Outcome::Unmapped);
    let detach = Detach { domain: DomainId(1), endpoint: EndpointId(8) };
    script.request(Request::Detach(detach), Status::Ok);
    script.kick();
    script
}

#[test]
fn a_driver_that_maps_each_buffer() {
    let analysis = buffers().analyse();
    assert_eq!((analysis.events, analysis.accesses, analysis.odd), (20, 4, 0));
    let [facts] = &analysis.endpoints[..] else { panic!("one endpoint") };
    assert_eq!(facts.endpoint, 8);
    let mappings = &facts.mappings;
    assert_eq!((mappings.made, mappings.ended, mappings.alive_at_the_end), (3, 3, 0));
    assert_eq!((mappings.memory_again, mappings.address_again), (1, 0));
    // MAP, kick, access, UNMAP.
    assert_eq!(mappings.lifetimes.values(8), Some(vec![(3, 3)]));
    assert_eq!(mappings.uses.values(8), Some(vec![(1, 3)]));
    assert_eq!(mappings.sizes.values(8), Some(vec![(0x1000, 3)]));
    assert_eq!(facts.accesses.sizes.values(8), Some(vec![(8, 1), (0x1000, 3)]));
    assert_eq!(facts.faults(), 1);
    assert_eq!(facts.accesses.outcomes["unmapped"], 1);
    assert_eq!((facts.strides.steps, facts.strides.follows), (3, 2));
    assert_eq!(facts.strides.most, [(0x1000, 2), (-0x2000, 1)]);
    let verdicts = facts.iotlb.verdicts;
    assert_eq!((verdicts.lookups, verdicts.hits, verdicts.first), (3, 0, 3));

    let saving = &analysis.requests;
    assert_eq!(kinds(&saving.sent), [("ATTACH", 1), ("DETACH", 1), ("MAP", 3), ("UNMAP", 3)]);
    assert_eq!(kinds(&saving.handover), [("ATTACH_TABLE", 1), ("DETACH", 1), ("INVALIDATE", 3)]);
    assert_eq!(kinds(&saving.bound), [("ATTACH_TABLE", 1), ("DETACH", 1)]);
    assert_eq!((saving.sent.kicks, saving.handover.kicks, saving.bound.kicks), (8, 5, 2));
    let length = |kind: RequestType| kind.readable_len() as u64;
    let handover =
        length(RequestType::AttachTable) + length(RequestType::Detach) + 3 * length(RequestType::Invalidate);
    assert_eq!(saving.handover.bytes, handover);
    assert_eq!(facts.requests.sent.kinds, saving.sent.kinds);
}

#[test]
fn an_unmap_of_many_needs_one_invalidate_and_one_of_nothing_none() {
    let script = Script::new();
    script.attach(8, 1);
    (0..4).for_each(|page| script.map(1, page, 1, page * PAGE));
    script.unmap(1, 0, 4);
    script.unmap(1, 0, 4);
    script.request(Request::Unmap(unmap_one()), Status::Range);
    script.kick();
    let analysis = script.analyse();
    assert_eq!(kinds(&analysis.requests.handover), [("ATTACH_TABLE", 1), ("INVALIDATE", 1), ("UNMAP", 1)]);
    assert_eq!(kinds(&analysis.requests.bound), [("ATTACH_TABLE", 1), ("UNMAP", 1)]);
    assert_eq!((analysis.requests.sent.kicks, analysis.endpoints[0].rejected), (1, 1));
}

fn unmap_one() -> Unmap {
    Unmap { domain: DomainId(1), virt_start: Iova(0), virt_end: Iova(0xfff) }
}

#[test]
fn mappings_are_used_by_those_in_the_domain_only_and_end_with_it() {
    let script = Script::new();
    script.attach(8, 1);
    script.attach(9, 1);
    script.attach(10, 2);
    script.map(1, 0x10, 2, 0);
    script.access(8, None, 0x10 * PAGE, 16, Outcome::Passed);
    script.access(9, None, 0x11 * PAGE + 5, 16, Outcome::Passed);
    script.access(10, None, 0x10 * PAGE, 16, Outcome::Unmapped);
    script.access(8, Some(3), 0x10 * PAGE, 16, Outcome::Configuration);
    // The last to leave takes the mappings along.
    script.attach(8, 2);
    script.0.record(Event::Reset);
    let analysis = script.analyse();
    let of = |id: u32| analysis.endpoints.iter().find(|facts| facts.endpoint == id).unwrap();
    assert_eq!(of(9).mappings.uses.values(8), Some(vec![(2, 1)]), "both accesses went through it");
    assert_eq!(of(9).mappings.lifetimes.values(8), Some(vec![(6, 1)]));
    assert_eq!(of(8).mappings.ended, 0, "it had left");
    assert_eq!((of(8).accesses.pasids, of(8).faults(), of(10).faults()), (1, 1, 1));
    assert_eq!((analysis.resets, analysis.odd), (1, 0));
    // The MAP counts for both endpoints, and once in the sum.
    assert_eq!((of(8).requests.sent.of(RequestType::Map), of(9).requests.sent.of(RequestType::Map)), (1, 1));
    assert_eq!(analysis.requests.sent.of(RequestType::Map), 1);
}

#[test]
fn what_an_unmap_drops_misses_and_what_has_no_room_too() {
    let script = Script::new();
    script.attach(8, 1);
    script.map(1, 0, 8, 0);
    // The cache has four entries.
    (0..5).for_each(|page| script.access(8, None, page * PAGE, 8, Outcome::Passed));
    script.access(8, None, 4 * PAGE, 8, Outcome::Passed);
    script.access(8, None, 0, 8, Outcome::Passed);
    script.unmap(1, 0, 8);
    script.map(1, 0, 8, 0);
    script.access(8, None, 0, 8, Outcome::Passed);
    let analysis = script.analyse();
    let verdicts = analysis.endpoints[0].iotlb.verdicts;
    assert_eq!((verdicts.hits, verdicts.first, verdicts.evicted, verdicts.dropped), (1, 5, 1, 1));
    let curve = &analysis.endpoints[0].iotlb.without_drops;
    assert_eq!(
        curve[..4],
        [(1, 2), (2, 2), (4, 2), (8, 3)],
        "page 0 comes again at once, and behind four others"
    );
}

#[test]
fn a_trace_that_makes_no_sense_is_counted_and_not_believed() {
    let script = Script::new();
    script.map(7, 0, 1, 0);
    script.map(7, 0, 1, 0);
    script.unmap(9, 0, u64::MAX / PAGE);
    script.0.record(Event::Request { readable: &[0xaa; 40], status: Some(Status::Unsupp) });
    script.0.record(Event::Request { readable: &[], status: None });
    script.access(8, None, u64::MAX - 8, 8, Outcome::Passed);
    for id in 0..1000 {
        script.access(id, None, 0, 1 << 30, Outcome::Unattached);
        script.attach(id, id);
    }
    let bytes = script.bytes();
    let analysis = analyse(&mut TraceReader::new(&bytes[..]).unwrap(), 4, false).unwrap();
    assert_eq!((analysis.undecodable, analysis.endpoints.len()), (2, 256));
    assert!(analysis.odd > 2 && analysis.of_others > 0);
    // And it can be drawn.
    let drawing = raster::draw(&mut TraceReader::new(&bytes[..]).unwrap(), &analysis, false).unwrap();
    assert!(html::page("<&>", &analysis, &drawing).contains("&lt;&amp;&gt;"));
    assert!(text::text(&analysis).contains("do not fit"));
}

#[test]
fn a_trace_that_was_cut_is_told_and_taken_if_wanted() {
    let whole = buffers().bytes();
    for end in 16..whole.len() {
        let cut = &whole[..end];
        let error = analyse(&mut TraceReader::new(cut).unwrap(), 4, false).unwrap_err();
        assert!(error.to_string().contains(&format!("cut off after {end} bytes")), "{error}");
        let analysis = analyse(&mut TraceReader::new(cut).unwrap(), 4, true).unwrap();
        assert!(analysis.cut.is_some() && analysis.events <= 20);
        assert!(story::cautions(&analysis)[0].contains("cut off"));
        raster::draw(&mut TraceReader::new(cut).unwrap(), &analysis, true).unwrap();
    }
}

#[test]
fn the_page_is_one_file_and_shows_each_picture() {
    let bytes = buffers().bytes();
    let analysis = analyse(&mut TraceReader::new(&bytes[..]).unwrap(), 64, false).unwrap();
    let drawing = raster::draw(&mut TraceReader::new(&bytes[..]).unwrap(), &analysis, false).unwrap();
    let [raster] = &drawing.rasters[..] else { panic!("one endpoint") };
    assert_eq!((raster.columns(), raster.span()), (19, (0, 18)));
    let [band] = &raster.bands[..] else { panic!("one piece") };
    // Each buffer's page a row; from MAP to UNMAP four events, the access in the third of them, one refused at the end.
    assert_eq!(band.mapped.runs(19), [(0, 2, 4), (1, 7, 4), (2, 12, 4)]);
    assert_eq!(band.read.runs(19), [(0, 4, 1), (1, 9, 1), (2, 14, 1)]);
    assert_eq!(band.refused.runs(19), [(0, 17, 1)]);
    assert!(band.written.runs(19).is_empty());

    let page = html::page("trace", &analysis, &drawing);
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    // The saving, the overview, the addresses, and seven small ones.
    assert_eq!(page.matches("<svg").count(), 10);
    for foreign in ["<script", "http:", "https:", "url(", "@import", "src="] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    assert!(page.contains("prefers-color-scheme:dark"));
}

/// Two pages in order for PASID 1, one of them by two accesses; one for PASID 2 that is taken away; one that is refused,
/// one whose device gives up, and one that goes on.
fn paging() -> Script {
    let script = Script::new();
    script.faults(1, 0x10, 0);
    script.access(8, Some(1), 0x10 * PAGE + 16, 8, Outcome::Waits { group: 0 });
    script.faults(2, 0x40, 1);
    script.responds(1, 0, PageResponseCode::Success);
    script.goes_on(1, 0, WaitEnd::Retry);
    // One that polls asks again.
    script.goes_on(1, 0, WaitEnd::Retry);
    script.access(8, Some(1), 0x10 * PAGE + 8, 8, Outcome::Passed);
    script.goes_on(2, 1, WaitEnd::Failed);
    script.access(8, Some(2), 0x40 * PAGE + 8, 8, Outcome::Configuration);
    script.faults(1, 0x11, 2);
    script.responds(1, 2, PageResponseCode::Success);
    script.goes_on(1, 2, WaitEnd::Retry);
    script.access(8, Some(1), 0x11 * PAGE + 8, 8, Outcome::Passed);
    script.access(8, Some(1), 0x12 * PAGE, 8, Outcome::Passed);
    // The same number for another group; the device does not tell when it goes on.
    script.faults(1, 0x20, 0);
    script.responds(1, 0, PageResponseCode::Invalid);
    script.faults(1, 0x21, 0);
    script.goes_on(1, 0, WaitEnd::TimedOut);
    script.faults(1, 0x10, 7);
    script.kick();
    script
}

#[test]
fn waits_are_followed_to_their_end() {
    let analysis = paging().analyse();
    let [facts] = &analysis.endpoints[..] else { panic!("one endpoint") };
    // What waits comes again, and counts then.
    assert_eq!((analysis.accesses, facts.accesses.total, facts.faults()), (4, 4, 1));
    let waits = facts.waits.as_ref().unwrap();
    assert_eq!((waits.waits, waits.told, waits.most_at_a_time), (6, 6, 2));
    let ends = [("closed", 1), ("gave_up", 1), ("open", 1), ("refused", 1), ("served", 2)];
    assert_eq!(waits.ends.iter().map(|(name, count)| (*name, *count)).collect::<Vec<_>>(), ends);
    // From the first access on: of PASID 1, 6 events, then 3; of PASID 2, 6; 2 until the refusal, 2 until it gave up.
    assert_eq!(waits.lengths.values(8), Some(vec![(2, 2), (3, 1), (6, 2)]));
    assert_eq!(waits.answers.values(8), Some(vec![(1, 2), (4, 1)]));
    assert_eq!((waits.follows, waits.again), (2, 1), "0x11 behind 0x10, 0x21 behind 0x20; 0x10 once more");
    assert_eq!(waits.by_pasid.iter().collect::<Vec<_>>(), [(&1, &5), (&2, &1)]);
    // 0x12 was there.
    assert_eq!((waits.pages, waits.pages_waited_for), (6, 5));

    let words = text::text(&analysis).split_whitespace().collect::<Vec<_>>().join(" ");
    for sentence in [
        "Its device met no page 6 times, and waited: 2 ended with a page.",
        "the driver refused 1; 1 ended without an answer of the driver's",
        "the 8 KiB of memory behind these waits",
        "Of the 6 pages that the device touched, 5 (83 %) were not there at the first touch.",
        "2 of the page requests (33 %) were for the page behind",
    ] {
        assert!(words.contains(sentence), "{sentence}\n{words}");
    }
}

#[test]
fn waits_are_drawn() {
    let bytes = paging().bytes();
    let analysis = analyse(&mut TraceReader::new(&bytes[..]).unwrap(), 64, false).unwrap();
    let drawing = raster::draw(&mut TraceReader::new(&bytes[..]).unwrap(), &analysis, false).unwrap();
    let lanes = drawing.rasters[0].waits.as_ref().unwrap();
    let marks = |marks: &[bool]| marks.iter().filter(|&&mark| mark).count();
    let [first, second] = &lanes.lanes[..] else { panic!("two PASIDs") };
    assert_eq!((marks(&first.passed), marks(&first.refused)), (3, 0));
    assert_eq!((marks(&second.passed), marks(&second.refused)), (0, 1));
    assert_eq!(lanes.answers.iter().sum::<u32>(), 3);
    let page = html::page("trace", &analysis, &drawing);
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    for piece in
        ["Page faults over time", "5 waits", "1 wait<", "read 0x10008: SUCCESS", "0x40008: ended without"]
    {
        assert!(page.contains(piece), "{piece}");
    }
    assert!(!page.contains("NaN"));
}
