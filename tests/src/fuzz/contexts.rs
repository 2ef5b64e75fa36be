//! Contexts and PASID tables that nobody built.

use pgtable_formats::context::vtd::{CapRegisters, FirstStageFlags};
use pgtable_formats::context::{Canonical, Context, smmuv3, vtd};
use pgtable_formats::{Access, Gpa, Iova, Pasid};

use super::words::Input;

const ACCESSES: usize = 6;

/// A bind from any words refuses or succeeds; look-ups and walks through what it bound end with an answer, and the
/// same one twice.
pub(super) fn context_tables(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte();
    let registers = [input.word(), input.word()];
    let words = [input.entry(), input.entry()];
    let accesses: [(u32, u64); ACCESSES] =
        core::array::from_fn(|_| (u32::from_le_bytes(input.take()), input.word()));
    let Some(table) = bind(kind, registers, words) else { return };
    let memory = input.memory();
    for (pasid, address) in accesses {
        let pasid = if pasid & 1 == 0 { None } else { Pasid::new(pasid >> 12) };
        let found = table.lookup(&memory, pasid);
        assert_eq!(table.lookup(&memory, pasid), found);
        assert!(
            pasid.is_none() || table.effective_pasid(pasid).is_none_or(|effective| Some(effective) == pasid)
        );
        let Ok(Context::Stage1(stage1)) = found else { continue };
        for access in [Access::READ, Access::WRITE] {
            if let Ok(translation) = stage1.walk(&memory, Iova(address), access) {
                assert!(translation.perms.allow(access));
                assert_eq!(stage1.walk(&memory, Iova(address), access), Ok(translation));
            }
        }
    }
}

fn bind(kind: u8, registers: [u64; 2], words: [u64; 2]) -> Option<Canonical> {
    // Half of the inputs have the registers of well-equipped hardware, so that more of them get past the bind.
    let is_custom = kind & 0x80 != 0;
    match kind & 3 {
        // Page tables as a processor's registers describe them.
        1 if kind & 0x40 != 0 => {
            let [asid, ttbr0, ttbr1, mair] =
                [registers[0], words[0] & !0xfff, words[1] & !0xfff, registers[1]];
            let tcr = smmuv3::Tcr::from_bits(registers[1] ^ 0x2_0080_3519);
            let asked = smmuv3::PageTableRegisters { asid: asid as u16, tcr, ttbr0, ttbr1, mair };
            let caps = smmuv3::Caps::from_registers(smmuv3::IdRegisters::SOFTWARE);
            let table = smmuv3::PageTable::new(&asked, &caps).ok()?;
            assert_eq!(
                smmuv3::PageTable::new(&table.registers(), &caps),
                Ok(table),
                "registers that say the same"
            );
            for (first, size) in table.extents().into_iter().flatten() {
                assert!(first.is_aligned(size.trailing_zeros() as u8), "{first} is aligned to {size:#x}");
            }
            Some(Canonical::Smmuv3PageTable(table))
        }
        0 | 1 => {
            let half = |word: u64| (word as u32, (word >> 32) as u32);
            let ((idr0, idr1), (idr3, idr5)) = (half(registers[0]), half(registers[1]));
            let custom = smmuv3::IdRegisters { idr0, idr1, idr3, idr5 };
            let registers = if is_custom { custom } else { smmuv3::IdRegisters::SOFTWARE };
            let caps = smmuv3::Caps::from_registers(registers);
            smmuv3::CdTable::from_ste(words[0], words[1], &caps).ok().map(Canonical::Smmuv3)
        }
        which => {
            let custom = CapRegisters { cap: registers[0], ecap: registers[1] };
            let caps = vtd::Caps::from_registers(if is_custom { custom } else { CapRegisters::SOFTWARE });
            if which == 2 {
                let context = [words[0] & !0x1ff | words[0] & 0xe00 | 1, words[1] & 0xf_ffff, 0, 0];
                vtd::PasidTable::from_context_entry(context, &caps).ok().map(Canonical::VtdPasidTable)
            } else {
                let flags = FirstStageFlags::from_bits_truncate(words[1]);
                let width = if words[1] >> 8 & 1 == 0 { 48 } else { 57 };
                let table = vtd::FirstStage::new(Gpa(words[0] & !0xfff), flags, width, &caps);
                table.ok().map(Canonical::VtdFirstStage)
            }
        }
    }
}
