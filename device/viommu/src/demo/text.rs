//! The story in words: each scene from its facts.

mod paging;

use std::fmt::{self, Display, Formatter};

use comfy_table::{CellAlignment, Table, presets};

use super::facts::{self, Hex, Sent};

/// What comes before the first scene.
pub(super) struct Opening;
/// Scene 1.
pub(super) struct Machine<'a>(pub(super) &'a facts::Machine);
/// Scene 2.
pub(super) struct Probe<'a>(pub(super) &'a facts::Probe);
/// Scene 3.
pub(super) struct Handover<'a>(pub(super) &'a facts::Handover);
/// Scene 4.
pub(super) struct Change<'a>(pub(super) &'a facts::Change);
/// Scene 5.
pub(super) struct Faults<'a>(pub(super) &'a facts::Faults);
/// Scene 6.
pub(super) struct OtherVendor<'a>(pub(super) &'a facts::Sharing);
/// Scene 7.
pub(super) struct Paging<'a>(pub(super) &'a [facts::Paging; 2]);
/// Scene 8.
pub(super) struct Comparison<'a>(pub(super) &'a facts::Comparison);
/// What comes after the last scene.
pub(super) struct Closing;

const INDENT: &str = "    ";

impl Display for Opening {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(
            "\
A guest hands its own page tables to an IOMMU

Guest, hypervisor and devices are all in this one process. They share one guest memory, and
the guest talks to its IOMMU through virtio queues in that memory. What follows was measured
or read back, and compared with what must come out, before it was printed.
",
        )
    }
}

impl Display for Machine<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let facts = self.0;
        heading(f, 1, "What is on the machine")?;
        f.write_str(
            "\
A device reads and writes memory by itself. An IOMMU stands in between: it translates each
address that a device uses, or refuses the access. A device behind it is called an endpoint.

",
        )?;
        let (first, last) = (facts.memory_first, facts.memory_last);
        let mebibytes = facts.memory_bytes >> 20;
        let mut lines = vec![("guest memory".to_owned(), format!("{first} to {last}, {mebibytes} MiB"))];
        lines.push((
            "IOMMU".to_owned(),
            format!("virtio-iommu with {} queues in guest memory", facts.queues.len()),
        ));
        for queue in &facts.queues {
            let what = format!("{} entries, at {}", queue.entries, queue.at);
            lines.push((format!("  for {}", queue.purpose), what));
        }
        for endpoint in &facts.endpoints {
            let wait = if endpoint.can_wait { "; it can wait for memory" } else { "" };
            let what = format!("a DMA engine behind an {}{wait}", endpoint.hardware);
            lines.push((format!("endpoint {}", endpoint.endpoint), what));
        }
        pairs(f, &lines)?;
        let fault = &facts.at_first;
        writeln!(f)?;
        writeln!(
            f,
            "\
Nothing is allowed yet. Endpoint {} tried to read {} and was refused: {}.
The guest was told by an event: {}.",
            fault.endpoint,
            fault.address,
            fault.architecture,
            event(fault),
        )
    }
}

impl Display for Probe<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let facts = self.0;
        heading(f, 2, &format!("What the guest learns about endpoint {}", facts.endpoint))?;
        writeln!(f, "The guest asks what stands behind the endpoint. {}: PROBE.\n", sent(&facts.sent))?;
        let sizes: Vec<String> = facts.page_sizes.iter().map(|size| format!("{} KiB", size >> 10)).collect();
        let formats: Vec<String> = facts.table_formats.iter().map(u8::to_string).collect();
        let mut lines = vec![
            ("hardware", format!("{}; it can walk page tables that the guest built", facts.hardware)),
            ("page sizes", sizes.join(", ")),
            ("addresses", format!("{} bits", facts.address_bits)),
            ("PASIDs", format!("{} bits; a PASID says for which process an access is", facts.pasid_bits)),
            ("table formats", format!("{} (by number)", formats.join(", "))),
        ];
        for reserved in &facts.reserved {
            let what =
                format!("{} to {} ({}): not to be mapped", reserved.first, reserved.last, reserved.kind);
            lines.push(("reserved", what));
        }
        pairs(f, &lines)
    }
}

