//! What a VT-d unit can do, read from its capability registers.

use bitfield_struct::bitfield;

use crate::Pasid;

/// CAP_REG.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct Cap {
    /// Bits 2:0, ND: number of domains, as `4 + 2 * ND` bits.
    #[bits(3)]
    pub nd: u8,
    /// Bits 6:3.
    #[bits(4)]
    __: u8,
    /// Bit 7, CM: not-present entries may be cached.
    pub cm: bool,
    /// Bits 12:8, SAGAW: widths of the second stage.
    #[bits(5)]
    pub sagaw: u8,
    /// Bits 15:13.
    #[bits(3)]
    __: u8,
    /// Bits 21:16, MGAW: largest guest address width less one.
    #[bits(6)]
    pub mgaw: u8,
    /// Bits 38:22.
    #[bits(17)]
    __: u32,
    /// Bit 39, PSI: page-selective invalidation.
    pub psi: bool,
    /// Bits 47:40.
    #[bits(8)]
    __: u8,
    /// Bits 53:48, MAMV: largest address mask of an invalidation.
    #[bits(6)]
    pub mamv: u8,
    /// Bits 55:54.
    #[bits(2)]
    __: u8,
    /// Bit 56, FS1GP: 1 GiB pages in the first stage.
    pub fs1gp: bool,
    /// Bits 59:57.
    #[bits(3)]
    __: u8,
    /// Bit 60, FS5LP: first-stage tables of 5 levels.
    pub fs5lp: bool,
    /// Bits 63:61.
    #[bits(3)]
    __: u8,
}

/// ECAP_REG.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Hash)]
pub struct Ecap {
    /// Bits 1:0.
    #[bits(2)]
    __: u8,
    /// Bit 2, DT: device TLBs.
    pub dt: bool,
    /// Bits 24:3.
    #[bits(22)]
    __: u32,
    /// Bit 25, MTS: memory types in PASID entries.
    pub mts: bool,
    /// Bit 26, NEST: nested translation.
    pub nest: bool,
    /// Bits 28:27.
    #[bits(2)]
    __: u8,
    /// Bit 29, PRS: page requests.
    pub prs: bool,
    /// Bit 30, ERS: execute requests.
    pub ers: bool,
    /// Bit 31, SRS: privileged requests.
    pub srs: bool,
    /// Bit 32.
    __: bool,
    /// Bit 33, NWFS: no-write flag.
    pub nwfs: bool,
    /// Bit 34, EAFS: extended-accessed flag.
    pub eafs: bool,
    /// Bits 39:35, PSS: PASID bits less one.
    #[bits(5)]
    pub pss: u8,
    /// Bit 40, PASID: requests with PASIDs.
    pub pasid: bool,
    /// Bit 41, DIT: device TLB invalidation throttling.
    pub dit: bool,
    /// Bit 42, PDS: page request draining.
    pub pds: bool,
    /// Bit 43, SMTS: scalable mode.
    pub smts: bool,
    /// Bit 44.
    __: bool,
    /// Bit 45, SLADS: accessed and dirty flags in the second stage.
    pub slads: bool,
    /// Bit 46, SSTS: second stage in scalable mode.
    pub ssts: bool,
    /// Bit 47, FSTS: first stage.
    pub fsts: bool,
    /// Bit 48, SMPWC: page walks are coherent.
    pub smpwc: bool,
    /// Bit 49, RPS: the context entry names the PASID of untagged requests.
    pub rps: bool,
    /// Bits 63:50.
    #[bits(14)]
    __: u16,
}

const _: () = assert!(size_of::<Cap>() == 8 && size_of::<Ecap>() == 8);

/// The capability registers, as raw values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CapRegisters {
    /// CAP_REG, see [`Cap`].
    pub cap: u64,
    /// ECAP_REG, see [`Ecap`].
    pub ecap: u64,
}

