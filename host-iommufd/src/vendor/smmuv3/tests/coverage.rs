//! Nothing that was asked for survives the commands, which are read here by their bits in the plainest way.

use proptest::prelude::*;
use viommu_device::host::{Invalidation, Scope};
use viommu_wire::{Caches, EndpointId};

use super::accepted::Kernel;
use super::*;
use crate::vendor::smmuv3::{everything, plan};

/// A translation in the TLB, or a table that it leads through (`table`).
#[derive(Clone, Copy, Debug)]
struct Cached {
    asid: u16,
    global: bool,
    table: bool,
    granule_lg2: u8,
    /// What it translates is as large as this, and has the address.
    size_lg2: u8,
    address: u64,
    /// Bits of an address that tables translate, in each half.
    bits: u8,
}

impl Cached {
    fn first(self) -> u64 {
        self.address >> self.size_lg2 << self.size_lg2
    }

    fn last(self) -> u64 {
        self.address | ((1 << self.size_lg2) - 1)
    }

    fn meets(self, first: u64, last: u64) -> bool {
        self.first() <= last && first <= self.last()
    }

    fn survives(self, [q0, q1]: [u64; 2]) -> bool {
        let (asid, address) = ((q0 >> 48) as u16, q1 & !0xfff);
        let named = match q0 & 0xff {
            0x10 => true,
            0x11 => !self.global && self.asid == asid,
            // The SMMU may find nothing by an address that no table translates.
            0x12 | 0x13 if canonical(address, self.bits) != address => false,
            op @ (0x12 | 0x13) => {
                let pages = match q1 >> 10 & 3 {
                    0 => self.meets(address, address),
                    tg => {
                        let granule_lg2 = 10 + 2 * tg;
                        let pages = u128::from((q0 >> 12 & 0x1f) + 1) << (q0 >> 20 & 0x3f);
                        assert_eq!(address % (1 << granule_lg2), 0, "the range is unpredictable");
                        let last = u128::from(address) + (pages << granule_lg2) - 1;
                        // The top of the address space is where a range ends.
                        let last = u64::try_from(last).unwrap_or(u64::MAX);
                        u64::from(self.granule_lg2) == granule_lg2 && self.meets(address, last)
                    }
                };
                let of_space = op == 0x13 || self.global || self.asid == asid;
                pages && of_space && (q1 & 1 == 0 || !self.table)
            }
            _ => false,
        };
        !named
    }
}

/// A translation in a device's cache.
#[derive(Clone, Copy, Debug)]
struct InDevice {
    vsid: u32,
    pasid: Option<u32>,
    address: u64,
}

impl InDevice {
    fn survives(self, [q0, q1]: [u64; 2]) -> bool {
        if q0 & 0xff != 0x40 || (q0 >> 32) as u32 != self.vsid {
            return true;
        }
        let of_pasid = match self.pasid {
            None => q0 >> 11 & 1 == 0,
            Some(pasid) => q0 >> 11 & 1 == 1 && (q0 >> 9 & 1 == 1 || u64::from(pasid) == q0 >> 12 & 0xf_ffff),
        };
        let lg2 = 12 + (q1 & 0x3f);
        let block = |address: u64| if lg2 == 64 { 0 } else { address >> lg2 };
        !(of_pasid && block(self.address) == block(q1))
    }
}

/// A context descriptor in the cache, or the level-1 entry above it.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    vsid: u32,
    index: u32,
    level1: bool,
}

impl Descriptor {
    fn survives(self, [q0, q1]: [u64; 2]) -> bool {
        if (q0 >> 32) as u32 != self.vsid {
            return true;
        }
        match q0 & 0xff {
            0x05 => (q0 >> 12 & 0xf_ffff) as u32 != self.index || self.level1 && q1 & 1 == 1,
            0x06 => false,
            _ => true,
        }
    }
}

/// What an [`Invalidation`] says, taken by the word.
struct Asked<'a> {
    asked: &'a Invalidation,
    target: Target,
    /// IDR5.
    idr5: u32,
}

