//! Guest memory with rings of any bytes.

use arbitrary::Unstructured;
use viommu_guest::hal::{GuestMem, QueueLayout};
use viommu_wire::{Gpa, Status};

use crate::rig::{Machine, Memory, Rig, Sends, Setup, request};

/// Bytes of memory that rings and buffers are put in.
const WINDOW: u64 = 0x4000;

/// Kicks queues whose rings lie anywhere in bytes of any kind, over each other too. The device does not panic, ends each
/// kick, stays inside of memory, and serves a proper driver after a reset.
pub fn queue_bytes(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let proves = bytes.ratio(1, 8).unwrap_or(true);
    let setup = Setup { queue_size: 256, memory_bytes: 16 << 20, ..Setup::default() };
    let machine = Machine::new(setup);
    let accept = machine.lock().offered_features();
    machine.lock().accept_features(accept).expect("what is offered");
    // A request to begin with, so that a chain has something to lead to.
    let memory = machine.memory();
    let attach = request::attach(1, 8).encode();
    memory.write(Gpa(Memory::BASE + WINDOW - 0x100), &attach).expect("memory");
    for index in 0..2 {
        let layout = layout(&mut bytes);
        assert!(machine.enable_queue(index, layout));
    }
    for _ in 0..8 {
        fill(&mut bytes, memory);
        let mut iommu = machine.lock();
        for _ in 0..3 {
            // An unusable ring is an error; nothing else is of interest here.
            let _ = iommu.kick_requests(memory.map()).map(|notify| notify.requests);
            let _ = iommu.kick_events(memory.map()).map(|notify| notify.events);
        }
        assert!(!iommu.device().needs_reset());
        if bytes.is_empty() {
            break;
        }
    }
    machine.lock().reset();
    // A driver of its own takes longer than all of this.
    if !proves {
        return;
    }
    let mut rig = Rig::start(machine, None);
    assert_eq!(rig.send(&request::attach(1, 8)), Status::Ok);
    assert_eq!(rig.send(&request::map(1, 0x1000, 0x1fff, 0x4010_0000)), Status::Ok);
    assert_eq!(rig.machine.write(8, 0x1234), Some(0x4010_0234));
    assert_eq!(rig.send(&request::unmap(1, 0x1000, 0x1fff)), Status::Ok);
}

/// Rings somewhere in the window, mostly where they are allowed to be.
fn layout(bytes: &mut Unstructured<'_>) -> QueueLayout {
    let mut at = |align: u64| {
        let place = bytes.int_in_range(0..=0xff_u64).unwrap_or(0);
        let odd = bytes.ratio(1, 16).unwrap_or(false);
        Gpa(Memory::BASE + place * (WINDOW / 256) / align * align + u64::from(odd))
    };
    let (descriptors, available, used) = (at(16), at(2), at(4));
    let size_lg2 = bytes.int_in_range(0..=8).unwrap_or(0);
    QueueLayout { size: 1 << size_lg2, descriptors, available, used }
}

/// Overwrites pieces of the window.
fn fill(bytes: &mut Unstructured<'_>, memory: &Memory) {
    let pieces = bytes.int_in_range(0..=8).unwrap_or(0);
    for _ in 0..pieces {
        let at = Memory::BASE + bytes.int_in_range(0..=WINDOW - 0x101).unwrap_or(0);
        match bytes.int_in_range(0..=3).unwrap_or(0) {
            // A descriptor that makes sense.
            0 => {
                let address = Memory::BASE + bytes.int_in_range(0..=WINDOW).unwrap_or(0);
                let length = bytes.int_in_range(0..=255_u32).unwrap_or(0);
                let (flags, next) =
                    (bytes.int_in_range(0..=7_u16).unwrap_or(0), bytes.arbitrary::<u8>().unwrap_or(0));
                let mut descriptor = address.to_le_bytes().to_vec();
                descriptor.extend(length.to_le_bytes());
                descriptor.extend(flags.to_le_bytes());
                descriptor.extend(u16::from(next).to_le_bytes());
                memory.write(Gpa(at & !15), &descriptor).expect("memory");
            }
            // An index.
            1 => {
                let index = u16::from(bytes.arbitrary::<u8>().unwrap_or(0));
                memory.write(Gpa(at & !1), &index.to_le_bytes()).expect("memory");
            }
            _ => {
                let length = bytes.int_in_range(0..=64_usize).unwrap_or(0).min(bytes.len());
                let piece = bytes.bytes(length).unwrap_or(&[]);
                memory.write(Gpa(at), piece).expect("memory");
            }
        }
    }
}
