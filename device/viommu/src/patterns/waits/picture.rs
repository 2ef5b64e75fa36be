//! The pictures of accesses that wait.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use pgtable_formats::Pasid;

use super::super::analysis::Unit;
use super::super::raster::Raster;
use super::super::story::{duration, number, plural};
use super::super::svg::{LEFT, RIGHT, bars, begin, histogram};
use super::lanes::{Lane, Lanes};
use super::{End, Touch, Wait, WaitFacts};

const ROW: f64 = 9.0;
/// Waits of one address space that are drawn above each other.
const MAX_ROWS: usize = 12;
/// Cells in a row of pages.
const CELLS: usize = 32;
/// Pages that nobody touched, between two that are drawn in one row.
const NEAR: u64 = 8;
/// Rows of pages.
const PIECES: usize = 24;

/// Waits over time, address space by address space: each a bar, and below it the accesses that did not wait.
pub(in super::super) fn time(raster: &Raster, lanes: &Lanes, facts: &WaitFacts) -> String {
    let (first, last) = raster.span();
    let columns = raster.columns();
    let step = (RIGHT - LEFT) / columns as f64;
    let x = |event: u64| LEFT + step * raster.column(event) as f64;
    let rows: Vec<Vec<Vec<&Wait>>> = lanes
        .lanes
        .iter()
        .map(|lane| stack(facts.kept.iter().filter(|wait| wait.pasid == lane.pasid)))
        .collect();
    let heights: Vec<f64> = rows.iter().map(|rows| rows.len().max(1) as f64 * ROW + 30.0).collect();
    let ticks = heights.iter().sum::<f64>() + 4.0;
    let height = ticks + 3.0 * 20.0 + 26.0;
    let mut text = begin(height, &format!("Endpoint {}: accesses that wait, over time", raster.endpoint));
    let mut y = 4.0;
    for ((lane, rows), height) in lanes.lanes.iter().zip(&rows).zip(&heights) {
        self::lane(&mut text, lane, rows, (y, *height), &x, step);
        y += height;
    }
    for (index, (name, class, counts)) in [
        ("PAGE_RESP", "map", &lanes.answers),
        ("INVALIDATE", "invalidate", &lanes.invalidates),
        ("ATTACH_TABLE", "table", &lanes.binds),
    ]
    .into_iter()
    .enumerate()
    {
        let base = ticks + 20.0 * index as f64 + 16.0;
        let sum: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        let mut path = String::new();
        for (column, _) in counts.iter().enumerate().filter(|&(_, &count)| count > 0) {
            // Writing to a string cannot fail.
            let _ = write!(
                path,
                "M{:.1} {base}v-11h{:.2}v11z",
                LEFT + step * column as f64,
                step.clamp(1.0, 3.0)
            );
        }
        let _ = writeln!(
            text,
            "<text class=\"axis end\" x=\"{}\" y=\"{}\">{} {name}</text>\n\
             <path class=\"rule\" d=\"M{LEFT} {base}H{RIGHT}\"/>\n<path class=\"{class}\" d=\"{path}\"/>",
            LEFT - 10.0,
            base - 2.0,
            number(sum),
        );
    }
    let bottom = height - 8.0;
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

fn lane(
    text: &mut String,
    lane: &Lane,
    rows: &[Vec<&Wait>],
    (y, height): (f64, f64),
    x: &dyn Fn(u64) -> f64,
    step: f64,
) {
    let waits: usize = rows.iter().map(Vec::len).sum();
    let _ = writeln!(
        text,
        "<rect class=\"band\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>\n\
         <text class=\"name\" x=\"{2}\" y=\"{3:.1}\">{4}</text>\n\
         <text class=\"axis end\" x=\"{2}\" y=\"{5:.1}\">{6}</text>",
        RIGHT - LEFT,
        height - 10.0,
        LEFT - 10.0,
        y + 12.0,
        name(lane.pasid),
        y + 26.0,
        plural(waits as u64, "wait"),
    );
    for (index, row) in rows.iter().enumerate() {
        let top = y + 3.0 + ROW * index as f64;
        for wait in row {
            bar(text, wait, top, x, step);
        }
    }
    let base = y + height - 12.0;
    for (class, marks) in [("read", &lane.passed), ("refused", &lane.refused)] {
        let mut path = String::new();
        for (column, _) in marks.iter().enumerate().filter(|&(_, &marked)| marked) {
            let _ = write!(
                path,
                "M{:.1} {base:.1}v-8h{:.2}v8z",
                LEFT + step * column as f64,
                step.clamp(1.0, 2.0)
            );
        }
        if !path.is_empty() {
            let _ = writeln!(text, "<path class=\"{class}\" d=\"{path}\"/>");
        }
    }
}

/// Grey until the driver is told, then until it answers, and then until the device goes on; the end in the colour of how.
fn bar(text: &mut String, wait: &Wait, top: f64, x: &dyn Fn(u64) -> f64, step: f64) {
    let end = wait.ended.map_or(RIGHT, |ended| x(ended.event));
    let told = wait.told.map_or(end, |told| x(told.event));
    let answered = wait.answered.map_or(end, |(answered, _)| x(answered.event));
    let how = match wait.end {
        End::Open => "it waits still",
        End::Served => "SUCCESS",
        End::Refused => "refused by the driver",
        End::Closed => "ended without an answer of the driver's",
        End::GaveUp => "the device gave up",
    };
    let kind = if wait.write { "write" } else { "read" };
    let _ = write!(text, "<g><title>{kind} {:#x}: {how}</title>", wait.address);
    for (class, from, to) in
        [("queued", x(wait.began.event), told), ("asked", told, answered), ("woken", answered, end)]
    {
        if to > from {
            let _ = write!(
                text,
                "<rect class=\"{class}\" x=\"{from:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                to - from,
                ROW - 3.0
            );
        }
    }
    let class = match wait.end {
        End::Open => "queued",
        End::Served => "read",
        End::Refused | End::Closed => "refused",
        End::GaveUp => "write",
    };
    let _ = writeln!(
        text,
        "<rect class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"/></g>",
        end,
        top - 1.0,
        step.clamp(2.0, 4.0),
        ROW - 1.0,
    );
}

/// Waits in rows, such that none of a row overlap.
fn stack<'w>(waits: impl Iterator<Item = &'w Wait>) -> Vec<Vec<&'w Wait>> {
    let mut rows: Vec<Vec<&Wait>> = Vec::new();
    for wait in waits {
        let is_free = |row: &Vec<&Wait>| {
            row.last().is_none_or(|last| last.ended.is_some_and(|ended| ended.event < wait.began.event))
        };
        let free = rows.iter().position(is_free).unwrap_or(rows.len());
        if free == rows.len() && free < MAX_ROWS {
            rows.push(Vec::new());
        }
        if let Some(row) = rows.get_mut(free) {
            row.push(wait);
        }
    }
    rows
}

