//! What the request queue does with well-formed and with hostile rings.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, unreachable_pub)]

mod driver;

use driver::{BASE, BUFFERS, Driver, END, INDIRECT, NEXT, WRITE, memory};
use proptest::prelude::*;
use viommu_queue::{
    ChainError, Kick, MAX_CHAIN_LENGTH, MAX_PASSES, QueueError, READABLE_LIMIT, RequestQueue, RingPart,
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 16;
const R: u64 = BUFFERS;
const W: u64 = BUFFERS + 0x8000;

fn enabled<'m>(memory: &'m GuestMemoryMmap, event_idx: bool) -> (Driver<'m>, RequestQueue) {
    let driver = Driver::new(memory, SIZE);
    let mut queue = RequestQueue::new(SIZE, 600).unwrap();
    driver.enable(queue.queue_mut(), event_idx);
    (driver, queue)
}

/// Answers with the number of readable bytes, then with their sum, and fills the rest.
fn echo(readable: &[u8], writable: &mut [u8]) -> usize {
    let sum = readable.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    writable.fill(0xee);
    let head = [readable.len() as u8, sum];
    let n = writable.len().min(2);
    writable[..n].copy_from_slice(&head[..n]);
    writable.len()
}

/// A good request in descriptors 0 and 1 is served.
fn assert_usable(driver: &mut Driver<'_>, queue: &mut RequestQueue) {
    driver.used();
    driver.write(R, &[1, 2, 3]);
    driver.write(W, &[0; 4]);
    driver.chain(0, &[(R, 3, 0), (W, 4, WRITE)]);
    driver.offer(0);
    let kick = queue.kick(driver.memory, echo).unwrap();
    assert_eq!((kick.served, kick.refused), (1, 0));
    assert_eq!(driver.used(), [(0, 4)]);
    assert_eq!(driver.read(W, 4), [3, 6, 0xee, 0xee]);
}

/// The chain from descriptor 2 is refused for `error`, unseen by the handler, and the queue works after it.
fn assert_refused(build: impl FnOnce(&Driver<'_>), error: ChainError) {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    build(&driver);
    driver.offer(2);
    let kick = queue.kick(&memory, |_, _| panic!("handler must not see {error}")).unwrap();
    assert_eq!(kick, Kick { refused: 1, refusal: Some((2, error)), notify: true, ..Kick::default() });
    assert_eq!(driver.used(), [(2, 0)]);
    assert_usable(&mut driver, &mut queue);
}

#[test]
fn all_that_is_there_is_served_and_published_once() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    for i in 0..8 {
        driver.write(R + u64::from(i), &[i as u8]);
        driver.chain(2 * i, &[(R + u64::from(i), 1, 0), (W + 4 * u64::from(i), 2, WRITE)]);
        driver.offer(2 * i);
    }
    let kick = queue
        .kick(&memory, |readable, writable| {
            assert_eq!(driver.used_index(), 0, "published before the end");
            echo(readable, writable)
        })
        .unwrap();
    assert_eq!(kick, Kick { served: 8, notify: true, ..Kick::default() });
    assert_eq!(driver.used(), (0..8).map(|i| (2 * i, 2)).collect::<Vec<_>>());
    for i in 0..8 {
        assert_eq!(driver.read(W + 4 * i, 4), [1, i as u8, 0, 0]);
    }
    assert_eq!(queue.kick(&memory, echo).unwrap(), Kick::default());
}

#[test]
fn indices_wrap() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, true);
    driver.chain(0, &[(R, 3, 0), (W, 4, WRITE)]);
    for _ in 0..70_000u32 {
        driver.offer(0);
        assert_eq!(queue.kick(&memory, |_, _| 4).unwrap().served, 1);
    }
    assert_eq!(driver.used_index(), 70_000u32 as u16);
    assert_eq!(queue.queue().next_avail(), 70_000u32 as u16);
}