impl CapRegisters {
    /// All that this crate's own lookup and walk do: 20 PASID bits, first-stage tables of 4 and 5 levels with
    /// 1 GiB pages, 52-bit addresses, privileged requests, extended-accessed flags.
    pub const SOFTWARE: Self = Self {
        cap: Cap::new()
            .with_nd(6)
            .with_mgaw(51)
            .with_psi(true)
            .with_mamv(20)
            .with_fs1gp(true)
            .with_fs5lp(true)
            .into_bits(),
        ecap: Ecap::new()
            .with_srs(true)
            .with_eafs(true)
            .with_pss(Pasid::BITS - 1)
            .with_pasid(true)
            .with_smts(true)
            .with_fsts(true)
            .with_smpwc(true)
            .with_rps(true)
            .into_bits(),
    };

    /// The bits of physical registers that a guest may be shown when its first-stage tables are handed to that
    /// hardware: those which the Linux uAPI lists for `iommu_hw_info_vtd`, without what only matters to a second
    /// stage (SAGAW, NEST, SSTS, SLADS) or what `iommu_hwpt_vtd_s1` cannot express (ERS, MTS, NWFS).
    #[must_use]
    pub const fn filtered(self) -> Self {
        let (cap, ecap) = (Cap::from_bits(self.cap), Ecap::from_bits(self.ecap));
        Self {
            cap: Cap::new()
                .with_nd(cap.nd())
                .with_cm(cap.cm())
                .with_mgaw(cap.mgaw())
                .with_psi(cap.psi())
                .with_mamv(cap.mamv())
                .with_fs1gp(cap.fs1gp())
                .with_fs5lp(cap.fs5lp())
                .into_bits(),
            ecap: Ecap::new()
                .with_dt(ecap.dt())
                .with_prs(ecap.prs())
                .with_srs(ecap.srs())
                .with_eafs(ecap.eafs())
                .with_pss(ecap.pss())
                .with_pasid(ecap.pasid())
                .with_dit(ecap.dit())
                .with_pds(ecap.pds())
                .with_smts(ecap.smts())
                .with_fsts(ecap.fsts())
                .with_smpwc(ecap.smpwc())
                .with_rps(ecap.rps())
                .into_bits(),
        }
    }
}

/// What first-stage configuration may use, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Caps {
    pub(super) registers: CapRegisters,
    /// Host address width (HAW) in bits, 32 to 52: address bits from there on are reserved. Taken as CAP.MGAW + 1.
    pub haw: u8,
    /// First-stage tables of 5 levels (CAP.FS5LP).
    pub fs5lp: bool,
    /// 1 GiB pages (CAP.FS1GP).
    pub fs1gp: bool,
    /// Bits of a PASID, 0 to 20 (ECAP.PASID, PSS).
    pub pasid_bits: u8,
    /// First-stage translation in scalable mode (ECAP.SMTS and FSTS).
    pub first_stage: bool,
    /// Privileged requests (ECAP.SRS).
    pub srs: bool,
    /// Extended-accessed flag (ECAP.EAFS).
    pub eafs: bool,
    /// The context entry names the PASID of untagged requests, otherwise it is 0 (ECAP.RPS).
    pub rps: bool,
}

impl Caps {
    /// Decodes the registers.
    pub const fn from_registers(registers: CapRegisters) -> Self {
        let (cap, ecap) = (Cap::from_bits(registers.cap), Ecap::from_bits(registers.ecap));
        let pss = ecap.pss() + 1;
        Self {
            registers,
            haw: match cap.mgaw() + 1 {
                0..=32 => 32,
                bits @ 33..=52 => bits,
                _ => 52,
            },
            fs5lp: cap.fs5lp(),
            fs1gp: cap.fs1gp(),
            pasid_bits: match (ecap.pasid(), pss > Pasid::BITS) {
                (false, _) => 0,
                (true, true) => Pasid::BITS,
                (true, false) => pss,
            },
            first_stage: ecap.smts() && ecap.fsts(),
            srs: ecap.srs(),
            eafs: ecap.eafs(),
            rps: ecap.rps(),
        }
    }

    /// The registers that were decoded, unchanged.
    pub const fn registers(&self) -> CapRegisters {
        self.registers
    }
}