impl Display for Handover<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let facts = self.0;
        heading(f, 3, &format!("Processes share their addresses with a device ({})", facts.hardware))?;
        writeln!(
            f,
            "\
The guest builds a page table for each of {} processes, gives each a PASID, and enters them in
a {} at {}. Then it hands that table over.
{}: ATTACH_TABLE.

All processes use the same pointer, {}. What the device finds there:
",
            facts.processes.len(),
            facts.table_kind,
            facts.table,
            sent(&facts.sent),
            facts.pointer,
        )?;
        processes(f, facts)?;
        copies(f, facts)
    }
}

impl Display for Change<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        heading(f, 4, "The guest changes a mapping")?;
        f.write_str(
            "\
Hardware keeps translations that it used. A change counts when the guest has sent INVALIDATE.

",
        )?;
        change(f, self.0)
    }
}

impl Display for Faults<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        heading(f, 5, "What the guest did not allow")?;
        f.write_str(
            "\
The device tries what it must not do. Each access is refused, and the guest gets one event for
it, with endpoint, PASID, address and reason. The last column is the hardware's own name.

",
        )?;
        faults(f, self.0)
    }
}

impl Display for OtherVendor<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let facts = self.0;
        let handover = &facts.handover;
        heading(f, 6, &format!("The same guest code with other hardware ({})", handover.hardware))?;
        writeln!(
            f,
            "\
Endpoint {}: other page tables, and a {} instead, at {}.
{}: ATTACH_TABLE.
",
            handover.endpoint,
            handover.table_kind,
            handover.table,
            sent(&handover.sent),
        )?;
        processes(f, handover)?;
        copies(f, handover)?;
        writeln!(f)?;
        change(f, &facts.change)?;
        writeln!(f)?;
        faults(f, &facts.faults)
    }
}

impl Display for Comparison<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let facts = self.0;
        heading(f, 8, &format!("{} buffers: what each way sends", facts.buffers))?;
        writeln!(
            f,
            "\
Endpoint {} writes {} buffers of {} bytes that lie scattered in memory. A driver maps some
at a time, lets the device work, and unmaps them; a process that is bound just has them. A
kick tells the hypervisor to look into the queue, for one request or for many.
",
            facts.endpoint, facts.buffers, facts.buffer_bytes,
        )?;
        let mut table = new_table(&["in all", "sent", "at a time", "requests", "kicks", "bytes", "once"]);
        let mut each = new_table(&["per buffer", "at a time", "requests", "kicks", "bytes"]);
        for way in &facts.ways {
            let batch = way.batch.to_string();
            let once = way.before.requests + way.after.requests;
            let kinds: Vec<String> =
                way.kinds.iter().map(|(kind, number)| format!("{number} {kind}")).collect();
            let kinds = if kinds.is_empty() { "nothing".to_owned() } else { kinds.join(", ") };
            table.add_row([
                way.way.to_owned(),
                kinds,
                batch.clone(),
                way.sent.requests.to_string(),
                way.sent.notifications.to_string(),
                way.sent.bytes.to_string(),
                once.to_string(),
            ]);
            each.add_row([
                way.way.to_owned(),
                batch,
                format!("{:.3}", way.per_buffer.requests),
                format!("{:.3}", way.per_buffer.notifications),
                format!("{:.1}", way.per_buffer.bytes),
            ]);
        }
        print_table(f, &mut table, 2)?;
        writeln!(f)?;
        print_table(f, &mut each, 1)?;
        f.write_str(
            "
bytes   of requests and answers, without the queue's own descriptors
once    requests before the first buffer and after the last one, not counted in the others

MAP and UNMAP      The device keeps the page table. Each buffer needs a MAP; one UNMAP may
                   cover a batch.
handover           The guest edits its own page table, which sends nothing. It still has to
                   send an INVALIDATE, and wait for the answer, before it uses unmapped
                   memory for something else; one may cover a batch.
process bound once The buffers are memory that the process has mapped anyway, and stay so.
                   An INVALIDATE is due only when the process loses memory.

",
        )?;
        let (moved, closed): (u64, u64) =
            facts.ways.iter().fold((0, 0), |(moved, closed), way| (moved + way.moved, closed + way.closed));
        writeln!(
            f,
            "Compared: {moved} bytes that the device wrote. Buffers that it could not reach any more once"
        )?;
        writeln!(f, "they were unmapped: {closed}.")
    }
}

impl Display for Closing {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Everything came out as it must.")
    }
}

