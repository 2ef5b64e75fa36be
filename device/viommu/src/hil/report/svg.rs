//! An address space as a drawing: what the device says, where the guest's table leads, what memory is behind.
//!
//! Not to scale: address spaces are mostly holes. Each piece that matters is a box, in the order of addresses.

use std::fmt::Write as _;

use pgtable_formats::{Gpa, Iova, IovaRange};

use super::escape;
use crate::hil::outcome::size;
use crate::hil::picture::{Access, End, Mapping, Picture};

/// Most boxes in the first column.
const MOST: usize = 16;
const ROW: u32 = 46;
const BOX: u32 = 34;
const TOP: u32 = 44;
const WIDTH: u32 = 980;
/// Left edge and width of the columns.
const COLUMNS: [(u32, u32); 3] = [(230, 210), (510, 190), (770, 200)];
const HEADS: [&str; 3] = ["the device says (IOVA)", "guest-physical", "memory of the machine"];

/// A box of the first column.
struct First<'p> {
    range: IovaRange,
    /// `None`: nothing is mapped there.
    mapping: Option<&'p Mapping>,
    accesses: Vec<&'p Access>,
}

/// The drawing as an element of HTML.
pub(super) fn svg(picture: &Picture) -> String {
    let (firsts, left_out) = firsts(picture);
    let outputs = outputs(&firsts);
    let rows = firsts.len().max(outputs.len()).max(picture.memory.len()).max(1);
    let rows = u32::try_from(rows).unwrap_or(u32::MAX).min(64);
    let height = TOP + ROW * rows + if left_out > 0 { 24 } else { 0 };
    let mut text = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n",
        escape(&picture.title)
    );
    for ((x, width), head) in COLUMNS.iter().zip(HEADS) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "<text class=\"head\" x=\"{}\" y=\"22\">{head}</text>", x + width / 2);
    }
    let middle: Vec<(Gpa, Gpa, u32)> =
        outputs.iter().enumerate().map(|(row, (first, last))| (*first, *last, y(row))).collect();
    let right: Vec<(Gpa, Gpa, u32)> =
        picture.memory.iter().enumerate().map(|(row, memory)| (memory.first, memory.last, y(row))).collect();

    for (row, first) in firsts.iter().enumerate() {
        if let Some(mapping) = first.mapping
            && let Some(target) = place(&middle, mapping.output)
        {
            band(&mut text, 0, y(row), target, if mapping.stale { "band stale" } else { "band" });
        }
        for access in &first.accesses {
            // A translation that the table does not have is drawn where it led.
            if let End::Stale(at) = access.end
                && let Some(target) = place(&middle, at)
                && first.mapping.is_none_or(|mapping| place(&middle, mapping.output) != Some(target))
            {
                band(&mut text, 0, y(row), target, "band stale");
            }
        }
    }
    for (first, _, from) in &middle {
        if let Some(target) = place(&right, *first) {
            band(&mut text, 1, *from, target, "band second");
        }
    }
    for (row, first) in firsts.iter().enumerate() {
        draw_first(&mut text, y(row), first);
    }
    for (first, last, at) in &middle {
        let inside = place(&right, *first).is_some();
        let class = if inside { "box gpa" } else { "box nowhere" };
        let note = if inside { String::new() } else { ", no memory".to_owned() };
        let length = length(first.0, last.0);
        boxed(&mut text, 1, *at, class, &first.to_string(), &format!("{length}{note}"));
    }
    for (memory, (_, _, at)) in picture.memory.iter().zip(&right) {
        let range = format!("{} .. {}", memory.first, memory.last);
        boxed(&mut text, 2, *at, "box memory", &memory.what, &range);
    }
    if left_out > 0 {
        let _ = writeln!(
            text,
            "<text class=\"small\" x=\"{}\" y=\"{}\">and {left_out} more mappings</text>",
            COLUMNS[0].0,
            height - 8
        );
    }
    text.push_str("</svg>\n");
    text
}

/// The boxes of the first column: mappings, and what was accessed without one. And how many had no room.
fn firsts(picture: &Picture) -> (Vec<First<'_>>, usize) {
    let mut firsts: Vec<First<'_>> = picture
        .mappings
        .iter()
        .map(|mapping| First { range: mapping.range, mapping: Some(mapping), accesses: Vec::new() })
        .collect();
    for access in &picture.accesses {
        match firsts.iter_mut().find(|first| first.range.contains(access.address)) {
            Some(first) => first.accesses.push(access),
            None => {
                let page = access.address.0 & !0xfff;
                let range = IovaRange::from_length(Iova(page), 0x1000).unwrap_or(IovaRange::ALL);
                firsts.push(First { range, mapping: None, accesses: vec![access] });
            }
        }
    }
    firsts.sort_by_key(|first| first.range.start());
    let all = firsts.len();
    // What was accessed is what a reader wants to see.
    let mut plain = all.saturating_sub(MOST);
    firsts.retain(|first| {
        let drop = plain > 0 && first.accesses.is_empty();
        plain -= usize::from(drop);
        !drop
    });
    firsts.truncate(MOST);
    let left_out = all - firsts.len();
    (firsts, left_out)
}

