//! What a leaf of VMSAv8-64 permits, together with the tables above it.

use super::Vmsav8Flags;
use crate::Perms;

/// Permissions by [`modes_of`] the flags, and by what a leaf and the tables above it take away together, in the order of
/// a table entry's bits \[62:59\]: bit 0 privileged and bit 1 unprivileged execution, bit 2 unprivileged accesses, bit 3
/// writes.
pub(super) static PERMS: [[Perms; 16]; 16] = {
    let mut perms = [[Perms::empty(); 16]; 16];
    let mut bits = 0;
    while bits <= Vmsav8Flags::all().bits() {
        let flags = Vmsav8Flags::from_bits_truncate(bits);
        let mut taken = 0;
        while taken < 16 {
            perms[modes_of(flags)][taken] = perms_of(flags, taken);
            taken += 1;
        }
        bits += 1;
    }
    perms
};

/// What flags say about permissions: bit 0 WXN, bit 1 PAN, bits 3:2 E0PD and EPAN.
#[inline]
pub(super) const fn modes_of(flags: Vmsav8Flags) -> usize {
    let bits = flags.bits();
    (bits >> 1 & 0b0001 | bits >> 4 & 0b0010 | bits >> 8 & 0b1100) as usize
}

/// Direct permissions (DDI 0487, D8.4.1).
const fn perms_of(flags: Vmsav8Flags, taken: usize) -> Perms {
    let (user, write) = (taken & 4 == 0, taken & 8 == 0);
    let user_execute = taken & 2 == 0;
    // What unprivileged accesses can write is never executed by privileged ones.
    let privileged_execute = taken & 1 == 0 && !(user && write);
    let wxn = flags.contains(Vmsav8Flags::WXN);
    let mut perms = Perms::empty();
    if user {
        perms = perms.union(Perms::USER_READ);
        if write {
            perms = perms.union(Perms::USER_WRITE);
        }
    }
    if user_execute && !(wxn && user && write) {
        perms = perms.union(Perms::USER_EXECUTE);
    }
    // PAN is about data: what WXN looks at is the page, PAN or not.
    if privileged_execute && !(wxn && write) {
        perms = perms.union(Perms::PRIV_EXECUTE);
    }
    let is_shared = user || user_execute && flags.contains(Vmsav8Flags::EPAN);
    if !(is_shared && flags.contains(Vmsav8Flags::PAN)) {
        perms = perms.union(Perms::PRIV_READ);
        if write {
            perms = perms.union(Perms::PRIV_WRITE);
        }
    }
    if flags.contains(Vmsav8Flags::E0PD) { perms.difference(USER) } else { perms }
}

const USER: Perms = Perms::USER_READ.union(Perms::USER_WRITE).union(Perms::USER_EXECUTE);
