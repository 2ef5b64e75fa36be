//! What a person reads.

use std::fmt::Write as _;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};

use crate::hil::outcome::{Comparison, Done, Outcome, Report, Subject, Tally, size, time};

/// What comes before the checks: what they are made on.
pub(crate) fn head(report: &Report) -> String {
    let mut text = String::new();
    for (name, value) in &report.facts {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<10}{value}");
    }
    for Subject { name, engine, endpoint } in &report.subjects {
        let _ = writeln!(text, "{:<10}{name}, {engine}, endpoint {endpoint:#x}", "device");
    }
    text
}

/// A check that is done. `width`: of the longest name.
pub(crate) fn line(check: &Done, width: usize) -> String {
    let (mark, what) = match &check.outcome {
        Outcome::Passed => ("ok  ", check.claim),
        Outcome::Failed(why) => ("FAIL", why.lines().next().unwrap_or_default()),
        Outcome::Skipped(why) => ("skip", why.as_str()),
    };
    let mut text = format!("  {mark} {:<width$} {:>8}  {what}\n", check.name, time(check.elapsed));
    for note in &check.notes {
        let _ = writeln!(text, "       {:<width$} {:>8}  - {note}", "", "");
    }
    text
}

/// What comes after the checks; its last line sums up.
pub(crate) fn tail(report: &Report) -> String {
    let mut text = String::new();
    for comparison in &report.comparisons {
        let _ = writeln!(text, "\n{}", table(comparison));
    }
    failures(&mut text, report);
    let Tally { passed, failed, skipped } = report.tally();
    let verdict = match (failed, passed) {
        (0, 0) => "NOTHING WAS CHECKED",
        (0, _) => "PASSED",
        _ => "FAILED",
    };
    let elapsed = time(report.elapsed);
    let _ = writeln!(text, "\n{verdict}: {passed} passed, {failed} failed, {skipped} skipped in {elapsed}");
    text
}

fn failures(text: &mut String, report: &Report) {
    let failed: Vec<_> = report
        .checks
        .iter()
        .filter_map(|check| match &check.outcome {
            Outcome::Failed(why) => Some((check, why)),
            _ => None,
        })
        .collect();
    if failed.is_empty() {
        return;
    }
    text.push_str("\nWhat failed:\n");
    for (check, why) in failed {
        let _ = writeln!(text, "  {} {}: it should be that {}", check.subject, check.name, check.claim);
        for line in why.lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
}

fn table(comparison: &Comparison) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "buffers",
        "way",
        "requests",
        "ioctls",
        "requests/buffer",
        "ioctls/buffer",
        "map+unmap/buffer",
        "DMA/buffer",
    ]);
    for row in &comparison.rows {
        table.add_row([
            format!("{} x {}", row.buffers, size(row.buffer)),
            row.way.to_owned(),
            row.requests.to_string(),
            row.ioctls.to_string(),
            format!("{:.2}", row.each(row.requests)),
            format!("{:.2}", row.each(row.ioctls)),
            time(row.mapping / row.buffers.max(1)),
            time(row.dma / row.buffers.max(1)),
        ]);
    }
    for index in 2..8 {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines: Vec<String> = table.to_string().lines().map(|line| format!(" {}", line.trim_end())).collect();
    format!(
        "{}: MAP/UNMAP requests against handover on the same work (map, DMA, unmap)\n{}",
        comparison.subject,
        lines.join("\n")
    )
}
