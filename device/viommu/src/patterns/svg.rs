//! The pictures, as elements of HTML. Colours come from the page's style.

use std::fmt::Write as _;

use pgtable_formats::Pasid;

use super::analysis::Unit;
use super::endpoint::{EndpointFacts, Locality};
use super::histogram::Histogram;
use super::raster::{Band, Lane, Raster};
use super::saving::Saving;
use super::story::{bytes, distance, duration, number, percent, plural};
use super::waits;
use super::world::Kind;

const WIDTH: f64 = 980.0;
/// Where time starts in the large pictures, and where it ends.
pub(super) const LEFT: f64 = 168.0;
pub(super) const RIGHT: f64 = WIDTH - 12.0;
const MIN_BAND: f64 = 20.0;
const ROW: f64 = 2.5;

/// Bars for what was sent, and what would have been.
pub(super) fn saving(saving: &Saving) -> String {
    let ways = [
        ("as it was", &saving.sent),
        ("with its own table", &saving.handover),
        ("and memory stays mapped", &saving.bound),
    ];
    let most = ways.iter().map(|(_, way)| way.requests).max().unwrap_or(0).max(1);
    let mut text = begin(118.0, "Requests, by kind, in three ways");
    let (left, width) = (190.0, 500.0);
    for (index, (name, way)) in ways.iter().enumerate() {
        let y = 8.0 + 36.0 * index as f64;
        let _ = writeln!(text, "<text class=\"name\" x=\"{}\" y=\"{}\">{name}</text>", left - 10.0, y + 18.0);
        let mut x = left;
        for (kind, count) in &way.kinds {
            let wide = width * *count as f64 / most as f64;
            let _ = writeln!(
                text,
                "<rect class=\"{}\" x=\"{x:.1}\" y=\"{y}\" width=\"{:.1}\" height=\"26\"><title>{} {kind}</title></rect>",
                class(kind),
                wide.max(0.5),
                number(*count),
            );
            x += wide;
        }
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{}\"><tspan class=\"strong\">{}</tspan> <tspan class=\"soft\" dx=\"4\">{}, {}</tspan></text>",
            x + 8.0,
            y + 18.0,
            plural(way.requests, "request"),
            plural(way.kicks, "kick"),
            bytes(way.bytes),
        );
    }
    text.push_str("</svg>\n");
    text
}

/// The colours of requests that are in use, for a legend.
pub(super) fn legend(saving: &Saving) -> Vec<(&'static str, String)> {
    let mut entries: Vec<(&'static str, Vec<&'static str>)> = Vec::new();
    let ways = [&saving.sent, &saving.handover, &saving.bound];
    for kind in ways.iter().flat_map(|way| way.kinds.keys().copied()) {
        let class = class(kind);
        match entries.iter_mut().find(|(known, _)| *known == class) {
            Some((_, kinds)) if kinds.contains(&kind) => {}
            Some((_, kinds)) => kinds.push(kind),
            None => entries.push((class, vec![kind])),
        }
    }
    entries.into_iter().map(|(class, kinds)| (class, kinds.join(", "))).collect()
}

fn class(kind: &str) -> &'static str {
    match kind {
        "MAP" => "map",
        "UNMAP" => "unmap",
        "INVALIDATE" => "invalidate",
        "ATTACH_TABLE" => "table",
        _ => "other",
    }
}

