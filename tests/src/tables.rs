//! Guest tables of either architecture, made by hand: what a guest kernel without `viommu-guest` would do.

use pgtable_formats::context::{Canonical, smmuv3, vtd};
use pgtable_formats::edit::{EditOptions, Editor};
use pgtable_formats::format::Attrs;
use pgtable_formats::leaf::vmsav8::{Granule, Vmsav8};
use pgtable_formats::{Gpa, Iova, IovaRange, Pasid, TableAlloc, TableMem};
use viommu_device::host::TableCaps;
use viommu_wire::{ArmPageTable, TableDescriptor, VtdPageTable, VtdPasidTable};

/// A stage-1 page table: 4 KiB pages, 48 bits of address.
#[derive(Clone, Copy, Debug)]
pub enum PageTable {
    /// For an SMMUv3, with the context descriptor that leads to it.
    Smmuv3 {
        /// The descriptor.
        cd: smmuv3::Cd,
        /// The same where it is bound on its own.
        bare: smmuv3::PageTable,
        /// The format of its lower half.
        format: Vmsav8,
    },
    /// For VT-d.
    Vtd(vtd::FirstStage),
}

/// A table of page tables by PASID. Untagged DMA uses PASID 0.
#[derive(Clone, Debug)]
pub enum PasidTable {
    /// Context descriptors.
    Smmuv3(smmuv3::CdTable),
    /// A PASID directory.
    Vtd(vtd::PasidTable),
}

impl PageTable {
    /// An empty table that hardware with `caps` walks; `asid` matters on Arm only.
    pub fn new<T: TableMem + TableAlloc>(caps: &TableCaps, asid: u16, memory: &mut T) -> Self {
        let root = memory.alloc(12).expect("memory");
        match caps {
            TableCaps::Smmuv3(caps) => {
                let spec = smmuv3::CdSpec {
                    asid,
                    lower: Some(smmuv3::HalfSpec { root, granule: Granule::K4, input_bits: 48 }),
                    upper: None,
                    output_bits: caps.oas_bits,
                    ds: false,
                    mair: 0xff,
                };
                let cd = spec.encode(caps).expect("a legal descriptor");
                let context = smmuv3::context_from_cd(&cd.words(), caps, false).expect("a legal descriptor");
                let format = *context.half(Iova(0)).expect("a lower half");
                let registers = smmuv3::PageTableRegisters::of(&cd);
                let bare = smmuv3::PageTable::new(&registers, caps).expect("what the descriptor says");
                Self::Smmuv3 { cd, bare, format }
            }
            TableCaps::Vtd(caps) => {
                let flags = vtd::FirstStageFlags::empty();
                Self::Vtd(vtd::FirstStage::new(root, flags, 48, caps).expect("a legal table"))
            }
        }
    }

    /// The root table.
    pub fn root(&self) -> Gpa {
        match self {
            Self::Smmuv3 { format, .. } => format.params().root,
            Self::Vtd(table) => table.root(),
        }
    }

    /// Maps `length` bytes. The table is not told to anybody.
    pub fn map<T: TableMem + TableAlloc>(
        &self,
        memory: &mut T,
        iova: u64,
        output: u64,
        length: u64,
        attrs: Attrs,
    ) {
        let range = IovaRange::from_length(Iova(iova), length).expect("a range");
        let options = EditOptions::default();
        match self {
            Self::Smmuv3 { format, .. } => {
                Editor::new(*format, memory, options).map(range, Gpa(output), attrs)
            }
            Self::Vtd(table) => Editor::new(*table.format(), memory, options).map(range, Gpa(output), attrs),
        }
        .expect("a mapping");
    }

    /// Unmaps `length` bytes and invalidates nothing. Tables stay.
    pub fn unmap<T: TableMem + TableAlloc>(&self, memory: &mut T, iova: u64, length: u64) {
        let range = IovaRange::from_length(Iova(iova), length).expect("a range");
        let options = EditOptions { keep_tables: true, ..EditOptions::default() };
        match self {
            Self::Smmuv3 { format, .. } => Editor::new(*format, memory, options).unmap(range),
            Self::Vtd(table) => Editor::new(*table.format(), memory, options).unmap(range),
        }
        .expect("what was mapped");
    }

