//! The virtqueue: golden bytes, suppression of notifications, wrapping, hostile devices.

use alloc::{vec, vec::Vec};

use pgtable_formats::TableAlloc;
use viommu_wire::{Features, Gpa};

use crate::hal::fake::{self, BASE, FakePlatform, FakeTransport};
use crate::hal::{Platform, QueueLayout, Transport};
use crate::queue::{Buffer, Queue, QueueError, QueueOptions, Used};

const POLLED: QueueOptions = QueueOptions { event_idx: false, indirect: 0, interrupts: false };

fn queue(size: u16, options: QueueOptions) -> (FakePlatform, FakeTransport, Queue) {
    let mut platform = fake::platform();
    let (memory, alloc) = platform.parts();
    let queue = Queue::new(memory, alloc, size, options).unwrap();
    let mut device = FakeTransport::new(platform.memory.clone(), Features::empty());
    let mut features = Features::empty();
    features.set(Features::RING_EVENT_IDX, options.event_idx);
    device.accept_features(features).unwrap();
    device.enable_queue(0, queue.layout()).unwrap();
    (platform, device, queue)
}

fn buffer(offset: u64, length: u32) -> Buffer {
    Buffer { at: Gpa(BASE + 0x10_0000 + offset), length }
}

/// virtio 1.4, 2.7.5, 2.7.6: the bytes of a chain of two in descriptor table and available ring.
#[test]
fn golden_bytes_of_a_chain() {
    let (platform, _, mut queue) = queue(4, POLLED);
    let layout = queue.layout();
    assert_eq!(
        layout,
        QueueLayout { size: 4, descriptors: Gpa(BASE), available: Gpa(BASE + 64), used: Gpa(BASE + 80) }
    );
    assert_eq!(queue.add(&platform.memory, &[buffer(0, 20)], &[buffer(0x20, 4)]), Ok(0));
    assert_eq!(platform.memory.bytes(Gpa(layout.available.0 + 2), 2), [0, 0], "not published yet");
    assert_eq!(queue.publish(&platform.memory), Ok(true));
    assert_eq!(
        platform.memory.bytes(layout.descriptors, 32),
        super::hex(
            "0000104000000000 14000000 0100 0100
             2000104000000000 04000000 0200 0000"
        )
    );
    // NO_INTERRUPT, index 1, head 0.
    assert_eq!(platform.memory.bytes(layout.available, 6), super::hex("0100 0100 0000"));
}

/// virtio 1.4, 2.7.5.3: one descriptor with INDIRECT, the chain in a table of its own.
#[test]
fn golden_bytes_of_an_indirect_chain() {
    let (platform, device, mut queue) = queue(2, QueueOptions { indirect: 2, ..POLLED });
    let memory = &platform.memory;
    let heads: Vec<_> =
        (0..2).map(|i| queue.add(memory, &[buffer(i * 64, 20)], &[buffer(i * 64 + 32, 4)])).collect();
    assert_eq!(heads, [Ok(0), Ok(1)]);
    assert_eq!(queue.add(memory, &[buffer(0, 1)], &[buffer(1, 1)]), Err(QueueError::Full));
    queue.publish(memory).unwrap();
    assert_eq!(
        platform.memory.bytes(queue.layout().descriptors, 16),
        super::hex("0010004000000000 20000000 0400 0000")
    );
    assert_eq!(
        platform.memory.bytes(Gpa(BASE + 0x1000), 32),
        super::hex(
            "0000104000000000 14000000 0100 0100
             2000104000000000 04000000 0200 0000"
        )
    );
    assert_eq!(device.next_chain(0).unwrap().readable.len(), 20);
    let second = device.next_chain(0).unwrap();
    assert!(second.indirect && second.head == 1 && second.writable == [(buffer(96, 4).at, 4)]);
}

