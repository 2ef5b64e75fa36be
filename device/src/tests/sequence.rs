//! Random sequences of requests over a host that fails at random. The scripted host checks its contract, `send`
//! compares the records with what is bound, and a rejected request has changed nothing.

use proptest::collection::vec as sequences;
use proptest::prelude::*;

use super::*;
use crate::Limits;

#[derive(Clone, Debug)]
enum Step {
    Send(Request),
    /// A request with one byte changed.
    Distort(Request, usize, u8),
    Bypass(bool),
    Reset,
    /// The n-th call from now on fails, or all from there on.
    Fail(usize, bool),
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => requests().prop_map(Step::Send),
        2 => (requests(), 0..124usize, any::<u8>()).prop_map(|(request, at, byte)| Step::Distort(request, at, byte)),
        1 => any::<bool>().prop_map(Step::Bypass),
        1 => Just(Step::Reset),
        3 => (0..6usize, prop::bool::weighted(0.2)).prop_map(|(call, on)| Step::Fail(call, on)),
    ]
}

fn requests() -> impl Strategy<Value = Request> {
    let endpoint = prop::sample::select(vec![8u32, 8, 9, 16, 16, 16, 17, 24, 7]);
    let tables = prop_oneof![
        (0..2u64).prop_map(|n| cd_table(0x4000_0000 + (n << 16))),
        (0..2u64).prop_map(|n| pasid_table(0x4000_0000 + (n << 12))),
        (0..2u64, 0..4u32).prop_map(|(n, value)| page_table(0x4000_0000 + (n << 12), value)),
        (0..2u64, 0..4u32).prop_map(|(n, value)| page_table(0x4000_0000 + (n << 12), value)),
        (0..4u32).prop_map(unbind),
    ];
    let scope = prop_oneof![
        Just(InvalidateScope::Domain),
        prop::option::of(0..4u32).prop_map(|value| InvalidateScope::Pasid(value.map(pasid))),
    ];
    let pages = || (0..12u64, 0..4u64).prop_map(|(first, more)| (first, first + more));
    prop_oneof![
        (0..5u32, endpoint.clone()).prop_map(|(domain, endpoint)| attach(domain, endpoint)),
        (0..5u32, endpoint.clone()).prop_map(|(domain, endpoint)| attach_bypass(domain, endpoint)),
        (0..5u32, endpoint.clone()).prop_map(|(domain, endpoint)| detach(domain, endpoint)),
        (0..5u32, pages()).prop_map(|(domain, (first, last))| map(domain, first, last)),
        (0..5u32, pages()).prop_map(|(domain, (first, last))| unmap(domain, first, last)),
        (0..5u32, endpoint.clone(), tables.clone())
            .prop_map(|(domain, endpoint, t)| table(domain, endpoint, t)),
        (0..5u32, endpoint, tables).prop_map(|(domain, endpoint, t)| table(domain, endpoint, t)),
        (0..5u32, scope).prop_map(|(domain, scope)| {
            let domain = DomainId(domain);
            let caches = Caches::all();
            Request::Invalidate(Invalidate { domain, scope, caches, leaf: false, tag: None, global: false })
        }),
    ]
}

/// Sends, whatever comes back. Only where the way back failed, too, may a rejected request have changed something.
fn attempt(device: &mut Device<TestHost>, readable: &[u8]) {
    let before = observe(device);
    let mut writable = [0xee; 4];
    let Handled { used, rejection } = device.handle(readable, &mut writable);
    consistent(device);
    assert_eq!(used == 0, rejection.is_some_and(|rejection| rejection.status().is_none()));
    if rejection.is_some() && !device.needs_reset() {
        assert_eq!(observe(device), before, "{rejection:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes(steps in sequences(steps(), 1..80), bypass: bool) {
        let limits = Limits {
            max_domains: 4,
            max_mappings_per_domain: 6,
            max_mappings: 8,
            max_bound_pasids_per_endpoint: 3,
            max_bound_pasids: 5,
            ..Limits::default()
        };
        let mut device = device_with(DeviceConfig { bypass, limits, ..DeviceConfig::default() });
        for step in steps {
            match step {
                Step::Send(request) => attempt(&mut device, &request.encode()),
                Step::Distort(request, at, byte) => {
                    let mut bytes = request.encode().to_vec();
                    if let Some(place) = bytes.get_mut(at) {
                        *place = byte;
                    }
                    attempt(&mut device, &bytes);
                }
                Step::Bypass(on) => {
                    let before = observe(&device);
                    let failed = device.write_config(Config::BYPASS_OFFSET, &[on.into()]).is_err();
                    consistent(&device);
                    if failed && !device.needs_reset() {
                        prop_assert_eq!(observe(&device), before);
                    }
                }
                Step::Reset => {
                    device.host.fails = Fails::Never;
                    device.reset();
                    consistent(&device);
                    prop_assert!(!device.needs_reset());
                    prop_assert_eq!(device.domain_count(), 0);
                    prop_assert!(device.host.live_spaces() <= 1, "bypass at most");
                    device.accept_features(DeviceConfig::FEATURES).unwrap();
                }
                Step::Fail(call, on) => {
                    let at = device.host.calls + call;
                    device.host.fails = if on { Fails::From(at) } else { Fails::At(at) };
                }
            }
            prop_assert!(device.domain_count() <= limits.max_domains);
            prop_assert!(device.mapping_count() <= limits.max_mappings);
            prop_assert!(device.page_tables <= limits.max_bound_pasids);
        }
        device.host.fails = Fails::Never;
        device.system_reset();
        prop_assert_eq!(device.host.live_spaces(), usize::from(bypass));
    }
}
