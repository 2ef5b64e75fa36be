//! Words by hand: commands of IHI 0070, 4.3 to 4.5, entries of 5.2, events of 7.3.

use pgtable_formats::context::smmuv3::{Caps, CdTable, Event, IdRegisters, StallModel};
use pgtable_formats::{AccessKind, Iova};
use viommu_device::host::{Invalidation, Scope};
use viommu_wire::Caches;

use super::*;
use crate::vendor::smmuv3::{ABORT, BYPASS, DecodedEvent, caps, decode, everything, plan, ste};

/// The TLBI commands of one invalidation.
fn tlbi(asked: Invalidation, hardware: &Hardware) -> Vec<[u64; 2]> {
    let mut steps = commands(&plan(&[(asked, PLAIN)], hardware));
    assert_eq!(steps.len(), 1);
    steps.remove(0)
}

/// The ATC_INV commands of one invalidation of `target`.
fn atc(asked: Invalidation, target: Target) -> Vec<[u64; 2]> {
    commands(&plan(&[(asked, target)], &server())).pop().unwrap()
}

fn pages(start: u64, last: u64, page_lg2: u8) -> Invalidation {
    translations(Scope::Range { pasid: None, range: range(start, last), page_lg2 })
}

// ---- hardware ----

/// The emulated SMMU of QEMU: what Linux 7.3 says of it, and what of that a guest is shown.
#[test]
fn emulated_smmu() {
    let hardware = Hardware::new(0, &EMULATED, 44);
    assert!(hardware.range_invalidation && !hardware.ats && !hardware.repeat);
    let Caps { ssid_bits, stall_model, oas_bits, input_bits, httu, .. } = hardware.caps;
    assert_eq!((ssid_bits, oas_bits, input_bits, httu), (0, 44, 48, 0));
    assert_eq!(stall_model, StallModel::Terminate);
    assert!(hardware.caps.granule_4k && hardware.caps.granule_16k && hardware.caps.granule_64k);
    let IdRegisters { idr0, idr1, idr3, idr5 } = hardware.caps.registers();
    // VMID16, COHACC and S2P are gone from IDR0, queue sizes from IDR1, XNX from IDR3; OAS is what stage 2 takes.
    assert_eq!((idr0, idr1, idr3, idr5), (0x0d40_100a, 0x10, 0x1400, 0x74));
}

#[test]
fn only_bits_of_the_uapi_reach_a_guest() {
    let IdRegisters { idr0, idr1, idr3, idr5 } = caps(&[u32::MAX; 6], 40).registers();
    let listed = 3 << 27 | 1 << 26 | 3 << 24 | 3 << 21 | 1 << 19 | 1 << 12 | 3 << 2;
    assert_eq!(idr0, listed | 1 << 1, "and S1P, which is implied");
    assert_eq!(idr1, 0x7ff);
    assert_eq!(idr3, 3 << 11 | 1 << 10);
    assert_eq!(idr5, 3 << 10 | 0xf << 4 | 2, "OAS = 2: 40 bits");
}

#[test]
fn erratum_repeats_all_but_the_devices_step() {
    let hardware = hardware(1, |idr| idr[0] |= ATS);
    let asked = Invalidation { caches: Caches::all(), ..translations(Scope::Endpoint) };
    let target = Target { pasids: 0, ..TARGET };
    let plan = plan(&[(asked, target)], &hardware);
    assert_eq!(plan.steps().map(|step| step.repeat).collect::<Vec<_>>(), [true, true, false]);
}

// ---- stream table entries ----

fn table(ste: [u64; 2], hardware: &Hardware) -> CdTable {
    CdTable::from_ste(ste[0], ste[1], &hardware.caps).unwrap()
}

#[test]
fn entries_of_no_table() {
    assert_eq!(BYPASS, [0x9, 0]);
    assert_eq!(ABORT, [0, 0]);
}

/// What the kernel took in a trial: one descriptor at 0x4000_0000, write-back, inner shareable.
#[test]
fn entry_of_one_descriptor() {
    let table = table([0x4000_0000, 1 << 2 | 1 << 4 | 3 << 6], &server());
    assert_eq!(ste(&table, true, false), [0x4000_000b, 0xd4]);
}