#[test]
fn a_chain_may_be_cut_anywhere() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    let request: Vec<u8> = (1..=36).collect();
    for cut in 1..36usize {
        driver.write(R, &request[..cut]);
        driver.write(R + 0x100, &request[cut..]);
        driver.write(W, &[0; 0x20]);
        driver.chain(
            3,
            &[(R, cut as u32, 0), (R + 0x100, 36 - cut as u32, 0), (W + 0x10, 1, WRITE), (W, 3, WRITE)],
        );
        driver.offer(3);
        let kick = queue
            .kick(&memory, |readable, writable| {
                assert_eq!(readable, request);
                assert_eq!(writable, [0; 4]);
                writable.copy_from_slice(&[9, 8, 7, 6]);
                4
            })
            .unwrap();
        assert_eq!(kick.served, 1);
        assert_eq!(driver.used(), [(3, 4)]);
        assert_eq!((driver.read(W + 0x10, 2), driver.read(W, 4)), (vec![9, 0], vec![8, 7, 6, 0]));
    }
}

#[test]
fn a_chain_of_single_bytes_fills_the_table() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    let parts: Vec<_> = (0..12).map(|i| (R + i, 1, 0)).chain((0..4).map(|i| (W + 3 - i, 1, WRITE))).collect();
    driver.write(R, &[1; 12]);
    driver.chain(0, &parts);
    driver.offer(0);
    assert_eq!(queue.kick(&memory, echo).unwrap().served, 1);
    assert_eq!(driver.used(), [(0, 4)]);
    assert_eq!(driver.read(W, 4), [0xee, 0xee, 12, 12], "last byte first");
}

#[test]
fn only_the_used_bytes_are_written() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    driver.write(W, &[0x55; 16]);
    driver.chain(0, &[(R, 3, 0), (W, 3, WRITE), (W + 8, 8, WRITE)]);
    for (used, expected) in [(0, 0), (2, 2), (4, 4), (11, 11), (usize::MAX, 11)] {
        driver.offer(0);
        driver.write(W, &[0x55; 16]);
        let kick = queue.kick(&memory, |_, writable| {
            writable.fill(0xaa);
            used
        });
        assert_eq!(kick.unwrap().served, 1);
        assert_eq!(driver.used(), [(0, expected)]);
        let bytes = driver.read(W, 16);
        let written = bytes.iter().filter(|byte| **byte == 0xaa).count();
        assert_eq!(written, expected as usize);
        assert_eq!(bytes[3..8], [0x55; 5], "between the buffers");
    }
}

#[test]
fn long_parts_are_cut_at_their_limits() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    // What lies behind the limits need not even be memory: it is not touched.
    driver.chain(
        0,
        &[
            (R, 4000, 0),
            (R, 4000, 0),
            (END - 1, 2, 0),
            (W, 500, WRITE),
            (W + 0x1000, 500, WRITE),
            (0, 4, WRITE),
        ],
    );
    driver.offer(0);
    let kick = queue.kick(&memory, |readable, writable| {
        assert_eq!((readable.len(), writable.len()), (READABLE_LIMIT, 600));
        writable.fill(1);
        writable.len()
    });
    assert_eq!(kick.unwrap().served, 1);
    assert_eq!(driver.used(), [(0, 600)]);
    assert_eq!(driver.read(W + 0x1000 + 99, 2), [1, 0]);
}

#[test]
fn a_part_may_be_missing() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    driver.chain(0, &[(R, 3, 0)]);
    driver.chain(1, &[(W, 3, WRITE)]);
    driver.offer(0);
    driver.offer(1);
    let mut seen = Vec::new();
    let kick = queue.kick(&memory, |readable, writable| {
        seen.push((readable.len(), writable.len()));
        writable.len()
    });
    assert_eq!(kick.unwrap().served, 2);
    assert_eq!(seen, [(3, 0), (0, 3)]);
    assert_eq!(driver.used(), [(0, 0), (1, 3)]);
}

#[test]
fn indirect_tables() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    let table = BUFFERS + 0x4000;
    driver.write(R, &[1, 2, 3]);
    // All in the indirect table; the device must ignore WRITE on the descriptor that refers to it.
    driver.entry(table, 0, R, 2, NEXT, 2);
    driver.entry(table, 2, R + 2, 1, NEXT, 1);
    driver.entry(table, 1, W, 4, WRITE, 0);
    for flags in [INDIRECT, INDIRECT | WRITE] {
        driver.descriptor(5, table, 48, flags, 0);
        driver.offer(5);
        assert_eq!(queue.kick(&memory, echo).unwrap().served, 1);
        assert_eq!(driver.used(), [(5, 4)]);
        assert_eq!(driver.read(W, 4), [3, 6, 0xee, 0xee]);
    }
    // Ordinary descriptors first, then the table.
    driver.descriptor(0, R, 1, NEXT, 7);
    driver.descriptor(7, table, 48, INDIRECT, 0);
    driver.offer(0);
    assert_eq!(queue.kick(&memory, echo).unwrap().served, 1);
    assert_eq!(driver.used(), [(0, 4)]);
    assert_eq!(driver.read(W, 2), [4, 7]);
}

