//! A guest's tables in memory, a host with caches and one without.

mod binding;
mod caches;
mod model;
mod page_requests;
mod reserved;
mod silence;
mod translate;

use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;

use pgtable_formats::context::{Canonical, smmuv3, vtd};
use pgtable_formats::edit::{EditOptions, Editor};
use pgtable_formats::format::Attrs;
use pgtable_formats::leaf::{Granule, Vmsav8};
use pgtable_formats::suite::FlatMem;
use pgtable_formats::{Access, Format, Gpa, Iova, IovaRange, NotMemory, Pasid, TableAlloc, TableMem};
use viommu_wire::{Caches, EndpointId, ReservedRegion};

use super::suite::{self, Rig};
use super::{SoftHost, Stage2};
use crate::host::{EndpointCaps, FaultCause, Host, Invalidation, Scope, SpaceSpec, Stream, TableCaps};

const ENDPOINT: EndpointId = EndpointId(8);
const OTHER: EndpointId = EndpointId(9);
const MEMORY: Gpa = Gpa(0x4000_0000);
const MEMORY_SIZE: usize = 8 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arch {
    Arm,
    Vtd,
}

/// Guest memory with several users: the guest that edits tables and the hosts that read them.
#[derive(Clone, Debug)]
struct Memory(Rc<RefCell<FlatMem>>);

impl Memory {
    fn new() -> Self {
        Self(Rc::new(RefCell::new(FlatMem::new(MEMORY, MEMORY_SIZE))))
    }

    fn tables(&self) -> usize {
        self.0.borrow().tables()
    }
}

impl TableMem for Memory {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.0.borrow().load(at)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        self.0.borrow().compare_exchange(at, current, new)
    }
}

impl TableAlloc for Memory {
    fn alloc(&mut self, size_lg2: u8) -> Option<Gpa> {
        self.0.borrow_mut().alloc(size_lg2)
    }

    fn free(&mut self, table: Gpa, size_lg2: u8) {
        self.0.borrow_mut().free(table, size_lg2);
    }
}

impl Stage2 for Memory {
    fn contains(&self, first: Gpa, last: Gpa) -> bool {
        self.0.borrow().contains(first, last)
    }
}

fn arm_caps() -> smmuv3::Caps {
    smmuv3::Caps::from_registers(smmuv3::IdRegisters::SOFTWARE)
}

fn vtd_caps() -> vtd::Caps {
    vtd::Caps::from_registers(vtd::CapRegisters::SOFTWARE)
}

fn endpoint_caps(arch: Arch, reserved: Vec<ReservedRegion>) -> EndpointCaps {
    let tables = match arch {
        Arch::Arm => TableCaps::Smmuv3(arm_caps()),
        Arch::Vtd => TableCaps::Vtd(vtd_caps()),
    };
    EndpointCaps { tables: Some(tables), reserved, ..EndpointCaps::default() }
}

/// The page table of one process.
#[derive(Clone, Copy, Debug)]
enum PageTable {
    Arm { root: Gpa },
    Vtd(vtd::FirstStage),
}

impl PageTable {
    fn new(arch: Arch, memory: &mut Memory) -> Self {
        let root = memory.alloc(12).unwrap();
        match arch {
            Arch::Arm => Self::Arm { root },
            Arch::Vtd => {
                let flags = vtd::FirstStageFlags::empty();
                Self::Vtd(vtd::FirstStage::new(root, flags, 48, &vtd_caps()).unwrap())
            }
        }
    }

    fn cd(self, asid: u16) -> smmuv3::CdSpec {
        let Self::Arm { root } = self else { panic!("not Arm") };
        let lower = Some(smmuv3::HalfSpec { root, granule: Granule::K4, input_bits: 48 });
        smmuv3::CdSpec { asid, lower, upper: None, output_bits: 48, ds: false, mair: 0xff }
    }

    fn vmsav8(self) -> Vmsav8 {
        let cd = self.cd(1).encode(&arm_caps()).unwrap();
        let context = smmuv3::context_from_cd(&cd.words(), &arm_caps(), false).unwrap();
        *context.half(Iova(0)).unwrap()
    }

    fn map(self, memory: &mut Memory, range: IovaRange, output: Gpa, attrs: Attrs) {
        match self {
            Self::Arm { .. } => map_with(self.vmsav8(), memory, range, output, attrs),
            Self::Vtd(table) => map_with(*table.format(), memory, range, output, attrs),
        }
    }

    /// Says whether a table went or came.
    fn unmap(self, memory: &mut Memory, range: IovaRange, keep_tables: bool) -> bool {
        match self {
            Self::Arm { .. } => unmap_with(self.vmsav8(), memory, range, keep_tables),
            Self::Vtd(table) => unmap_with(*table.format(), memory, range, keep_tables),
        }
    }

    /// Leads the pages of `range` elsewhere, in the same tables.
    fn remap(self, memory: &mut Memory, range: IovaRange, output: Gpa, attrs: Attrs) {
        assert!(!self.unmap(memory, range, true));
        self.map(memory, range, output, attrs);
    }
}

fn map_with<F: Format>(format: F, memory: &mut Memory, range: IovaRange, output: Gpa, attrs: Attrs) {
    Editor::new(format, memory, EditOptions::default()).map(range, output, attrs).unwrap();
}