impl Asked<'_> {
    fn descriptors(&self) -> bool {
        self.asked.caches.contains(Caches::PASID)
    }

    fn of(&self, cached: Cached) -> bool {
        let Invalidation { scope, leaf, tag, global, .. } = *self.asked;
        if self.descriptors() {
            return true;
        }
        let in_scope = match scope {
            Scope::Endpoint | Scope::Pasid(_) => true,
            Scope::Range { range, page_lg2, .. } => {
                let is_granule = [12, 14, 16].contains(&page_lg2) && has_granule(self.idr5, page_lg2);
                let other = is_granule && page_lg2 != cached.granule_lg2;
                !other && cached.meets(range.start().0, range.last().0) && !(leaf && cached.table)
            }
        };
        in_scope
            && match tag {
                None => true,
                Some(_) if cached.global => global,
                Some(tag) => global || cached.asid == tag,
            }
    }

    fn of_device(&self, cached: InDevice) -> bool {
        let Invalidation { scope, tag, global, .. } = *self.asked;
        let (pasid, range) = match scope {
            Scope::Endpoint => return cached.vsid == self.target.vsid,
            Scope::Pasid(pasid) => (pasid, None),
            Scope::Range { pasid, range, .. } => (pasid, Some(range)),
        };
        let of_pasid = match pasid {
            _ if global => true,
            None => cached.pasid.is_none() || tag.is_some(),
            Some(pasid) => {
                cached.pasid == Some(pasid.value()) || pasid.value() == 0 && cached.pasid.is_none()
            }
        };
        let of_range = self.descriptors() || range.is_none_or(|range| range.contains(Iova(cached.address)));
        cached.vsid == self.target.vsid && of_pasid && of_range
    }

    fn of_descriptor(&self, cached: Descriptor) -> bool {
        let index = match (self.asked.scope, self.asked.tag) {
            (Scope::Endpoint, _) => None,
            (Scope::Pasid(None) | Scope::Range { pasid: None, .. }, Some(_)) => None,
            (Scope::Pasid(pasid) | Scope::Range { pasid, .. }, _) => Some(pasid.map_or(0, Pasid::value)),
        };
        self.descriptors()
            && cached.vsid == self.target.vsid
            && index.is_none_or(|index| index == cached.index)
    }
}

/// IDR5 bits 4 to 6: 4 KiB, 16 KiB, 64 KiB.
fn has_granule(idr5: u32, lg2: u8) -> bool {
    idr5 >> (4 + (lg2 - 12) / 2) & 1 == 1
}

/// Addresses that meet each other and the edges of address spaces.
fn address() -> impl Strategy<Value = u64> {
    let near = prop_oneof![
        Just(0u64),
        Just(0x1_0000_0000),
        Just(1 << 46),
        Just(u64::MAX << 48),
        Just(u64::MAX << 52),
        (0u32..52).prop_map(|bit| 1 << bit)
    ];
    prop_oneof![
        10 => (near, -0x40_0000i64..0x40_0000).prop_map(|(base, offset)| base.wrapping_add_signed(offset)),
        1 => any::<u64>(),
        1 => (0u64..0x40_0000).prop_map(|offset| u64::MAX - offset),
    ]
}

fn any_range() -> impl Strategy<Value = IovaRange> {
    let length = prop_oneof![
        6 => 0u64..0x20_0000,
        2 => (0u32..64, any::<u64>()).prop_map(|(bits, value)| value & ((1 << bits) - 1)),
    ];
    (address(), length).prop_map(|(start, length)| range(start, start.saturating_add(length)))
}

fn any_pasid() -> impl Strategy<Value = Option<Pasid>> {
    prop_oneof![Just(None), (0u32..4).prop_map(Pasid::new), (0u32..1 << 20).prop_map(Pasid::new),]
}

fn scope() -> impl Strategy<Value = Scope> {
    let page_lg2 = prop_oneof![6 => prop::sample::select(vec![12u8, 14, 16]), 1 => 0u8..64];
    prop_oneof![
        1 => Just(Scope::Endpoint),
        2 => any_pasid().prop_map(Scope::Pasid),
        6 => (any_pasid(), any_range(), page_lg2)
            .prop_map(|(pasid, range, page_lg2)| Scope::Range { pasid, range, page_lg2 }),
    ]
}

fn any_tag() -> impl Strategy<Value = u16> {
    prop_oneof![4 => 0u16..3, 1 => any::<u16>()]
}