/// Where the first column leads, in the order of addresses.
fn outputs(firsts: &[First<'_>]) -> Vec<(Gpa, Gpa)> {
    let mut outputs: Vec<(Gpa, Gpa)> = Vec::new();
    for first in firsts {
        if let Some(mapping) = first.mapping {
            let last = mapping.output.0.saturating_add(mapping.range.length_minus_one());
            outputs.push((mapping.output, Gpa(last)));
        }
    }
    for access in firsts.iter().flat_map(|first| &first.accesses) {
        if let End::Reached(at) | End::Stale(at) = access.end
            && !outputs.iter().any(|(first, last)| (*first..=*last).contains(&at))
        {
            outputs.push((Gpa(at.0 & !0xfff), Gpa(at.0 | 0xfff)));
        }
    }
    outputs.sort_unstable();
    outputs.dedup();
    outputs
}

fn draw_first(text: &mut String, at: u32, first: &First<'_>) {
    let length = length(first.range.start().0, first.range.last().0);
    let (class, note) = match first.mapping {
        None => ("box hole", "not mapped".to_owned()),
        Some(mapping) if mapping.stale => ("box gone", format!("{length}, taken away")),
        Some(mapping) if mapping.write => ("box iova", format!("{length}, read and write")),
        Some(_) => ("box iova", format!("{length}, read only")),
    };
    boxed(text, 0, at, class, &first.range.start().to_string(), &note);
    let (mut reached, mut stale, mut faulted) = (0u32, 0u32, 0u32);
    for access in &first.accesses {
        match access.end {
            End::Reached(_) => reached += 1,
            End::Stale(_) => stale += 1,
            End::Faulted => faulted += 1,
        }
    }
    let kind = |ended: fn(&End) -> bool| {
        let mut kinds = first.accesses.iter().filter(|access| ended(&access.end)).map(|access| access.write);
        match (kinds.clone().any(|write| write), kinds.any(|write| !write)) {
            (true, true) => "read, write",
            (true, false) => "write",
            _ => "read",
        }
    };
    let lines = [
        (reached, "reached", kind(|end| matches!(end, End::Reached(_))), "✓"),
        (stale, "stale", kind(|end| matches!(end, End::Stale(_))), "~"),
        (faulted, "faulted", kind(|end| matches!(end, End::Faulted)), "✗"),
    ];
    let shown: Vec<_> = lines.iter().filter(|(count, ..)| *count > 0).collect();
    let step = 15;
    let count = u32::try_from(shown.len()).unwrap_or(0);
    for (index, (count_of, word, kind, mark)) in (0u32..).zip(shown) {
        let times = if *count_of > 1 { format!(" ×{count_of}") } else { String::new() };
        let _ = writeln!(
            text,
            "<text class=\"access {word}\" x=\"{}\" y=\"{}\">{kind}{times} {word} {mark} →</text>",
            COLUMNS[0].0 - 8,
            at + BOX / 2 + 5 + step * index - (count - 1) * step / 2,
        );
    }
}

fn boxed(text: &mut String, column: usize, at: u32, class: &str, title: &str, note: &str) {
    let Some((x, width)) = COLUMNS.get(column) else { return };
    let _ = writeln!(
        text,
        "<rect class=\"{class}\" x=\"{x}\" y=\"{at}\" width=\"{width}\" height=\"{BOX}\" rx=\"4\"/>\
         <text class=\"title\" x=\"{0}\" y=\"{1}\">{2}</text><text class=\"small\" x=\"{0}\" y=\"{3}\">{4}</text>",
        x + 8,
        at + 15,
        escape(title),
        at + 28,
        escape(note),
    );
}

/// From a box of `column` to one of the next.
fn band(text: &mut String, column: usize, from: u32, to: u32, class: &str) {
    let (Some((x, width)), Some((next, _))) = (COLUMNS.get(column), COLUMNS.get(column + 1)) else { return };
    let (left, right) = (x + width, *next);
    let middle = u32::midpoint(left, right);
    let (from, to) = (from + BOX / 2, to + BOX / 2);
    let _ = writeln!(
        text,
        "<path class=\"{class}\" d=\"M{left} {from} C{middle} {from} {middle} {to} {right} {to}\"/>"
    );
}

/// The box that holds an address.
fn place(boxes: &[(Gpa, Gpa, u32)], at: Gpa) -> Option<u32> {
    boxes.iter().find(|(first, last, _)| (*first..=*last).contains(&at)).map(|(_, _, y)| *y)
}

fn y(row: usize) -> u32 {
    TOP + ROW * u32::try_from(row).unwrap_or(0).min(64)
}

fn length(first: u64, last: u64) -> String {
    size(last.saturating_sub(first).saturating_add(1))
}