/// When which endpoint did what: accesses above the line, requests below.
pub(super) fn overview(lanes: &[Lane], columns: usize, events: u64) -> String {
    const LANE: f64 = 48.0;
    const HALF: f64 = 20.0;
    let bottom = LANE * lanes.len() as f64 + 6.0;
    let mut text = begin(bottom + 20.0, "When which endpoint did what");
    let step = (RIGHT - LEFT) / columns.max(1) as f64;
    for (index, lane) in lanes.iter().enumerate() {
        let middle = LANE * index as f64 + 26.0;
        let _ = writeln!(
            text,
            "<text class=\"name\" x=\"{}\" y=\"{}\">endpoint {}</text>",
            LEFT - 10.0,
            middle + 4.0,
            lane.endpoint
        );
        for (class, counts, sign) in [("access-bar", &lane.accesses, '-'), ("map", &lane.requests, ' ')] {
            let most = f64::from(counts.iter().copied().max().unwrap_or(0).max(1));
            let mut path = String::new();
            for (column, &count) in counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
                let high = 3.0 + (HALF - 3.0) * f64::from(count) / most;
                let back = if sign == '-' { ' ' } else { '-' };
                let x = LEFT + step * column as f64;
                let _ =
                    write!(path, "M{x:.1} {middle}v{sign}{high:.1}h{:.2}v{back}{high:.1}z", step.max(1.0));
            }
            let _ = writeln!(text, "<path class=\"{class}\" d=\"{path}\"/>");
        }
        let _ = writeln!(text, "<path class=\"rule\" d=\"M{LEFT} {middle}H{RIGHT}\"/>");
    }
    let _ = writeln!(
        text,
        "<text class=\"axis\" x=\"{LEFT}\" y=\"{0}\">event 0</text>\n\
         <text class=\"axis end\" x=\"{RIGHT}\" y=\"{0}\">event {1}</text>\n</svg>",
        bottom + 12.0,
        number(events.saturating_sub(1))
    );
    text
}

/// Addresses over time.
pub(super) fn time(raster: &Raster) -> String {
    let (first, last) = raster.span();
    let layout = layout(raster);
    let ticks = layout.last().map_or(30.0, |&(y, height)| y + height) + 12.0;
    let height = ticks + 3.0 * 22.0 + 34.0;
    let title = format!("Endpoint {}: addresses over time", raster.endpoint);
    let mut text = begin(height, &title);
    let step = (RIGHT - LEFT) / raster.columns() as f64;
    let x = |column: usize| LEFT + step * column as f64;

    let _ = writeln!(text, "<text class=\"axis end\" x=\"{}\" y=\"17\">translated by</text>", LEFT - 10.0);
    for (index, &(from, kind)) in raster.kinds.iter().enumerate() {
        let to = raster.kinds.get(index + 1).map_or(raster.columns(), |&(next, _)| next);
        if to <= from {
            continue;
        }
        let (class, name) = match kind {
            None => ("none", "nothing"),
            Some(Kind::Mapped) => ("mapped", "MAP requests"),
            Some(Kind::Bypass) => ("bypass", "bypass"),
            Some(Kind::Table) => ("table", "its own table"),
        };
        let wide = x(to) - x(from);
        let _ = writeln!(
            text,
            "<rect class=\"kind {class}\" x=\"{:.1}\" y=\"6\" width=\"{wide:.1}\" height=\"16\"><title>{name}</title></rect>",
            x(from)
        );
        if wide > 7.0 * name.len() as f64 {
            let _ = writeln!(
                text,
                "<text class=\"inside\" x=\"{:.1}\" y=\"18\">{name}</text>",
                x(from) + wide / 2.0
            );
        }
    }
    let mut before: Option<Option<Pasid>> = None;
    for (band, &(y, height)) in raster.bands.iter().zip(&layout) {
        let space = (before != Some(band.pasid)).then_some(band.pasid);
        before = Some(band.pasid);
        self::band(&mut text, band, (y, height), step, raster.columns(), space);
    }
    for (index, (name, class, counts)) in [
        ("MAP", "map", &raster.maps),
        ("UNMAP", "unmap", &raster.unmaps),
        ("INVALIDATE", "invalidate", &raster.invalidates),
    ]
    .into_iter()
    .enumerate()
    {
        let base = ticks + 22.0 * index as f64 + 18.0;
        let sum: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        let _ = writeln!(
            text,
            "<text class=\"axis end\" x=\"{}\" y=\"{}\">{} {name}</text>\n<path class=\"rule\" d=\"M{LEFT} {base}H{RIGHT}\"/>",
            LEFT - 10.0,
            base - 3.0,
            number(sum),
        );
        let most = counts.iter().copied().max().unwrap_or(0).max(1);
        let mut path = String::new();
        for (column, &count) in counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
            let high = 4.0 + 12.0 * f64::from(count) / f64::from(most);
            let _ = write!(path, "M{:.1} {base}v-{high:.1}h{:.2}v{high:.1}z", x(column), step.max(1.0));
        }
        let _ = writeln!(text, "<path class=\"{class}\" d=\"{path}\"/>");
    }
    let bottom = height - 12.0;
    let _ = writeln!(
        text,
        "<text class=\"axis\" x=\"{LEFT}\" y=\"{bottom}\">event {}</text>\n\
         <text class=\"axis middle\" x=\"{:.1}\" y=\"{bottom}\">time →</text>\n\
         <text class=\"axis end\" x=\"{RIGHT}\" y=\"{bottom}\">event {}</text>\n</svg>",
        number(first),
        f64::midpoint(LEFT, RIGHT),
        number(last),
    );
    text
}

