//! What decoding refuses, and with which status.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops where it finds something wrong")]

use proptest::prelude::*;
use viommu_wire::{
    DecodeError, Event, Invalidate, InvalidateScope, Iova, IovaRange, Properties, Property, PropertyError,
    Request, RequestType, Status,
};

/// A well-formed request of `kind` with every selector legal.
fn good(kind: RequestType) -> Vec<u8> {
    let mut bytes = vec![0; kind.readable_len()];
    bytes[0] = kind.number();
    if kind == RequestType::Invalidate {
        bytes[4] = 1; // DOMAIN
        bytes[5] = 2; // TLB
    }
    bytes
}

#[test]
fn every_kind_decodes_at_its_length_and_longer_but_not_shorter() {
    for kind in RequestType::ALL {
        let mut bytes = good(kind);
        let exact = Request::decode(&bytes).unwrap();
        assert_eq!(exact.kind(), kind);
        bytes.extend([0xff; 9]);
        assert_eq!(Request::decode(&bytes), Ok(exact), "{}: a longer request is accepted", kind.name());
        for length in 4..kind.readable_len() {
            let error = Request::decode(&bytes[..length]).unwrap_err();
            assert_eq!(error, DecodeError::Short { kind, length });
            assert_eq!(error.status(), Some(Status::Inval));
        }
        for length in 0..4 {
            let error = Request::decode(&bytes[..length]).unwrap_err();
            assert_eq!(error.status(), None, "no head: returned unwritten (D-11)");
        }
    }
}

#[test]
fn d10_an_unknown_type_has_no_status() {
    for number in 0..=u8::MAX {
        if RequestType::from_number(number).is_none() {
            let error = Request::decode(&[number; 200]).unwrap_err();
            assert_eq!((error, error.status()), (DecodeError::UnknownType { kind: number }, None));
        }
    }
}

#[test]
fn d12_head_reserved_is_ignored() {
    for kind in RequestType::ALL {
        let mut bytes = good(kind);
        let plain = Request::decode(&bytes);
        bytes[1..4].fill(0xff);
        assert_eq!(Request::decode(&bytes), plain);
    }
}

/// Every reserved byte on its own, with the requests that must check theirs and those that must not (D-17, D-25,
/// D-38, D-43).
#[test]
fn reserved_bytes_are_checked_where_the_specification_says_so() {
    let reserved: [(RequestType, std::ops::Range<usize>, bool); 7] = [
        (RequestType::Attach, 16..20, true),
        (RequestType::Detach, 12..20, false),
        (RequestType::Unmap, 24..28, true),
        (RequestType::Probe, 8..72, false),
        (RequestType::AttachTable, 13..16, true),
        (RequestType::Invalidate, 41..60, true),
        (RequestType::PageResponse, 20..28, true),
    ];
    for (kind, places, checked) in reserved {
        for place in places {
            let mut bytes = good(kind);
            bytes[place] = 1;
            let expected =
                if checked { Err(DecodeError::Reserved { kind }) } else { Request::decode(&good(kind)) };
            assert_eq!(Request::decode(&bytes), expected, "{} byte {place}", kind.name());
        }
    }
}

#[test]
fn descriptor_bytes_that_a_format_leaves_unused_must_be_zero() {
    // Format number, and the bytes of the descriptor that mean something.
    for (format, used) in [(0u8, 16..20), (1, 16..32), (2, 16..40), (0x81, 16..29)] {
        for place in 16..124 {
            let mut bytes = good(RequestType::AttachTable);
            bytes[12] = format;
            bytes[place] = 1;
            let reserved = Err(DecodeError::Reserved { kind: RequestType::AttachTable });
            let meant = used.contains(&place);
            assert_eq!(Request::decode(&bytes) == reserved, !meant, "format {format:#x} byte {place}");
        }
    }
}

#[test]
fn d18_d32_unknown_flags() {
    for (kind, place, known) in
        [(RequestType::Attach, 12, 1u32), (RequestType::Map, 32, 7), (RequestType::PageResponse, 8, 1)]
    {
        for bit in 0..32 {
            let mut bytes = good(kind);
            bytes[place..place + 4].copy_from_slice(&(1u32 << bit).to_le_bytes());
            let unknown = 1u32 << bit & !known;
            match Request::decode(&bytes) {
                Ok(_) => assert_eq!(unknown, 0),
                Err(error) => assert_eq!(error, DecodeError::UnknownFlags { kind, flags: unknown.into() }),
            }
        }
    }
}

#[test]
fn invalidate_selectors() {
    let decode = |scope: u8, caches: u8, flags: u16| {
        let mut bytes = good(RequestType::Invalidate);
        bytes[4] = scope;
        bytes[5] = caches;
        bytes[6..8].copy_from_slice(&flags.to_le_bytes());
        bytes[32] = 1; // nr_pages
        bytes[40] = 12; // page_size
        Request::decode(&bytes)
    };
    for scope in 0..=u8::MAX {
        assert_eq!(decode(scope, 2, 0).is_ok(), (1..=3).contains(&scope));
    }
    for caches in 0..=u8::MAX {
        assert_eq!(decode(1, caches, 0).is_ok(), (1..=3).contains(&caches));
    }
    for bit in 0..16 {
        assert_eq!(decode(1, 1, 1 << bit).is_ok(), bit < 4);
    }
}

