//! Tables that this program's guest library did not build: random ones, and those of real kernels. Each access is
//! compared with what the software host makes of the same tables in the same memory.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail, ensure};
use pgtable_formats::context::smmuv3;
use pgtable_formats::leaf::vmsav8::{Granule, Vmsav8};
use pgtable_formats::{Fault, Gpa, Iova, Pasid};
use viommu_device::host::{FaultCause, Host as _, TableCaps};
use viommu_guest::Endpoint;
use viommu_host_iommufd::kernel::Iommufd;
use viommu_wire::TableDescriptor;

use super::faults::heeds_privilege;
use crate::capture::{Capture, CapturedEndpoint, IdRegisters};
use crate::hil::bench::{Bench, Station};
use crate::hil::check::{Stage, skip};
use crate::hil::compare::{Comparer, events};
use crate::hil::generate::{self, Layout, RandomTable, Shape};
use crate::hil::guest::{AT, BYTES, FIRST, GLANCE, Guest, UNTOUCHED, WORD, domain, memory};
use crate::hil::random::Random;

/// How many random tables a slow device is given.
const FEW: u32 = 2;

pub(super) fn random<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    const DATA_LG2: u8 = 21;
    const TABLE_PAGES: u64 = 64;
    let mut guest = stage.guest()?;
    let endpoint = guest.probe(stage.station(index)?)?;
    let caps = smmuv3_caps(&guest, &endpoint)?;
    let layout = Layout {
        tables: guest.block(18)?,
        table_pages: TABLE_PAGES,
        data: guest.block(DATA_LG2)?,
        data_bytes: 1 << DATA_LG2,
        nowhere: Gpa((FIRST.0 + BYTES).next_multiple_of(1 << 30)),
    };
    let wanted = stage.tables;
    let (seed, station) = (stage.seed, stage.bench.station(index)?);
    let tables = if station.is_slow() { wanted.min(FEW) } else { wanted };
    let shape = shape(&mut guest, station, &endpoint, &caps)?;
    // What was told of these is not to be taken for events of the tables.
    guest.faults(GLANCE)?;
    let mut comparer = Comparer::new(&guest, &endpoint, caps)?;
    let clean = vec![UNTOUCHED; 1 << DATA_LG2];
    guest.write(layout.data, &clean)?;
    for number in 0..tables {
        let table = generate::smmuv3(&mut Random::new(seed ^ u64::from(number) << 32), &layout, &caps, shape);
        place(&guest, &table)?;
        let result =
            comparer.table(&mut guest, station, &endpoint, table.descriptor, &table.probes, &|iova| {
                format!("; {}", table.way(iova))
            });
        result.with_context(|| format!("random table {number} of seed {seed}"))?;
        // Nothing was written that was not to be: each word that was is clean again.
        if guest.read(layout.data, clean.len())? != clean {
            comparer.differs(format!("table {number}: a write went to another place as well"));
            guest.write(layout.data, &clean)?;
        }
        comparer.number(number);
        if comparer.is_enough() {
            break;
        }
    }
    for what in left_out(shape) {
        stage.note(format!("left out: {what}"));
    }
    if tables < wanted {
        stage.note(format!("{tables} tables, not {wanted}: this device is slow"));
    }
    finish(stage, comparer, &format!("{tables} random tables (seed {seed})"))
}

pub(super) fn captured<B: Bench>(stage: &mut Stage<'_, B>, index: usize) -> anyhow::Result<()> {
    if stage.captures.is_empty() {
        return Err(skip("no captures were given (--captures FOLDER)"));
    }
    let mut checked = 0;
    for folder in stage.captures {
        let capture = Capture::load(folder)?;
        let name = folder
            .file_name()
            .map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into());
        if !matches!(capture.registers, IdRegisters::Smmuv3(_)) {
            stage.note(format!("{name}: not for an SMMUv3"));
            continue;
        }
        capture_on(stage, index, &capture, &name).with_context(|| format!("capture {name}"))?;
        checked += 1;
    }
    if checked == 0 { Err(skip("no capture is for this hardware")) } else { Ok(()) }
}