/// Top and height of each band.
fn layout(raster: &Raster) -> Vec<(f64, f64)> {
    let mut y = 30.0;
    let mut before = None;
    let mut layout = Vec::new();
    for band in &raster.bands {
        // Room for the name of another address space.
        y += if before == Some(band.pasid) { 6.0 } else { 20.0 };
        before = Some(band.pasid);
        let height = (band.mapped.rows() as f64 * ROW).max(MIN_BAND);
        layout.push((y, height));
        y += height;
    }
    layout
}

fn band(
    text: &mut String,
    band: &Band,
    (y, height): (f64, f64),
    step: f64,
    columns: usize,
    space: Option<Option<Pasid>>,
) {
    if let Some(pasid) = space {
        let name = pasid.map_or("without a PASID".to_owned(), |pasid| format!("PASID {}", pasid.value()));
        let _ = writeln!(text, "<text class=\"space\" x=\"{LEFT}\" y=\"{:.1}\">{name}</text>", y - 5.0);
    }
    let length = band.range.length_minus_one().saturating_add(1);
    let (first, size) = (band.range.start(), bytes(length));
    let _ = writeln!(
        text,
        "<rect class=\"band\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\"><title>{first}, {size}</title></rect>",
        RIGHT - LEFT
    );
    let _ =
        writeln!(text, "<text class=\"axis end\" x=\"{}\" y=\"{:.1}\">{first}</text>", LEFT - 10.0, y + 10.0);
    if height > 22.0 {
        let _ = writeln!(
            text,
            "<text class=\"axis end soft\" x=\"{}\" y=\"{:.1}\">{size} ↓</text>",
            LEFT - 10.0,
            y + 24.0
        );
    }
    let row = height / band.mapped.rows() as f64;
    for (class, plane) in [
        ("held", &band.mapped),
        ("read", &band.read),
        ("write", &band.written),
        ("asked", &band.waited),
        ("refused", &band.refused),
    ] {
        let mut path = String::new();
        for (at, column, count) in plane.runs(columns) {
            let wide = (step * count as f64).max(1.2);
            // What is a point must be seen.
            let high = if class == "held" { row } else { row.max(2.0) };
            let _ = write!(
                path,
                "M{:.1} {:.1}h{wide:.2}v{high:.2}h-{wide:.2}z",
                LEFT + step * column as f64,
                y + row * at as f64,
            );
        }
        if !path.is_empty() {
            let _ = writeln!(text, "<path class=\"{class}\" d=\"{path}\"/>");
        }
    }
}

