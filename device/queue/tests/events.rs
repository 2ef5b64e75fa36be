//! What the event queue does with the driver's buffers.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, unreachable_pub)]

mod driver;

use std::collections::VecDeque;

use driver::{BUFFERS, Driver, END, INDIRECT, NEXT, WRITE, memory};
use viommu_queue::{ChainError, EventQueue, Kick};
use vm_memory::GuestMemoryMmap;

const SIZE: u16 = 16;

fn enabled<'m>(memory: &'m GuestMemoryMmap) -> (Driver<'m>, EventQueue) {
    let driver = Driver::new(memory, SIZE);
    let mut queue = EventQueue::new(SIZE).unwrap();
    driver.enable(queue.queue_mut(), false);
    (driver, queue)
}

/// Records of 24 bytes, each full of its number.
struct Events(VecDeque<u8>);

impl Events {
    fn fill(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let number = *self.0.front()?;
        let Some(record) = buffer.get_mut(..24) else { return Some(0) };
        record.fill(number);
        self.0.pop_front();
        Some(24)
    }
}

#[test]
fn one_buffer_per_event_and_the_rest_stays() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory);
    for i in 0..3 {
        driver.chain(i, &[(BUFFERS + 32 * u64::from(i), 32, WRITE)]);
        driver.offer(i);
    }
    let mut events = Events([1, 2].into());
    let kick = queue.kick(&memory, |buffer| events.fill(buffer));
    assert_eq!(kick, Ok(Kick { served: 2, notify: true, ..Kick::default() }));
    assert_eq!(driver.used(), [(0, 24), (1, 24)]);
    assert_eq!(driver.read(BUFFERS + 32, 26), [[2; 24].as_slice(), &[0; 2]].concat());

    assert_eq!(queue.kick(&memory, |buffer| events.fill(buffer)), Ok(Kick::default()));
    events.0.push_back(3);
    assert_eq!(queue.kick(&memory, |buffer| events.fill(buffer)).unwrap().served, 1);
    assert_eq!(driver.used(), [(2, 24)]);
}

#[test]
fn events_wait_for_buffers() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory);
    let mut events = Events([1, 2, 3].into());
    assert_eq!(queue.kick(&memory, |buffer| events.fill(buffer)), Ok(Kick::default()));
    driver.chain(0, &[(BUFFERS, 24, WRITE)]);
    for number in 1..=3 {
        driver.offer(0);
        assert_eq!(queue.kick(&memory, |buffer| events.fill(buffer)).unwrap().served, 1);
        assert_eq!(driver.used(), [(0, 24)]);
        assert_eq!(driver.read(BUFFERS, 24), [number; 24]);
    }
}

/// D-58: never span several buffers.
#[test]
fn a_buffer_too_small_goes_back_and_the_event_is_kept() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory);
    driver.chain(0, &[(BUFFERS, 23, WRITE)]);
    driver.chain(1, &[(BUFFERS + 64, 1, WRITE)]);
    driver.chain(2, &[(BUFFERS + 128, 20, WRITE), (BUFFERS + 160, 4, WRITE)]);
    for head in 0..3 {
        driver.offer(head);
    }
    let mut events = Events([7].into());
    assert_eq!(queue.kick(&memory, |buffer| events.fill(buffer)).unwrap().served, 3);
    assert_eq!(driver.used(), [(0, 0), (1, 0), (2, 24)]);
    assert_eq!(driver.read(BUFFERS, 24), [0; 24]);
    assert_eq!(driver.read(BUFFERS + 128, 20), [7; 20]);
    assert_eq!(driver.read(BUFFERS + 160, 5), [7, 7, 7, 7, 0]);
}

#[test]
fn bad_buffers_go_back_and_the_event_is_kept() {
    let memory = memory();
    let (mut driver, mut queue) = enabled(&memory);
    driver.chain(0, &[(BUFFERS, 24, 0)]);
    driver.chain(1, &[(END - 8, 24, WRITE)]);
    driver.descriptor(2, BUFFERS, 24, WRITE | NEXT, 2);
    driver.descriptor(3, BUFFERS, 8, INDIRECT, 0);
    driver.chain(4, &[(BUFFERS, 0, WRITE)]);
    driver.chain(5, &[(BUFFERS, 24, WRITE)]);
    for head in [0, 1, 2, 3, SIZE, 4, 5] {
        driver.offer(head);
    }
    let mut events = Events([9].into());
    let kick = queue.kick(&memory, |buffer| events.fill(buffer)).unwrap();
    assert_eq!((kick.served, kick.refused, kick.refusal), (1, 6, Some((0, ChainError::Readable))));
    assert_eq!(driver.used(), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 24)]);
    assert_eq!(driver.read(BUFFERS, 24), [9; 24]);
}