/// One capture, its tables bound to the device one after the other.
fn capture_on<B: Bench>(
    stage: &mut Stage<'_, B>,
    index: usize,
    capture: &Capture,
    name: &str,
) -> anyhow::Result<()> {
    const OWN: u64 = 4 << 20;
    // Memory where tables and buffers lie, and nowhere else; what the driver needs comes behind it.
    let tables = capture.pages.iter().map(|(at, _)| at.0);
    let mut chunks: BTreeSet<u64> = tables.map(chunk).collect();
    for mapping in capture.endpoints.iter().flat_map(|endpoint| &endpoint.mappings) {
        if !is_device(mapping.output) {
            chunks.extend((chunk(mapping.output.0)..=chunk(mapping.output_last().0)).step_by(CHUNK_STEP));
        }
    }
    let own = chunks.last().context("the capture is empty")? + CHUNK;
    let mut regions: Vec<(Gpa, usize)> = Vec::new();
    for at in chunks.into_iter().chain((own..own + OWN).step_by(CHUNK_STEP)) {
        match regions.last_mut() {
            Some((first, bytes)) if first.0 + *bytes as u64 == at => *bytes += CHUNK_STEP,
            _ => regions.push((Gpa(at), CHUNK_STEP)),
        }
    }
    let map = memory(&regions)?;
    let mut guest = Guest::start_with(stage.bench, map, (Gpa(own), Gpa(own + OWN - 1)))?;
    for (at, page) in &capture.pages {
        guest.write(*at, page)?;
    }
    let station = stage.bench.station(index)?;
    let endpoint = guest.probe(station)?;
    let caps = smmuv3_caps(&guest, &endpoint)?;
    let mut comparer = Comparer::new(&guest, &endpoint, caps)?;
    let mut mappings = 0;
    for table in &capture.endpoints {
        let probes = probes(table, if station.is_slow() { 1 } else { usize::MAX });
        mappings += table.mappings.len();
        comparer.expected = Some(table.clone());
        comparer.table(&mut guest, station, &endpoint, table.table, &probes, &|_| String::new())?;
        if comparer.is_enough() {
            break;
        }
    }
    comparer.expected = None;
    let count = capture.endpoints.len();
    finish(stage, comparer, &format!("{name}: {count} tables with {mappings} mappings ({})", capture.source))
}

const CHUNK: u64 = 1 << 16;
const CHUNK_STEP: usize = 1 << 16;

const fn chunk(at: u64) -> u64 {
    at & !(CHUNK - 1)
}

/// Below guest memory lie the registers of the machine that was captured: its interrupt controller.
fn is_device(output: Gpa) -> bool {
    output < FIRST
}

/// First and last word of each mapping, and what is beside it.
fn probes(table: &CapturedEndpoint, most: usize) -> Vec<Iova> {
    let mut probes = BTreeSet::from([0, (1 << 48) - 4, 1 << 48]);
    for mapping in table.mappings.iter().filter(|mapping| !is_device(mapping.output)).take(most) {
        let (first, last) = (mapping.range.start().0, mapping.range.last().0);
        probes.extend([first, last & !3]);
        probes.extend(first.checked_sub(4));
        probes.extend(last.checked_add(1));
    }
    probes.into_iter().map(Iova).collect()
}

fn smmuv3_caps<K: Iommufd>(guest: &Guest<K>, endpoint: &Endpoint) -> anyhow::Result<smmuv3::Caps> {
    match guest.machine.lock().device().host().caps(endpoint.id()).and_then(|caps| caps.tables.clone()) {
        Some(TableCaps::Smmuv3(caps)) if caps.granule_4k => Ok(caps),
        Some(TableCaps::Smmuv3(_)) => Err(skip("the tables have pages of 4 KiB, and this SMMUv3 has not")),
        _ => Err(skip("the tables are for an SMMUv3")),
    }
}