/// Whatever else a guest sets (S1ContextPtr\[55:52\], STRW, SHCFG, S1PIE and more) is not in the entry.
#[test]
fn entry_has_no_other_bits() {
    let kernel_takes = [0xf80f_ffff_ffff_ffff, 0x3800_00ff];
    let (pointer, cd_max, format) = (0xfff_ffff_ffc0, 6, 1);
    let word0 = cd_max << 59 | 0x7f << 52 | pointer | format << 4;
    let table = table([word0, !0], &server());
    let [word0, word1] = ste(&table, true, false);
    assert_eq!([word0 & !kernel_takes[0], word1 & !kernel_takes[1]], [0, 0]);
    assert_eq!(word0, cd_max << 59 | pointer | format << 4 | 0xb, "V=1, Config=5");
    assert_eq!(word1, 0x1000_00fc, "S1DSS = 3 acts as 0, EATS is 1");
}

#[test]
fn two_levels_with_pasids() {
    // S1CDMax = 20, S1Fmt = 2 (64 KiB leaves), S1DSS = 2, EATS = 1.
    let table = table([20 << 59 | 2 << 4 | 0x8000_0000, 1 << 28 | 2], &server());
    assert_eq!(ste(&table, true, false), [0xa000_0000_8000_002b, 0x1000_0002]);
    assert_eq!(ste(&table, false, false), [0xa000_0000_8000_002b, 0x2], "the device has no ATS");
}

/// The kernel leaves S1STALLD to us.
#[test]
fn stalls_are_forbidden_to_who_may_not() {
    let stall_model = |model: u32| hardware(0, |idr| idr[0] = idr[0] & !(3 << 24) | model << 24);
    let stalld = |model: u32, may_stall: bool, word1: u64| {
        let table = table([0x4000_0000, word1], &stall_model(model));
        ste(&table, false, may_stall)[1] >> 27 & 1
    };
    for guest in [0, 1 << 27] {
        assert_eq!(stalld(0, false, guest), 1);
        assert_eq!(stalld(0, true, guest), 0);
        // The bit is illegal where the model is fixed.
        assert_eq!([stalld(1, false, guest), stalld(2, false, guest), stalld(2, true, guest)], [0; 3]);
    }
}

/// The kernel sets S2S for a device that stalls; IHI 0070 makes that illegal with full ATS.
#[test]
fn no_ats_for_who_may_stall() {
    let hardware = hardware(0, |idr| idr[0] &= !(3 << 24));
    let table = table([0x4000_0000, 1 << 28], &hardware);
    assert_eq!(ste(&table, true, true)[1] >> 28 & 3, 0);
    assert_eq!(ste(&table, true, false)[1] >> 28 & 3, 1);
}

/// Split-stage ATS and DPT are not for a guest: EATS is 0 or 1.
#[test]
fn any_ats_is_full_ats() {
    for eats in [1, 2, 3] {
        let table = table([0x4000_0000, eats << 28], &server());
        assert_eq!(ste(&table, true, false)[1] >> 28 & 3, 1);
    }
}

// ---- TLBI (IHI 0070, 4.4) ----

#[test]
fn whole_address_spaces() {
    let whole = translations(Scope::Pasid(None));
    let hardware = server();
    assert_eq!(tlbi(whole, &hardware), [[0x10, 0]], "NH_ALL");
    let tagged = Invalidation { tag: Some(0x2a), ..whole };
    assert_eq!(tlbi(tagged, &hardware), [[0x002a_0000_0000_0011, 0]], "NH_ASID");
    assert_eq!(tlbi(Invalidation { global: true, ..tagged }, &hardware), [[0x10, 0]]);
    assert_eq!(
        tlbi(Invalidation { scope: Scope::Endpoint, ..tagged }, &hardware),
        [[0x002a_0000_0000_0011, 0]]
    );
    let wide = Invalidation { tag: Some(0x102a), ..whole };
    assert_eq!(tlbi(wide, &hardware), [[0x102a_0000_0000_0011, 0]]);
    let narrow = super::hardware(0, |idr| idr[0] &= !(1 << 12));
    assert_eq!(tlbi(wide, &narrow), [[0x10, 0]], "an 8-bit ASID cannot be it");
}

#[test]
fn one_page() {
    let asked = pages(0x7f00_0000_3000, 0x7f00_0000_3fff, 12);
    for hardware in [server(), hardware(0, |idr| idr[3] &= !RIL)] {
        assert_eq!(tlbi(asked, &hardware), [[0x13, 0x7f00_0000_3000]], "NH_VAA");
        let tagged = Invalidation { tag: Some(0x2a), leaf: true, ..asked };
        assert_eq!(tlbi(tagged, &hardware), [[0x002a_0000_0000_0012, 0x7f00_0000_3001]], "NH_VA, LEAF");
        let global = Invalidation { global: true, ..tagged };
        assert_eq!(tlbi(global, &hardware), [[0x13, 0x7f00_0000_3001]]);
    }
}