fn address_range(address: u64, nr_pages: u64, page_size: u8) -> Option<IovaRange> {
    let mut bytes = good(RequestType::Invalidate);
    bytes[4] = 3;
    bytes[24..32].copy_from_slice(&address.to_le_bytes());
    bytes[32..40].copy_from_slice(&nr_pages.to_le_bytes());
    bytes[40] = page_size;
    match Request::decode(&bytes) {
        Ok(Request::Invalidate(Invalidate { scope: InvalidateScope::Address { range, .. }, .. })) => {
            Some(range)
        }
        Ok(other) => panic!("{other:?}"),
        Err(error) => {
            assert_eq!(error, DecodeError::BadAddressRange);
            None
        }
    }
}

#[test]
fn invalidate_ranges_cover_what_they_name_and_never_wrap() {
    let range = |start, last| IovaRange::new(Iova(start), Iova(last));
    assert_eq!(address_range(0x1000, 1, 12), range(0x1000, 0x1fff));
    assert_eq!(address_range(0x1800, 1, 12), range(0x1000, 0x2fff), "a misaligned page touches two");
    assert_eq!(address_range(0, 1 << 52, 12), range(0, u64::MAX));
    assert_eq!(address_range(0x1000, 1 << 52, 12), None);
    assert_eq!(address_range(0, 0, 12), None);
    assert_eq!(address_range(0, 1, 64), None);
    assert_eq!(address_range(0, 1, 255), None);
    assert_eq!(address_range(0, 2, 63), range(0, u64::MAX));
    assert_eq!(address_range(u64::MAX, 1, 0), range(u64::MAX, u64::MAX));
    assert_eq!(address_range(u64::MAX, 2, 0), None);
}

/// what is not understood is skipped by its own length, and what follows is still read.
#[test]
fn r13_properties_after_a_bad_one_are_read() {
    let mut area = vec![0xff, 0x0f, 3, 0, 1, 2, 3]; // unknown type, length 3
    let good = Property::PasidSize { bits: 20 };
    let mut bytes = [0; 8];
    good.encode(&mut bytes);
    let mut reserved = bytes;
    reserved[1] |= 0x80;
    area.extend(reserved);
    area.extend([1, 0, 2, 0, 9, 9]); // RESV_MEM of two bytes
    area.extend(bytes);
    area.extend([0; 16]);
    let seen: Vec<_> = Properties::new(&area).collect();
    assert_eq!(
        seen,
        [
            Err(PropertyError::Unknown { kind: 0xfff }),
            Err(PropertyError::Reserved { kind: 0x800 }),
            Err(PropertyError::Short { kind: 1 }),
            Ok(good),
        ]
    );
}

#[test]
fn d58_events_never_come_in_part() {
    let event = Event::decode(&[0; 24]).unwrap();
    for length in 0..event.encoded_len() {
        let mut buffer = vec![0xaa; length];
        assert_eq!(event.encode(&mut buffer), None);
        assert!(buffer.iter().all(|&byte| byte == 0xaa));
    }
}

#[test]
fn r15_events_with_reserved_bytes_are_ignored() {
    for place in 1..4 {
        let mut bytes = [0; 24];
        bytes[place] = 1;
        assert_eq!(Event::decode(&bytes), None);
    }
}

proptest! {
    /// What decodes is what its own bytes decode to; nothing panics.
    #[test]
    fn decoding_is_total_and_encoding_its_inverse(kind in 0u8..10, mut bytes in prop::collection::vec(any::<u8>(), 0..160)) {
        if let Some(first) = bytes.first_mut() {
            *first = kind;
        }
        if let Ok(request) = Request::decode(&bytes) {
            // An address range is widened to whole pages, so the bytes may differ; the meaning does not.
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
    }

    #[test]
    fn sparse_requests_decode_to_their_inverse(kind in 0usize..8, changes in prop::collection::vec((1usize..124, any::<u8>()), 0..6)) {
        let mut bytes = good(RequestType::ALL[kind]);
        for (place, value) in changes {
            if let Some(byte) = bytes.get_mut(place) {
                *byte = value;
            }
        }
        if let Ok(request) = Request::decode(&bytes) {
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
        }
    }

    #[test]
    fn property_lists_end(area in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(Properties::new(&area).count() <= area.len() / 4 + 1);
    }

    #[test]
    fn events_decode_to_their_inverse(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        if let Some(event) = Event::decode(&bytes) {
            let mut buffer = [0; 48];
            let length = event.encode(&mut buffer).unwrap();
            prop_assert_eq!(Event::decode(&buffer[..length]), Some(event));
        }
    }
}
