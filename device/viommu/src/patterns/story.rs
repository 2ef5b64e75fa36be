//! What was found, in words. Every sentence is made of counts from the trace.

use viommu_wire::RequestType;

use super::analysis::{Analysis, Unit};
use super::endpoint::EndpointFacts;
use super::histogram::Histogram;
use super::locality::PER_ACCESS;
use super::saving::Saving;
use super::waits;
use super::world::Kind;

/// What holds for the whole trace, in paragraphs.
pub(super) fn whole(analysis: &Analysis) -> Vec<String> {
    let mut told = Vec::new();
    let requests = &analysis.requests.all;
    let duration = match analysis.unit {
        Unit::Events => String::new(),
        Unit::Nanoseconds => format!(" in {}", nanoseconds(analysis.duration)),
    };
    told.push(format!(
        "The trace holds {}{duration}: {} by the driver, which came with {}, and {} by {}.",
        plural(analysis.events, "event"),
        plural(requests.requests, "request"),
        plural(requests.kicks, "kick"),
        plural(analysis.accesses, "access"),
        plural(analysis.endpoints.len() as u64, "endpoint"),
    ));
    told.push(saving(&analysis.requests));
    told
}

/// The one number that the page is about.
pub(super) fn saving(saving: &Saving) -> String {
    if !saving.applies() {
        return "No endpoint was translated by MAP requests: handover has nothing to save.".into();
    }
    let Saving { sent, handover, bound, .. } = saving;
    let against = |now: u64, then: u64| match now.checked_sub(then) {
        Some(less) => format!("{} fewer, {}", number(less), percent(less, now)),
        None => format!("{} more", number(then - now)),
    };
    format!(
        "{} keep mappings in the device up to date. Had the driver handed its page tables over, {} would have been \
         sent instead: no MAP, and an INVALIDATE for each UNMAP that took something away ({}). If the memory may stay \
         mapped, as that of a process that the device works for, {} ({}).",
        plural(sent.requests, "request"),
        number(handover.requests),
        against(sent.requests, handover.requests),
        number(bound.requests),
        against(sent.requests, bound.requests),
    )
}

/// What counts are to be taken with care, if anything.
pub(super) fn cautions(analysis: &Analysis) -> Vec<String> {
    let mut told = Vec::new();
    if let Some(cut) = &analysis.cut {
        told.push(format!("This is a part: {cut}."));
    }
    let mut note = |count: u64, text: &str| {
        if count > 0 {
            told.push(format!("{} {text}.", number(count)));
        }
    };
    note(analysis.left_out, "events at the end were left out, because the trace had reached its limit");
    note(
        analysis.odd,
        "requests do not fit to those before, or are more than is followed: the trace starts in the middle, perhaps",
    );
    note(analysis.of_others, "events are of endpoints beyond the 256 that are followed");
    note(analysis.undecodable, "requests were none that the device could make sense of");
    let long: u64 = analysis.endpoints.iter().map(|endpoint| endpoint.accesses.long).sum();
    note(
        long,
        &format!(
            "accesses were longer than {}; of each, the first {PER_ACCESS} pages count for hits and misses",
            bytes(PER_ACCESS << 12)
        ),
    );
    told
}

/// What is to be said of one endpoint, in paragraphs.
pub(super) fn endpoint(facts: &EndpointFacts, unit: Unit) -> Vec<String> {
    let mut told = Vec::new();
    told.push(accesses(facts));
    told.extend(facts.waits.iter().flat_map(|waits| waits::story::story(facts, waits, unit)));
    told.extend(mappings(facts, unit));
    told.extend(own_table(facts));
    told.extend(strides(facts));
    told.extend(cache(facts));
    if facts.requests.applies() {
        told.push(saved(&facts.requests));
    }
    told
}

/// What it would have been for this endpoint's requests.
fn saved(saving: &Saving) -> String {
    let Saving { sent, handover, bound, .. } = saving;
    format!(
        "Of {} for these mappings, handover would have left {}; {} if the memory stays mapped.",
        plural(sent.requests, "request"),
        number(handover.requests),
        number(bound.requests),
    )
}

