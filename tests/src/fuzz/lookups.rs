//! Context-descriptor tables and PASID directories over memory of any kind, next to the model.

use arbitrary::Unstructured;
use pgtable_formats::context::smmuv3::{Caps as SmmuCaps, CdTable, IdRegisters};
use pgtable_formats::context::vtd::{CapRegisters, Caps as VtdCaps, PasidTable};
use pgtable_formats::context::{Canonical, Context, Stage1};
use pgtable_formats::suite::FlatMem;
use pgtable_formats::{Gpa, Iova, Pasid, TableMem};

use super::Filler;
use crate::model::words::{self, cd, pasid_entry};
use crate::model::world::{Hardware, World};

const BASE: u64 = 0x4000_0000;
const BYTES: usize = 0x2_0000;

/// What is bound keeps its meaning, and what is looked up in it is what the model finds there.
pub(super) fn lookups(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let bytes = &mut bytes;
    let memory = FlatMem::new(Gpa(BASE), BYTES);
    let world = World::ordinary();
    let id = *bytes.choose(&[8, 9, 16, 17]).unwrap_or(&8);
    let hardware = world.endpoint(id).expect("an endpoint").tables;
    fill(hardware, bytes, &memory);
    let base = BASE | bytes.int_in_range(0..=31_u64).unwrap_or(0) << 12;
    match hardware {
        Hardware::None => {}
        Hardware::Smmuv3 { registers: [idr0, idr1, idr3, idr5], .. } => {
            let caps = SmmuCaps::from_registers(IdRegisters { idr0, idr1, idr3, idr5 });
            let (ste0, ste1) = bytes.arbitrary::<(u64, u64)>().unwrap_or((0, 0));
            // Mostly a table that is in memory and of a size that fits.
            let is_wild = bytes.ratio(1, 8).unwrap_or(false);
            let ste0 = if is_wild { ste0 } else { ste0 & (0xf << 59 | 3 << 4) | base };
            let Ok(table) = CdTable::from_ste(ste0, ste1, &caps) else { return };
            let [word0, word1] = table.words();
            assert_eq!(CdTable::from_ste(word0, word1, &caps), Ok(table), "canonical words mean the same");
            let model = words::CdTable {
                base: table.extents().0.0,
                leaf_bits: table.format().leaf_bits().unwrap_or(0).into(),
                cd_max: table.pasid_bits().into(),
                dss: ste1 & 3,
            };
            check(&Canonical::Smmuv3(table), bytes, &memory, |pasid| match model.entry(pasid)? {
                None => Ok(words::Context::Bypass),
                Some(entry) => model.context(&|at| memory.load(Gpa(at)).ok(), entry, hardware),
            });
        }
        Hardware::Vtd { shown: [cap, ecap], .. } => {
            let caps = VtdCaps::from_registers(CapRegisters { cap, ecap });
            let lg2 = bytes.int_in_range(5..=16).unwrap_or(7);
            let untagged = bytes.int_in_range(0..=0xf_ffff_u32).unwrap_or(0);
            let untagged = if bytes.ratio(7, 8).unwrap_or(true) { 0 } else { untagged };
            let pasid = Pasid::new(untagged).expect("20 bits");
            let Ok(table) = PasidTable::new(Gpa(base), lg2, pasid, &caps) else { return };
            let again = PasidTable::from_context_entry(table.words(), &caps);
            assert_eq!(again, Ok(table), "the same as a context entry");
            let model = words::Directory { base, lg2: lg2.into(), untagged };
            check(&Canonical::VtdPasidTable(table), bytes, &memory, |pasid| {
                let entry = model.entry(pasid, hardware)?;
                model.context(&|at| memory.load(Gpa(at)).ok(), entry, hardware)
            });
        }
    }
}

type Foretold = Result<words::Context, &'static str>;

fn check(
    table: &Canonical,
    bytes: &mut Unstructured<'_>,
    memory: &FlatMem,
    foretell: impl Fn(Option<u32>) -> Foretold,
) {
    for _ in 0..16 {
        let number = bytes.arbitrary::<u32>().unwrap_or(0);
        let mask = if bytes.ratio(3, 4).unwrap_or(true) { 0x3ff } else { 0xf_ffff };
        let pasid = Some(number & mask).filter(|_| bytes.ratio(7, 8).unwrap_or(true));
        let found = table.lookup(memory, pasid.and_then(Pasid::new));
        match (foretell(pasid), &found) {
            (Ok(words::Context::Unknown), _) | (Ok(words::Context::Bypass), Ok(Context::Bypass)) => {}
            (Err(name), Err(fault)) => assert_eq!(fault.to_string(), name, "PASID {pasid:?}"),
            (Ok(words::Context::Tables(space)), Ok(Context::Stage1(stage1))) => agree(&space, stage1),
            (foretold, found) => panic!("PASID {pasid:?}: foretold {foretold:x?}, found {found:x?}"),
        }
        if bytes.is_empty() {
            break;
        }
    }
}

fn agree(space: &words::Space, stage1: &Stage1) {
    match (*space, stage1) {
        (words::Space::Arm { root, input, asid, .. }, Stage1::Smmuv3(context)) => {
            let half = context.half(Iova(0)).expect("the lower half");
            assert_eq!((context.asid(), u32::from(half.params().input_lg2)), (asid, input));
            assert_eq!(half.params().root.0, root & !((1 << half.params().root_lg2()) - 1));
        }
        (words::Space::Vtd { root, levels, .. }, Stage1::Vtd(table)) => {
            assert_eq!((table.root().0, table.address_width()), (root, 12 + 9 * levels));
        }
        _ => panic!("{space:?} is not {stage1:?}"),
    }
}

/// Descriptors and pointers that are mostly good, spoiled by words of the input.
fn fill(hardware: Hardware, bytes: &mut Unstructured<'_>, memory: &FlatMem) {
    let mut filler = Filler::new(bytes.arbitrary().unwrap_or(0));
    let page = |random: u64| BASE + (random >> 40) % (BYTES as u64 >> 12) * 0x1000;
    for at in (BASE..BASE + BYTES as u64).step_by(64) {
        let random = filler.next();
        let mut words = match (random % 8, hardware) {
            (0, _) => [0; 8],
            (1, _) => [0; 8].map(|_| filler.next()),
            (2 | 3, _) => [0; 8].map(|_| page(filler.next()) | 1),
            (_, Hardware::Smmuv3 { .. }) => cd(page(random), random as u16),
            _ => pasid_entry(page(random), random & 0x100 != 0),
        };
        if random >> 3 & 3 == 0 {
            words[(random >> 5 & 7) as usize] ^= 1 << (random >> 8 & 63);
        }
        for (at, word) in (at..).step_by(8).zip(words) {
            memory.store(Gpa(at), word).expect("memory");
        }
    }
    let patches = bytes.int_in_range(0..=32).unwrap_or(0);
    for _ in 0..patches {
        let at = bytes.int_in_range(0..=BYTES as u64 / 8 - 1).unwrap_or(0);
        memory.store(Gpa(BASE + 8 * at), bytes.arbitrary().unwrap_or(0)).expect("memory");
    }
}
