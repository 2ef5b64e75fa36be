//! JUnit XML, as continuous-integration servers read it: a suite for each device, a case for each check.

use std::fmt::Write as _;
use std::time::Duration;

use super::escape;
use crate::hil::outcome::{Done, Outcome, Report, Tally, tally};

/// The whole document.
pub(crate) fn junit(report: &Report) -> String {
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let counts = counts(report.tally(), report.elapsed);
    // Writing to a string cannot fail.
    let _ = writeln!(xml, "<testsuites name=\"viommu hil\" {counts}>");
    for (subject, checks) in report.groups() {
        suite(&mut xml, report, subject, &checks);
    }
    xml.push_str("</testsuites>\n");
    xml
}

fn suite(xml: &mut String, report: &Report, subject: &str, checks: &[&Done]) {
    let elapsed = checks.iter().map(|check| check.elapsed).sum();
    let counts = counts(tally(checks.iter().copied()), elapsed);
    let _ = writeln!(xml, "  <testsuite name=\"{}\" {counts}>", escape(subject));
    xml.push_str("    <properties>\n");
    for (name, value) in &report.facts {
        let (name, value) = (escape(name), escape(value));
        let _ = writeln!(xml, "      <property name=\"{name}\" value=\"{value}\"/>");
    }
    xml.push_str("    </properties>\n");
    for check in checks {
        case(xml, check);
    }
    xml.push_str("  </testsuite>\n");
}

fn case(xml: &mut String, check: &Done) {
    let _ = writeln!(
        xml,
        "    <testcase classname=\"viommu.hil.{}\" name=\"{}\" time=\"{}\">",
        // Viewers cut class names at dots.
        escape(&check.subject.replace('.', "_")),
        escape(check.name),
        seconds(check.elapsed),
    );
    match &check.outcome {
        Outcome::Passed => {}
        Outcome::Failed(why) => {
            let first = why.lines().next().unwrap_or_default();
            let _ = writeln!(xml, "      <failure message=\"{}\">{}</failure>", escape(first), escape(why));
        }
        Outcome::Skipped(why) => {
            let _ = writeln!(xml, "      <skipped message=\"{}\"/>", escape(why));
        }
    }
    if !check.notes.is_empty() {
        let _ = writeln!(xml, "      <system-out>{}</system-out>", escape(&check.notes.join("\n")));
    }
    xml.push_str("    </testcase>\n");
}

fn counts(Tally { passed, failed, skipped }: Tally, elapsed: Duration) -> String {
    let tests = passed + failed + skipped;
    let time = seconds(elapsed);
    format!("tests=\"{tests}\" failures=\"{failed}\" errors=\"0\" skipped=\"{skipped}\" time=\"{time}\"")
}

fn seconds(duration: Duration) -> String {
    format!("{:.6}", duration.as_secs_f64())
}
