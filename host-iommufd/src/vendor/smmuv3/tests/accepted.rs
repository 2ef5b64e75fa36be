//! Which commands Linux 7.3.4 takes for `IOMMU_HWPT_INVALIDATE`, checked as it does: field by field.

use crate::vendor::smmuv3::Hardware;

/// What the kernel goes by.
pub(super) struct Kernel {
    pub(super) ats: bool,
    pub(super) ril: bool,
    pub(super) ds: bool,
    pub(super) substream_bits: u32,
    pub(super) asid_bits: u32,
}

impl Kernel {
    /// Of the raw registers, not of what was decoded from them.
    pub(super) fn of(idr: &[u32; 6]) -> Self {
        Self {
            ats: idr[0] >> 10 & 1 == 1,
            ril: idr[3] >> 10 & 1 == 1,
            ds: idr[5] >> 7 & 1 == 1,
            substream_bits: (idr[1] >> 6 & 0x1f).min(20),
            asid_bits: if idr[0] >> 12 & 1 == 1 { 16 } else { 8 },
        }
    }

    /// `EIO` comes out as an error that says why.
    pub(super) fn accepts(&self, [q0, q1]: [u64; 2]) -> Result<(), &'static str> {
        const OP: u64 = 0xff;
        const VMID: u64 = 0xffff << 32;
        const ASID: u64 = 0xffff << 48;
        const SID: u64 = 0xffff_ffff << 32;
        const SSID: u64 = 0xf_ffff << 12;
        const NUM: u64 = 0x1f << 12;
        const SCALE: u64 = 0x3f << 20;
        const ADDRESS: u64 = !0xfff;
        let (fields0, fields1) = match q0 & OP {
            0x30 => (OP, 0),
            0x10 => (OP | VMID, 0),
            0x11 => (OP | VMID | ASID, 0),
            0x12 | 0x13 => {
                let asid = if q0 & OP == 0x12 { ASID } else { 0 };
                let ranges = if self.ril { (NUM | SCALE, 0xf00) } else { (0, 0) };
                (OP | VMID | asid | ranges.0, 1 | ADDRESS | ranges.1)
            }
            0x40 if !self.ats => return Err("no ATS"),
            0x40 => {
                let substreams = if self.substream_bits != 0 { SSID | 1 << 11 | 1 << 9 } else { 0 };
                (OP | SID | substreams, 0x3f | ADDRESS)
            }
            0x05 => (OP | SID | if self.substream_bits != 0 { SSID } else { 0 }, 1),
            0x06 => (OP | SID, 0),
            _ => return Err("opcode"),
        };
        if q0 & !fields0 != 0 || q1 & !fields1 != 0 {
            return Err("a bit that the command does not have");
        }
        match q0 & OP {
            0x11 | 0x12 if q0 >> 48 >> self.asid_bits != 0 => Err("ASID"),
            0x12 | 0x13 => self.accepts_range(q0 >> 12 & 0x1f, q0 >> 20 & 0x3f, q1 >> 8 & 3, q1 >> 10 & 3),
            0x40 | 0x05 if (q0 & SSID) >> 12 >> self.substream_bits != 0 => Err("SubstreamID"),
            0x40 if q1 & 0x3f > 52 => Err("SIZE"),
            _ => Ok(()),
        }
    }

    fn accepts_range(&self, num: u64, scale: u64, ttl: u64, tg: u64) -> Result<(), &'static str> {
        match tg {
            0 if num != 0 || scale != 0 || ttl != 0 => Err("a range without TG"),
            1..=3 if num == 0 && scale == 0 && ttl == 0 => Err("TG without a range"),
            2 if ttl == 1 && !self.ds => Err("TTL"),
            _ if scale >= 32 && !self.ds => Err("SCALE"),
            _ => Ok(()),
        }
    }
}

#[test]
fn refuses_what_the_kernel_refuses() {
    let idr = super::EMULATED;
    let kernel = Kernel::of(&idr);
    assert!(!Hardware::new(0, &idr, 44).ats);
    for (command, refused) in [
        ([0x03, 0], "opcode"),
        ([0x46, 0], "opcode"),
        ([0x10 | 1 << 12, 0], "a bit that the command does not have"),
        ([0x40, 0], "no ATS"),
        ([0x05 | 1 << 11, 0], "a bit that the command does not have"),
        ([0x05 | 1 << 12, 0], "a bit that the command does not have"),
        ([0x06, 1], "a bit that the command does not have"),
        ([0x13 | 1 << 48, 0], "a bit that the command does not have"),
        ([0x12, 1 << 10], "TG without a range"),
        ([0x12 | 1 << 12, 0], "a range without TG"),
        ([0x12, 2 << 10 | 1 << 8], "TTL"),
        ([0x12 | 32 << 20, 1 << 10], "SCALE"),
    ] {
        assert_eq!(kernel.accepts(command), Err(refused), "{command:x?}");
    }
    let narrow = Kernel { asid_bits: 8, substream_bits: 4, ats: true, ..kernel };
    assert_eq!(narrow.accepts([0x11 | 0x100 << 48, 0]), Err("ASID"));
    assert_eq!(narrow.accepts([0x05 | 16 << 12, 0]), Err("SubstreamID"));
    assert_eq!(narrow.accepts([0x40, 53]), Err("SIZE"));
    assert_eq!(narrow.accepts([0x40 | 1 << 11 | 1 << 9 | 15 << 12, 52]), Ok(()));
}