#[test]
fn an_indirect_chain_may_be_longer_than_the_queue() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    let table = BUFFERS + 0x10_000;
    for i in 0..MAX_CHAIN_LENGTH as u16 {
        let last = i + 1 == MAX_CHAIN_LENGTH as u16;
        driver.entry(table, i, W, 1, if last { WRITE } else { NEXT }, i + 1);
    }
    driver.descriptor(0, table, MAX_CHAIN_LENGTH as u32 * 16, INDIRECT, 0);
    driver.offer(0);
    let kick = queue.kick(&memory, |readable, writable| {
        assert_eq!((readable.len(), writable.len()), (MAX_CHAIN_LENGTH - 1, 1));
        1
    });
    assert_eq!(kick.unwrap().served, 1);
}

#[test]
fn loops_are_refused() {
    assert_refused(|driver| driver.descriptor(2, R, 4, NEXT, 2), ChainError::TooLong(usize::from(SIZE)));
    assert_refused(
        |driver| {
            driver.descriptor(2, R, 4, NEXT, 3);
            driver.descriptor(3, W, 4, NEXT | WRITE, 4);
            driver.descriptor(4, W, 4, NEXT | WRITE, 3);
        },
        ChainError::TooLong(usize::from(SIZE)),
    );
}

#[test]
fn loops_in_indirect_tables_are_refused() {
    let table = BUFFERS + 0x4000;
    assert_refused(
        |driver| {
            driver.descriptor(2, table, 32, INDIRECT, 0);
            driver.entry(table, 0, R, 4, NEXT, 1);
            driver.entry(table, 1, R, 4, NEXT, 0);
        },
        ChainError::TooLong(MAX_CHAIN_LENGTH),
    );
}

#[test]
fn next_beyond_the_table_is_refused() {
    assert_refused(|driver| driver.descriptor(2, R, 4, NEXT, SIZE), ChainError::Next(SIZE));
    assert_refused(|driver| driver.descriptor(2, R, 4, NEXT, u16::MAX), ChainError::Next(u16::MAX));
    let table = BUFFERS + 0x4000;
    assert_refused(
        |driver| {
            driver.descriptor(2, table, 32, INDIRECT, 0);
            driver.entry(table, 0, R, 4, NEXT, 2);
        },
        ChainError::Next(2),
    );
}

#[test]
fn buffers_outside_memory_are_refused() {
    for (address, len) in [(0, 4), (BASE - 1, 4), (END, 1), (END - 3, 4), (u64::MAX, 1), (u64::MAX - 3, 8)] {
        let error = ChainError::BadAddress { address, len };
        assert_refused(|driver| driver.chain(2, &[(address, len, 0), (W, 4, WRITE)]), error);
        assert_refused(|driver| driver.chain(2, &[(R, 4, 0), (address, len, WRITE)]), error);
    }
    let error = ChainError::BadAddress { address: END - 16, len: 32 };
    assert_refused(|driver| driver.descriptor(2, END - 16, 32, INDIRECT, 0), error);
    let error = ChainError::BadAddress { address: u64::MAX - 15, len: 32 };
    assert_refused(|driver| driver.descriptor(2, u64::MAX - 15, 32, INDIRECT, 0), error);
}

#[test]
fn empty_buffers_are_refused() {
    assert_refused(|driver| driver.chain(2, &[(R, 0, 0), (W, 4, WRITE)]), ChainError::Empty);
    assert_refused(|driver| driver.chain(2, &[(R, 4, 0), (W, 0, WRITE)]), ChainError::Empty);
}