/// Chains of several buffers, collected out of order, over more rounds than the indices have numbers.
#[test]
fn every_descriptor_comes_back_in_any_order_over_the_wrap() {
    for options in [POLLED, QueueOptions { event_idx: true, indirect: 3, interrupts: true }] {
        let (platform, device, mut queue) = queue(8, options);
        let memory = &platform.memory;
        for round in 0..9000u32 {
            let mut heads = vec![];
            for chain in 0..(round % 4 + 1).min(2) {
                let readable: Vec<_> = (0..=u64::from(chain)).map(|i| buffer(i * 16, 7)).collect();
                heads.push(queue.add(memory, &readable, &[buffer(0x100, 40)]).unwrap());
            }
            assert!(queue.publish(memory).unwrap(), "round {round}");
            assert!(!queue.publish(memory).unwrap());
            assert_eq!(queue.collect(memory), Ok(None));
            let found: Vec<_> = core::iter::from_fn(|| device.next_chain(0)).collect();
            assert_eq!(found.iter().map(|chain| chain.head).collect::<Vec<_>>(), heads);
            for chain in found.iter().rev() {
                device.push_used(0, chain.head.into(), round % 41);
            }
            for head in heads.iter().rev() {
                assert_eq!(queue.collect(memory), Ok(Some(Used { head: *head, written: round % 41 })));
            }
            assert_eq!(queue.collect(memory), Ok(None));
            assert_eq!(queue.in_flight(), 0);
        }
        assert_eq!((0..8).filter(|_| queue.add(memory, &[buffer(0, 1)], &[]).is_ok()).count(), 8);
    }
}

/// virtio 1.4, 2.7.10.1: the device's NO_NOTIFY is respected.
#[test]
fn no_notify_suppresses_notifications() {
    let (platform, _, mut queue) = queue(8, POLLED);
    let memory = &platform.memory;
    for (flags, notify) in [(0u16, true), (1, false), (0, true)] {
        crate::hal::GuestMem::write(memory, queue.layout().used, &flags.to_le_bytes()).unwrap();
        queue.add(memory, &[buffer(0, 1)], &[]).unwrap();
        assert_eq!(queue.publish(memory), Ok(notify));
    }
}

/// virtio 1.4, 2.7.10: with EVENT_IDX one notification when the index passes `avail_event`, at the wrap too.
#[test]
fn event_idx_decides_about_notifications() {
    let (platform, device, mut queue) = queue(8, QueueOptions { event_idx: true, ..POLLED });
    let memory = &platform.memory;
    let event = Gpa(queue.layout().used.0 + 4 + 8 * 8);
    let mut index = 0u16;
    for _ in 0..30_000u32 {
        for (ahead, count) in [(0u16, 2u16), (1, 2), (2, 2), (u16::MAX, 1)] {
            crate::hal::GuestMem::store_release(memory, event, index.wrapping_add(ahead)).unwrap();
            for _ in 0..count {
                queue.add(memory, &[], &[buffer(0, 8)]).unwrap();
            }
            // The device asks to hear when entry `index + ahead` is there.
            assert_eq!(queue.publish(memory), Ok(ahead < count), "{ahead} {count}");
            index = index.wrapping_add(count);
            while let Some(chain) = device.next_chain(0) {
                device.push_used(0, chain.head.into(), 0);
                assert!(queue.collect(memory).unwrap().is_some());
            }
        }
    }
}

/// virtio 1.4, 2.7.8: an interrupt is asked for at the next used entry where interrupts are wanted.
#[test]
fn used_event_follows_what_was_collected() {
    let (platform, device, mut queue) =
        queue(4, QueueOptions { event_idx: true, indirect: 0, interrupts: true });
    let memory = &platform.memory;
    let used_event = Gpa(queue.layout().available.0 + 4 + 2 * 4);
    for expected in 0..5 {
        assert_eq!(queue.collect(memory), Ok(None));
        assert_eq!(platform.memory.bytes(used_event, 2), [expected, 0]);
        queue.add(memory, &[], &[buffer(0, 8)]).unwrap();
        queue.publish(memory).unwrap();
        let head = device.next_chain(0).unwrap().head;
        device.push_used(0, head.into(), 8);
        assert!(queue.collect(memory).unwrap().is_some());
    }
}

/// A number that is none, a descriptor in the middle of a chain, a free one, a chain that is back already.
#[test]
fn hostile_used_ids_are_named_and_the_queue_goes_on() {
    for id in [4, 0xffff_ffff, 0x1_0000, 1, 3, 2] {
        let (platform, device, mut queue) = queue(4, POLLED);
        let memory = &platform.memory;
        assert_eq!(queue.add(memory, &[buffer(0, 20)], &[buffer(32, 4)]), Ok(0));
        assert_eq!(queue.add(memory, &[buffer(0, 20)], &[]), Ok(2));
        queue.publish(memory).unwrap();
        device.push_used(0, 2, 0);
        assert_eq!(queue.collect(memory), Ok(Some(Used { head: 2, written: 0 })));
        device.push_used(0, id, 4);
        assert_eq!(queue.collect(memory), Err(QueueError::UsedId { id }));
        assert_eq!(queue.collect(memory), Ok(None));
        // The index is ahead by the entry that was none, so the honest one comes with room to spare.
        assert_eq!(queue.add(memory, &[buffer(0, 1)], &[]), Ok(2));
        queue.publish(memory).unwrap();
        device.push_used(0, 0, 4);
        assert_eq!(queue.collect(memory), Ok(Some(Used { head: 0, written: 4 })));
    }
}

