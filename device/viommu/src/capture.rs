//! Captures: IOMMU tables that a real kernel built, and what they must translate to.
//!
//! A capture is a folder with `capture.json` and `memory.bin`; `tests/captures/README.md` describes the format. The
//! files come from strangers: whatever they hold, loading ends in a capture or in an error.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use pgtable_formats::context::vtd::{ContextEntry, ContextWord0};
use pgtable_formats::context::{smmuv3, vtd};
use pgtable_formats::{Gpa, Iova, IovaRange, Pasid};
use serde::Deserialize;
use viommu_device::host::{EndpointCaps, TableCaps};
use viommu_wire::{AttachTable, DomainId, EndpointId, Request, TableDescriptor, VtdPasidTable};

use crate::machine::Machine;
use crate::notation;

/// Bytes of a page of `memory.bin`.
pub(crate) const PAGE: u64 = PAGE_BYTES as u64;
const PAGE_BYTES: usize = 4096;
/// Most bytes that guest memory may span.
const MAX_SPAN: u64 = 8 << 30;
/// Most bytes that are read of either file.
const MAX_FILE: u64 = 256 << 20;
/// log2 of the number of directory entries where PDTS is 0 (VT-d 9.4).
const MIN_DIRECTORY_LG2: u8 = 7;

/// A capture.
#[derive(Clone, Debug)]
pub(crate) struct Capture {
    /// Where it comes from, in its maker's words.
    pub(crate) source: String,
    /// The ID registers.
    pub(crate) registers: IdRegisters,
    /// In the order of the file.
    pub(crate) endpoints: Vec<CapturedEndpoint>,
    /// The pages that hold tables.
    pub(crate) pages: Vec<(Gpa, Box<[u8]>)>,
    /// First and last address of guest memory, whole pages: it covers tables and outputs.
    pub(crate) memory: (Gpa, Gpa),
}

/// The ID registers of the hardware that walks the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IdRegisters {
    /// SMMU_IDR0, 1, 3 and 5.
    Smmuv3(smmuv3::IdRegisters),
    /// Capability and Extended Capability Register.
    Vtd(vtd::CapRegisters),
}

/// An endpoint, its table and what that must translate.
#[derive(Clone, Debug)]
pub(crate) struct CapturedEndpoint {
    pub(crate) id: EndpointId,
    /// What ATTACH_TABLE says of its table.
    pub(crate) table: TableDescriptor,
    /// Sorted and disjoint.
    pub(crate) mappings: Vec<CapturedMapping>,
}

/// What is mapped, all of it readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CapturedMapping {
    pub(crate) range: IovaRange,
    /// Where the first address leads.
    pub(crate) output: Gpa,
    pub(crate) write: bool,
    /// Whether unprivileged accesses pass.
    pub(crate) user: bool,
}

impl Capture {
    /// Reads a folder.
    pub(crate) fn load(folder: &Path) -> anyhow::Result<Self> {
        let json = read(&folder.join("capture.json"))?;
        let memory = read(&folder.join("memory.bin"))?;
        Self::parse(&json, &memory).with_context(|| format!("capture {}", folder.display()))
    }

    fn parse(json: &[u8], memory: &[u8]) -> anyhow::Result<Self> {
        let file: CaptureFile = serde_json::from_slice(json).context("capture.json")?;
        let registers = file.registers.decode(file.iommu)?;
        ensure!(!file.endpoints.is_empty(), "there are no endpoints");
        let mut ids = BTreeSet::new();
        let mut endpoints = Vec::with_capacity(file.endpoints.len());
        for endpoint in &file.endpoints {
            let id = endpoint.id;
            ensure!(ids.insert(id), "endpoint {id} is listed twice");
            endpoints.push(endpoint.decode(file.iommu).with_context(|| format!("endpoint {id}"))?);
        }
        let pages = pages(memory).context("memory.bin")?;
        let memory = span(&endpoints, &pages)?;
        Ok(Self { source: file.source, registers, endpoints, pages, memory })
    }

    /// The endpoints, all with hardware of these registers.
    pub(crate) fn caps(&self, registers: IdRegisters) -> Vec<(EndpointId, EndpointCaps)> {
        let caps = EndpointCaps { tables: Some(registers.caps()), ..EndpointCaps::default() };
        self.endpoints.iter().map(|endpoint| (endpoint.id, caps.clone())).collect()
    }