/// `(NUM + 1) << SCALE` pages of TG from ADDR on.
#[test]
fn pages_by_range() {
    let hardware = server();
    let two = tlbi(pages(0x1000, 0x2fff, 12), &hardware);
    assert_eq!(two, [[0x13 | 1 << 20, 0x1000 | 1 << 10]]);
    let three = tlbi(pages(0x1000, 0x3fff, 12), &hardware);
    assert_eq!(three, [[0x13 | 2 << 12, 0x1000 | 1 << 10]]);
    // 33 pages: one, and 1 << 5.
    let odd = tlbi(pages(0x4000, 0x2_4fff, 12), &hardware);
    assert_eq!(odd, [[0x13, 0x4000], [0x13 | 5 << 20, 0x5000 | 1 << 10]]);
    let large = tlbi(pages(0x4000_0000, 0x7fff_ffff, 14), &hardware);
    assert_eq!(large, [[0x13 | 16 << 20, 0x4000_0000 | 2 << 10]]);
    // 31 pages of 64 KiB at the end of the address space.
    let upper = tlbi(pages(0xffff_ffff_ffe1_0000, u64::MAX, 16), &hardware);
    assert_eq!(upper, [[0x13 | 30 << 12, 0xffff_ffff_ffe1_0000 | 3 << 10]]);
    // All bits of the count: 2^36 - 1 pages.
    let most = tlbi(pages(0x1000, 0xffff_ffff_ffff, 12), &hardware);
    assert_eq!(most.len(), 8);
    assert_eq!(most[0], [0x13 | 30 << 12, 0x1000 | 1 << 10]);
    // Seven times five bits are done, the last page's address is 2^47, and one bit is left: 16 << 31.
    assert_eq!(most[7], [0x13 | 15 << 12 | 31 << 20, 1 << 47 | 1 << 10]);
}

#[test]
fn pages_one_by_one() {
    let hardware = hardware(0, |idr| idr[3] &= !RIL);
    let tagged = |asked| Invalidation { tag: Some(1), ..asked };
    let some = tlbi(tagged(pages(0x1000, 0x1f_ffff, 12)), &hardware);
    assert_eq!(some.len(), 511);
    assert_eq!([some[0][1], some[510][1]], [0x1000, 0x1f_f000]);
    // As many as a table has entries.
    assert_eq!(tlbi(tagged(pages(0, 0x1f_ffff, 12)), &hardware), [[0x0001_0000_0000_0011, 0]]);
    assert_eq!(tlbi(tagged(pages(0, 0x1fff_ffff, 16)), &hardware), [[0x0001_0000_0000_0011, 0]]);
    assert_eq!(tlbi(pages(0, 0x1f_ffff, 12), &hardware), [[0x10, 0]], "without a tag");
}

#[test]
fn ranges_that_no_command_says() {
    let hardware = server();
    let tagged = |asked| tlbi(Invalidation { tag: Some(1), ..asked }, &hardware);
    let whole = [[0x0001_0000_0000_0011, 0]];
    assert_eq!(tagged(pages(0x20_0000, 0x3f_ffff, 21)), whole, "a block is no granule");
    assert_eq!(tagged(pages(0, u64::MAX, 12)), whole);
    assert_eq!(tagged(pages(0, 0xffff_ffff_ffff, 12)), whole, "2^36 pages");
    assert_eq!(tagged(pages(0x2a00_0000_0000_1000, 0x2a00_0000_0000_1fff, 12)), whole, "by TBI");
    let narrow = super::hardware(0, |idr| idr[5] &= !(1 << 5));
    let asked = Invalidation { tag: Some(1), ..pages(0, 0x3fff, 14) };
    assert_eq!(tlbi(asked, &narrow), whole, "there is no 16 KiB granule");

    let large = super::hardware(0, |idr| idr[5] |= 1 << 10);
    let asked = pages(0x4_0000_0000_0000, 0x4_0000_0000_ffff, 16);
    assert_eq!(tlbi(asked, &large), [[0x13, 0x4_0000_0000_0000]], "VAX: 52 bits");
    assert_eq!(tlbi(asked, &hardware), [[0x10, 0]], "48 bits");
}

// ---- CFGI (IHI 0070, 4.3) ----