#[test]
fn readable_after_writable_is_refused() {
    assert_refused(|driver| driver.chain(2, &[(W, 4, WRITE), (R, 4, 0)]), ChainError::Order);
    assert_refused(|driver| driver.chain(2, &[(R, 4, 0), (W, 4, WRITE), (R, 4, 0)]), ChainError::Order);
    let table = BUFFERS + 0x4000;
    assert_refused(
        |driver| {
            driver.descriptor(2, W, 4, WRITE | NEXT, 3);
            driver.descriptor(3, table, 16, INDIRECT, 0);
            driver.entry(table, 0, R, 4, 0, 0);
        },
        ChainError::Order,
    );
}

#[test]
fn bad_indirect_tables_are_refused() {
    let table = BUFFERS + 0x4000;
    for len in [0, 1, 15, 17, 16 * (MAX_CHAIN_LENGTH as u32 + 1), u32::MAX] {
        assert_refused(
            |driver| driver.descriptor(2, table, len, INDIRECT, 0),
            ChainError::IndirectLength(len),
        );
    }
    assert_refused(|driver| driver.descriptor(2, table, 16, INDIRECT | NEXT, 3), ChainError::IndirectAndNext);
    assert_refused(
        |driver| {
            driver.descriptor(2, table, 16, INDIRECT, 0);
            driver.entry(table, 0, table, 16, INDIRECT, 0);
        },
        ChainError::NestedIndirect,
    );
}

#[test]
fn four_gibibytes_are_refused() {
    assert_refused(
        |driver| driver.chain(2, &[(R, 4096, 0), (R, u32::MAX, 0), (W, 4, WRITE)]),
        ChainError::TooManyBytes,
    );
}

#[test]
fn a_head_beyond_the_table_is_skipped() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    driver.chain(0, &[(R, 3, 0), (W, 4, WRITE)]);
    for head in [SIZE, 0, u16::MAX] {
        driver.offer(head);
    }
    let kick = queue.kick(&memory, echo).unwrap();
    assert_eq!(
        kick,
        Kick {
            served: 1,
            refused: 2,
            refusal: Some((SIZE, ChainError::Head(SIZE))),
            notify: true,
            again: false
        }
    );
    assert_eq!(driver.used(), [(0, 4)]);
    assert_usable(&mut driver, &mut queue);
}

#[test]
fn an_available_index_too_far_ahead_takes_nothing() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, true);
    for index in [SIZE + 1, 1000, u16::MAX] {
        driver.set_available_index(index);
        let error = QueueError::AvailableIndex { index, next: 0, size: SIZE };
        assert_eq!(queue.kick(&memory, |_, _| panic!("taken")), Err(error));
        assert_eq!(driver.used(), []);
    }
    driver.set_available_index(driver.available_index());
    assert_usable(&mut driver, &mut queue);
}

#[test]
fn an_index_that_jumps_while_served_keeps_what_was_done() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    driver.chain(0, &[(R, 3, 0), (W, 4, WRITE)]);
    driver.offer(0);
    let kick = queue.kick(&memory, |_, _| {
        driver.set_available_index(1 + SIZE + 1);
        4
    });
    assert_eq!(kick, Ok(Kick { served: 1, notify: true, ..Kick::default() }));
    assert_eq!(driver.used(), [(0, 4)]);
    driver.set_available_index(driver.available_index());
    assert_usable(&mut driver, &mut queue);
}

#[test]
fn a_driver_that_keeps_adding_does_not_hold_the_thread() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, true);
    driver.chain(0, &[(R, 3, 0), (W, 4, WRITE)]);
    driver.offer(0);
    let kick = queue.kick(&memory, |_, _| {
        driver.offer(0);
        4
    });
    assert_eq!(kick.map(|kick| (kick.served as usize, kick.again)), Ok((MAX_PASSES, true)));
    assert_eq!(driver.used().len(), MAX_PASSES);
    let kick = queue.kick(&memory, |_, _| 4);
    assert_eq!(kick.map(|kick| (kick.served, kick.again)), Ok((1, false)));
}