#[test]
fn hostile_used_index_is_named() {
    let (platform, device, mut queue) = queue(4, POLLED);
    let memory = &platform.memory;
    queue.add(memory, &[buffer(0, 20)], &[buffer(32, 4)]).unwrap();
    queue.publish(memory).unwrap();
    queue.add(memory, &[buffer(0, 20)], &[]).unwrap();
    let index = Gpa(queue.layout().used.0 + 2);
    // The second chain is not published, so the device cannot have used it.
    for found in [2, 3, 5, u16::MAX] {
        crate::hal::GuestMem::store_release(memory, index, found).unwrap();
        assert_eq!(queue.collect(memory), Err(QueueError::UsedIndex { found, in_flight: 1 }));
    }
    crate::hal::GuestMem::store_release(memory, index, 0).unwrap();
    assert_eq!(queue.collect(memory), Ok(None));
    device.push_used(0, 0, 4);
    assert!(queue.collect(memory).unwrap().is_some());
}

/// A used length beyond the writable part is cut: nobody reads more than the device could write.
#[test]
fn hostile_used_length_is_cut() {
    let (platform, device, mut queue) = queue(4, POLLED);
    let memory = &platform.memory;
    let head = queue.add(memory, &[buffer(0, 20)], &[buffer(32, 4), buffer(64, 8)]).unwrap();
    queue.publish(memory).unwrap();
    device.push_used(0, head.into(), u32::MAX);
    assert_eq!(queue.collect(memory), Ok(Some(Used { head, written: 12 })));
}

/// What the device writes over the descriptors does not matter: the driver never reads them.
#[test]
fn hostile_descriptors_do_not_matter() {
    let (platform, device, mut queue) = queue(4, POLLED);
    let memory = &platform.memory;
    for _ in 0..10 {
        let head = queue.add(memory, &[buffer(0, 20)], &[buffer(32, 4), buffer(64, 8)]).unwrap();
        queue.publish(memory).unwrap();
        crate::hal::GuestMem::write(memory, queue.layout().descriptors, &[0xff; 64]).unwrap();
        device.push_used(0, head.into(), 4);
        assert!(queue.collect(memory).unwrap().is_some());
    }
    assert_eq!((0..5).filter(|_| queue.add(memory, &[buffer(0, 1)], &[]).is_ok()).count(), 4);
}

#[test]
fn chains_that_cannot_be_are_refused_and_change_nothing() {
    let (platform, _, mut queue) = queue(4, POLLED);
    let memory = &platform.memory;
    let many = [buffer(0, 1); 5];
    for (readable, writable) in [
        (&many[..0], &many[..0]),
        (&many[..], &many[..0]),
        (&many[..2], &many[..3]),
        (&[buffer(0, 0)][..], &[]),
    ] {
        assert_eq!(queue.add(memory, readable, writable), Err(QueueError::Chain));
    }
    let huge = buffer(0, u32::MAX);
    assert_eq!(queue.add(memory, &[huge], &[huge]), Err(QueueError::Chain));
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(queue.add(memory, &many[..2], &many[..2]), Ok(0));
    assert_eq!(queue.add(memory, &many[..1], &[]), Err(QueueError::Full));
    assert_eq!(queue.next_head(1), None);
}

#[test]
fn memory_is_taken_once_and_given_back() {
    let mut platform = fake::platform();
    let (memory, alloc) = platform.parts();
    for size in [0, 3, 100] {
        assert_eq!(Queue::new(memory, alloc, size, POLLED).err(), Some(QueueError::Size(size)));
    }
    for size in [1, 2, 256, 1024, 0x8000] {
        let queue = Queue::new(memory, alloc, size, QueueOptions { indirect: 2, ..POLLED }).unwrap();
        let layout = queue.layout();
        assert!(
            layout.descriptors.is_aligned(4) && layout.available.is_aligned(1) && layout.used.is_aligned(2)
        );
        assert!(layout.used.0 >= layout.available.0 + 6 + 2 * u64::from(size));
        assert!(alloc.live.len() == 2);
        queue.release(alloc);
        assert!(alloc.live.is_empty());
    }
    alloc.budget = 0;
    assert_eq!(alloc.alloc(12), None);
    assert_eq!(Queue::new(memory, alloc, 4, POLLED).err(), Some(QueueError::NoMemory));
}