impl Display for Hex {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

fn heading(f: &mut Formatter<'_>, number: u32, title: &str) -> fmt::Result {
    let title = format!("{number}. {title}");
    writeln!(f, "{title}\n{}\n", "-".repeat(title.len()))
}

/// Names and values, aligned.
fn pairs<N: AsRef<str>>(f: &mut Formatter<'_>, lines: &[(N, String)]) -> fmt::Result {
    let width = lines.iter().map(|(name, _)| name.as_ref().len()).max().unwrap_or(0);
    lines.iter().try_for_each(|(name, value)| writeln!(f, "{INDENT}{:width$}  {value}", name.as_ref()))
}

fn sent(sent: &Sent) -> String {
    if sent.requests == 0 {
        return "No request".to_owned();
    }
    let Sent { requests, notifications, bytes } = sent;
    let plural = |number: u64, one: &str| format!("{number} {one}{}", if number == 1 { "" } else { "s" });
    format!("{}, {}, {bytes} bytes", plural(*requests, "request"), plural(*notifications, "kick"))
}

fn event(fault: &facts::Fault) -> String {
    let facts::Fault { reason, endpoint, address, .. } = fault;
    let pasid = fault.pasid.map_or(String::new(), |pasid| format!(", PASID {pasid}"));
    format!("reason {reason}, endpoint {endpoint}{pasid}, address {address}")
}

fn processes(f: &mut Formatter<'_>, facts: &facts::Handover) -> fmt::Result {
    let mut table =
        new_table(&["process", "PASID", "page table", "memory behind the pointer", "reads there"]);
    for process in &facts.processes {
        let pages: Vec<String> = process.pages.iter().map(Hex::to_string).collect();
        table.add_row([
            process.name.to_string(),
            process.pasid.to_string(),
            process.page_table.to_string(),
            pages.join(", then "),
            format!("\"{}\"", process.text),
        ]);
    }
    print_table(f, &mut table, 5)
}

fn copies(f: &mut Formatter<'_>, facts: &facts::Handover) -> fmt::Result {
    let copied: u64 = facts.processes.iter().map(|process| process.copied).sum();
    writeln!(f, "\nFor each of them the device copied from that pointer to another one of the process:")?;
    let sent = sent(&facts.sent_for_copies).to_lowercase();
    writeln!(f, "{copied} bytes in all, every one compared; {sent} sent.")
}

fn change(f: &mut Formatter<'_>, facts: &facts::Change) -> fmt::Result {
    let read = |seen: &facts::Seen| format!("\"{}\", at {}", seen.text, seen.page);
    let request = |facts: &Sent| sent(facts).to_lowercase();
    let lines = [
        (format!("device reads {} for {}", facts.pointer, facts.process), read(&facts.before)),
        (
            "guest takes the page out".to_owned(),
            format!("{}; its table says {} now", request(&facts.sent_for_removal), facts.table_says),
        ),
        ("device reads again".to_owned(), format!("{}: STALE", read(&facts.stale))),
        ("guest sends INVALIDATE".to_owned(), request(&facts.sent_for_invalidation)),
        (
            "device reads again".to_owned(),
            format!("refused, {}: {}", facts.gone.architecture, facts.gone.meaning),
        ),
        ("guest enters another page".to_owned(), request(&facts.sent_for_new_mapping)),
        ("device reads again".to_owned(), read(&facts.after)),
    ];
    pairs(f, &lines)
}

fn faults(f: &mut Formatter<'_>, facts: &facts::Faults) -> fmt::Result {
    let header = ["the device tried", "endpoint", "PASID", "address", "reason", "hardware says"];
    let mut table = new_table(&header);
    for fault in &facts.events {
        table.add_row([
            format!("{}: {}", fault.access, fault.what),
            fault.endpoint.to_string(),
            fault.pasid.map_or("-".to_owned(), |pasid| pasid.to_string()),
            fault.address.to_string(),
            fault.reason.to_owned(),
            fault.architecture.clone(),
        ]);
    }
    print_table(f, &mut table, 6)?;
    writeln!(f)?;
    let meanings = facts.events.iter().map(|fault| (fault.architecture.as_str(), fault.meaning.to_owned()));
    pairs(f, &meanings.collect::<Vec<_>>())?;
    writeln!(f, "\nThe device works on: {} bytes copied for the same process.", facts.copied_afterwards)
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(header);
    table
}

/// The first `texts` columns hold words, the others numbers.
fn print_table(f: &mut Formatter<'_>, table: &mut Table, texts: usize) -> fmt::Result {
    for column in table.column_iter_mut().skip(texts) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string().lines().try_for_each(|line| writeln!(f, "{INDENT}{line}"))
}
