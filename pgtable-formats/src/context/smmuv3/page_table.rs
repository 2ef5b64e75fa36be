//! The canonical stage-1 page table of one PASID, as a processor's registers describe it.

use bitfield_struct::bitfield;

use super::{
    Caps, Cd, CdWord0, CdWord1, CdWord2, Context, StallModel, TableEndianness,
    context::{lower_granule, upper_granule},
    context_from_cd,
};
use crate::{Gpa, Iova, leaf::vmsav8::Granule};

/// TCR_EL1 (Arm DDI 0487, D24.2). What a device translates by is judged; what only a processor has is ignored.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct Tcr {
    /// Bits 5:0, T0SZ: the lower half translates `64 - T0SZ` bits.
    #[bits(6)]
    pub t0sz: u8,
    /// Bit 6, reserved.
    pub reserved6: bool,
    /// Bit 7, EPD0: no walks in the lower half.
    pub epd0: bool,
    /// Bits 9:8, IRGN0: inner cacheability of walks.
    #[bits(2)]
    pub irgn0: u8,
    /// Bits 11:10, ORGN0: outer cacheability of walks.
    #[bits(2)]
    pub orgn0: u8,
    /// Bits 13:12, SH0: shareability of walks; 1 is reserved.
    #[bits(2)]
    pub sh0: u8,
    /// Bits 15:14, TG0: 0 4 KiB, 1 64 KiB, 2 16 KiB, 3 reserved.
    #[bits(2)]
    pub tg0: u8,
    /// Bits 21:16, T1SZ: the upper half translates `64 - T1SZ` bits.
    #[bits(6)]
    pub t1sz: u8,
    /// Bit 22, A1: which TTBR has the ASID. Ignored: the ASID is given on its own.
    pub a1: bool,
    /// Bit 23, EPD1: no walks in the upper half.
    pub epd1: bool,
    /// Bits 25:24, IRGN1.
    #[bits(2)]
    pub irgn1: u8,
    /// Bits 27:26, ORGN1.
    #[bits(2)]
    pub orgn1: u8,
    /// Bits 29:28, SH1.
    #[bits(2)]
    pub sh1: u8,
    /// Bits 31:30, TG1: 1 16 KiB, 2 4 KiB, 3 64 KiB, 0 reserved.
    #[bits(2)]
    pub tg1: u8,
    /// Bits 34:32, IPS: 0 to 7 mean 32, 36, 40, 42, 44, 48, 52, 56 bits of output address.
    #[bits(3)]
    pub ips: u8,
    /// Bit 35, reserved.
    pub reserved35: bool,
    /// Bit 36, AS: 16-bit ASIDs. Ignored: the ASID is as it is.
    pub asid16: bool,
    /// Bit 37, TBI0: bits 63:56 of lower-half addresses are ignored.
    pub tbi0: bool,
    /// Bit 38, TBI1: bits 63:56 of upper-half addresses are ignored.
    pub tbi1: bool,
    /// Bit 39, HA: hardware updates the access flag.
    pub ha: bool,
    /// Bit 40, HD: hardware updates the dirty state.
    pub hd: bool,
    /// Bit 41, HPD0: hierarchical permissions are ignored.
    pub hpd0: bool,
    /// Bit 42, HPD1.
    pub hpd1: bool,
    /// Bits 50:43, HWU059 to HWU162: page-based hardware attributes. Ignored.
    pub hwu: u8,
    /// Bits 52:51, TBID0 and TBID1: TBI is not about instructions. Ignored.
    #[bits(2)]
    pub tbid: u8,
    /// Bits 54:53, NFD0 and NFD1: non-fault loads. Ignored.
    #[bits(2)]
    pub nfd: u8,
    /// Bit 55, E0PD0: the lower half is closed to unprivileged accesses.
    pub e0pd0: bool,
    /// Bit 56, E0PD1.
    pub e0pd1: bool,
    /// Bits 58:57, TCMA0 and TCMA1: memory tagging. Ignored.
    #[bits(2)]
    pub tcma: u8,
    /// Bit 59, DS: 52-bit addresses with the 4 KiB and 16 KiB granules.
    pub ds: bool,
    /// Bits 61:60, MTX0 and MTX1: memory tagging. Ignored.
    #[bits(2)]
    pub mtx: u8,
    /// Bits 63:62, reserved.
    #[bits(2)]
    pub reserved62: u8,
}

