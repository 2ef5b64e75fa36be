//! The way of an access that the front does not know.

use alloc::collections::BTreeMap;

use pgtable_formats::context::{Context, Stage1};
use pgtable_formats::leaf::X86;
use pgtable_formats::walk::{Step, walk_from};
use pgtable_formats::{Access, Fault, Format, Gpa, Iova, IovaRange, Perms, TableMem, Translation};
use viommu_wire::EndpointId;

use super::contexts::{Route, Tables};
use super::front::PAGE_LG2;
use super::key::Key;
use super::port::{Port, Served};
use super::reserved::{Place, is_interrupt, locate};
use super::space::{Kind, Spaces};
use super::tlb::Tlb;
use super::walk_cache::WalkCache;
use super::{Piece, SoftHost, Stage2};
use crate::host::{FaultCause, Stream};
use crate::mapping::MapFlags;

impl<M: Stage2> SoftHost<M> {
    #[inline(never)]
    pub(super) fn miss(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Piece, FaultCause> {
        if self.is_strict {
            return self.translate_strictly(stream, iova, access);
        }
        let key = Key::new(stream.endpoint, stream.pasid);
        if self.contexts.get(key).is_none() {
            let (port, served, kind) = serving(&self.ports, &self.spaces, stream)?;
            let Kind::Table { table, .. } = kind else {
                let run = untabled(port, kind, iova, access)?;
                let size_lg2 = run.block_lg2(iova);
                if size_lg2 >= PAGE_LG2 {
                    self.front.fill(key, iova, run.apply(iova), size_lg2, run.perms);
                }
                return Ok(run.piece(iova));
            };
            let route = match table.lookup(&self.memory, stream.pasid).map_err(FaultCause::Table)? {
                Context::Bypass => Route::Bypass,
                Context::Stage1(stage1) => {
                    Route::Tables(Tables::new(stream.endpoint, served.effective, stage1))
                }
            };
            self.contexts.fill(key, route);
        }
        let Some(Route::Tables(tables)) = self.contexts.get(key) else {
            return Ok(Run::EVERYTHING.piece(iova));
        };
        let place = interrupt_place(&self.ports, stream, &tables.stage1, iova);
        if let Some(run) = interrupt(place, access) {
            return Ok(run.piece(iova));
        }
        let Self { memory, tlb, walks, .. } = self;
        let translation =
            translate_cached(tables, memory, tlb, walks, iova, access).map_err(FaultCause::Table)?;
        let is_whole_page = matches!(place, Place::Free(free) if free.covers(page(iova)));
        if is_whole_page && is_cacheable(tables, &translation) {
            let Translation { size_lg2, perms, .. } = translation;
            self.front.fill(key, iova, translation.apply(iova), size_lg2, perms);
        }
        Ok(piece_of(&translation, iova))
    }

    fn translate_strictly(&self, stream: Stream, iova: Iova, access: Access) -> Result<Piece, FaultCause> {
        let (port, _, kind) = serving(&self.ports, &self.spaces, stream)?;
        let Kind::Table { table, .. } = kind else {
            return untabled(port, kind, iova, access).map(|run| run.piece(iova));
        };
        // By reference: a copy of what was just put together costs as much as the walk.
        let context = table.lookup(&self.memory, stream.pasid);
        let stage1 = match &context {
            Ok(Context::Stage1(stage1)) => stage1,
            Ok(Context::Bypass) => return Ok(Run::EVERYTHING.piece(iova)),
            Err(fault) => return Err(FaultCause::Table(*fault)),
        };
        if let Some(run) = interrupt(interrupt_place(&self.ports, stream, stage1, iova), access) {
            return Ok(run.piece(iova));
        }
        let translation = stage1.walk(&self.memory, iova, access).map_err(FaultCause::Table)?;
        Ok(piece_of(&translation, iova))
    }
}

/// Finds what `stream` translates through.
#[inline]
fn serving<'a>(
    ports: &'a BTreeMap<EndpointId, Port>,
    spaces: &'a Spaces,
    stream: Stream,
) -> Result<(&'a Port, Served, &'a Kind), FaultCause> {
    let found = || {
        let port = ports.get(&stream.endpoint)?;
        let served = port.served(spaces, stream.pasid)?;
        Some((port, served, &spaces.get(served.space)?.kind))
    };
    found().ok_or(FaultCause::Unattached)
}