    /// Maps pages elsewhere, behind the back of whoever caches them.
    pub fn remap<T: TableMem + TableAlloc>(&self, memory: &mut T, iova: u64, output: u64, length: u64) {
        self.unmap(memory, iova, length);
        self.map(memory, iova, output, length, Attrs::READ_WRITE);
    }

    /// How ATTACH_TABLE binds it to one PASID; both architectures have that.
    pub fn descriptor(&self, pasid: u32) -> Option<TableDescriptor> {
        let pasid = Pasid::new(pasid).expect("20 bits");
        Some(match self {
            Self::Smmuv3 { bare, .. } => {
                let smmuv3::PageTableRegisters { asid, tcr, ttbr0, ttbr1, mair } = bare.registers();
                let tcr = tcr.into_bits();
                TableDescriptor::ArmPageTable(ArmPageTable { pasid, asid, tcr, ttbr0, ttbr1, mair })
            }
            Self::Vtd(table) => TableDescriptor::VtdPageTable(VtdPageTable {
                pgd: table.root(),
                flags: table.flags().bits(),
                addr_width: table.address_width(),
                pasid,
            }),
        })
    }

    /// What a host is given for one PASID; both architectures have that.
    pub fn canonical(&self) -> Option<Canonical> {
        Some(match self {
            Self::Smmuv3 { bare, .. } => Canonical::Smmuv3PageTable(*bare),
            Self::Vtd(table) => Canonical::VtdFirstStage(*table),
        })
    }
}

impl PasidTable {
    /// An empty table for `bits` of PASID (on VT-d at least 13).
    pub fn new<T: TableMem + TableAlloc>(caps: &TableCaps, bits: u8, memory: &mut T) -> Self {
        match caps {
            TableCaps::Smmuv3(caps) => {
                let (format, untagged) = (smmuv3::TableFormat::Linear, smmuv3::Untagged::Pasid0);
                let table = smmuv3::CdTable::create(format, bits, untagged, caps, memory);
                Self::Smmuv3(table.expect("a legal table"))
            }
            TableCaps::Vtd(caps) => {
                let directory_lg2 = bits.saturating_sub(6).max(7);
                let table = vtd::PasidTable::create(directory_lg2, Pasid::ZERO, caps, memory);
                Self::Vtd(table.expect("a legal table"))
            }
        }
    }

    /// Lets a PASID use `table`. An entry that is in use is replaced; nothing is invalidated.
    pub fn set<T: TableMem + TableAlloc>(&self, memory: &mut T, pasid: u32, table: &PageTable) {
        self.clear(memory, pasid);
        let pasid = Pasid::new(pasid).expect("20 bits");
        match (self, table) {
            (Self::Smmuv3(cds), PageTable::Smmuv3 { cd, .. }) => {
                cds.write(memory, pasid, cd).expect("room for a descriptor");
            }
            (Self::Vtd(entries), PageTable::Vtd(table)) => {
                let entry = vtd::PasidEntry::first_stage(table, 1);
                entries.write(memory, pasid, &entry).expect("room for an entry");
            }
            _ => panic!("tables of different architectures"),
        }
    }

    /// Clears the entry of a PASID; nothing is invalidated.
    pub fn clear<T: TableMem>(&self, memory: &T, pasid: u32) {
        let pasid = Pasid::new(pasid).expect("20 bits");
        match self {
            Self::Smmuv3(cds) => cds.clear(memory, pasid),
            Self::Vtd(entries) => entries.clear(memory, pasid),
        }
        .expect("a table in memory");
    }

    /// How ATTACH_TABLE binds it.
    pub fn descriptor(&self) -> TableDescriptor {
        match self {
            Self::Smmuv3(table) => {
                let [ste0, ste1] = table.words();
                TableDescriptor::Smmuv3 { ste0, ste1 }
            }
            Self::Vtd(table) => TableDescriptor::VtdPasidTable(VtdPasidTable {
                directory: table.extents().0,
                directory_lg2: table.directory_lg2(),
                untagged: table.untagged(),
            }),
        }
    }

    /// What a host is given.
    pub fn canonical(&self) -> Canonical {
        match self {
            Self::Smmuv3(table) => Canonical::Smmuv3(*table),
            Self::Vtd(table) => Canonical::VtdPasidTable(*table),
        }
    }
}