/// As many as make the 16-bit used index come round in one kick.
#[test]
fn a_kick_that_fills_the_largest_queue_twice_notifies() {
    for event_idx in [false, true] {
        const LARGEST: u16 = 1 << 15;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let mut queue = RequestQueue::new(LARGEST, 600).unwrap();
        let [descriptors, available, used, buffer] = [0, 0x10_0000, 0x20_0000, 0x30_0000_u64];
        let ring = queue.queue_mut();
        ring.set_desc_table_address(Some(descriptors as u32), None);
        ring.set_avail_ring_address(Some(available as u32), None);
        ring.set_used_ring_address(Some(used as u32), None);
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        // One writable descriptor, offered in every entry.
        memory.write_obj([buffer, 4 | 2 << 32], GuestAddress(descriptors)).unwrap();
        let offer = |index: u16| memory.write_obj(index, GuestAddress(available + 2)).unwrap();
        offer(LARGEST);
        let mut served = 0_u32;
        let kick = queue.kick(&memory, |_, _| {
            served += 1;
            if served == u32::from(LARGEST) {
                offer(0);
            }
            4
        });
        let expected = Kick { served: 1 << 16, notify: true, ..Kick::default() };
        assert_eq!(kick, Ok(expected), "event_idx {event_idx}");
    }
}

#[test]
fn a_queue_that_is_not_set_up_is_an_error() {
    let memory = memory();
    let mut queue = RequestQueue::new(SIZE, 600).unwrap();
    assert_eq!(queue.kick(&memory, echo), Err(QueueError::NotReady));

    let driver = Driver::new(&memory, SIZE);
    type Set = fn(&mut virtio_queue::Queue, u64);
    let cases: [(RingPart, Set); 3] = [
        (RingPart::Descriptors, |queue, at| queue.set_desc_table_address(Some(at as u32), None)),
        (RingPart::Available, |queue, at| queue.set_avail_ring_address(Some(at as u32), None)),
        (RingPart::Used, |queue, at| queue.set_used_ring_address(Some(at as u32), None)),
    ];
    for (part, set) in cases {
        for address in [0, END - 16, END] {
            driver.enable(queue.queue_mut(), false);
            set(queue.queue_mut(), address);
            assert_eq!(queue.kick(&memory, echo), Err(QueueError::BadRing { part, address }));
        }
    }
    driver.enable(queue.queue_mut(), false);
    assert_eq!(queue.kick(&memory, echo), Ok(Kick::default()));
}

#[test]
fn buffers_may_lie_across_regions() {
    let half = 1 << 19;
    let ranges = [(GuestAddress(BASE), half), (GuestAddress(BASE + half as u64), half)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let (mut driver, mut queue) = enabled(&memory, false);
    let border = BASE + half as u64;
    driver.write(border - 2, &[1, 2, 3, 4, 5]);
    driver.chain(0, &[(border - 2, 5, 0), (border - 3, 6, WRITE)]);
    driver.offer(0);
    assert_eq!(queue.kick(&memory, echo).unwrap().served, 1);
    assert_eq!(driver.used(), [(0, 6)]);
    assert_eq!(driver.read(border - 3, 6), [5, 15, 0xee, 0xee, 0xee, 0xee]);
}

#[test]
fn a_notification_is_sent_unless_the_flag_says_no() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, false);
    driver.chain(0, &[(R, 3, 0), (W, 4, WRITE)]);
    for (flags, notify) in [(0, true), (1, false), (2, true), (1, false)] {
        driver.set_available_flags(flags);
        driver.offer(0);
        assert_eq!(queue.kick(&memory, |_, _| 4).unwrap().notify, notify);
        assert!(!queue.kick(&memory, |_, _| 4).unwrap().notify, "nothing new");
    }
}

#[test]
fn event_idx_decides_once_for_all_that_was_added() {
    let memory = memory();
    for start in [0u16, 5, u16::MAX - 3, u16::MAX] {
        for added in 1..=5u16 {
            for event in 0..8u16 {
                let (mut driver, mut queue) = enabled(&memory, true);
                driver.chain(0, &[(R, 3, 0), (W, 4, WRITE)]);
                queue.queue_mut().set_next_avail(start);
                queue.queue_mut().set_next_used(start);
                driver.set_available_index(start.wrapping_add(added));
                for slot in 0..SIZE {
                    driver.store16(BASE + 0x1_0004 + 2 * u64::from(slot), 0);
                }
                // Notify when the element with index `used_event` is among those added.
                driver.set_used_event(start.wrapping_add(event));
                let kick = queue.kick(&memory, |_, _| 4).unwrap();
                assert_eq!(kick.served, u32::from(added));
                assert_eq!(kick.notify, event < added, "start {start} added {added} event {event}");
                assert_eq!(driver.available_event(), start.wrapping_add(added), "asks for the next entry");
                driver.offer(0);
            }
        }
    }
}

