//! What the waits of an endpoint mean, in words. Every sentence is made of counts from the trace.

use super::super::analysis::Unit;
use super::super::endpoint::EndpointFacts;
use super::super::story::{bytes, duration, number, percent, plural, spread};
use super::{End, WaitFacts};

/// In paragraphs.
pub(in super::super) fn story(facts: &EndpointFacts, waits: &WaitFacts, unit: Unit) -> Vec<String> {
    let mut told = vec![what(facts, waits, unit)];
    told.extend(refusals(waits));
    told.push(meaning(waits));
    told
}

fn what(facts: &EndpointFacts, waits: &WaitFacts, unit: Unit) -> String {
    let served = waits.of(End::Served);
    let mut text = format!(
        "Its device met no page {}, and waited: {} with a page.",
        times(waits.waits),
        if served == waits.waits {
            "each time it ended".to_owned()
        } else {
            format!("{} ended", number(served))
        },
    );
    let show = |value| duration(value, unit);
    if let Some(lengths) = spread(&waits.lengths, &show) {
        text.push_str(&format!(" A wait took {lengths}"));
        if let Some(answers) = spread(&waits.answers, &show) {
            text.push_str(&format!("; of that the driver took {answers}, from the event to its answer"));
        }
        text.push('.');
    }
    let spaces = waits.spaces().len() as u64;
    if waits.most_at_a_time > 1 {
        text.push_str(&format!(
            " Up to {} waited at a time, for {}.",
            plural(waits.most_at_a_time as u64, "access"),
            plural(spaces, "address space"),
        ));
    }
    let passed = facts.accesses.total - facts.faults();
    if passed > 0 {
        let found = passed.saturating_sub(served);
        text.push_str(&format!(
            " Of {} that got through, {} ({}) found their page there.",
            plural(passed, "access"),
            number(found),
            percent(found, passed),
        ));
    }
    text
}

fn refusals(waits: &WaitFacts) -> Option<String> {
    let (refused, closed) = (waits.of(End::Refused), waits.of(End::Closed));
    let mut parts = Vec::new();
    if refused > 0 {
        parts.push(format!("the driver refused {}", number(refused)));
    }
    if closed > 0 {
        parts.push(format!(
            "{} ended without an answer of the driver's, because their address space was taken away from the device \
             or the time for an answer was over",
            number(closed)
        ));
    }
    if waits.of(End::GaveUp) > 0 {
        parts.push(format!("the device gave up {}", number(waits.of(End::GaveUp))));
    }
    if waits.of(End::Open) > 0 {
        parts.push(format!("{} went on at the end of the trace", number(waits.of(End::Open))));
    }
    (!parts.is_empty()).then(|| format!("Of the others, {}.", parts.join("; ")))
}

/// For handover.
fn meaning(waits: &WaitFacts) -> String {
    let served = waits.of(End::Served);
    let mut text = format!(
        "What it means for handover: the {} of memory behind these waits had to be there, and pinned, only from the \
         first use on; MAP needs beforehand all that a device may ever use. That cost an event and a PAGE_RESP for \
         each page, {} in all, and no MAP.",
        bytes(served << 12),
        plural(waits.told.saturating_add(waits.answers_given()), "message"),
    );
    if waits.pages > 0 {
        text.push_str(&format!(
            " Of the {} that the device touched, {} ({}) were not there at the first touch.",
            plural(waits.pages, "page"),
            number(waits.pages_waited_for),
            percent(waits.pages_waited_for, waits.pages),
        ));
    }
    if waits.follows > 0 {
        text.push_str(&format!(
            " {} of the page requests ({}) were for the page behind the one that the same address space had asked for \
             before: a driver that makes the next page as well saves these.",
            number(waits.follows),
            percent(waits.follows, waits.told),
        ));
    }
    if waits.again > 0 {
        text.push_str(&format!(
            " {} of them were for a page that had been asked for before: it had been taken away, or more was wanted of it.",
            number(waits.again)
        ));
    }
    text
}

impl WaitFacts {
    /// Answers that the driver gave.
    fn answers_given(&self) -> u64 {
        self.answers.count()
    }
}

fn times(count: u64) -> String {
    if count == 1 { "once".into() } else { format!("{} times", number(count)) }
}
