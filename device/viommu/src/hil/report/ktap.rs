//! KTAP, as the kernel's own tests print it (Documentation/dev-tools/ktap.rst): a subtest for each device.

use std::fmt::Write as _;

use super::one_line;
use crate::hil::outcome::{Done, Outcome, Report, size, tally};

/// The whole output.
pub(crate) fn ktap(report: &Report) -> String {
    let groups = report.groups();
    let mut text = String::from("KTAP version 1\n");
    for (name, value) in &report.facts {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# {name}: {}", one_line(value));
    }
    for comparison in &report.comparisons {
        for row in &comparison.rows {
            let _ = writeln!(
                text,
                "# {} {} {}: {} buffers, {} requests, {} ioctls, {} us mapping, {} us DMA",
                comparison.subject,
                row.way,
                size(row.buffer),
                row.buffers,
                row.requests,
                row.ioctls,
                row.mapping.as_micros(),
                row.dma.as_micros(),
            );
        }
    }
    let _ = writeln!(text, "1..{}", groups.len());
    for (number, (subject, checks)) in (1..).zip(groups) {
        let _ = writeln!(text, "  KTAP version 1\n  # Subtest: {}", name(subject));
        let _ = writeln!(text, "  1..{}", checks.len());
        for (number, check) in (1..).zip(&checks) {
            line(&mut text, number, check);
        }
        let tally = tally(checks.iter().copied());
        let _ = match tally {
            _ if tally.failed != 0 => writeln!(text, "not ok {number} {}", name(subject)),
            _ if tally.passed == 0 => writeln!(text, "ok {number} {} # SKIP every check", name(subject)),
            _ => writeln!(text, "ok {number} {}", name(subject)),
        };
    }
    let tally = report.tally();
    let total = tally.passed + tally.failed + tally.skipped;
    let _ = writeln!(
        text,
        "# Totals: pass:{} fail:{} skip:{} total:{total}",
        tally.passed, tally.failed, tally.skipped
    );
    text
}

/// Diagnostics come before the result that they belong to.
fn line(text: &mut String, number: usize, check: &Done) {
    for note in &check.notes {
        let _ = writeln!(text, "  # {}: {}", check.name, one_line(note));
    }
    if let Outcome::Failed(why) = &check.outcome {
        for line in why.lines() {
            let _ = writeln!(text, "  # {}: {}", check.name, one_line(line));
        }
    }
    let _ = match &check.outcome {
        Outcome::Passed => writeln!(text, "  ok {number} {}", name(check.name)),
        Outcome::Failed(_) => writeln!(text, "  not ok {number} {}", name(check.name)),
        Outcome::Skipped(why) => {
            writeln!(text, "  ok {number} {} # SKIP {}", name(check.name), one_line(why))
        }
    };
}

/// A description ends at `#`.
fn name(text: &str) -> String {
    one_line(text).replace('#', "_")
}