    /// Writes the tables to guest memory.
    pub(crate) fn fill(&self, machine: &Machine) -> anyhow::Result<()> {
        self.pages.iter().try_for_each(|(at, page)| machine.write(*at, page))
    }

    /// The request that binds the table of the endpoint with this ID, to the domain that is its place in the list plus
    /// one; `None` where there is no such endpoint.
    pub(crate) fn attach_table(&self, id: EndpointId) -> Option<Request> {
        let (domain, endpoint) = (1u32..).zip(&self.endpoints).find(|(_, endpoint)| endpoint.id == id)?;
        Some(Request::AttachTable(AttachTable {
            domain: DomainId(domain),
            endpoint: id,
            table: endpoint.table,
        }))
    }
}

impl IdRegisters {
    /// What tables may use.
    pub(crate) fn caps(self) -> TableCaps {
        match self {
            Self::Smmuv3(registers) => TableCaps::Smmuv3(smmuv3::Caps::from_registers(registers)),
            Self::Vtd(registers) => TableCaps::Vtd(vtd::Caps::from_registers(registers)),
        }
    }
}

impl CapturedMapping {
    /// Where the last address leads.
    pub(crate) fn output_last(&self) -> Gpa {
        // `decode` checked the sum.
        Gpa(self.output.0.saturating_add(self.range.length_minus_one()))
    }
}

/// `capture.json`.
#[derive(Deserialize)]
struct CaptureFile {
    #[serde(default)]
    source: String,
    iommu: Iommu,
    registers: RegistersFile,
    endpoints: Vec<EndpointFile>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Iommu {
    Smmuv3,
    Vtd,
}

#[derive(Deserialize)]
struct RegistersFile {
    idr0: Option<Word>,
    idr1: Option<Word>,
    idr3: Option<Word>,
    idr5: Option<Word>,
    cap: Option<Word>,
    ecap: Option<Word>,
}

#[derive(Deserialize)]
struct EndpointFile {
    id: u32,
    ste: Option<[Word; 2]>,
    context: Option<[Word; 4]>,
    pasid: Option<u32>,
    mappings: Vec<MappingFile>,
}

#[derive(Deserialize)]
struct MappingFile {
    iova: Word,
    last: Word,
    output: Word,
    write: bool,
    user: Option<bool>,
}

/// A 64-bit number: in JSON either a string as the console takes it, or a number.
#[derive(Clone, Copy, Deserialize)]
#[serde(try_from = "NumberOrText")]
struct Word(u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u64),
    Text(String),
}

impl TryFrom<NumberOrText> for Word {
    type Error = notation::NotationError;

    fn try_from(value: NumberOrText) -> Result<Self, Self::Error> {
        match value {
            NumberOrText::Number(number) => Ok(Self(number)),
            NumberOrText::Text(text) => notation::number(&text).map(Self),
        }
    }
}

impl RegistersFile {
    fn decode(&self, iommu: Iommu) -> anyhow::Result<IdRegisters> {
        let word = |name: &str, word: Option<Word>| match word {
            Some(Word(value)) => Ok(value),
            None => bail!("register {name} is missing"),
        };
        let word32 = |name: &str, value: Option<Word>| {
            u32::try_from(word(name, value)?).with_context(|| format!("register {name} has 32 bits"))
        };
        Ok(match iommu {
            Iommu::Smmuv3 => IdRegisters::Smmuv3(smmuv3::IdRegisters {
                idr0: word32("idr0", self.idr0)?,
                idr1: word32("idr1", self.idr1)?,
                idr3: word32("idr3", self.idr3)?,
                idr5: word32("idr5", self.idr5)?,
            }),
            Iommu::Vtd => IdRegisters::Vtd(vtd::CapRegisters {
                cap: word("cap", self.cap)?,
                ecap: word("ecap", self.ecap)?,
            }),
        })
    }
}

