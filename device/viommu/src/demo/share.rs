//! Scenes 3 to 6: a device works on the pointers of processes. The guest's code is the same for each architecture.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use pgtable_formats::format::Attrs;
use pgtable_formats::{Access, AccessKind, Gpa, Pasid};
use viommu_guest::tables::{AddressSpace, PasidTable, SpaceOptions, Style, TableOptions};
use viommu_guest::{Endpoint, Hardware};
use viommu_wire::{DomainId, FaultReason, Iova, IovaRange, RequestType, TableDescriptor};

use super::begin::{SMMUV3_NAME, VTD_NAME};
use super::engine::Engine;
use super::facts::{Change, Fault, Faults, Handover, Hex, Process as ProcessFacts, Seen, Sent};
use super::guest::{Forbidden, Guest, PAGE, PAGE_LEN, amount, same};
use super::machine::Machine;

/// What every process reads from, and where it wants the copy. Both are the same in all of them.
const SOURCE: Iova = Iova(0x7f00_0000_0000);
const TARGET: Iova = Iova(0x7f00_0010_0000);
/// Nothing is there in any process.
const NOWHERE: Iova = Iova(0x7f00_dead_0000);
/// Pages of either.
const PAGES: u64 = 2;
const LENGTH: u64 = PAGES * PAGE;
/// Bytes that are looked at for a text.
const GLANCE: usize = 64;

/// An endpoint whose device works for processes.
pub(super) struct Shared {
    engine: Engine,
    pasids: PasidTable,
    processes: Vec<Process>,
    words: &'static Words,
}

/// A process of the guest.
struct Process {
    name: char,
    space: AddressSpace,
    pasid: Pasid,
    /// Its pages, where the processor finds them.
    source: Vec<Gpa>,
    target: Vec<Gpa>,
}

/// What an architecture calls things.
struct Words {
    hardware: &'static str,
    table: &'static str,
    unmapped: &'static str,
    denied: &'static str,
    no_process: &'static str,
}

const SMMUV3: Words = Words {
    hardware: SMMUV3_NAME,
    table: "context-descriptor table",
    unmapped: "F_TRANSLATION",
    denied: "F_PERMISSION",
    no_process: "C_BAD_CD",
};

const VTD: Words = Words {
    hardware: VTD_NAME,
    table: "PASID directory",
    unmapped: "0x71",
    denied: "0x85",
    no_process: "0x59",
};

impl Shared {
    /// Makes processes, gives each a page table and a PASID, hands the table of PASIDs over, and lets the device copy
    /// for each of them.
    pub(super) fn start(
        machine: &Machine,
        guest: &mut Guest,
        endpoint: &Endpoint,
        names: &[char],
    ) -> anyhow::Result<(Self, Handover)> {
        let words = match endpoint.properties().hardware {
            Some(Hardware::Smmuv3(_)) => &SMMUV3,
            Some(Hardware::Vtd(_)) => &VTD,
            None => anyhow::bail!("no hardware walks tables for endpoint {}", endpoint.id()),
        };
        let engine = Engine::new(machine, endpoint.id());
        let (shared, sent) = guest.measure(|guest| {
            let domain = guest.driver.new_domain_id().context("no domain is left")?;
            let pasids = Self::pasid_table(guest, endpoint, domain)?;
            let mut shared = Self { engine, pasids, processes: Vec::new(), words };
            for &name in names {
                let process = Process::start(guest, endpoint, &mut shared.pasids, name)?;
                shared.processes.push(process);
            }
            shared.pasids.attach(&mut guest.driver)?;
            Ok(shared)
        })?;
        same("what the handover sent", sent, sends(&[(RequestType::AttachTable, 1)]))?;
        let (processes, sent_for_copies) = guest.measure(|guest| shared.copy_for_all(guest))?;
        same("what the copies sent", sent_for_copies, Sent::default())?;
        let table = match shared.pasids.descriptor() {
            Some(TableDescriptor::Smmuv3 { ste0, .. }) => {
                pgtable_formats::context::smmuv3::Ste0::from_bits(ste0).s1_context_ptr() << 6
            }
            Some(TableDescriptor::VtdPasidTable(table)) => table.directory.0,
            other => anyhow::bail!("a table of PASIDs was to be handed over, and not {other:?}"),
        };
        let facts = Handover {
            endpoint: endpoint.id().0,
            hardware: words.hardware,
            table_kind: words.table,
            table: Hex(table),
            format: shared.pasids.format(),
            sent,
            pointer: Hex(SOURCE.0),
            processes,
            sent_for_copies,
        };
        Ok((shared, facts))
    }