#[test]
fn position_and_configuration_survive_save_and_restore() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory, true);
    assert_usable(&mut driver, &mut queue);
    let state = queue.queue().state();
    let mut restored = RequestQueue::new(SIZE, 600).unwrap();
    *restored.queue_mut() = state.try_into().unwrap();
    assert_usable(&mut driver, &mut restored);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Random descriptors, rings and indices, biased to plausible ones: the kick ends, every entry is given back but
    /// those without a descriptor, and once the ring is sane again a good request works.
    #[test]
    fn random_rings(
        descriptors in proptest::collection::vec(
            (
                prop_oneof![4 => BUFFERS..BUFFERS + 0x2000, 1 => Just(BASE), 1 => END - 8..END + 8, 1 => any::<u64>()],
                prop_oneof![6 => 0u32..80, 1 => (0u32..40).prop_map(|n| 16 * n), 1 => any::<u32>()],
                prop_oneof![8 => 0u16..8, 1 => any::<u16>()],
                prop_oneof![8 => 0u16..SIZE, 1 => any::<u16>()],
            ),
            usize::from(SIZE),
        ),
        noise in proptest::collection::vec(any::<u8>(), 0x400),
        heads in proptest::collection::vec(prop_oneof![8 => 0u16..SIZE, 1 => any::<u16>()], usize::from(SIZE)),
        start in any::<u16>(),
        ahead in prop_oneof![4 => 0u16..=SIZE, 1 => any::<u16>()],
        event_idx in any::<bool>(),
        used in any::<usize>(),
    ) {
        let memory = memory();
        let (driver, mut queue) = enabled(&memory, event_idx);
        driver.write(BUFFERS, &noise);
        for (i, &(address, len, flags, next)) in descriptors.iter().enumerate() {
            driver.descriptor(i as u16, address, len, flags, next);
        }
        for (slot, &head) in heads.iter().enumerate() {
            driver.store16(BASE + 0x1_0004 + 2 * slot as u64, head);
        }
        queue.queue_mut().set_next_avail(start);
        driver.set_available_index(start.wrapping_add(ahead));
        let kick = queue.kick(&memory, |readable, writable| {
            assert!(readable.len() <= READABLE_LIMIT && writable.len() <= 600);
            writable.fill(0x77);
            used
        });
        if ahead <= SIZE {
            let kick = kick.unwrap();
            prop_assert_eq!(kick.served + kick.refused, u32::from(ahead));
            prop_assert!(!kick.again);
            let skipped = (0..ahead).filter(|i| heads[usize::from(start.wrapping_add(*i) % SIZE)] >= SIZE).count();
            prop_assert_eq!(usize::from(driver.used_index()), usize::from(ahead) - skipped);
        } else {
            let error = QueueError::AvailableIndex { index: start.wrapping_add(ahead), next: start, size: SIZE };
            prop_assert_eq!(kick, Err(error));
        }

        memory.write_slice(&[0; 0x3_0000], GuestAddress(BASE)).unwrap();
        let mut driver = Driver::new(&memory, SIZE);
        queue.queue_mut().reset();
        driver.enable(queue.queue_mut(), event_idx);
        assert_usable(&mut driver, &mut queue);
    }

    /// Nothing but noise in the whole of the rings.
    #[test]
    fn random_ring_bytes(noise in proptest::collection::vec(any::<u8>(), 0x200), start in any::<u16>()) {
        let memory = memory();
        let (driver, mut queue) = enabled(&memory, start % 2 == 0);
        for at in [BASE, BASE + 0x1_0000, BASE + 0x2_0000] {
            driver.write(at, &noise);
        }
        queue.queue_mut().set_next_avail(start);
        let _ = queue.kick(&memory, |_, writable| writable.len());

        memory.write_slice(&[0; 0x3_0000], GuestAddress(BASE)).unwrap();
        let mut driver = Driver::new(&memory, SIZE);
        queue.queue_mut().reset();
        driver.enable(queue.queue_mut(), true);
        assert_usable(&mut driver, &mut queue);
    }
}