/// What describes the stage-1 page tables of one address space: what a driver binds to a PASID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PageTableRegisters {
    /// The tag on cached translations; unique per address space.
    pub asid: u16,
    /// As TCR_EL1.
    pub tcr: Tcr,
    /// Address of the lower half's first table, and nothing else: no ASID, no CnP, 52-bit addresses in bits 51:0.
    pub ttbr0: u64,
    /// Address of the upper half's first table.
    pub ttbr1: u64,
    /// As MAIR_EL1.
    pub mair: u64,
}

/// Why registers are not bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageTableRefusal {
    /// IDR0.TTF has no VMSAv8-64 tables.
    #[error("VMSAv8-64 tables are not implemented")]
    Aarch64,
    /// The ASID has more than 8 bits and IDR0.ASID16 is 0.
    #[error("ASID {0:#x} has more than 8 bits, and 16 are not implemented")]
    Asid(u16),
    /// TGx names a granule that IDR5 does not have.
    #[error("the granule of {} bytes is not implemented", 1u32 << .0.lg2())]
    Granule(Granule),
    /// 64 - TxSZ is no input size that this SMMU has with that granule.
    #[error("{asked} bits of input address, where {smallest} to {largest} are implemented")]
    InputSize {
        /// 64 - TxSZ.
        asked: u8,
        /// The least.
        smallest: u8,
        /// The most.
        largest: u8,
    },
    /// IPS is larger than IDR5.OAS.
    #[error("{asked} bits of output address, and {implemented} are implemented")]
    OutputSize {
        /// What IPS says.
        asked: u8,
        /// What IDR5.OAS says.
        implemented: u8,
    },
    /// HA or HD, and IDR0.HTTU does not have it.
    #[error("hardware updates of flags are not implemented")]
    FlagUpdate,
    /// HPDx, and IDR3.HAD is 0.
    #[error("hierarchical permissions cannot be disabled")]
    HierarchicalPermissions,
    /// E0PDx, and IDR3.E0PD is 0.
    #[error("a half cannot be closed to unprivileged accesses")]
    E0pd,
    /// DS, and IDR5.DS is 0.
    #[error("52-bit addresses with this granule are not implemented")]
    LargeAddresses,
    /// The SMMU would answer C_BAD_CD to the descriptor that says all this.
    #[error("no legal context descriptor says this")]
    Descriptor,
    /// A reserved bit, or a reserved value of TGx or SHx.
    #[error("reserved bits or values")]
    Reserved,
    /// A table is not aligned to its size and to 64 bytes.
    #[error("table {table} is not aligned to {size:#x} bytes")]
    Alignment {
        /// The table.
        table: Gpa,
        /// What it has to be aligned to.
        size: u64,
    },
    /// A table lies beyond the output size.
    #[error("table {table} has more than {bits} bits")]
    AddressSize {
        /// The table.
        table: Gpa,
        /// What IPS says, or 48 where the granule has no larger addresses.
        bits: u8,
    },
}

impl PageTableRefusal {
    /// Whether the registers are meaningful but beyond the capabilities; otherwise they are invalid as such.
    pub const fn is_unsupported(self) -> bool {
        match self {
            Self::Aarch64
            | Self::Asid(_)
            | Self::Granule(_)
            | Self::OutputSize { .. }
            | Self::FlagUpdate
            | Self::HierarchicalPermissions
            | Self::E0pd
            | Self::LargeAddresses
            | Self::Descriptor => true,
            // Some SMMU has it.
            Self::InputSize { asked, .. } => matches!(asked, 16..=52),
            Self::Reserved | Self::Alignment { .. } | Self::AddressSize { .. } => false,
        }
    }
}

/// The page tables of one PASID in canonical form: VMSAv8-64, stage 1, and the descriptor that leads to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageTable {
    cd: Cd,
    context: Context,
    stall_model: StallModel,
}