    /// The first process gets another page behind its pointer.
    pub(super) fn change(&mut self, guest: &mut Guest) -> anyhow::Result<Change> {
        let Self { engine, processes, words, .. } = self;
        let process = processes.first_mut().context("there is no process")?;
        let pasid = process.pasid;
        let old = *process.source.first().context("the process has no page")?;
        let new = guest.page()?;
        let page = IovaRange::from_length(SOURCE, PAGE).context("an empty page")?;
        let new_text = format!("process {}, the new page", process.name);
        guest.write(new, &filled(&new_text))?;

        let before = seen(engine, pasid)?;
        same(
            "what the device reads at first",
            &before,
            &Seen { page: Hex(old.0), text: text(process.name, 0) },
        )?;

        let remove = |guest: &mut Guest| Ok(process.space.unmap_unsynchronized(&mut guest.driver, page)?);
        let ((), sent_for_removal) = guest.measure(remove)?;
        same("what the removal sent", sent_for_removal, Sent::default())?;
        let walked = process.space.translate(&guest.driver, SOURCE, Access::READ);
        let table_says = walked.err().context("the page table still has the mapping")?.to_string();
        same("what the page table says", table_says.as_str(), words.unmapped)?;
        let stale = seen(engine, pasid).context("no stale translation shows")?;
        same("what the device reads after the removal", &stale, &before)?;

        let invalidate = |guest: &mut Guest| Ok(process.space.synchronize(&mut guest.driver)?);
        let ((), sent_for_invalidation) = guest.measure(invalidate)?;
        same("what the invalidation sent", sent_for_invalidation, sends(&[(RequestType::Invalidate, 1)]))?;
        let gone = guest.forbid(
            engine,
            &Forbidden {
                what: "the mapping that was taken away",
                pasid: Some(pasid),
                address: SOURCE,
                kind: AccessKind::Read,
                reason: FaultReason::Mapping,
                name: words.unmapped,
            },
        )?;

        let map = |guest: &mut Guest| Ok(process.space.map(&mut guest.driver, page, new, Attrs::READ)?);
        let ((), sent_for_new_mapping) = guest.measure(map)?;
        same("what the new mapping sent", sent_for_new_mapping, Sent::default())?;
        let after = seen(engine, pasid)?;
        same("what the device reads at last", &after, &Seen { page: Hex(new.0), text: new_text })?;
        if let Some(first) = process.source.first_mut() {
            *first = new;
        }
        Ok(Change {
            process: process.name,
            pasid: pasid.value(),
            pointer: Hex(SOURCE.0),
            before,
            table_says,
            sent_for_removal,
            stale,
            sent_for_invalidation,
            gone,
            sent_for_new_mapping,
            after,
        })
    }

    /// What the device must not do for the last process, and that it works on afterwards.
    pub(super) fn faults(&mut self, guest: &mut Guest) -> anyhow::Result<Faults> {
        let Self { engine, processes, words, .. } = self;
        let process = processes.last().context("there is no process")?;
        let highest = processes.iter().map(|process| process.pasid.value()).max().unwrap_or(0);
        let nobody = Pasid::new(highest + 1).context("no PASID is left")?;
        let forbidden = [
            Forbidden {
                what: "an unmapped address",
                pasid: Some(process.pasid),
                address: NOWHERE,
                kind: AccessKind::Write,
                reason: FaultReason::Mapping,
                name: words.unmapped,
            },
            Forbidden {
                what: "a read-only page",
                pasid: Some(process.pasid),
                address: SOURCE,
                kind: AccessKind::Write,
                reason: FaultReason::Mapping,
                name: words.denied,
            },
            Forbidden {
                what: "a PASID that nobody has",
                pasid: Some(nobody),
                address: SOURCE,
                kind: AccessKind::Read,
                reason: FaultReason::Unknown,
                name: words.no_process,
            },
        ];
        let events: anyhow::Result<Vec<Fault>> =
            forbidden.iter().map(|forbidden| guest.forbid(engine, forbidden)).collect();
        let events = events?;
        process.clear_target(guest)?;
        engine.copy(process.pasid, SOURCE, TARGET, LENGTH)?;
        let copied_afterwards = process.check_copy(guest)?;
        Ok(Faults { events, copied_afterwards })
    }

    /// Ends it all: the device reaches nothing any more, and the memory of the tables is given back.
    pub(super) fn end(mut self, guest: &mut Guest) -> anyhow::Result<()> {
        self.pasids.detach(&mut guest.driver)?;
        for Process { mut space, pasid, .. } in self.processes {
            ensure!(
                self.engine.leads(Some(pasid), TARGET, Access::WRITE).is_err(),
                "PASID {pasid} works although the endpoint was detached"
            );
            self.pasids.unbind(&mut guest.driver, Some(pasid), &mut space)?;
            space.release(&mut guest.driver).map_err(|(_, error)| error)?;
        }
        self.pasids.release(&mut guest.driver).map_err(|(_, error)| error)?;
        Ok(())
    }

    /// One table for all PASIDs that the hardware has.
    pub(super) fn pasid_table(
        guest: &mut Guest,
        endpoint: &Endpoint,
        domain: DomainId,
    ) -> anyhow::Result<PasidTable> {
        let options = TableOptions { style: Style::Table, ..TableOptions::default() };
        Ok(PasidTable::new(&mut guest.driver, endpoint, domain, options)?)
    }

