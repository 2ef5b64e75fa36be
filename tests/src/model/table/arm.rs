//! Format 0x80: page tables as a processor's registers describe them.

use super::super::request::{INVAL, UNSUPP, le16, le32, le64};
use super::super::words::{Context, Space};
use super::super::world::Hardware;
use super::{Asked, Judged, Refused, refused};

/// Bits of an output address by IPS.
const SIZES: [u32; 8] = [32, 36, 40, 42, 44, 48, 52, 56];

/// What is wrong, of the two ways in which something can be.
#[derive(Default)]
struct Wrong {
    /// As such.
    invalid: bool,
    /// For this hardware.
    beyond: bool,
}

/// One half, as far as its walks are enabled.
struct Half {
    granule: Option<u32>,
    input: u32,
    root: u64,
    shareability: u64,
}

pub(super) fn pages(bytes: &[u8], hardware: Hardware) -> Result<Judged, Refused> {
    let Hardware::Smmuv3 { ssid_bits, oas, shown: [idr0, _, _, idr5], .. } = hardware else {
        return refused(UNSUPP);
    };
    let (pasid, asid, tcr) = (le32(bytes, 16), le16(bytes, 20), le64(bytes, 24));
    let roots = [le64(bytes, 32), le64(bytes, 40)];
    let field = |low: u32, bits: u32| tcr >> low & ((1 << bits) - 1);
    if pasid >> ssid_bits != 0 {
        return refused(UNSUPP);
    }
    let mut wrong = Wrong::default();
    wrong.invalid |= field(6, 1) | field(35, 1) | field(62, 2) != 0;
    // ASID16; IPS; HA and HD, without HTTU.
    wrong.beyond |= asid > 0xff && idr0 & 1 << 12 == 0;
    let output = SIZES[field(32, 3) as usize];
    wrong.beyond |= output > oas.into();
    wrong.beyond |= field(39, 2) != 0;
    let halves = [
        Half {
            granule: [Some(12), Some(16), Some(14), None][field(14, 2) as usize],
            input: 64 - field(0, 6) as u32,
            root: roots[0],
            shareability: field(12, 2),
        },
        Half {
            granule: [None, Some(14), Some(12), Some(16)][field(30, 2) as usize],
            input: 64 - field(16, 6) as u32,
            root: roots[1],
            shareability: field(28, 2),
        },
    ];
    let is_enabled = [field(7, 1) == 0, field(23, 1) == 0];
    let mut extents = Vec::new();
    for (n, half) in (0..).zip(halves).filter(|&(n, _)| is_enabled[n as usize]) {
        // HAD, E0PD, which nobody is told of.
        wrong.beyond |= field(41 + n, 1) | field(55 + n, 1) != 0;
        extents.extend(half.judge(field(59, 1) != 0, output, idr5, &mut wrong));
    }
    match (wrong.invalid, wrong.beyond) {
        (false, false) => {}
        (true, false) => return refused(INVAL),
        (false, true) => return refused(UNSUPP),
        (true, true) => return Err(vec![INVAL, UNSUPP]),
    }
    // Walks are modelled of a lower half in pages of 4 KiB, without TBI.
    let lower = [field(14, 2), field(37, 1), field(7, 1)] == [0; 3] && !is_enabled[1];
    let context = match lower {
        true => Context::Tables(Space::Arm { root: roots[0], input: 64 - field(0, 6) as u32, output, asid }),
        false => Context::Unknown,
    };
    Ok(Judged { asked: Asked::Pages(pasid, context), extents })
}

impl Half {
    /// Where the first table begins, and its size.
    fn judge(&self, ds: bool, output: u32, idr5: u32, wrong: &mut Wrong) -> Option<(u64, u64)> {
        wrong.invalid |= self.shareability == 1;
        let Some(granule) = self.granule else {
            wrong.invalid = true;
            return None;
        };
        let is_large = granule == 16;
        wrong.beyond |= idr5 >> (granule / 2 - 2) & 1 == 0;
        wrong.beyond |= ds && !is_large; // No hardware here has DS, nor VAX.
        if !(25..=48).contains(&self.input) {
            let exists = (16..=52).contains(&self.input);
            wrong.beyond |= exists;
            wrong.invalid |= !exists;
            return None;
        }
        let stride = granule - 3;
        let below = (self.input - 1 - granule) / stride;
        let size = 1 << u32::max(self.input - granule - below * stride + 3, 6);
        let bits = u32::min(output, if is_large || ds { 52 } else { 48 });
        wrong.invalid |= !self.root.is_multiple_of(size) || self.root >> bits != 0;
        Some((self.root, size))
    }
}