fn unmap_with<F: Format>(format: F, memory: &mut Memory, range: IovaRange, keep_tables: bool) -> bool {
    let before = memory.tables();
    let options = EditOptions { split: true, keep_tables, ..EditOptions::default() };
    let freed = Editor::new(format, memory, options).unmap(range).unwrap().tables_freed;
    freed || memory.tables() != before
}

/// A guest that handed a PASID table over for endpoint [`ENDPOINT`].
struct World {
    arch: Arch,
    memory: Memory,
    host: SoftHost<Memory>,
    /// Sees the same tables and caches nothing.
    strict: SoftHost<Memory>,
    table: Canonical,
}

impl World {
    fn new(arch: Arch) -> Self {
        Self::with_untagged(arch, smmuv3::Untagged::Pasid0, Pasid::ZERO)
    }

    /// What serves untagged accesses, on Arm and on VT-d.
    fn with_untagged(arch: Arch, s1dss: smmuv3::Untagged, rid_pasid: Pasid) -> Self {
        let mut memory = Memory::new();
        let table = match arch {
            Arch::Arm => Canonical::Smmuv3(
                smmuv3::CdTable::create(smmuv3::TableFormat::TwoLevel4K, 10, s1dss, &arm_caps(), &mut memory)
                    .unwrap(),
            ),
            Arch::Vtd => Canonical::VtdPasidTable(
                vtd::PasidTable::create(7, rid_pasid, &vtd_caps(), &mut memory).unwrap(),
            ),
        };
        let mut host = SoftHost::new(memory.clone());
        let mut strict = SoftHost::new(memory.clone());
        strict.set_strict(true);
        for host in [&mut host, &mut strict] {
            for endpoint in [ENDPOINT, OTHER] {
                host.add_endpoint(endpoint, endpoint_caps(arch, vec![])).unwrap();
            }
            let mut space = host.create(SpaceSpec::GuestTable { endpoint: ENDPOINT, table: &table }).unwrap();
            host.bind(Stream::untagged(ENDPOINT), Some(&mut space)).unwrap();
        }
        Self { arch, memory, host, strict, table }
    }

    fn page_table(&mut self) -> PageTable {
        PageTable::new(self.arch, &mut self.memory)
    }

    /// Writes the entry of `pasid` over whatever is there.
    fn set_context(&mut self, pasid: u32, asid: u16, page_table: PageTable) {
        let pasid = Pasid::new(pasid).unwrap();
        match (&self.table, page_table) {
            (Canonical::Smmuv3(table), _) => {
                table.clear(&self.memory, pasid).unwrap();
                let cd = page_table.cd(asid).encode(&arm_caps()).unwrap();
                table.write(&mut self.memory, pasid, &cd).unwrap();
            }
            (Canonical::VtdPasidTable(table), PageTable::Vtd(first_stage)) => {
                table.clear(&self.memory, pasid).unwrap();
                let entry = vtd::PasidEntry::first_stage(&first_stage, 1);
                table.write(&mut self.memory, pasid, &entry).unwrap();
            }
            _ => panic!("a page table of the other architecture"),
        }
    }

    fn map(&mut self, table: PageTable, iova: u64, length: u64, output: u64, attrs: Attrs) {
        table.map(&mut self.memory, range(iova, length), Gpa(output), attrs);
    }

    fn remap(&mut self, table: PageTable, iova: u64, length: u64, output: u64, attrs: Attrs) {
        table.remap(&mut self.memory, range(iova, length), Gpa(output), attrs);
    }

    fn read(&mut self, pasid: u32, iova: u64) -> Result<u64, FaultCause> {
        self.host.translate(tagged(pasid), Iova(iova), Access::READ, |piece| piece.output.0)
    }

    fn write(&mut self, pasid: u32, iova: u64) -> Result<u64, FaultCause> {
        self.host.translate(tagged(pasid), Iova(iova), Access::WRITE, |piece| piece.output.0)
    }

    fn invalidate(&mut self, invalidation: Invalidation) {
        self.host.invalidate(&[invalidation]).unwrap();
    }
}

fn tagged(pasid: u32) -> Stream {
    Stream { endpoint: ENDPOINT, pasid: Some(Pasid::new(pasid).unwrap()) }
}

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::from_length(Iova(start), length).unwrap()
}

/// An invalidation of translations.
fn tlb(scope: Scope) -> Invalidation {
    Invalidation { endpoint: ENDPOINT, scope, caches: Caches::TLB, leaf: false, tag: None, global: false }
}

fn pages(pasid: u32, start: u64, length: u64) -> Scope {
    Scope::Range { pasid: Pasid::new(pasid), range: range(start, length), page_lg2: 12 }
}

impl Rig for SoftHost<Memory> {
    type Host = Self;

    fn host(&mut self) -> &mut Self {
        self
    }

    fn endpoints(&self) -> [EndpointId; 2] {
        [ENDPOINT, OTHER]
    }

    fn no_endpoint(&self) -> EndpointId {
        EndpointId(7)
    }

    fn dma(&mut self, stream: Stream, iova: Iova, access: Access) -> Result<Gpa, FaultCause> {
        self.translate(stream, iova, access, |piece| piece.output)
    }
}

#[test]
fn holds_what_every_host_holds() {
    for strict in [false, true] {
        suite::check(|| {
            let mut host = SoftHost::new(Memory::new());
            host.set_strict(strict);
            for endpoint in [OTHER, ENDPOINT] {
                host.add_endpoint(endpoint, endpoint_caps(Arch::Arm, vec![])).unwrap();
            }
            host
        });
    }
}
