//! What an SMMUv3 can do, read from its ID registers (IHI 0070, 6.3.1 to 6.3.6).

use bitfield_struct::bitfield;

use crate::Pasid;

/// SMMU_IDR0.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Idr0 {
    /// Bit 0, S2P: stage 2.
    pub s2p: bool,
    /// Bit 1, S1P: stage 1.
    pub s1p: bool,
    /// Bits 3:2, TTF: bit 0 VMSAv8-32, bit 1 VMSAv8-64 tables.
    #[bits(2)]
    pub ttf: u8,
    /// Bit 4, COHACC: table accesses are coherent.
    pub cohacc: bool,
    /// Bit 5, BTM: broadcast TLB maintenance.
    pub btm: bool,
    /// Bits 7:6, HTTU: 0 none, 1 access flag, 2 and dirty state, 3 and access flag of table descriptors.
    #[bits(2)]
    pub httu: u8,
    /// Bit 8, DORMHINT.
    pub dormhint: bool,
    /// Bit 9, Hyp.
    pub hyp: bool,
    /// Bit 10, ATS.
    pub ats: bool,
    /// Bit 11, NS1ATS: no split-stage ATS.
    pub ns1ats: bool,
    /// Bit 12, ASID16: 16-bit ASIDs, otherwise 8.
    pub asid16: bool,
    /// Bits 15:13: MSI, SEV, ATOS.
    #[bits(3)]
    __: u8,
    /// Bit 16, PRI.
    pub pri: bool,
    /// Bit 17, VMW.
    pub vmw: bool,
    /// Bit 18, VMID16.
    pub vmid16: bool,
    /// Bit 19, CD2L: two-level CD tables.
    pub cd2l: bool,
    /// Bit 20, VATOS.
    pub vatos: bool,
    /// Bits 22:21, TTENDIAN: 0 both, 2 little, 3 big; 1 reserved.
    #[bits(2)]
    pub ttendian: u8,
    /// Bit 23, ATSRECERR.
    pub atsrecerr: bool,
    /// Bits 25:24, STALL_MODEL: 0 both, 1 no stall, 2 stall forced.
    #[bits(2)]
    pub stall_model: u8,
    /// Bit 26, TERM_MODEL: terminated transactions always abort (CD.A must be 1).
    pub term_model: bool,
    /// Bits 28:27, ST_LEVEL: 1 two-level stream tables.
    #[bits(2)]
    pub st_level: u8,
    /// Bits 31:29.
    #[bits(3)]
    __: u8,
}

/// SMMU_IDR1.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Idr1 {
    /// Bits 5:0, SIDSIZE: bits of a StreamID.
    #[bits(6)]
    pub sidsize: u8,
    /// Bits 10:6, SSIDSIZE: bits of a SubstreamID (PASID), 0 to 20.
    #[bits(5)]
    pub ssidsize: u8,
    /// Bits 31:11: queue sizes and attributes.
    #[bits(21)]
    __: u32,
}

/// SMMU_IDR3.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Idr3 {
    /// Bits 1:0.
    #[bits(2)]
    __: u8,
    /// Bit 2, HAD: hierarchical attributes can be disabled.
    pub had: bool,
    /// Bit 3, PBHA.
    pub pbha: bool,
    /// Bit 4, XNX.
    pub xnx: bool,
    /// Bits 7:5.
    #[bits(3)]
    __: u8,
    /// Bit 8, FWB.
    pub fwb: bool,
    /// Bit 9, STT: small translation tables (TxSZ up to 48).
    pub stt: bool,
    /// Bit 10, RIL: range invalidation.
    pub ril: bool,
    /// Bits 12:11, BBML: break-before-make level.
    #[bits(2)]
    pub bbml: u8,
    /// Bit 13, E0PD: unprivileged access can be kept out of one half.
    pub e0pd: bool,
    /// Bits 16:14.
    #[bits(3)]
    __: u8,
    /// Bit 17, EPAN.
    pub epan: bool,
    /// Bit 18, S1PI: permission indirection.
    pub s1pi: bool,
    /// Bits 22:19.
    #[bits(4)]
    __: u8,
    /// Bit 23, AIE.
    pub aie: bool,
    /// Bits 31:24.
    #[bits(8)]
    __: u8,
}