/// Where an access that a guest's table translates lies with respect to addresses that hardware takes for interrupts
/// before: on VT-d, untagged writes to the MSI region.
#[inline]
fn interrupt_place(ports: &BTreeMap<EndpointId, Port>, stream: Stream, stage1: &Stage1, iova: Iova) -> Place {
    match (stage1, stream.pasid, ports.get(&stream.endpoint)) {
        (Stage1::Vtd(_), None, Some(port)) => locate(&port.caps.reserved, iova),
        _ => Place::Free(IovaRange::ALL),
    }
}

/// An interrupt's way: untranslated.
fn interrupt(place: Place, access: Access) -> Option<Run> {
    match place {
        Place::Reserved(region) if is_interrupt(region, access.kind) => {
            Some(Run { range: region.range, offset: 0, perms: Perms::WRITE })
        }
        Place::Reserved(_) | Place::Free(_) => None,
    }
}

fn piece_of(translation: &Translation, iova: Iova) -> Piece {
    let mask = (1 << translation.size_lg2) - 1;
    Piece { output: translation.apply(iova), length: mask - (iova.0 & mask) + 1 }
}

/// Translates through a guest's tables and all caches of what was read from them.
#[inline]
fn translate_cached<M: TableMem>(
    tables: &Tables,
    memory: &M,
    tlb: &mut Tlb,
    walks: &mut WalkCache,
    iova: Iova,
    access: Access,
) -> Result<Translation, Fault> {
    let kept = tlb.lookup(tables, iova);
    if let Some(translation) = kept
        && translation.perms.allow(access)
    {
        return Ok(translation);
    }
    let resumed = match kept {
        // More may be permitted by now, or with a flag that the walk sets.
        Some(_) => None,
        None => resume(tables, memory, walks, iova, access),
    };
    let translation = match resumed {
        Some(translation) => translation,
        None => tables.stage1.walk(memory, iova, access)?,
    };
    if is_cacheable(tables, &translation) {
        tlb.fill(tables, &translation);
    }
    Ok(translation)
}

/// Walks from a cached last-level table, or from the root and then keeps the one it finds. `None`: a whole walk has to
/// tell.
fn resume<M: TableMem>(
    tables: &Tables,
    memory: &M,
    walks: &mut WalkCache,
    iova: Iova,
    access: Access,
) -> Option<Translation> {
    match &tables.stage1 {
        Stage1::Smmuv3(context) if context.is_big_endian() => None,
        Stage1::Smmuv3(context) => resume_with(context.half(iova)?, tables, memory, walks, iova, access),
        Stage1::Vtd(table) => resume_with(table.format(), tables, memory, walks, iova, access),
    }
}

fn resume_with<F: Format, M: TableMem>(
    format: &F,
    tables: &Tables,
    memory: &M,
    walks: &mut WalkCache,
    iova: Iova,
    access: Access,
) -> Option<Translation> {
    let region_lg2 = format.entry_lg2(1);
    if let Some(step) = walks.lookup(tables, iova, region_lg2) {
        return walk_from(format, memory, step, iova, access, |_| ()).ok();
    }
    let mut last_level = None;
    let reached = |step: Step| last_level = Some(step).filter(|step| step.level == 0);
    let translation = walk_from(format, memory, Step::root(format), iova, access, reached).ok()?;
    // An alias (TBI) is not the address that the guest will name to drop the table.
    if let Some(step) = last_level
        && translation.contains(iova)
    {
        walks.fill(tables, iova, region_lg2, step);
    }
    Some(translation)
}