/// LEAF is 0: a level-1 entry may have changed. Which ASID the descriptor had is not known any more.
#[test]
fn descriptors() {
    let hardware = server();
    let target = Target { vsid: 0x42, ats: false, pasids: 8 };
    let cfgi = |scope, tag| {
        let asked = Invalidation { caches: Caches::PASID, tag, ..translations(scope) };
        let steps = commands(&plan(&[(asked, target)], &hardware));
        assert_eq!((steps.len(), &steps[1][..]), (2, &[[0x10, 0]][..]));
        assert_eq!(steps[0].len(), 1);
        steps[0][0]
    };
    assert_eq!(cfgi(Scope::Pasid(Some(pasid(0xab))), None), [0x42_000a_b005, 0]);
    assert_eq!(cfgi(Scope::Pasid(Some(pasid(0xab))), Some(9)), [0x42_000a_b005, 0]);
    assert_eq!(cfgi(Scope::Pasid(None), None), [0x42_0000_0005, 0], "descriptor 0");
    assert_eq!(cfgi(Scope::Pasid(None), Some(9)), [0x42_0000_0006, 0], "a tag alone");
    assert_eq!(cfgi(Scope::Endpoint, None), [0x42_0000_0006, 0], "CFGI_CD_ALL");
    assert_eq!(cfgi(Scope::Pasid(Some(pasid(0x100))), None), [0x42_0000_0006, 0], "beyond the table");
}

// ---- ATC_INV (IHI 0070, 4.5.1) ----

#[test]
fn devices_caches() {
    let all = 52;
    let whole = |scope| translations(scope);
    assert_eq!(atc(whole(Scope::Pasid(None)), TARGET), [[0x7_0000_0040, all]]);
    assert_eq!(atc(whole(Scope::Pasid(Some(pasid(5)))), TARGET), [[0x7_0000_5840, all]], "SSV");
    let both = [[0x7_0000_0040, all], [0x7_0000_0a40, all]];
    assert_eq!(atc(whole(Scope::Endpoint), TARGET), both, "and Global");
    let untagged = [[0x7_0000_0040, all]];
    assert_eq!(atc(whole(Scope::Endpoint), Target { pasids: 0, ..TARGET }), untagged, "no PASIDs");
    let zero = [[0x7_0000_0040, all], [0x7_0000_0840, all]];
    assert_eq!(atc(whole(Scope::Pasid(Some(Pasid::ZERO))), TARGET), zero, "untagged DMA may be PASID 0");
    let by_tag = Invalidation { tag: Some(3), ..whole(Scope::Pasid(None)) };
    assert_eq!(atc(by_tag, TARGET), both, "which PASIDs have the ASID is not known");
}

/// SIZE is log2 of 4 KiB pages, the address a multiple of the span.
#[test]
fn devices_ranges() {
    let spans = |start, last| {
        let words = atc(pages(start, last, 12), TARGET);
        words.into_iter().map(|[_, word1]| word1).collect::<Vec<_>>()
    };
    assert_eq!(spans(0x3000, 0x3fff), [0x3000]);
    assert_eq!(spans(0x4000, 0x7fff), [0x4000 | 2]);
    assert_eq!(spans(0x5000, 0x7fff), [0x4000 | 2]);
    // Not one block of 8 GiB.
    assert_eq!(spans(0xffff_f000, 0x1_0000_0fff), [0xffff_f000, 0x1_0000_0000]);
    assert_eq!(spans(0xffff_ffff_ffff_f000, u64::MAX), [0xffff_ffff_ffff_f000]);
    assert_eq!(spans(0x2a00_0000_0000_1000, 0x2a00_0000_0000_1fff), [52], "by TBI");
    assert_eq!(spans(0, u64::MAX), [52]);
}

/// A device may refuse less than the smallest translation unit, which is the SMMU's smallest page.
#[test]
fn no_span_below_the_translation_unit() {
    let hardware = hardware(0, |idr| {
        idr[0] |= ATS;
        idr[5] &= !(3 << 4);
    });
    let target = Target { pasids: 0, ..TARGET };
    let plan = plan(&[(pages(0x3000, 0x3fff, 12), target)], &hardware);
    assert_eq!(commands(&plan)[1], [[0x7_0000_0040, 4]]);
}

#[test]
fn no_command_to_devices_without_ats() {
    let asked = translations(Scope::Endpoint);
    assert_eq!(commands(&plan(&[(asked, PLAIN)], &server())).len(), 1);
    let emulated = Hardware::new(0, &EMULATED, 44);
    assert_eq!(commands(&plan(&[(asked, TARGET)], &emulated)).len(), 1, "the SMMU has none");
    assert_eq!(commands(&everything(&[TARGET], &emulated)).len(), 2);
}

// ---- batches ----