/// Pages by address, with the order in which they were touched first.
pub(in super::super) fn touches(facts: &WaitFacts) -> String {
    let mut spaces: BTreeMap<Option<Pasid>, Vec<(usize, &Touch)>> = BTreeMap::new();
    for touch in &facts.touches {
        let space = spaces.entry(touch.pasid).or_default();
        space.push((space.len() + 1, touch));
    }
    spaces.retain(|_, touches| touches.iter().any(|(_, touch)| touch.waited));
    let mut pieces = Vec::new();
    for (pasid, touches) in &mut spaces {
        let all = touches.len();
        touches.sort_by_key(|(_, touch)| touch.page);
        let near = |a: &(usize, &Touch), b: &(usize, &Touch)| b.1.page - a.1.page <= NEAR;
        pieces.extend(touches.chunk_by(near).map(|piece| (*pasid, all, piece)));
    }
    let drawn = pieces.len().min(PIECES);
    let pieces = pieces.get(..drawn).unwrap_or_default();
    let names = pieces.chunk_by(|a, b| a.0 == b.0).count();
    let height = 28.0 * drawn as f64 + 20.0 * names as f64 + 4.0;
    let mut text = begin(height, "Pages, and in which order they were touched first");
    let wide = (RIGHT - LEFT) / CELLS as f64;
    let mut before = None;
    let mut bottom = 0.0;
    for &(pasid, all, piece) in pieces {
        if before != Some(pasid) {
            let (name, at) = (name(pasid), bottom + 15.0);
            let _ = writeln!(text, "<text class=\"space\" x=\"{LEFT}\" y=\"{at:.1}\">{name}</text>");
            bottom += 20.0;
        }
        before = Some(pasid);
        let y = bottom;
        bottom += 28.0;
        let [(_, first), ..] = piece else { continue };
        let _ = writeln!(
            text,
            "<text class=\"axis end\" x=\"{}\" y=\"{:.1}\">{:#x}</text>",
            LEFT - 10.0,
            y + 15.0,
            first.page << 12,
        );
        let pages = piece.last().map_or(1, |(_, last)| last.page - first.page + 1);
        let per_cell = pages.div_ceil(CELLS as u64);
        let mut cells: BTreeMap<u64, (usize, &Touch)> = BTreeMap::new();
        for &(order, touch) in piece {
            let cell = cells.entry((touch.page - first.page) / per_cell).or_insert((order, touch));
            if order < cell.0 {
                *cell = (order, touch);
            }
        }
        for (cell, (order, touch)) in cells {
            let class = match (touch.waited, touch.passed) {
                (true, true) => "asked",
                (true, false) => "refused",
                (false, _) => "woken",
            };
            let left = LEFT + wide * cell as f64;
            // The later, the paler.
            let shade = 1.0 - 0.7 * (order - 1) as f64 / all.max(2) as f64;
            let _ = writeln!(
                text,
                "<rect class=\"{class}\" opacity=\"{shade:.2}\" x=\"{left:.1}\" y=\"{y}\" width=\"{:.1}\" \
                 height=\"22\"><title>{:#x}</title></rect>",
                wide - 1.5,
                touch.page << 12,
            );
            // Longer numbers have no room.
            if order < 1000 {
                let (x, y) = (left + wide / 2.0 - 0.7, y + 15.0);
                let _ = writeln!(text, "<text class=\"inside\" x=\"{x:.1}\" y=\"{y}\">{order}</text>");
            }
        }
    }
    text.push_str("</svg>\n");
    text
}

/// The small pictures, each with its caption.
pub(in super::super) fn small(facts: &WaitFacts, unit: Unit) -> Vec<(String, String)> {
    let show = |value| duration(value, unit);
    let mut pictures = Vec::new();
    if facts.lengths.ends().is_some() {
        pictures.push((
            "How long an access waits, until its device goes on".to_owned(),
            bars(&histogram(&facts.lengths, &show), "asked"),
        ));
    }
    if facts.answers.ends().is_some() {
        pictures.push((
            "How long the driver takes, from the event to its answer".to_owned(),
            bars(&histogram(&facts.answers, &show), "asked"),
        ));
    }
    pictures
}

fn name(pasid: Option<Pasid>) -> String {
    pasid.map_or("no PASID".to_owned(), |pasid| format!("PASID {}", pasid.value()))
}