    fn copy_for_all(&self, guest: &mut Guest) -> anyhow::Result<Vec<ProcessFacts>> {
        for process in &self.processes {
            self.engine.copy(process.pasid, SOURCE, TARGET, LENGTH)?;
        }
        let mut pages: Vec<Gpa> = Vec::new();
        let mut facts = Vec::new();
        for process in &self.processes {
            let copied = process.check_copy(guest)?;
            for (index, &page) in process.source.iter().enumerate() {
                let at = Iova(SOURCE.0 + index as u64 * PAGE);
                let guests =
                    process.space.translate(&guest.driver, at, Access::READ).map(|found| found.apply(at));
                same("where the page table leads", guests, Ok(page))?;
                same(
                    "where the device gets",
                    self.engine.leads(Some(process.pasid), at, Access::READ),
                    Ok(page),
                )?;
                ensure!(!pages.contains(&page), "two processes have page {page}");
                pages.push(page);
            }
            facts.push(ProcessFacts {
                name: process.name,
                pasid: process.pasid.value(),
                page_table: Hex(process.space.root().0),
                pages: process.source.iter().map(|page| Hex(page.0)).collect(),
                text: seen(&self.engine, process.pasid)?.text,
                copied,
            });
        }
        Ok(facts)
    }
}

impl Process {
    fn start(
        guest: &mut Guest,
        endpoint: &Endpoint,
        pasids: &mut PasidTable,
        name: char,
    ) -> anyhow::Result<Self> {
        let mut space = AddressSpace::new(&mut guest.driver, endpoint, SpaceOptions::default())?;
        let source = Self::memory(guest, &mut space, SOURCE, Attrs::READ)?;
        let target = Self::memory(guest, &mut space, TARGET, Attrs::READ_WRITE)?;
        for (index, &page) in source.iter().enumerate() {
            guest.write(page, &filled(&text(name, index)))?;
        }
        let pasid = pasids.bind(&mut guest.driver, &mut space)?;
        Ok(Self { name, space, pasid, source, target })
    }

    /// Maps pages from `at` on. They do not follow each other in memory, as those of a real process do not.
    fn memory(
        guest: &mut Guest,
        space: &mut AddressSpace,
        at: Iova,
        attrs: Attrs,
    ) -> anyhow::Result<Vec<Gpa>> {
        let mut pages = (0..PAGES).map(|_| guest.page()).collect::<anyhow::Result<Vec<Gpa>>>()?;
        pages.reverse();
        for (index, &page) in pages.iter().enumerate() {
            let range =
                IovaRange::from_length(Iova(at.0 + index as u64 * PAGE), PAGE).context("an empty page")?;
            space.map(&mut guest.driver, range, page, attrs)?;
        }
        let adjoining =
            pages.windows(2).any(|pair| matches!(pair, [a, b] if a.checked_add(PAGE) == Some(*b)));
        ensure!(!adjoining, "pages follow each other");
        Ok(pages)
    }

    fn clear_target(&self, guest: &Guest) -> anyhow::Result<()> {
        self.target.iter().try_for_each(|&page| guest.write(page, &[0; PAGE_LEN]))
    }

    /// Compares what the device wrote, page by page, as the processor sees it. Gives the number of bytes.
    fn check_copy(&self, guest: &Guest) -> anyhow::Result<u64> {
        let mut copied = 0;
        for (&source, &target) in self.source.iter().zip(&self.target) {
            let [expected, found] = [source, target].map(|page| guest.read(page, PAGE_LEN));
            let what = format!("the copy that process {} has at {target}", self.name);
            ensure!(expected? == found?, "{what} differs from its source");
            copied += PAGE;
        }
        Ok(copied)
    }
}

/// What stands in page `index` of a process.
fn text(process: char, index: usize) -> String {
    format!("process {process}, page {}", index + 1)
}

/// A page full of `text`.
fn filled(text: &str) -> Vec<u8> {
    format!("{text}. ").into_bytes().into_iter().cycle().take(PAGE_LEN).collect()
}

/// What the device reads through the pointer, and where it gets it from.
fn seen(engine: &Engine, pasid: Pasid) -> anyhow::Result<Seen> {
    let mut bytes = [0; GLANCE];
    engine.read(Some(pasid), SOURCE, &mut bytes)?;
    let page = engine.leads(Some(pasid), SOURCE, Access::READ).map_err(|cause| anyhow::anyhow!("{cause}"))?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.split_once('.').map_or(text.as_ref(), |(text, _)| text);
    Ok(Seen { page: Hex(page.0), text: text.to_owned() })
}

/// What these requests amount to when one kick announces each.
fn sends(kinds: &[(RequestType, u64)]) -> Sent {
    let kinds: BTreeMap<_, _> = kinds.iter().map(|(kind, number)| (kind.name(), *number)).collect();
    amount(&kinds, kinds.values().sum())
}
