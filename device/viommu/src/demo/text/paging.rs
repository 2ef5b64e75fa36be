//! Scene 7 in words.

use std::fmt::{self, Display, Formatter};

use super::super::facts::{self, PageRequest};
use super::{Paging, heading, new_table, pairs, print_table, sent};

impl Display for Paging<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let [first, second] = self.0;
        let title = format!("Memory on demand, and a process that is killed ({})", first.hardware);
        heading(f, 7, &title)?;
        let pages = first.length >> 12;
        writeln!(
            f,
            "\
The device of endpoint {} can wait for memory. {} processes have {} MiB of addresses each, from
{} on, and have written to every other one of {pages} pages there; nothing else is behind
the addresses. For each of them, {} bytes at a time and taking turns, the device copies these
{pages} pages to {}. Where it meets no page it waits, and asks the guest for it.

Each page request, by group, with the answer. The pages behind it are there from then on:
",
            first.endpoint,
            first.processes.len(),
            first.area_bytes >> 20,
            first.area_first,
            first.burst,
            first.target,
        )?;
        requests(f, first)?;
        writeln!(f)?;
        kill(f, first)?;
        writeln!(f, "\nThe same guest code at endpoint {} ({}).\n", second.endpoint, second.hardware)?;
        pairs(f, &[("handed over before", handed_over(first)), ("handed over here", handed_over(second))])?;
        let same = |[first, second]: [&PageRequest; 2]| {
            (first.pasid, first.access, first.address, first.group, first.answer)
                == (second.pasid, second.access, second.address, second.group, second.answer)
        };
        let mut pairs = first.requests.iter().zip(&second.requests).map(|(first, second)| [first, second]);
        if first.requests.len() == second.requests.len() && pairs.all(same) {
            writeln!(
                f,
                "\nThe device asked for the same pages in the same order, and got the same answers.\n"
            )?;
        } else {
            writeln!(f)?;
            requests(f, second)?;
            writeln!(f)?;
        }
        kill(f, second)
    }
}

/// A row for each page, a column for each process: they all use the same pointers.
fn requests(f: &mut Formatter<'_>, facts: &facts::Paging) -> fmt::Result {
    let mut header = vec!["the device asks for".to_owned()];
    header.extend(facts.processes.iter().map(|process| format!("{}, PASID {}", process.name, process.pasid)));
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let mut table = new_table(&header);
    let mut rows: Vec<(&str, facts::Hex)> = Vec::new();
    for request in &facts.requests {
        if !rows.contains(&(request.access, request.address)) {
            rows.push((request.access, request.address));
        }
    }
    for (access, address) in rows {
        let mut row = vec![format!("{access} {address}")];
        row.extend(facts.processes.iter().map(|process| {
            let is_this = |request: &&PageRequest| {
                (request.pasid, request.access, request.address) == (process.pasid, access, address)
            };
            let cells: Vec<String> = facts.requests.iter().filter(is_this).map(cell).collect();
            cells.join(", ")
        }));
        table.add_row(row);
    }
    print_table(f, &mut table, 4)
}

fn cell(request: &PageRequest) -> String {
    format!("group {}: {}", request.group, request.answer)
}

fn kill(f: &mut Formatter<'_>, facts: &facts::Paging) -> fmt::Result {
    let facts::Kill { process, copied, waiting, watched, .. } = &facts.kill;
    let kill = &facts.kill;
    writeln!(
        f,
        "\
Process {process} is killed with {copied} of its {} bytes copied, while the device waits for it:
the guest has taken in one of its page requests, and another one lies in the event queue.
",
        facts.length,
    )?;
    let request = |sent_: &facts::Sent| sent(sent_).to_lowercase();
    let answered = match (kill.answered_by_device, kill.answered_by_guest) {
        (_, 0) => "by the device, at the unbind".to_owned(),
        (0, _) => "by the guest".to_owned(),
        (device, guest) => format!("{device} by the device, {guest} by the guest"),
    };
    let others: Vec<String> = facts
        .processes
        .iter()
        .filter(|process| process.finished)
        .map(|process| process.name.to_string())
        .collect();
    let lines = [
        (
            "the process ends".to_owned(),
            format!("its page table is emptied; {}", request(&kill.sent_for_exit)),
        ),
        ("device reads again".to_owned(), "a page that it had read before: it waits".to_owned()),
        (
            "guest unbinds it".to_owned(),
            format!("{}, and the event queue is drained", request(&kill.sent_for_unbind)),
        ),
        (format!("{waiting} accesses waited"), format!("all INVALID, {answered}")),
        (
            "device goes on".to_owned(),
            format!("{} accesses tried, none passed: {}", kill.refused_afterwards, kill.refusal),
        ),
        (
            "memory it had".to_owned(),
            format!("{watched} bytes, used for something else at once: none was changed"),
        ),
        (
            format!("{} go on", others.join(" and ")),
            format!("{} bytes each, every one compared", facts.length),
        ),
    ];
    pairs(f, &lines)?;
    let (asked, switches) = (facts.requests.len(), facts.switches);
    writeln!(
        f,
        "\nIn all {asked} page requests; the device went over from one process to another {switches} times."
    )
}

fn handed_over(facts: &facts::Paging) -> String {
    let what = if facts.one_table { "one table for all PASIDs" } else { "a page table for each PASID" };
    format!("{what} (format {})", facts.format)
}