fn invalidation() -> impl Strategy<Value = (Invalidation, Target)> {
    let caches = prop_oneof![
        4 => Just(Caches::TLB),
        1 => Just(Caches::PASID),
        1 => Just(Caches::all()),
    ];
    let tag = prop::option::weighted(0.6, any_tag());
    let bits = prop_oneof![Just(0u8), 1u8..4, Just(20)];
    (0u32..3, scope(), caches, any::<[bool; 3]>(), tag, bits).prop_map(
        |(vsid, scope, caches, [leaf, global, ats], tag, pasids)| {
            let endpoint = EndpointId(vsid);
            let asked = Invalidation { endpoint, scope, caches, leaf, tag, global };
            (asked, Target { vsid, ats, pasids })
        },
    )
}

/// Registers with what matters to commands there or not.
fn registers() -> impl Strategy<Value = [u32; 6]> {
    let bits = prop_oneof![Just(0u32), 1u32..4, Just(20)];
    (any::<[bool; 4]>(), 1u32..8, bits, 0u32..2).prop_map(|([ats, asid16, ril, ds], granules, bits, vax)| {
        let mut idr = EMULATED;
        idr[0] = idr[0] & !(ATS | 1 << 12) | u32::from(ats) << 10 | u32::from(asid16) << 12;
        idr[1] |= bits << 6;
        idr[3] = idr[3] & !RIL | u32::from(ril) << 10;
        idr[5] = idr[5] & !0xff0 | granules << 4 | u32::from(ds) << 7 | vax << 10;
        idr
    })
}

/// Where a cached thing of interest may be: at the ends of the ranges, inside, or anywhere.
fn addresses(batch: &[(Invalidation, Target)], others: &[u64]) -> Vec<u64> {
    let mut addresses = others.to_vec();
    for (asked, _) in batch {
        if let Scope::Range { range, .. } = asked.scope {
            let (start, last) = (range.start().0, range.last().0);
            let inside = others.iter().map(|other| match range.length_minus_one() {
                u64::MAX => *other,
                length => start + other % (length + 1),
            });
            addresses.extend([start, last, start.wrapping_sub(1), last.wrapping_add(1)]);
            addresses.extend(inside);
        }
    }
    addresses
}