/// The small pictures of one endpoint, each with its caption.
pub(super) fn small(facts: &EndpointFacts, unit: Unit) -> Vec<(String, String)> {
    let mut pictures = Vec::new();
    let mappings = &facts.mappings;
    if mappings.ended > 0 {
        pictures.push((
            "How long a mapping lives, from MAP to its end".to_owned(),
            bars(&histogram(&mappings.lifetimes, &|value| duration(value, unit)), "held-bar"),
        ));
        pictures.push((
            "How many accesses go through a mapping before it ends".to_owned(),
            bars(&histogram(&mappings.uses, &uses), "held-bar"),
        ));
    }
    if mappings.made > 0 {
        pictures.push((
            "How large mappings are".to_owned(),
            bars(&histogram(&mappings.sizes, &bytes), "held-bar"),
        ));
    }
    if facts.accesses.total > 0 {
        pictures.push((
            "How large accesses are".to_owned(),
            bars(&histogram(&facts.accesses.sizes, &bytes), "access-bar"),
        ));
    }
    pictures.extend(facts.waits.iter().flat_map(|waits| waits::picture::small(waits, unit)));
    if facts.strides.steps > 0 {
        let strides = &facts.strides;
        let mut rows: Vec<(String, u64)> =
            strides.most.iter().map(|&(step, count)| (distance(step), count)).collect();
        if strides.others > 0 {
            rows.push(("any other".to_owned(), strides.others));
        }
        let caption = "How far the next access of the same kind is".to_owned();
        pictures.push((caption, bars(&rows, "access-bar")));
    }
    if facts.iotlb.verdicts.lookups > 0 {
        pictures.push((
            format!("What an IOTLB of {} would say", plural(facts.iotlb.entries as u64, "page")),
            verdicts(&facts.iotlb),
        ));
        pictures.push(("How large an IOTLB would have to be: hits by size".to_owned(), curve(&facts.iotlb)));
    }
    pictures
}

fn uses(count: u64) -> String {
    if count == 0 { "none".to_owned() } else { number(count) }
}

/// At most ten rows: value by value where there are few, else by powers of two.
pub(super) fn histogram(histogram: &Histogram, show: &dyn Fn(u64) -> String) -> Vec<(String, u64)> {
    const ROWS: usize = 10;
    if let Some(values) = histogram.values(6) {
        return values.into_iter().map(|(value, count)| (show(value), count)).collect();
    }
    let mut buckets = histogram.buckets();
    let (least, most) = histogram.ends().unwrap_or((0, 0));
    for bucket in &mut buckets {
        bucket.first = bucket.first.max(least);
        bucket.last = bucket.last.min(most);
    }
    // The ends of a long tail are told together.
    let rest = if buckets.len() > ROWS { buckets.split_off(ROWS - 1) } else { Vec::new() };
    let name = |first, last: u64| {
        if first == last { show(first) } else { format!("{} to {}", plain(first, show), show(last)) }
    };
    let mut rows: Vec<(String, u64)> =
        buckets.iter().map(|bucket| (name(bucket.first, bucket.last), bucket.count)).collect();
    if let Some(first) = rest.first() {
        rows.push((format!("from {}", show(first.first)), rest.iter().map(|bucket| bucket.count).sum()));
    }
    rows
}

/// A number without the unit that follows behind the second one, where it is the same.
fn plain(value: u64, show: &dyn Fn(u64) -> String) -> String {
    let text = show(value);
    match text.split_once(" event") {
        Some((number, _)) => number.to_owned(),
        None => text,
    }
}

/// Rows of a name, a bar and a number.
pub(super) fn bars(rows: &[(String, u64)], class: &str) -> String {
    let (left, width) = (150.0, 190.0);
    let most = rows.iter().map(|&(_, count)| count).max().unwrap_or(0).max(1);
    let all: u64 = rows.iter().map(|&(_, count)| count).sum();
    let mut text = begin_small(rows.len() as f64 * 22.0 + 6.0);
    for (index, (name, count)) in rows.iter().enumerate() {
        let y = 4.0 + 22.0 * index as f64;
        let wide = width * *count as f64 / most as f64;
        let _ = writeln!(
            text,
            "<text class=\"axis end\" x=\"{}\" y=\"{}\">{name}</text>\n\
             <rect class=\"{class}\" x=\"{left}\" y=\"{y}\" width=\"{:.1}\" height=\"16\"/>\n\
             <text class=\"count\" x=\"{:.1}\" y=\"{}\">{} <tspan class=\"soft\" dx=\"5\">{}</tspan></text>",
            left - 8.0,
            y + 12.5,
            if *count == 0 { 0.0 } else { wide.max(1.0) },
            left + wide + 6.0,
            y + 12.5,
            number(*count),
            percent(*count, all),
        );
    }
    text.push_str("</svg>\n");
    text
}