/// An empty table for untagged DMA with pages of 4 KiB and 48 bits of address, and the format of its page table.
pub(super) fn raw_table<K: Iommufd>(
    guest: &mut Guest<K>,
    caps: &smmuv3::Caps,
) -> anyhow::Result<(TableDescriptor, Vmsav8)> {
    let root = guest.page()?;
    let memory = &mut guest.driver.platform_mut().alloc;
    let spec = smmuv3::CdSpec {
        asid: 1,
        lower: Some(smmuv3::HalfSpec { root, granule: Granule::K4, input_bits: 48 }),
        upper: None,
        output_bits: caps.oas_bits,
        ds: false,
        mair: 0xff,
    };
    let descriptor = spec.encode(caps).context("this SMMUv3 has no tables of 4 KiB pages")?;
    let context = smmuv3::context_from_cd(&descriptor.words(), caps, descriptor.word0.stall())
        .map_err(|event| anyhow::anyhow!("the descriptor is not legal: {event}"))?;
    let format = *context.half(Iova(0)).context("the descriptor has no lower half")?;
    let table =
        smmuv3::CdTable::create(smmuv3::TableFormat::Linear, 0, smmuv3::Untagged::Pasid0, caps, memory)?;
    table.write(memory, Pasid::ZERO, &descriptor)?;
    let [ste0, ste1] = table.words();
    Ok((TableDescriptor::Smmuv3 { ste0, ste1 }, format))
}

/// What this hardware takes in the architecture's way, by a look at each.
fn shape<K: Iommufd>(
    guest: &mut Guest<K>,
    station: &mut Station,
    endpoint: &Endpoint,
    caps: &smmuv3::Caps,
) -> anyhow::Result<Shape> {
    let translation = Some(FaultCause::Table(Fault::Smmuv3(smmuv3::Event::FTranslation)));
    let (empty, far) = (guest.page()?, guest.page()?);
    guest.write(Gpa(far.0 + 8 * (AT.0 >> 30 & 0x1ff)), &generate::FAR_BLOCK.to_le_bytes())?;
    let address_size = Some(FaultCause::Table(Fault::Smmuv3(smmuv3::Event::FAddrSize)));
    Ok(Shape {
        privilege: heeds_privilege(guest, station)?,
        top_blocks: first_fault(guest, station, endpoint, caps, generate::READ_ONLY_BLOCK)? == translation,
        in_order: first_fault(guest, station, endpoint, caps, generate::read_only_table(empty))?
            == translation
            && first_fault(guest, station, endpoint, caps, generate::table(far))? == address_size,
    })
}

/// Why a write at [`AT`] is refused where this is the first entry of the first table.
fn first_fault<K: Iommufd>(
    guest: &mut Guest<K>,
    station: &mut Station,
    endpoint: &Endpoint,
    caps: &smmuv3::Caps,
    entry: u64,
) -> anyhow::Result<Option<FaultCause>> {
    let (table, format) = raw_table(guest, caps)?;
    guest.write(format.params().root, &entry.to_le_bytes())?;
    let domain = domain(guest)?;
    guest.driver.attach_table(domain, endpoint, table).context("ATTACH_TABLE")?;
    // What was told before is not the answer.
    guest.faults(GLANCE)?;
    station.write(AT, WORD)?;
    let events = events(guest, 1)?;
    guest.driver.detach(domain, endpoint.id()).context("DETACH")?;
    Ok(events.first().map(|event| event.cause))
}

/// What is left out of random tables on hardware that differs from the architecture there.
fn left_out(shape: Shape) -> Vec<&'static str> {
    [
        (
            shape.privilege,
            "entries that refuse unprivileged accesses: this hardware takes all for privileged ones",
        ),
        (
            shape.top_blocks,
            "blocks at level 0, which are reserved: this hardware takes them for blocks of 512 GiB",
        ),
        (
            shape.in_order,
            "entries that are refused for several reasons: this hardware names another one first",
        ),
    ]
    .into_iter()
    .filter_map(|(heeded, what)| (!heeded).then_some(what))
    .collect()
}

fn place<K: Iommufd>(guest: &Guest<K>, table: &RandomTable) -> anyhow::Result<()> {
    for (at, words) in &table.pages {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        guest.write(Gpa(*at), &bytes)?;
    }
    Ok(())
}

fn finish<B: Bench>(stage: &mut Stage<'_, B>, comparer: Comparer, what: &str) -> anyhow::Result<()> {
    let is_cut = comparer.is_enough();
    let Comparer { counts, differences, .. } = comparer;
    stage.note(format!("{what}: {counts}"));
    if differences.is_empty() {
        ensure!(counts.reached > 0 && counts.accesses > counts.reached, "the tables show nothing: {counts}");
        return Ok(());
    }
    let more = if is_cut { ", and the rest was not tried" } else { "" };
    bail!("{} of {} accesses differ{more}:\n{}", differences.len(), counts.accesses, differences.join("\n"));
}