impl EndpointFile {
    fn decode(&self, iommu: Iommu) -> anyhow::Result<CapturedEndpoint> {
        let table = match iommu {
            Iommu::Smmuv3 => {
                let [ste0, ste1] = self.ste.context("`ste` is missing")?;
                TableDescriptor::Smmuv3 { ste0: ste0.0, ste1: ste1.0 }
            }
            Iommu::Vtd => {
                let words = self.context.context("`context` is missing")?;
                let untagged = self.pasid.context("`pasid` is missing")?;
                TableDescriptor::VtdPasidTable(pasid_table(words.map(|word| word.0), untagged)?)
            }
        };
        let mut mappings =
            self.mappings.iter().map(MappingFile::decode).collect::<anyhow::Result<Vec<_>>>()?;
        mappings.sort_by_key(|mapping| mapping.range.start());
        for (mapping, next) in mappings.iter().zip(mappings.iter().skip(1)) {
            let (range, next) = (mapping.range, next.range);
            ensure!(!range.overlaps(next), "mappings {range} and {next} overlap");
        }
        Ok(CapturedEndpoint { id: EndpointId(self.id), table, mappings })
    }
}

impl MappingFile {
    fn decode(&self) -> anyhow::Result<CapturedMapping> {
        let (first, last) = (Iova(self.iova.0), Iova(self.last.0));
        let range = IovaRange::new(first, last)
            .with_context(|| format!("mapping {first}-{last} ends before it starts"))?;
        let output = Gpa(self.output.0);
        ensure!(output.checked_add(range.length_minus_one()).is_some(), "output of mapping {range} wraps");
        Ok(CapturedMapping { range, output, write: self.write, user: self.user.unwrap_or(true) })
    }
}

/// The directory that a scalable-mode context entry points to.
fn pasid_table(words: [u64; 4], untagged: u32) -> anyhow::Result<VtdPasidTable> {
    let word0: ContextWord0 = ContextEntry::from_words(words).word0;
    ensure!(word0.present(), "the context entry is not present");
    Ok(VtdPasidTable {
        directory: Gpa(word0.directory() << 12),
        directory_lg2: MIN_DIRECTORY_LG2 + word0.pdts(),
        untagged: Pasid::new(untagged).with_context(|| format!("PASID {untagged} has more than 20 bits"))?,
    })
}

/// The records of `memory.bin`: a little-endian page address and the page.
fn pages(memory: &[u8]) -> anyhow::Result<Vec<(Gpa, Box<[u8]>)>> {
    const ADDRESS: usize = 8;
    const RECORD: usize = ADDRESS + PAGE_BYTES;
    let records = memory.chunks_exact(RECORD);
    ensure!(records.remainder().is_empty(), "length {} is no multiple of {RECORD}", memory.len());
    let mut pages = Vec::with_capacity(records.len());
    let mut seen = BTreeSet::new();
    for record in records {
        let Some((address, page)) = record.split_first_chunk::<ADDRESS>() else { bail!("record is cut off") };
        let address = Gpa(u64::from_le_bytes(*address));
        ensure!(address.0.is_multiple_of(PAGE), "page address {address} is not a multiple of {PAGE}");
        ensure!(seen.insert(address), "page {address} is there twice");
        pages.push((address, page.into()));
    }
    Ok(pages)
}

