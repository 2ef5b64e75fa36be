//! One page with everything in it: no script, nothing to fetch.

use std::fmt::Write as _;

use super::analysis::Analysis;
use super::endpoint::EndpointFacts;
use super::raster::{Drawing, Raster};
use super::waits::{WaitFacts, picture};
use super::{story, svg};
use crate::hil::report::escape;

const STYLE: &str = include_str!("page.css");

/// The whole page. `source`: what the trace is called.
pub(super) fn page(source: &str, analysis: &Analysis, drawing: &Drawing) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>How devices use their mappings</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>How devices use their mappings</h1>\n<p class=\"soft\">From the trace <code>{}</code></p>\n",
        escape(source)
    );
    story::whole(analysis).iter().for_each(|text| paragraph(&mut page, "", text));
    story::cautions(analysis).iter().for_each(|text| paragraph(&mut page, "caution", text));
    if analysis.requests.applies() {
        saving(&mut page, analysis);
    }
    if !analysis.endpoints.is_empty() {
        contents(&mut page, analysis, drawing);
    }
    for facts in &analysis.endpoints {
        let raster = drawing.rasters.iter().find(|raster| raster.endpoint == facts.endpoint);
        endpoint(&mut page, analysis, facts, raster);
    }
    footer(&mut page, analysis);
    page.push_str("</body>\n</html>\n");
    page
}

fn saving(page: &mut String, analysis: &Analysis) {
    page.push_str("<h2>What handover would save</h2>\n<figure>\n");
    page.push_str(&svg::saving(&analysis.requests));
    page.push_str("<p class=\"legend\">");
    for (class, kinds) in svg::legend(&analysis.requests) {
        // Writing to a string cannot fail.
        let _ = write!(page, "<span class=\"key {class}\"></span>{kinds} ");
    }
    page.push_str("</p>\n</figure>\n<p>What is counted, and what is thought:</p>\n<ul>\n");
    for assumption in [
        "The first bar is the trace: every request about a domain that translates by MAP requests, and the kicks that \
         brought them. A kick is an exit to the hypervisor.",
        "Second bar: the guest writes mappings into its own page table, so a MAP is not sent. Where an UNMAP took \
         something away, the guest sends one INVALIDATE and waits for the answer before it uses the memory for \
         something else. An ATTACH becomes an ATTACH_TABLE. A kick is saved only where nothing that it brought is left.",
        "Third bar: the memory may stay mapped, as that of a process whose table is bound for as long as it lives. \
         Then nothing is invalidated, and the device can reach the memory all the while.",
        "Not thought of: INVALIDATEs that a guest could merge, and those due where a process itself gives memory \
         back. Requests that were rejected stay as they were; those about endpoints which have their own table \
         already are not in the bars.",
    ] {
        let _ = writeln!(page, "<li>{assumption}</li>");
    }
    page.push_str("</ul>\n");
}