/// Whether an invalidation of any of the leaf's addresses will find what is kept of it. A large leaf over the interrupt
/// range is translated in parts, but the guest may name an address of another part.
#[inline]
fn is_cacheable(tables: &Tables, translation: &Translation) -> bool {
    !matches!(tables.stage1, Stage1::Vtd(_))
        || translation.size_lg2 == 12
        || (translation.output.0 ^ X86::INTERRUPT_RANGE.start()) >> 30 != 0
}

/// Translates where no guest's table does.
fn untabled(port: &Port, kind: &Kind, iova: Iova, access: Access) -> Result<Run, FaultCause> {
    let place = locate(&port.caps.reserved, iova);
    let run = match (place, interrupt(place, access), kind) {
        (_, Some(run), _) => run,
        (Place::Free(free), None, Kind::Mapped(mappings)) => {
            let mapping = mappings.lookup(iova).ok_or(FaultCause::Unmapped)?;
            mapping.translate(iova).ok_or(FaultCause::Unmapped)?;
            let mut perms = Perms::empty();
            // A MAP request cannot say that instructions may not be read.
            perms.set(Perms::READ | Perms::EXECUTE, mapping.flags.contains(MapFlags::READ));
            perms.set(Perms::WRITE, mapping.flags.contains(MapFlags::WRITE));
            let start = free.start().max(mapping.range.start());
            let last = free.last().min(mapping.range.last());
            Run {
                range: IovaRange::new(start, last).unwrap_or(mapping.range),
                offset: mapping.output.0.wrapping_sub(mapping.range.start().0),
                perms,
            }
        }
        (Place::Free(range), None, _) => Run { range, ..Run::EVERYTHING },
        (Place::Reserved(_), None, _) => return Err(FaultCause::Unmapped),
    };
    if run.perms.allow(access) { Ok(run) } else { Err(FaultCause::Permission) }
}

/// A range that leads to consecutive addresses, of any size and alignment.
#[derive(Clone, Copy, Debug)]
struct Run {
    range: IovaRange,
    /// Output less input address, modulo 2^64.
    offset: u64,
    perms: Perms,
}

impl Run {
    const EVERYTHING: Self = Self { range: IovaRange::ALL, offset: 0, perms: Perms::all() };

    /// Where `iova`, which lies inside, leads.
    const fn apply(&self, iova: Iova) -> Gpa {
        Gpa(iova.0.wrapping_add(self.offset))
    }

    /// What is left of it from `iova` on, which lies inside.
    fn piece(&self, iova: Iova) -> Piece {
        const MAX: u64 = 1 << 63;
        let output = self.apply(iova);
        let length_minus_one = (self.range.last().0 - iova.0).min(u64::MAX - output.0);
        Piece { output, length: length_minus_one.saturating_add(1).min(MAX) }
    }

    /// log2 of the size, at most 2^63, of the largest naturally aligned block around `iova` that lies inside and leads
    /// to one.
    fn block_lg2(&self, iova: Iova) -> u8 {
        // A block around `iova` is too large where it holds the address before the range or the one behind.
        let largest_without = |other: Option<u64>| match other {
            Some(other) => 63 - (iova.0 ^ other).leading_zeros(),
            None => 63,
        };
        let below = largest_without(self.range.start().0.checked_sub(1));
        let above = largest_without(self.range.last().0.checked_add(1));
        let lg2 = below.min(above).min(self.offset.trailing_zeros());
        // At most 63.
        lg2.to_le_bytes()[0]
    }
}

/// The page of the front that `iova` lies in.
fn page(iova: Iova) -> IovaRange {
    const MASK: u64 = (1 << PAGE_LG2) - 1;
    IovaRange::new(Iova(iova.0 & !MASK), Iova(iova.0 | MASK)).unwrap_or(IovaRange::ALL)
}