impl PageTable {
    /// Checks registers.
    ///
    /// What they say of a half whose walks are disabled (EPDx) is ignored, and so is what only processors have: A1, AS,
    /// HWU, TBID, NFD, TCMA, MTX. Everything else is taken or refused, never changed; reserved bits are refused. What a
    /// descriptor has beyond the registers is: V, AA64, R, A and ASET set, the byte order that the SMMU has (little
    /// where it has both), S where the SMMU has nothing else, all others 0. The endpoint counts as one that may not
    /// stall, see [`with_stall`](Self::with_stall).
    ///
    /// Whether the tables lie in memory is for the caller to check, see [`extents`](Self::extents).
    ///
    /// # Errors
    /// What the numbers themselves show to be wrong.
    pub fn new(registers: &PageTableRegisters, caps: &Caps) -> Result<Self, PageTableRefusal> {
        let tcr = registers.tcr;
        if tcr.reserved6() || tcr.reserved35() || tcr.reserved62() != 0 {
            return Err(PageTableRefusal::Reserved);
        }
        if !caps.aarch64 {
            return Err(PageTableRefusal::Aarch64);
        }
        if registers.asid > 0xff && !caps.asid16 {
            return Err(PageTableRefusal::Asid(registers.asid));
        }
        if tcr.ha() && caps.httu == 0 || tcr.hd() && caps.httu < 2 {
            return Err(PageTableRefusal::FlagUpdate);
        }
        let output_bits = output_bits(tcr.ips());
        if output_bits > caps.oas_bits {
            let (asked, implemented) = (output_bits, caps.oas_bits);
            return Err(PageTableRefusal::OutputSize { asked, implemented });
        }
        let mut word0 = CdWord0::new()
            .with_epd0(true)
            .with_epd1(true)
            .with_valid(true)
            .with_ips(tcr.ips())
            .with_endi(matches!(caps.endianness, TableEndianness::Big))
            .with_aa64(true)
            .with_ha(tcr.ha())
            .with_hd(tcr.hd())
            .with_stall(matches!(caps.stall_model, StallModel::Stall))
            .with_record(true)
            .with_abort(true)
            .with_aset(true)
            .with_asid(registers.asid);
        let (mut word1, mut word2) = (CdWord1::new(), CdWord2::new());
        if !tcr.epd0() {
            let half = Half {
                granule: lower_granule(tcr.tg0()),
                size: tcr.t0sz(),
                shareability: tcr.sh0(),
                root: registers.ttbr0,
                hpd: tcr.hpd0(),
                e0pd: tcr.e0pd0(),
            };
            half.check(tcr, caps)?;
            word0 = word0
                .with_epd0(false)
                .with_t0sz(tcr.t0sz())
                .with_tg0(tcr.tg0())
                .with_ir0(tcr.irgn0())
                .with_or0(tcr.orgn0())
                .with_sh0(tcr.sh0())
                .with_tbi0(tcr.tbi0());
            word1 = word1.with_ttb0(registers.ttbr0 >> 4).with_had0(tcr.hpd0()).with_e0pd0(tcr.e0pd0());
        }
        if !tcr.epd1() {
            let half = Half {
                granule: upper_granule(tcr.tg1()),
                size: tcr.t1sz(),
                shareability: tcr.sh1(),
                root: registers.ttbr1,
                hpd: tcr.hpd1(),
                e0pd: tcr.e0pd1(),
            };
            half.check(tcr, caps)?;
            word0 = word0
                .with_epd1(false)
                .with_t1sz(tcr.t1sz())
                .with_tg1(tcr.tg1())
                .with_ir1(tcr.irgn1())
                .with_or1(tcr.orgn1())
                .with_sh1(tcr.sh1())
                .with_tbi1(tcr.tbi1());
            word2 = word2.with_ttb1(registers.ttbr1 >> 4).with_had1(tcr.hpd1()).with_e0pd1(tcr.e0pd1());
        }
        word2.set_ds(tcr.ds() && caps.ds);
        let cd = Cd { word0, word1, word2, mair: registers.mair, ..Cd::default() };
        let context = context_from_cd(&cd.words(), caps, false).map_err(|_| PageTableRefusal::Descriptor)?;
        Ok(Self { cd, context, stall_model: caps.stall_model })
    }

    /// The same tables for an endpoint whose transactions may stall, or not: where stalling is optional
    /// (`STALL_MODEL = 0`), S of the descriptor is set for one that may.
    #[must_use]
    pub const fn with_stall(self, may_stall: bool) -> Self {
        let stalls = match self.stall_model {
            StallModel::Both => may_stall,
            StallModel::Terminate => false,
            StallModel::Stall => true,
        };
        let Cd { word0, .. } = self.cd;
        Self { cd: Cd { word0: word0.with_stall(stalls), ..self.cd }, ..self }
    }

    /// The context descriptor that leads to the tables.
    pub const fn cd(&self) -> &Cd {
        &self.cd
    }

    /// What walks the tables.
    #[inline]
    pub const fn context(&self) -> Context {
        self.context
    }

    /// The tag on cached translations.
    #[inline]
    pub const fn asid(&self) -> u16 {
        self.context.asid()
    }