/// SMMU_IDR5.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Idr5 {
    /// Bits 2:0, OAS: 0 to 7 mean 32, 36, 40, 42, 44, 48, 52, 56 bits of output address.
    #[bits(3)]
    pub oas: u8,
    /// Bit 3, D128: VMSAv9-128.
    pub d128: bool,
    /// Bit 4, GRAN4K.
    pub gran4k: bool,
    /// Bit 5, GRAN16K.
    pub gran16k: bool,
    /// Bit 6, GRAN64K.
    pub gran64k: bool,
    /// Bit 7, DS: 52-bit addresses with 4 KiB and 16 KiB granules.
    pub ds: bool,
    /// Bits 9:8.
    #[bits(2)]
    __: u8,
    /// Bits 11:10, VAX: 0 means 48, 1 means 52, 2 means 56 bits of virtual address.
    #[bits(2)]
    pub vax: u8,
    /// Bits 15:12.
    #[bits(4)]
    __: u8,
    /// Bits 31:16, STALL_MAX.
    pub stall_max: u16,
}

const _: () = assert!(
    size_of::<Idr0>() == 4 && size_of::<Idr1>() == 4 && size_of::<Idr3>() == 4 && size_of::<Idr5>() == 4
);

/// The ID registers that say what a stage-1 table may use, as raw values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct IdRegisters {
    /// SMMU_IDR0, see [`Idr0`].
    pub idr0: u32,
    /// SMMU_IDR1, see [`Idr1`].
    pub idr1: u32,
    /// SMMU_IDR3, see [`Idr3`].
    pub idr3: u32,
    /// SMMU_IDR5, see [`Idr5`].
    pub idr5: u32,
}

impl IdRegisters {
    /// All that this crate's own lookup and walk do: 20 PASID bits, two-level CD tables, 16-bit ASIDs,
    /// little-endian VMSAv8-64 tables with each granule, 48-bit addresses in and out, aborts without stalls.
    pub const SOFTWARE: Self = Self {
        idr0: Idr0::new()
            .with_s1p(true)
            .with_ttf(TTF_AARCH64)
            .with_cohacc(true)
            .with_asid16(true)
            .with_cd2l(true)
            .with_ttendian(TTENDIAN_LITTLE)
            .with_stall_model(STALL_NEVER)
            .with_term_model(true)
            .with_st_level(1)
            .into_bits(),
        idr1: Idr1::new().with_sidsize(32).with_ssidsize(Pasid::BITS).into_bits(),
        idr3: Idr3::new().with_had(true).with_ril(true).with_bbml(2).into_bits(),
        idr5: Idr5::new()
            .with_oas(OAS_48)
            .with_gran4k(true)
            .with_gran16k(true)
            .with_gran64k(true)
            .into_bits(),
    };

    /// The bits of physical registers that a guest may be shown when its tables are handed to that hardware: those
    /// which the Linux uAPI lists for `iommu_hw_info_arm_smmuv3`, and S1P, which is implied.
    ///
    /// HTTU, BTM and MPAM are not nestable and go. OAS is not on the list, so it becomes 0 (32 bits): the guest's
    /// output size follows from its stage 2, see [`with_output_bits`](Self::with_output_bits).
    #[must_use]
    pub const fn filtered(self) -> Self {
        let idr0 = Idr0::from_bits(self.idr0);
        let idr1 = Idr1::from_bits(self.idr1);
        let idr3 = Idr3::from_bits(self.idr3);
        let idr5 = Idr5::from_bits(self.idr5);
        Self {
            idr0: Idr0::new()
                .with_s1p(true)
                .with_ttf(idr0.ttf())
                .with_asid16(idr0.asid16())
                .with_cd2l(idr0.cd2l())
                .with_ttendian(idr0.ttendian())
                .with_stall_model(idr0.stall_model())
                .with_term_model(idr0.term_model())
                .with_st_level(idr0.st_level())
                .into_bits(),
            idr1: Idr1::new().with_sidsize(idr1.sidsize()).with_ssidsize(idr1.ssidsize()).into_bits(),
            idr3: Idr3::new().with_ril(idr3.ril()).with_bbml(idr3.bbml()).into_bits(),
            idr5: Idr5::new()
                .with_gran4k(idr5.gran4k())
                .with_gran16k(idr5.gran16k())
                .with_gran64k(idr5.gran64k())
                .with_ds(idr5.ds())
                .with_vax(idr5.vax())
                .into_bits(),
        }
    }

    /// The same registers with IDR5.OAS set to the largest size that `bits` (of guest-physical address) holds.
    #[must_use]
    pub const fn with_output_bits(self, bits: u8) -> Self {
        let oas = match bits {
            56.. => 7,
            52.. => 6,
            48.. => OAS_48,
            44.. => 4,
            42.. => 3,
            40.. => 2,
            36.. => 1,
            _ => 0,
        };
        Self { idr5: Idr5::from_bits(self.idr5).with_oas(oas).into_bits(), ..self }
    }
}

