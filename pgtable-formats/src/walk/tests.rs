use alloc::vec::Vec;
use core::cell::Cell;

use super::*;
use crate::NotMemory;
use crate::leaf::{X86, X86Flags, X86Levels, X86Params};
use crate::suite::FlatMem;

/// Four tables that lead to one page, all at address 0.
fn tables() -> (X86, FlatMem) {
    let flags = X86Flags::NXE;
    let params = X86Params { root: Gpa(0x1000), levels: X86Levels::Four, output_lg2: 46, flags };
    let mem = FlatMem::new(Gpa(0x1000), 0x4000);
    for at in [0x1000, 0x2000, 0x3000, 0x4000] {
        mem.store(Gpa(at), (at + 0x1000) | 0b111).expect("memory");
    }
    (X86::new(params).expect("legal"), mem)
}

/// Counts loads, and has another hand change entries between load and exchange.
struct Restless {
    mem: FlatMem,
    loads: Cell<u32>,
    /// Exchanges that still fail.
    failures: Cell<u32>,
    writable: bool,
}

impl TableMem for Restless {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.loads.set(self.loads.get() + 1);
        self.mem.load(at)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        if !self.writable {
            return Err(NotMemory);
        }
        if let Some(left) = self.failures.get().checked_sub(1) {
            self.failures.set(left);
            // Software bit 52 toggles.
            self.mem.store(at, current ^ 1 << 52)?;
            return Ok(Err(current ^ 1 << 52));
        }
        self.mem.compare_exchange(at, current, new)
    }
}

fn restless(failures: u32, writable: bool) -> (X86, Restless) {
    let (format, mem) = tables();
    (format, Restless { mem, loads: Cell::new(0), failures: Cell::new(failures), writable })
}

#[test]
fn each_entry_is_loaded_once() {
    let (format, mem) = restless(0, true);
    assert!(walk(&format, &mem, Iova(0), Access::WRITE).is_ok());
    assert_eq!(mem.loads.get(), 4);
}

#[test]
fn updates_are_tried_again_and_not_for_ever() {
    let (format, mem) = restless(UPDATE_ATTEMPTS, true);
    assert!(walk(&format, &mem, Iova(0), Access::WRITE).is_ok());
    assert_eq!(mem.mem.load(Gpa(0x4000)), Ok(0x5067));
    let (format, mem) = restless(u32::MAX, true);
    let fault = Err(WalkFault::EntryUpdate { level: 3 });
    assert_eq!(walk(&format, &mem, Iova(0), Access::WRITE), fault);
    let (format, mem) = restless(0, false);
    assert_eq!(walk(&format, &mem, Iova(0), Access::READ), fault);
}

/// An entry that changes between load and exchange is judged by what it has become.
#[test]
fn a_changed_entry_is_judged_anew() {
    struct Vanishing(FlatMem);
    impl TableMem for Vanishing {
        fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
            self.0.load(at)
        }
        fn compare_exchange(&self, at: Gpa, _: u64, _: u64) -> Result<Result<u64, u64>, NotMemory> {
            self.0.store(at, 0)?;
            Ok(Err(0))
        }
    }
    let (format, mem) = tables();
    let fault = walk(&format, &Vanishing(mem), Iova(0), Access::READ);
    assert_eq!(fault, Err(WalkFault::NotPresent { level: 3 }));
}

#[test]
fn a_walk_resumes_from_every_table_it_has_reached() {
    let (format, mem) = tables();
    // The limits of the tables above must travel along: level 2 forbids writes.
    mem.store(Gpa(0x2000), 0x3000 | 0b101).expect("memory");
    let mut steps = Vec::from([Step::root(&format)]);
    let whole =
        walk_from(&format, &mem, Step::root(&format), Iova(0x123), Access::READ, |step| steps.push(step));
    assert!(whole.is_ok());
    let places: Vec<_> = steps.iter().map(|step| (step.level, step.table.0)).collect();
    assert_eq!(places, [(3, 0x1000), (2, 0x2000), (1, 0x3000), (0, 0x4000)]);
    for step in steps {
        let resume = |access| walk_from(&format, &mem, step, Iova(0x123), access, |_| ());
        assert_eq!(resume(Access::READ), whole);
        let denied = Err(WalkFault::Permission { level: 0, denied: Denied::Write });
        assert_eq!(resume(Access::WRITE), denied, "from level {}", step.level);
    }
}

/// A table that leads to itself at every level is no loop: the level falls.
#[test]
fn tables_that_lead_to_themselves() {
    let (format, mem) = tables();
    mem.store(Gpa(0x1000), 0x1007).expect("memory");
    let found = walk(&format, &mem, Iova(0), Access::READ).expect("a page of its own table");
    assert_eq!(found.output, Gpa(0x1000));
    // Level 1 sees a table in it, as the others do; with PS it would be a leaf.
    mem.store(Gpa(0x1000), 0x1087).expect("memory");
    assert_eq!(walk(&format, &mem, Iova(0), Access::READ), Err(WalkFault::Reserved { level: 3 }));
}