    /// Registers that say the same.
    pub const fn registers(&self) -> PageTableRegisters {
        PageTableRegisters::of(&self.cd)
    }

    /// Where the first table of each half starts and its size in bytes; the lower half comes first.
    pub fn extents(&self) -> [Option<(Gpa, u64)>; 2] {
        // Bit 55 selects the half.
        [Iova(0), Iova(1 << 55)].map(|address| {
            let params = self.context.half(address)?.params();
            Some((params.root, 1 << params.root_lg2()))
        })
    }
}

impl PageTableRegisters {
    /// What a context descriptor says, as far as registers can say it.
    pub const fn of(cd: &Cd) -> Self {
        let Cd { word0, word1, word2, mair, .. } = *cd;
        let tcr = Tcr::new()
            .with_t0sz(word0.t0sz())
            .with_epd0(word0.epd0())
            .with_irgn0(word0.ir0())
            .with_orgn0(word0.or0())
            .with_sh0(word0.sh0())
            .with_tg0(word0.tg0())
            .with_t1sz(word0.t1sz())
            .with_epd1(word0.epd1())
            .with_irgn1(word0.ir1())
            .with_orgn1(word0.or1())
            .with_sh1(word0.sh1())
            .with_tg1(word0.tg1())
            .with_ips(word0.ips())
            .with_tbi0(word0.tbi0())
            .with_tbi1(word0.tbi1())
            .with_ha(word0.ha())
            .with_hd(word0.hd())
            .with_hpd0(word1.had0())
            .with_hpd1(word2.had1())
            .with_e0pd0(word1.e0pd0())
            .with_e0pd1(word2.e0pd1())
            .with_ds(word2.ds());
        let (ttbr0, ttbr1) = (word1.ttb0() << 4, word2.ttb1() << 4);
        Self { asid: word0.asid(), tcr, ttbr0, ttbr1, mair }
    }
}

/// What the registers say of a half whose walks are not disabled.
struct Half {
    /// `None` where TGx is reserved.
    granule: Option<Granule>,
    size: u8,
    shareability: u8,
    root: u64,
    hpd: bool,
    e0pd: bool,
}

impl Half {
    fn check(&self, tcr: Tcr, caps: &Caps) -> Result<(), PageTableRefusal> {
        const RESERVED_SHAREABILITY: u8 = 1;
        let granule = self.granule.ok_or(PageTableRefusal::Reserved)?;
        if self.shareability == RESERVED_SHAREABILITY {
            return Err(PageTableRefusal::Reserved);
        }
        if !caps.has_granule(granule) {
            return Err(PageTableRefusal::Granule(granule));
        }
        if self.hpd && !caps.had {
            return Err(PageTableRefusal::HierarchicalPermissions);
        }
        if self.e0pd && !caps.e0pd {
            return Err(PageTableRefusal::E0pd);
        }
        // DS has no meaning with the 64 KiB granule, which has the larger addresses anyhow.
        let is_64k = matches!(granule, Granule::K64);
        if tcr.ds() && !is_64k && !caps.ds {
            return Err(PageTableRefusal::LargeAddresses);
        }
        let is_large = is_64k || tcr.ds();
        let largest = if is_large { caps.input_bits } else { 48 };
        let smallest = match (caps.stt, is_64k) {
            (true, false) => 16,
            (true, true) => 17,
            (false, _) => 25,
        };
        let asked = 64 - self.size;
        if !(smallest..=largest).contains(&asked) {
            return Err(PageTableRefusal::InputSize { asked, smallest, largest });
        }
        let table = Gpa(self.root);
        let bits = output_bits(tcr.ips()).min(if is_large { 52 } else { 48 });
        if self.root >> bits != 0 {
            return Err(PageTableRefusal::AddressSize { table, bits });
        }
        // At least what a descriptor can express; 64 bytes where addresses have 52 bits (Arm DDI 0487, D8.2).
        let stride = granule.lg2() - 3;
        let levels_below = (asked - 1 - granule.lg2()) / stride;
        let size_lg2 = (asked - granule.lg2() - levels_below * stride + 3).max(6);
        if !table.is_aligned(size_lg2) {
            return Err(PageTableRefusal::Alignment { table, size: 1 << size_lg2 });
        }
        Ok(())
    }
}

/// What a code of IPS says; 56 is beyond VMSAv8-64.
const fn output_bits(code: u8) -> u8 {
    match code {
        7 => 56,
        code => super::caps::address_bits(code),
    }
}

#[cfg(test)]
mod tests;