const TTF_AARCH64: u8 = 2;
const TTENDIAN_LITTLE: u8 = 2;
const STALL_NEVER: u8 = 1;
const OAS_48: u8 = 5;

/// IDR0.STALL_MODEL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StallModel {
    /// A faulting transaction stalls or terminates, as its context descriptor says.
    Both,
    /// It always terminates; `CD.S = 1` is illegal. Reserved encodings count here.
    Terminate,
    /// It always stalls; `CD.S = 0` is illegal.
    Stall,
}

/// IDR0.TTENDIAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableEndianness {
    /// `CD.ENDI` decides.
    Both,
    /// Little-endian only. The reserved encoding counts here.
    Little,
    /// Big-endian only.
    Big,
}

/// What stage-1 configuration may use, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Caps {
    pub(super) registers: IdRegisters,
    /// Bits of a SubstreamID (PASID), 0 to 20 (IDR1.SSIDSIZE).
    pub ssid_bits: u8,
    /// Two-level CD tables (IDR0.CD2L).
    pub two_level_cd: bool,
    /// 16-bit ASIDs (IDR0.ASID16).
    pub asid16: bool,
    /// VMSAv8-64 tables (IDR0.TTF bit 1).
    pub aarch64: bool,
    /// Byte orders of translation tables (IDR0.TTENDIAN).
    pub endianness: TableEndianness,
    /// Whether faulting transactions may, never or always stall (IDR0.STALL_MODEL).
    pub stall_model: StallModel,
    /// `CD.A` must be 1 (IDR0.TERM_MODEL).
    pub always_abort: bool,
    /// Hardware update of flags (IDR0.HTTU): 0 none, 1 access, 2 and dirty, 3 and access of tables.
    pub httu: u8,
    /// Output address bits (IDR5.OAS), 32 to 52: 56 needs VMSAv9-128 and counts as 52.
    pub oas_bits: u8,
    /// Virtual address bits that the largest configuration translates (IDR5.VAX): 48 or 52.
    pub input_bits: u8,
    /// 4 KiB granule.
    pub granule_4k: bool,
    /// 16 KiB granule.
    pub granule_16k: bool,
    /// 64 KiB granule.
    pub granule_64k: bool,
    /// 52-bit addresses with the 4 KiB and 16 KiB granules (IDR5.DS).
    pub ds: bool,
    /// Small translation tables (IDR3.STT).
    pub stt: bool,
    /// Hierarchical attributes can be disabled (IDR3.HAD).
    pub had: bool,
    /// `CD.E0PDx` works (IDR3.E0PD).
    pub e0pd: bool,
    /// `CD.EPAN` works (IDR3.EPAN).
    pub epan: bool,
}

impl Caps {
    /// Decodes the registers.
    pub const fn from_registers(registers: IdRegisters) -> Self {
        let idr0 = Idr0::from_bits(registers.idr0);
        let idr1 = Idr1::from_bits(registers.idr1);
        let idr3 = Idr3::from_bits(registers.idr3);
        let idr5 = Idr5::from_bits(registers.idr5);
        let ssid = idr1.ssidsize();
        Self {
            registers,
            ssid_bits: if ssid > Pasid::BITS { Pasid::BITS } else { ssid },
            two_level_cd: idr0.cd2l(),
            asid16: idr0.asid16(),
            aarch64: idr0.ttf() & TTF_AARCH64 != 0,
            endianness: match idr0.ttendian() {
                0 => TableEndianness::Both,
                3 => TableEndianness::Big,
                _ => TableEndianness::Little,
            },
            stall_model: match idr0.stall_model() {
                0 => StallModel::Both,
                2 => StallModel::Stall,
                _ => StallModel::Terminate,
            },
            always_abort: idr0.term_model(),
            httu: idr0.httu(),
            oas_bits: address_bits(idr5.oas()),
            input_bits: if idr5.vax() == 0 { 48 } else { 52 },
            granule_4k: idr5.gran4k(),
            granule_16k: idr5.gran16k(),
            granule_64k: idr5.gran64k(),
            ds: idr5.ds(),
            stt: idr3.stt(),
            had: idr3.had(),
            e0pd: idr3.e0pd(),
            epan: idr3.epan(),
        }
    }

    /// The registers that were decoded, unchanged.
    pub const fn registers(&self) -> IdRegisters {
        self.registers
    }
}

/// Bits of an address size code as IDR5.OAS and CD.IPS have it; 56 counts as 52, the most that VMSAv8-64 puts out.
pub(super) const fn address_bits(code: u8) -> u8 {
    match code {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        5 => 48,
        _ => 52,
    }
}
