//! What a guest writes into its tables.

use super::super::layout::{self, Tables};
use super::super::words::{cd, pasid_entry};
use super::{Hints, Op, Source, le, le64};
use crate::rig::Memory;

/// Tables that hold together: what a run begins with, and then changes.
pub fn prepared() -> Vec<(u64, Vec<u64>)> {
    let mut words = Vec::new();
    for is_vtd in [false, true] {
        for n in 0..layout::SPACE_COUNT {
            let tables = Tables::new(is_vtd, n);
            words.extend(tables.links().map(|(at, table)| (at, vec![tables.link(table)])));
            words.push((tables.region(0), vec![tables.link(tables.pages(0, 0))]));
            words.push((tables.region(1), vec![tables.leaf(Memory::BASE + (n << 21), true)]));
            for variant in 0..2 {
                let output = Memory::BASE + (n << 16) + (variant << 15);
                let leaves = (0..4).map(|page| tables.leaf(output + (page << 12), false));
                words.push((tables.pages(0, variant), leaves.collect()));
            }
        }
    }
    for (pasid, n) in [(0, 0), (1, 1), (2, 2), (65, 0)] {
        let (leaf, within) = ((pasid >> 6) * 0x1_0000, 64 * (pasid & 63));
        let arm = cd(Tables::new(false, n).root, n as u16 + 1).to_vec();
        let linear = layout::CD_TABLES;
        let levels = linear + layout::CD_TABLE_STEP;
        words.push((levels + 8 * (pasid >> 6), vec![(levels + layout::CD_LEAVES + leaf) | 1]));
        words.push((levels + layout::CD_LEAVES + leaf + within, arm.clone()));
        if pasid < 16 {
            words.push((linear + within, arm.clone()));
        }
        if pasid == 0 {
            words.push((linear + 2 * layout::CD_TABLE_STEP, arm));
        }
        let entry = pasid_entry(Tables::new(true, n).root, pasid == 1).to_vec();
        for d in 0..layout::DIRECTORY_COUNT {
            let directory = layout::DIRECTORIES + d * layout::DIRECTORY_STEP;
            words.push((directory + 8 * (pasid >> 6), vec![(directory + layout::PASID_TABLES + leaf) | 1]));
            words.push((directory + layout::PASID_TABLES + leaf + within, entry.clone()));
        }
    }
    words
}

/// Something in a table.
pub(super) fn write(source: &mut Source<'_, '_>, hints: &Hints) -> Op {
    let recent = source.recent(hints);
    let is_vtd = match recent {
        Some((id, ..)) => hints.endpoints.contains(&(id, Some(true))),
        None => source.below(2) == 1,
    };
    let tables = Tables::new(is_vtd, source.below(3) as u64);
    let (region, page) = match recent {
        Some((_, _, iova)) => (iova >> 21 & 1, iova >> 12 & 7),
        None => (source.pick(&[0, 0, 1]), source.pick(&[0, 0, 1, 1, 2, 3, 4, 5])),
    };
    let (at, words) = match source.below(20) {
        0..8 => (tables.pages(region, source.below(2) as u64) + 8 * page, vec![leaf(source, tables, false)]),
        8..12 => {
            let word = match source.below(6) {
                0..4 => tables.link(tables.pages(region, source.below(2) as u64)),
                _ => leaf(source, tables, true),
            };
            (tables.region(region), vec![word])
        }
        // All of a path at once, so that there is something to walk.
        12..14 => return link(source, tables),
        14..18 if is_vtd => pasid_entry_at(source, hints, tables),
        14..18 => cd_at(source, tables),
        _ if is_vtd => {
            let directory = layout::DIRECTORIES + source.below(2) as u64 * layout::DIRECTORY_STEP;
            let n = source.below(2) as u64;
            let table = directory + layout::PASID_TABLES + n * 0x1_0000;
            (
                directory + 8 * n,
                vec![if source.one_in(4) { source.pick(&[0, 1 << 60, table | 5]) } else { table | 1 }],
            )
        }
        _ => {
            let base = layout::CD_TABLES + layout::CD_TABLE_STEP;
            let n = source.below(2) as u64;
            let table = base + layout::CD_LEAVES + n * 0x1_0000;
            (
                base + 8 * n,
                vec![if source.one_in(4) { source.pick(&[0, 1 << 50 | 1, table]) } else { table | 1 }],
            )
        }
    };
    Op::Write { at, words }
}

/// Takes pages away, so that there is something to wait for.
pub(super) fn unmap(source: &mut Source<'_, '_>, hints: &Hints) -> Op {
    let recent = source.recent(hints);
    let is_vtd = match recent {
        Some((id, ..)) => hints.endpoints.contains(&(id, Some(true))),
        None => source.below(2) == 1,
    };
    let tables = Tables::new(is_vtd, source.below(3) as u64);
    Op::Write { at: tables.pages(0, 0), words: vec![0; 4] }
}