fn verdicts(locality: &Locality) -> String {
    let verdicts = locality.verdicts;
    let rows = [
        ("hit", "hit", verdicts.hits),
        ("new", "first", verdicts.first),
        ("dropped", "dropped", verdicts.dropped),
        ("no room", "evicted", verdicts.evicted),
    ];
    let mut text = begin_small(30.0 + 22.0 * rows.len() as f64);
    let width = 428.0;
    let mut x = 6.0;
    for (index, (name, class, count)) in rows.into_iter().enumerate() {
        let wide = width * count as f64 / verdicts.lookups.max(1) as f64;
        let y = 28.0 + 22.0 * index as f64;
        let _ = writeln!(
            text,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"2\" width=\"{wide:.1}\" height=\"20\"/>\n\
             <rect class=\"{class}\" x=\"134\" y=\"{}\" width=\"10\" height=\"10\"/>\n\
             <text class=\"axis end\" x=\"126\" y=\"{}\">{name}</text>\n\
             <text class=\"count\" x=\"152\" y=\"{}\">{} <tspan class=\"soft\" dx=\"5\">{}</tspan></text>",
            y + 4.0,
            y + 13.0,
            y + 13.0,
            number(count),
            percent(count, verdicts.lookups),
        );
        x += wide;
    }
    text.push_str("</svg>\n");
    text
}

/// Hits by size where nothing is dropped, and the hits of the cache that is thought of.
fn curve(locality: &Locality) -> String {
    let (left, right, top, bottom) = (44.0, 420.0, 10.0, 112.0);
    let lookups = locality.verdicts.lookups.max(1) as f64;
    let points = &locality.without_drops;
    let last = points.len().saturating_sub(1).max(1) as f64;
    let x = |lg2: f64| left + (right - left) * (lg2 / last).min(1.0);
    let y = |hits: u64| bottom - (bottom - top) * hits as f64 / lookups;
    let mut text = begin_small(152.0);
    for (value, name) in [(0.0, "0 %"), (0.5, "50 %"), (1.0, "100 %")] {
        let at = bottom - (bottom - top) * value;
        let _ = writeln!(
            text,
            "<path class=\"rule\" d=\"M{left} {at:.1}H{right}\"/><text class=\"axis end\" x=\"{}\" y=\"{:.1}\">{name}</text>",
            left - 6.0,
            at + 4.0
        );
    }
    let mut path = String::new();
    for (index, &(_, hits)) in points.iter().enumerate() {
        let _ = write!(path, "{}{:.1} {:.1}", if index == 0 { "M" } else { "L" }, x(index as f64), y(hits));
    }
    let _ = writeln!(text, "<path class=\"line\" d=\"{path}\"/>");
    for (index, &(entries, _)) in points.iter().enumerate().step_by(3) {
        let _ = writeln!(
            text,
            "<text class=\"axis middle\" x=\"{:.1}\" y=\"{}\">{}</text>",
            x(index as f64),
            bottom + 16.0,
            number(entries)
        );
    }
    let at = x((locality.entries.max(1) as f64).log2());
    let _ = writeln!(
        text,
        "<circle class=\"hit\" cx=\"{at:.1}\" cy=\"{:.1}\" r=\"5\"/>\n\
         <text class=\"axis middle\" x=\"{:.1}\" y=\"{}\">pages that fit. Line: if nothing were dropped. Point: as it was.</text>\n</svg>",
        y(locality.verdicts.hits),
        f64::midpoint(left, right),
        bottom + 34.0,
    );
    text
}

pub(super) fn begin(height: f64, title: &str) -> String {
    format!("<svg class=\"wide\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{title}\">\n")
}

fn begin_small(height: f64) -> String {
    format!("<svg viewBox=\"0 0 440 {height:.0}\" role=\"img\">\n")
}