/// A TLBI reaches all streams behind the SMMU; CFGI and ATC_INV have a StreamID.
#[test]
fn streams_share_a_tlbi() {
    let asked = Invalidation { tag: Some(1), ..pages(0x1000, 0x1fff, 12) };
    let batch: Vec<_> = (0..100).map(|vsid| (asked, Target { vsid, ..TARGET })).collect();
    let steps = commands(&plan(&batch, &server()));
    assert_eq!([steps[0].len(), steps[1].len()], [1, 200], "a tag alone is about untagged DMA and PASIDs");
    let wide = (translations(Scope::Endpoint), PLAIN);
    let batch: Vec<_> = batch.into_iter().chain([wide]).collect();
    assert_eq!(commands(&plan(&batch, &server()))[0], [[0x10, 0]], "NH_ALL is all of them");
}

#[test]
fn nothing_for_nobody() {
    assert_eq!(plan(&[], &server()).steps().count(), 0);
    assert_eq!(everything(&[], &server()).steps().count(), 0);
}

#[test]
fn everything_of_two_streams() {
    let other = Target { vsid: 9, ats: false, pasids: 0 };
    let steps = commands(&everything(&[TARGET, other], &server()));
    assert_eq!(steps[0], [[0x7_0000_0006, 0], [0x9_0000_0006, 0]]);
    assert_eq!(steps[1], [[0x10, 0]]);
    assert_eq!(steps[2], [[0x7_0000_0040, 52], [0x7_0000_0a40, 52]]);
}

// ---- events (IHI 0070, 7.3) ----

/// As the kernel handed it over in a trial: a write by vSID 0x42 to an address without a translation.
#[test]
fn recorded_event() {
    let decoded = decode(&[0x42_0000_0010, 0x200_0000_0000, 0x2000_0000, 0]);
    let expected = DecodedEvent {
        vsid: 0x42,
        pasid: None,
        address: Some(Iova(0x2000_0000)),
        kind: AccessKind::Write,
        privileged: false,
        event: Event::FTranslation,
    };
    assert_eq!(decoded, Some(expected));
}

#[test]
fn events_of_accesses() {
    let (pnu, ind, rnw, s2) = (1 << 33, 1 << 34, 1 << 35, 1 << 39);
    for (id, event) in [
        (0x10, Event::FTranslation),
        (0x11, Event::FAddrSize),
        (0x12, Event::FAccess),
        (0x13, Event::FPermission),
    ] {
        // SSV, SubstreamID 5; the fourth word may hold anything.
        let decode = |word1| decode(&[7 << 32 | 5 << 12 | 1 << 11 | id, word1, !0, !0]);
        let read = decode(rnw).unwrap();
        assert_eq!((read.event, read.vsid, read.pasid), (event, 7, Some(pasid(5))));
        assert_eq!((read.kind, read.privileged), (AccessKind::Read, false));
        assert_eq!(read.address, Some(Iova(u64::MAX)));
        assert_eq!(decode(rnw | ind).unwrap().kind, AccessKind::Execute);
        assert_eq!(decode(ind).unwrap().kind, AccessKind::Write);
        assert!(decode(pnu).unwrap().privileged);
        assert_eq!(decode(s2 | rnw), None, "stage 2 is the host's");
    }
}

#[test]
fn events_of_configuration() {
    let decode = |word0: u64| decode(&[7 << 32 | word0, !0, !0, !0]);
    let ssv = 1 << 11;
    for (word0, event, tagged) in [
        (0x04 | 5 << 12 | ssv, Event::CBadSte, Some(pasid(5))),
        (0x04 | 5 << 12, Event::CBadSte, None),
        (0x06 | 5 << 12 | ssv, Event::FStreamDisabled, None),
        (0x08 | 5 << 12, Event::CBadSubstreamid, Some(pasid(5))),
        (0x0a | 5 << 12 | ssv, Event::CBadCd, Some(pasid(5))),
    ] {
        let decoded = decode(word0).unwrap();
        assert_eq!((decoded.event, decoded.pasid, decoded.address), (event, tagged, None));
        assert_eq!((decoded.vsid, decoded.kind, decoded.privileged), (7, AccessKind::Read, false));
    }
}

/// Eight events are forwarded; no other number is taken for one of them.
#[test]
fn no_other_events() {
    let forwarded = [0x04, 0x06, 0x08, 0x0a, 0x10, 0x11, 0x12, 0x13];
    for id in 0..=0xff {
        assert_eq!(decode(&[id, 0, 0, 0]).is_some(), forwarded.contains(&id), "{id:#x}");
    }
}