/// `address` as tables with so many bits can have it translated.
fn canonical(address: u64, bits: u8) -> u64 {
    let low = address & ((1 << bits) - 1);
    if address >> 55 & 1 == 1 { low | u64::MAX << bits } else { low }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// What is asked is dropped, in the step of its kind, by commands that the kernel takes.
    #[test]
    fn everything_that_is_asked_is_dropped(
        batch in prop::collection::vec(invalidation(), 1..4),
        idr in registers(),
        flags in 0u32..2,
        others in prop::collection::vec(address(), 4),
    ) {
        let hardware = Hardware::new(flags, &idr, 44);
        let kernel = Kernel::of(&idr);
        // S1CDMax and EATS were checked when the table was bound.
        let batch: Vec<_> = batch
            .into_iter()
            .map(|(asked, target)| {
                let pasids = target.pasids.min(hardware.caps.ssid_bits);
                (asked, Target { pasids, ats: target.ats && hardware.ats, ..target })
            })
            .collect();
        let plan = plan(&batch, &hardware);
        let all: Vec<_> = plan.steps().flat_map(|step| step.commands.to_vec()).collect();
        for &command in &all {
            prop_assert_eq!(kernel.accepts(command), Ok(()), "{:x?}", command);
        }
        // The order of the steps, and that each has its kind of command.
        let kind = |command: &[u64; 2]| match command[0] & 0xff { 0x05 | 0x06 => 0, 0x40 => 2, _ => 1 };
        prop_assert!(all.is_sorted_by_key(kind));
        for step in plan.steps() {
            prop_assert!(step.commands.iter().all(|command| kind(command) == kind(&step.commands[0])));
            prop_assert_eq!(step.repeat, flags == 1 && kind(&step.commands[0]) != 2);
        }

        let has_ats = |vsid| batch.iter().any(|(_, target)| target.ats && target.vsid == vsid);
        prop_assert!(all.iter().all(|[q0, _]| q0 & 0xff != 0x40 || has_ats((q0 >> 32) as u32)));

        let bits = if idr[5] >> 10 & 3 == 0 { 48 } else { 52 };
        for (asked, target) in &batch {
            let asked = Asked { asked, target: *target, idr5: idr[5] };
            for address in addresses(&batch, &others) {
                let sizes = [(12, [12, 21, 30]), (14, [14, 25, 36]), (16, [16, 29, 42])];
                for (granule_lg2, sizes) in sizes {
                    // A granule that the SMMU lacks is in no table.
                    if !has_granule(idr[5], granule_lg2) {
                        continue;
                    }
                    for (size_lg2, is) in sizes.into_iter().zip(0u16..) {
                        for asid in (0..3).chain(asked.asked.tag) {
                            if u32::from(asid) >> kernel.asid_bits != 0 {
                                continue;
                            }
                            let cached = Cached {
                                asid,
                                global: (asid + is) % 3 == 0,
                                table: (asid + is) % 2 == 0,
                                granule_lg2,
                                size_lg2,
                                address: canonical(address, bits),
                                bits,
                            };
                            prop_assert!(
                                !asked.of(cached) || all.iter().any(|&command| !cached.survives(command)),
                                "{:x?} survives {:x?}", cached, all
                            );
                        }
                    }
                }
                if !target.ats {
                    continue;
                }
                let tagged = (0..4.min(1u32 << target.pasids)).map(Some).filter(|_| target.pasids != 0);
                for pasid in tagged.chain([None]) {
                    let cached = InDevice { vsid: target.vsid, pasid, address };
                    prop_assert!(
                        !asked.of_device(cached) || all.iter().any(|&command| !cached.survives(command)),
                        "{:x?} survives {:x?}", cached, all
                    );
                }
            }
            for index in 0..4.min(1u32 << target.pasids) {
                for level1 in [false, true] {
                    let cached = Descriptor { vsid: target.vsid, index, level1 };
                    prop_assert!(
                        !asked.of_descriptor(cached) || all.iter().any(|&command| !cached.survives(command)),
                        "{:x?} survives {:x?}", cached, all
                    );
                }
            }
        }
    }

    /// A range costs few commands and reaches little beyond it.
    #[test]
    fn a_range_is_met_closely(start in 0u64..1 << 48, pages in 1u64..1 << 20, granule in 0usize..3) {
        let lg2 = [12, 14, 16][granule];
        let last = start | ((1 << lg2) - 1);
        let last = (last + ((pages - 1) << lg2)).min((1 << 48) - 1);
        let asked = translations(Scope::Range { pasid: None, range: range(start, last), page_lg2: lg2 });
        let plan = plan(&[(asked, TARGET)], &server());
        let [tlb, devices] = &commands(&plan)[..] else { panic!("{plan:x?}") };

        prop_assert!(tlb.len() <= 4);
        let mut next = start >> lg2 << lg2;
        for [q0, q1] in tlb {
            prop_assert_eq!(q1 & !0xfff, next);
            next += ((q0 >> 12 & 0x1f) + 1) << (q0 >> 20 & 0x3f) << lg2;
        }
        prop_assert_eq!(next, last + 1, "no page more, none twice");

        prop_assert!(devices.len() <= 2);
        let spans: u64 = devices.iter().map(|[_, q1]| 4096 << (q1 & 0x3f)).sum();
        prop_assert!(spans < 2 * (last - (start & !0xfff) + 1));
    }

    /// The last resort leaves nothing.
    #[test]
    fn everything_leaves_nothing(
        targets in prop::collection::vec((0u32..4, any::<bool>(), 0u8..=20), 1..4),
        idr in registers(),
        address in any::<u64>(),
    ) {
        let hardware = Hardware::new(0, &idr, 44);
        let targets: Vec<_> = targets
            .into_iter()
            .map(|(vsid, ats, pasids)| Target { vsid, ats: ats && hardware.ats, pasids: pasids.min(hardware.caps.ssid_bits) })
            .collect();
        let all: Vec<_> =
            everything(&targets, &hardware).steps().flat_map(|step| step.commands.to_vec()).collect();
        for &command in &all {
            prop_assert_eq!(Kernel::of(&idr).accepts(command), Ok(()));
        }
        let cached =
            Cached { asid: 3, global: true, table: true, granule_lg2: 12, size_lg2: 12, address, bits: 48 };
        prop_assert!(all.iter().any(|&command| !cached.survives(command)));
        for target in targets {
            let descriptor = Descriptor { vsid: target.vsid, index: 0, level1: true };
            prop_assert!(all.iter().any(|&command| !descriptor.survives(command)));
            for pasid in [None, Some(0), Some(1)].into_iter().take(if target.pasids == 0 { 1 } else { 3 }) {
                let cached = InDevice { vsid: target.vsid, pasid, address };
                prop_assert!(!target.ats || all.iter().any(|&command| !cached.survives(command)));
            }
        }
    }
}