fn accesses(facts: &EndpointFacts) -> String {
    let accesses = &facts.accesses;
    if accesses.total == 0 {
        return "Its device accessed nothing.".into();
    }
    let kind = match (accesses.reads, accesses.writes) {
        (0, _) => "all of them writes".to_owned(),
        (_, 0) => "all of them reads".to_owned(),
        (reads, writes) => format!("{} and {}", plural(reads, "read"), plural(writes, "write")),
    };
    let length = spread(&accesses.sizes, &bytes).map_or(String::new(), |spread| format!(" of {spread}"));
    let pasids = match accesses.pasids {
        0 => String::new(),
        count => format!(", for {}", plural(count, "PASID")),
    };
    let faults = match facts.faults() {
        0 => "None was refused.".to_owned(),
        1 => "One was refused.".to_owned(),
        count => format!("{} were refused.", number(count)),
    };
    format!(
        "Its device made {} to {} in all{pasids}: {kind}{length}. {faults}",
        plural(accesses.total, "access"),
        bytes(accesses.bytes),
    )
}

fn mappings(facts: &EndpointFacts, unit: Unit) -> Option<String> {
    let mappings = &facts.mappings;
    if mappings.made == 0 {
        return None;
    }
    let sizes = spread(&mappings.sizes, &bytes).map_or(String::new(), |sizes| format!(" of {sizes}"));
    let mut text = format!("The driver made {} for it{sizes}.", plural(mappings.made, "mapping"));
    if let Some(lifetime) = spread(&mappings.lifetimes, &|value| duration(value, unit)) {
        text.push_str(&format!(" From MAP to the end, a mapping lived for {lifetime}"));
        if mappings.alive_at_the_end > 0 {
            text.push_str(&format!(
                "; {} were there at the end of the trace",
                number(mappings.alive_at_the_end)
            ));
        }
        text.push('.');
    }
    if let (Some(once), Some(never)) = (mappings.uses.exactly(1), mappings.uses.exactly(0))
        && mappings.ended > 0
    {
        let of = |count| format!("{} ({})", number(count), percent(count, mappings.ended));
        let told = match (once == mappings.ended, never) {
            (true, _) => "each".to_owned(),
            (_, 0) => format!("{} of them", of(once)),
            _ => format!("{} of them, none through {}", of(once), of(never)),
        };
        text.push_str(&format!(" Exactly one access went through {told}."));
    }
    if mappings.memory_again > 0 {
        text.push_str(&format!(
            " {} of the MAPs ({}) were for memory that had been mapped before: it was taken away only to be given again.",
            number(mappings.memory_again),
            percent(mappings.memory_again, mappings.made),
        ));
    }
    Some(text)
}

fn own_table(facts: &EndpointFacts) -> Option<String> {
    let handed = facts.attached.get(&Kind::Table).copied().unwrap_or(0);
    let through = facts.accesses.through.get("own_table").copied().unwrap_or(0);
    (handed > 0).then(|| {
        let invalidates = facts.requests.all.of(RequestType::Invalidate);
        let each = match facts.accesses.through.get("mappings").copied() {
            Some(mapped) if mapped > 0 => format!("; {} went through mappings of MAP", number(mapped)),
            _ => String::new(),
        };
        format!(
            "A table was handed over {}: {} went through it, and {} told the device what had changed in it{each}.",
            times(handed),
            plural(through, "access"),
            plural(invalidates, "INVALIDATE"),
        )
    })
}

fn strides(facts: &EndpointFacts) -> Option<String> {
    let strides = &facts.strides;
    let &(most, count) = strides.most.first()?;
    let text = if strides.follows * 2 > strides.steps {
        format!(
            "{} of the accesses start where the one before of the same kind ended: the device streams",
            percent(strides.follows, strides.steps)
        )
    } else if count * 2 > strides.steps {
        format!(
            "{} of the accesses are {} from the one before of the same kind",
            percent(count, strides.steps),
            distance(most)
        )
    } else {
        "From one access to the next there is no distance that most of them have".to_owned()
    };
    Some(format!("{text}."))
}