/// The descriptor of format 0x80: mostly a good one.
pub(super) fn arm(source: &mut Source<'_, '_>, at: impl Fn(u64) -> u64) -> Vec<u8> {
    // EPD1, IPS = 40 bits, write-back and inner shareable, T0SZ = 25.
    let good = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32;
    let tcr = match source.below(24) {
        20 => good ^ 1 << source.below(64),
        21 => good ^ 1 << source.below(64) ^ 1 << source.below(64),
        // Sizes and granules.
        22 => good & !0x3f | source.below(64) as u64 | (source.below(4) as u64) << 14,
        // Both halves.
        23 => good & !(1 << 23) | 25 << 16 | (source.below(4) as u64) << 30 | (source.below(8) as u64) << 32,
        _ => good,
    };
    let odd = if source.one_in(30) { source.word() } else { 0 };
    let (first, second) = (source.below(3) as u64, source.below(3) as u64);
    let root = at(Tables::new(false, first).root) ^ odd & 0xfff;
    let other = if source.one_in(4) { source.word() } else { Tables::new(false, second).root };
    let pasid = source.pasid();
    let asid = u32::from(source.asid());
    [le(&[pasid, asid]), le64(&[tcr, root, other, 0xff])].concat()
}

/// A page or a block of 2 MiB, mostly a good one.
fn leaf(source: &mut Source<'_, '_>, tables: Tables, is_block: bool) -> u64 {
    let size = if is_block { 1 << 21 } else { 1 << 12 };
    let output = match source.one_in(12) {
        true => source.pick(&[0xfee0_0000, 1 << 45, 1 << 51, 0]),
        false => Memory::BASE + size * source.below(8) as u64,
    };
    let word = tables.leaf(output, is_block);
    match source.below(10) {
        6 => tables.global(word),
        7 => word ^ 1 << source.pick(&[0, 1, 2, 5, 6, 7, 8, 10, 11, 53, 54, 63]),
        8 => 0,
        9 => match source.below(4) {
            // A table that leads to itself, or out of memory, or anything.
            0 => tables.link(tables.root),
            1 => tables.link(Memory::BASE + layout::MEMORY_BYTES as u64),
            _ => source.word(),
        },
        _ => word,
    }
}

/// The next upper link of an address space; sometimes a bad one.
fn link(source: &mut Source<'_, '_>, tables: Tables) -> Op {
    let links: Vec<(u64, u64)> = tables.links().collect();
    let (at, table) = source.pick(&links);
    let word = if source.one_in(6) {
        source.pick(&[0, tables.link(table) & !2, tables.link(table) & !1])
    } else {
        tables.link(table)
    };
    Op::Write { at, words: vec![word] }
}

fn cd_at(source: &mut Source<'_, '_>, tables: Tables) -> (u64, Vec<u64>) {
    let table = source.below(layout::CD_TABLE_COUNT as usize) as u64;
    let pasid = source.pick(&[0_u64, 0, 1, 2, 65]);
    let base = layout::CD_TABLES + table * layout::CD_TABLE_STEP;
    let at = match table {
        1 => base + layout::CD_LEAVES + (pasid >> 6) * 0x1_0000 + 64 * (pasid & 63),
        _ => base + 64 * pasid,
    };
    let mut words = cd(tables.root, source.asid());
    if source.one_in(6) {
        match source.below(3) {
            0 => words = [0; 8],
            1 => words[0] ^= 1 << source.pick(&[31, 41, 46, 34]),
            _ => words[1] = source.pick(&[1 << 49, 1 << 44, layout::ZEROS]),
        }
    }
    (at, words.to_vec())
}

fn pasid_entry_at(source: &mut Source<'_, '_>, hints: &Hints, tables: Tables) -> (u64, Vec<u64>) {
    let directory = layout::DIRECTORIES + source.below(2) as u64 * layout::DIRECTORY_STEP;
    let pasid = source.pick(&[0_u64, 0, 1, 2, 65]);
    let at = directory + layout::PASID_TABLES + (pasid >> 6) * 0x1_0000 + 64 * (pasid & 63);
    let mut words = pasid_entry(tables.root, source.one_in(4));
    if source.one_in(6) {
        match source.below(4) {
            0 => words = [0; 8],
            1 => words[source.below(8)] ^= 1 << source.below(64),
            // The bypass of a machine serves the PASIDs that have nothing of their own, too: untagged accesses have none
            // where the device makes their entry of it.
            2 if hints.is_made && pasid == 0 => words[0] &= !0x1c0,
            2 => words[0] = words[0] & !0x1c0 | (source.below(8) as u64) << 6,
            _ => words[2] = source.pick(&[1 << 51, 1 << 40, layout::ZEROS, words[2] | 1 << 2]),
        }
    }
    (at, words.to_vec())
}