/// First and last address that appears in tables or outputs, rounded to pages.
fn span(endpoints: &[CapturedEndpoint], pages: &[(Gpa, Box<[u8]>)]) -> anyhow::Result<(Gpa, Gpa)> {
    let roots = endpoints.iter().filter_map(|endpoint| match endpoint.table {
        TableDescriptor::Smmuv3 { ste0, .. } => Some(smmuv3::Ste0::from_bits(ste0).s1_context_ptr() << 6),
        TableDescriptor::VtdPasidTable(table) => Some(table.directory.0),
        _ => None,
    });
    let tables = pages.iter().map(|(page, _)| page.0);
    let mappings = || endpoints.iter().flat_map(|endpoint| &endpoint.mappings);
    let firsts = mappings().map(|mapping| mapping.output.0);
    let lasts = mappings().map(|mapping| mapping.output_last().0);
    let addresses: BTreeSet<u64> = roots.chain(tables).chain(firsts).chain(lasts).collect();
    let (Some(first), Some(last)) = (addresses.first(), addresses.last()) else {
        bail!("there are no tables")
    };
    let (first, last) = (first & !(PAGE - 1), last | (PAGE - 1));
    ensure!(
        last - first < MAX_SPAN,
        "guest memory from {first:#x} to {last:#x} is more than the {} GiB that a capture may cover",
        MAX_SPAN >> 30
    );
    Ok((Gpa(first), Gpa(last)))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let context = || format!("cannot read {}", path.display());
    let file = File::open(path).with_context(context)?;
    let mut bytes = Vec::new();
    // One byte more than allowed tells a file that is too long; its length may be a lie (a pipe, /proc).
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).with_context(context)?;
    ensure!(bytes.len() as u64 <= MAX_FILE, "{} is longer than {} MiB", path.display(), MAX_FILE >> 20);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMMU: &str = r#"{"source":"test","iommu":"smmuv3",
        "registers":{"idr0":"0xd44101b","idr1":"0x2730010","idr3":"0x1414","idr5":"0x74"},
        "endpoints":[{"id":8,"ste":["0x44ec000b","0xd6"],
            "mappings":[{"iova":"0x2000","last":"0x2fff","output":"0x44a75000","write":false},
                        {"iova":"0x1000","last":"0x1fff","output":"0x44a76000","write":true}]}]}"#;

    fn page(address: u64) -> Vec<u8> {
        let mut record = address.to_le_bytes().to_vec();
        record.resize(8 + 4096, 0);
        record
    }

    fn error(json: &str, memory: &[u8]) -> String {
        format!("{:#}", Capture::parse(json.as_bytes(), memory).unwrap_err())
    }

    #[test]
    fn a_capture_is_sorted_and_spans_tables_and_outputs() {
        let capture = Capture::parse(SMMU.as_bytes(), &page(0x44ec_0000)).unwrap();
        assert_eq!(capture.memory, (Gpa(0x44a7_5000), Gpa(0x44ec_0fff)));
        let table = TableDescriptor::Smmuv3 { ste0: 0x44ec_000b, ste1: 0xd6 };
        let attach = AttachTable { domain: DomainId(1), endpoint: EndpointId(8), table };
        assert_eq!(capture.attach_table(EndpointId(8)), Some(Request::AttachTable(attach)));
        assert_eq!(capture.attach_table(EndpointId(9)), None);
        let endpoint = &capture.endpoints[0];
        assert_eq!(endpoint.mappings[0].range, IovaRange::new(Iova(0x1000), Iova(0x1fff)).unwrap());
        assert!(!endpoint.mappings[1].write);
    }

    #[test]
    fn malformed_captures_are_refused() {
        let memory = page(0x44ec_0000);
        let cases = [
            ("\"smmuv3\"", "\"amd\"", "unknown variant"),
            ("\"idr5\":\"0x74\"", "\"idr6\":\"0x74\"", "register idr5 is missing"),
            ("\"0x74\"", "\"0x100000074\"", "32 bits"),
            ("\"0x74\"", "\"74h\"", "not a number"),
            ("\"0x74\"", "-1", "capture.json"),
            ("\"ste\"", "\"context\"", "invalid length"),
            ("\"ste\"", "\"stx\"", "`ste` is missing"),
            ("\"0x1fff\"", "\"0xfff\"", "ends before it starts"),
            ("\"0x1fff\"", "\"0x2fff\"", "overlap"),
            ("\"0x44a75000\"", "\"0xfffffffffffff001\"", "wraps"),
            ("\"0x44a75000\"", "\"0x344a75000\"", "8 GiB"),
            ("\"endpoints\":[", "\"endpoints\":[],\"x\":[", "no endpoints"),
            ("}]}]}", "}]}", "capture.json"),
        ];
        for (from, to, expected) in cases {
            let json = SMMU.replacen(from, to, 1);
            assert_ne!(json, SMMU, "{from}");
            let error = error(&json, &memory);
            assert!(error.contains(expected), "{from} -> {to}: {error}");
        }
        assert!(error(SMMU, &memory[1..]).contains("no multiple of 4104"));
        assert!(error(SMMU, &page(0x44ec_0001)).contains("not a multiple of 4096"));
        assert!(error(SMMU, &[page(0x1000), page(0x1000)].concat()).contains("twice"));
        assert!(error("", &[]).contains("capture.json"));
    }
}