fn cache(facts: &EndpointFacts) -> Option<String> {
    let verdicts = facts.iotlb.verdicts;
    let entries = facts.iotlb.entries as u64;
    (verdicts.lookups > 0).then(|| {
        let of = |count| percent(count, verdicts.lookups);
        format!(
            "Of {}, an IOTLB of {} would have answered {}. It would have missed {} because they were new, {} because \
             what it had was dropped by an UNMAP, INVALIDATE or detach, and {} for want of room.",
            plural(verdicts.lookups, "page access"),
            plural(entries, "page"),
            of(verdicts.hits),
            of(verdicts.first),
            of(verdicts.dropped),
            of(verdicts.evicted),
        )
    })
}

/// One value, or the median and the ends.
pub(super) fn spread(histogram: &Histogram, show: &dyn Fn(u64) -> String) -> Option<String> {
    let (least, most) = histogram.ends()?;
    if least == most {
        return Some(show(least));
    }
    let (most, median) = (show(most), show(histogram.median()?));
    // One unit is enough where it is the same.
    let least = show(least);
    let least = match (least.split_once(' '), most.split_once(' ')) {
        (Some((value, unit)), Some((_, same))) if unit == same => value,
        _ => &least,
    };
    Some(format!("{least} to {most} (median {median})"))
}

/// With a comma at each thousand.
pub(super) fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

pub(super) fn plural(count: u64, one: &str) -> String {
    let more = if one.ends_with('s') { "es" } else { "s" };
    format!("{} {one}{}", number(count), if count == 1 { "" } else { more })
}

fn times(count: u64) -> String {
    if count == 1 { "once".into() } else { format!("{} times", number(count)) }
}

/// Of nothing, nothing.
pub(super) fn percent(part: u64, whole: u64) -> String {
    let percent = part as f64 * 100.0 / whole.max(1) as f64;
    match percent {
        _ if part == 0 => "0 %".into(),
        _ if part == whole => "100 %".into(),
        _ if percent >= 99.95 => "99.9 %".into(),
        _ if percent < 0.05 => "under 0.1 %".into(),
        _ if !(10.0..=90.0).contains(&percent) => format!("{percent:.1} %"),
        _ => format!("{percent:.0} %"),
    }
}

/// Bytes, in the unit that suits them.
pub(super) fn bytes(value: u64) -> String {
    const UNITS: [(u64, &str); 6] = [
        (1 << 60, "EiB"),
        (1 << 50, "PiB"),
        (1 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
    ];
    match UNITS.iter().find(|(unit, _)| value >= *unit) {
        None => plural(value, "byte"),
        Some((unit, name)) if value.is_multiple_of(*unit) => format!("{} {name}", value / unit),
        Some((unit, name)) => format!("{:.1} {name}", value as f64 / *unit as f64),
    }
}

/// A step in an address space.
pub(super) fn distance(step: i64) -> String {
    let length = bytes(step.unsigned_abs());
    match step {
        0 => "at the same address".into(),
        1.. => format!("{length} further"),
        _ => format!("{length} back"),
    }
}

pub(super) fn duration(value: u64, unit: Unit) -> String {
    match unit {
        Unit::Events => plural(value, "event"),
        Unit::Nanoseconds => nanoseconds(value),
    }
}

fn nanoseconds(value: u64) -> String {
    match value {
        0..1_000 => format!("{value} ns"),
        1_000..1_000_000 => format!("{:.1} µs", value as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", value as f64 / 1e6),
        _ => format!("{:.1} s", value as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [number(0), number(999), number(1000), number(1_234_567)],
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!([bytes(1), bytes(4096), bytes(5000)], ["1 byte", "4 KiB", "4.9 KiB"]);
        assert_eq!([percent(0, 0), percent(1, 3), percent(1, 10_000)], ["0 %", "33 %", "under 0.1 %"]);
        assert_eq!([percent(9_999, 10_000), percent(3, 3)], ["99.9 %", "100 %"]);
        assert_eq!(
            [distance(0), distance(64), distance(-4096)],
            ["at the same address", "64 bytes further", "4 KiB back"]
        );
        assert_eq!([plural(1, "access"), plural(2, "access")], ["1 access", "2 accesses"]);
    }
}