fn contents(page: &mut String, analysis: &Analysis, drawing: &Drawing) {
    page.push_str(
        "<h2>Endpoints</h2>\n<figure>\n<figcaption>The whole trace, event by event.</figcaption>\n",
    );
    page.push_str(&svg::overview(&drawing.lanes, drawing.columns, analysis.events));
    page.push_str(
        "<p class=\"legend\"><span class=\"key table\"></span>accesses, upwards \
         <span class=\"key map\"></span>requests, downwards</p>\n</figure>\n",
    );
    page.push_str(
        "<table>\n<thead><tr><th>endpoint</th><th class=\"number\">accesses</th>\
         <th class=\"number\">refused</th><th class=\"number\">bytes</th><th class=\"number\">mappings</th>\
         <th class=\"number\">IOTLB hits</th><th class=\"number\">requests</th><th class=\"number\">of those, for mappings</th><th class=\"number\">with its own table</th>\
         <th class=\"number\">and memory stays</th></tr></thead>\n<tbody>\n",
    );
    for facts in &analysis.endpoints {
        let verdicts = facts.iotlb.verdicts;
        let _ = write!(page, "<tr><td><a href=\"#endpoint-{0}\">{0}</a></td>", facts.endpoint);
        let cells = [
            story::number(facts.accesses.total),
            story::number(facts.faults()),
            story::bytes(facts.accesses.bytes),
            story::number(facts.mappings.made),
            story::percent(verdicts.hits, verdicts.lookups),
            story::number(facts.requests.all.requests),
            story::number(facts.requests.sent.requests),
            story::number(facts.requests.handover.requests),
            story::number(facts.requests.bound.requests),
        ];
        cells.iter().for_each(|cell| {
            let _ = write!(page, "<td class=\"number\">{cell}</td>");
        });
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table>\n");
}

fn endpoint(page: &mut String, analysis: &Analysis, facts: &EndpointFacts, raster: Option<&Raster>) {
    let _ = writeln!(page, "<h2 id=\"endpoint-{0}\">Endpoint {0}</h2>", facts.endpoint);
    story::endpoint(facts, analysis.unit).iter().for_each(|text| paragraph(page, "", text));
    match raster {
        Some(raster) => {
            page.push_str(
                "<figure>\n<figcaption>Addresses over time. From its first event to its last one; each event takes \
                 the same space. Address spaces are mostly holes: only the pieces in use are drawn, lowest address on top.</figcaption>\n",
            );
            page.push_str(&svg::time(raster));
            page.push_str(
                "<p class=\"legend\"><span class=\"key held\"></span>mapped by MAP \
                 <span class=\"key read\"></span>read <span class=\"key write\"></span>written \
                 <span class=\"key refused\"></span>refused",
            );
            if facts.waits.is_some() {
                page.push_str(" <span class=\"key asked\"></span>waited");
            }
            page.push_str("</p>\n</figure>\n");
            if raster.bands_left_out > 0 || facts.extents.more {
                paragraph(
                    page,
                    "soft",
                    "More address spaces, or pieces of them, were used than there is room for.",
                );
            }
        }
        None => paragraph(page, "soft", "Addresses are drawn for the endpoints with most events only."),
    }
    if let Some(waits) = &facts.waits {
        self::waits(page, raster, waits);
    }
    page.push_str("<div class=\"small\">\n");
    for (caption, picture) in svg::small(facts, analysis.unit) {
        let _ = writeln!(page, "<figure><figcaption>{caption}</figcaption>\n{picture}</figure>");
    }
    page.push_str("</div>\n");
}

/// What had to wait for pages.
fn waits(page: &mut String, raster: Option<&Raster>, facts: &WaitFacts) {
    if let Some((raster, lanes)) = raster.and_then(|raster| Some((raster, raster.waits.as_ref()?))) {
        page.push_str(
            "<figure>\n<figcaption>Page faults over time, by address space. Each bar is an access that waits for a page; \
             the marks below are accesses that did not.</figcaption>\n",
        );
        page.push_str(&picture::time(raster, lanes, facts));
        page.push_str(
            "<p class=\"legend\"><span class=\"key queued\"></span>the driver does not know yet \
             <span class=\"key asked\"></span>until it has answered \
             <span class=\"key woken\"></span>until the device goes on \
             <span class=\"key read\"></span>passed <span class=\"key refused\"></span>refused</p>\n</figure>\n",
        );
    }
    page.push_str(
        "<figure>\n<figcaption>Which pages the device touched first: by address, with the number of each in the order of \
         its address space; the later, the paler.</figcaption>\n",
    );
    page.push_str(&picture::touches(facts));
    page.push_str(
        "<p class=\"legend\"><span class=\"key woken\"></span>it was there <span class=\"key asked\"></span>made on \
         demand <span class=\"key refused\"></span>refused</p>\n</figure>\n",
    );
    if facts.more {
        paragraph(page, "soft", "More was waited for, or touched, than there is room for.");
    }
}

fn footer(page: &mut String, analysis: &Analysis) {
    let entries = analysis.endpoints.first().map_or(0, |facts| facts.iotlb.entries);
    let _ = writeln!(
        page,
        "<h2>How to read it</h2>\n<ul>\n\
         <li>An event is a request, a kick, an access or a reset. An access is one transfer of the device, \
         recorded when it is translated.</li>\n\
         <li>Mappings are those of MAP requests. What a guest enters into its own table, the device is not told: \
         that is the point.</li>\n\
         <li>The IOTLB is thought: {} of 4 KiB for each endpoint, the least recently used gives way, and what an \
         UNMAP, an INVALIDATE or a detach names is dropped.</li>\n\
         <li>An endpoint in a domain with others counts the requests about that domain, too; the sum at the top counts \
         each once.</li>\n</ul>",
        story::plural(entries as u64, "page"),
    );
}

fn paragraph(page: &mut String, class: &str, text: &str) {
    let text = escape(text);
    let _ = match class {
        "" => writeln!(page, "<p>{text}</p>"),
        class => writeln!(page, "<p class=\"{class}\">{text}</p>"),
    };
}
