//! Guests that mean ill: tables that change while they are read, lead to themselves, or have no end.

use core::cell::{Cell, RefCell};

use pgtable_formats::{NotMemory, TableMem};

use super::*;

/// Memory that counts loads, and changes under the reader.
struct Restless {
    memory: FlatMem,
    loads: Cell<usize>,
    /// What each word gave, in this reading.
    seen: RefCell<BTreeMap<Gpa, u64>>,
    /// Changes words while not 0.
    seed: Cell<u64>,
}

impl Restless {
    fn new() -> Self {
        Self { memory: memory(), loads: Cell::new(0), seen: RefCell::default(), seed: Cell::new(0) }
    }

    fn random(&self) -> u64 {
        let next = self.seed.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.seed.set(next);
        next >> 33
    }

    /// A word of the directory or of one of its tables becomes another, or one that makes sense.
    fn disturb(&self) {
        let guest = Guest::new();
        let pasid = self.random() % 256;
        let at = guest.table(pasid >> 6).0 + ((pasid & 63) << 6);
        match self.random() % 8 {
            0 => guest.link(&self.memory, pasid >> 6, guest.table((pasid >> 6) + 4 * (self.random() % 4))),
            1 => self.memory.store(Gpa(guest.directory.0 + 8 * (pasid >> 6)), self.random() % 4).unwrap(),
            2 => self.memory.store(Gpa(at), 0).unwrap(),
            3 => self
                .memory
                .store(Gpa(at + 8 * (self.random() % 8)), self.random() << (self.random() % 33))
                .unwrap(),
            _ => guest.set(&self.memory, pasid, &entry(100 + self.random() % 8)),
        }
    }
}

impl TableMem for Restless {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.loads.set(self.loads.get() + 1);
        let value = self.memory.load(at)?;
        if self.seed.get() != 0 {
            assert_eq!(self.seen.borrow_mut().insert(at, value), None, "{at} is loaded twice");
            (0..self.random() % 3).for_each(|_| self.disturb());
        }
        Ok(value)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        self.memory.compare_exchange(at, current, new)
    }
}

impl Stage2 for Restless {
    fn contains(&self, first: Gpa, last: Gpa) -> bool {
        self.memory.contains(first, last)
    }
}

/// What was read, word by word, says what has to be bound.
fn expected(seen: &BTreeMap<Gpa, u64>) -> Vec<(u32, u64)> {
    let guest = Guest::new();
    let mut expected = vec![];
    // PASID 0 is the untagged stream's.
    for pasid in 1..1024_u32 {
        let word = |at| seen.get(&Gpa(at)).copied().unwrap_or(0);
        let directory = vtd::DirectoryEntry::from_bits(word(guest.directory.0 + u64::from(pasid >> 6) * 8));
        if !directory.present() || directory.reserved() != 0 || directory.table() >> 40 != 0 {
            continue;
        }
        let at = (directory.table() << 12) + (u64::from(pasid & 63) << 6);
        let words = core::array::from_fn(|index| word(at + 8 * index as u64));
        use pgtable_formats::context::{Context, Stage1};
        if let Ok(Context::Stage1(Stage1::Vtd(table))) = vtd::PasidEntry::from_words(words).judge(&vtd_caps())
        {
            expected.push((pasid, table.root().0.wrapping_sub(MEMORY.0) >> 12));
        }
    }
    expected
}

/// Every word is loaded once, and what is bound is what these words said, however the table changes meanwhile.
#[test]
fn a_table_that_changes_is_read_once() {
    for seed in 1..40 {
        let memory = Restless::new();
        let mut host = over(&memory, MediationLimits::DEFAULT);
        let guest = Guest::new();
        for number in 0..4 {
            guest.link(&memory.memory, number, guest.table(number));
        }
        guest.bind(&mut host, VTD).unwrap();
        for round in 0..6 {
            // No two directory entries ever lead to one table: it would be two to the reader.
            for number in 0..4 {
                guest.link(&memory.memory, number, guest.table(number));
            }
            memory.seed.set(seed * 1000 + round);
            memory.seen.borrow_mut().clear();
            let _ = reread(&mut host, VTD, Scope::Endpoint);
            memory.seed.set(0);
            let seen = memory.seen.borrow();
            assert_eq!(leads(&host, VTD), expected(&seen), "seed {seed}, round {round}");
        }
    }
}

/// A directory is a table as well, and its entries are what they are.
#[test]
fn a_directory_that_leads_to_itself_is_read() {
    let memory = Restless::new();
    let mut host = over(&memory, MediationLimits::DEFAULT);
    let guest = Guest::new();
    for place in 0..1 << 14 {
        guest.link(&memory.memory, place, guest.directory);
    }
    assert_eq!(guest.bind(&mut host, VTD), Err(HostError::NoMemory), "more tables than are read");
    for place in 1 << 12..1 << 14 {
        memory.memory.store(Gpa(guest.directory.0 + 8 * place), 0).unwrap();
    }
    guest.bind(&mut host, VTD).unwrap();
    assert_eq!(host.held(VTD).unwrap().entries, 0, "all its entries have reserved bits");
    for pasid in [0, 8, 64 * 4096 - 1] {
        reread(&mut host, VTD, Scope::Pasid(Pasid::new(pasid))).unwrap();
    }
    assert_eq!(leads(&host, VTD), []);
}

/// 2^20 entries that are all present, in one page of memory: so many words are loaded, and no more.
#[test]
fn a_table_without_end_is_cut() {
    for is_legal in [true, false] {
        let memory = Restless::new();
        let mut host =
            over(&memory, MediationLimits { max_entries_per_endpoint: 100, ..MediationLimits::DEFAULT });
        let guest = Guest::new();
        guest.set(&memory.memory, 5, &entry(100));
        guest.bind(&mut host, VTD).unwrap();
        for pasid in 0..64 {
            let bad = vtd::PasidEntry { reserved: [0, 0, 0, 0, 1], ..entry(100) };
            guest.set(&memory.memory, pasid, &if is_legal || pasid == 5 { entry(100) } else { bad });
        }
        for place in 0..1 << 14 {
            guest.link(&memory.memory, place, guest.table(0));
        }
        let at_most = (1 << 14) + MediationLimits::DEFAULT.max_tables_per_reading * 512;
        let loads = |host: &mut Both<'_, Restless>, scope| {
            let (loads, calls) = (memory.loads.get(), host.host().calls);
            let stopped = reread(host, VTD, scope);
            assert_eq!(stopped, Err(Stopped { done: 0, error: HostError::NoMemory }));
            assert!(host.host().calls - calls <= 2 * 100 + 1);
            memory.loads.get() - loads
        };
        let seen = loads(&mut host, Scope::Endpoint);
        assert!(seen <= at_most, "{seen} loads");
        assert_eq!(host.held(VTD).unwrap().entries, 100, "those that there is room for");
        assert!(leads(&host, VTD).contains(&(5, 100)), "what was bound stays");
        // For another endpoint nothing of it is bound.
        let before = (memory.loads.get(), host.host().live);
        assert_eq!(guest.bind(&mut host, VTD_TOO), Err(HostError::NoMemory));
        assert!(memory.loads.get() - before.0 <= at_most);
        assert_eq!((host.host().live, leads(&host, VTD_TOO)), (before.1, vec![]));
        // What lies behind the cut is as it was.
        let cut = 64 << 12;
        assert!(leads(&host, VTD).iter().all(|(pasid, _)| *pasid < cut));
        guest.bind(&mut host, VTD).unwrap_err();
        host.bind(Stream::untagged(VTD), None).unwrap();
        assert_eq!((host.host().live, leads(&host, VTD)), (0, vec![]));
    }
}

/// Binding again and again into a window that is full changes nothing and leaks nothing.
#[test]
fn a_full_window_stays_as_it_is() {
    let memory = Restless::new();
    // Level 1 and two tables of level 2 for each of two endpoints.
    let share = (128 << 10) + 2 * 4096;
    let window = Window::new(WINDOW, 2 * share);
    let mut host: Both<'_, Restless> =
        Mediated::new(Books::new(), &memory, window, MediationLimits::DEFAULT).unwrap();
    let bind = |host: &mut Both<'_, Restless>, endpoint, pasid| {
        let mut pages = space(host, endpoint, arm_pages(100));
        let result = host.bind(tagged(endpoint, pasid), Some(&mut pages));
        host.destroy(pages);
        result
    };
    for endpoint in [ARM, ARM_TOO] {
        for pasid in [1, 64] {
            bind(&mut host, endpoint, pasid).unwrap();
        }
    }
    assert_eq!(host.window_left(), 0);
    let words = |memory: &Restless| -> Vec<u64> {
        (0..2 * share).step_by(8).map(|at| memory.memory.load(Gpa(WINDOW.0 + at)).unwrap()).collect()
    };
    let before = words(&memory);
    let (loads, calls) = (memory.loads.get(), host.host().calls);
    for pasid in 128..2128 {
        let endpoint = if pasid % 2 == 0 { ARM } else { ARM_TOO };
        assert_eq!(bind(&mut host, endpoint, pasid << 6 & 0xf_ffff | 128), Err(HostError::NoMemory));
    }
    assert_eq!((host.window_left(), words(&memory)), (0, before));
    assert_eq!((host.host().calls, memory.loads.get()), (calls, loads), "nothing is asked of the machine");
    let held = host.held(ARM).unwrap();
    assert_eq!((held.page_tables, held.window_bytes), (2, share));
    // One endpoint's full share takes nothing from what the other gives back.
    for pasid in [1, 64] {
        host.bind(tagged(ARM, pasid), None).unwrap();
    }
    bind(&mut host, ARM_TOO, 128).unwrap();
    assert_eq!(host.held(ARM).unwrap().window_bytes, 0);
    let books = host.into_inner();
    assert_eq!((books.live, books.bound.len()), (0, 0));
}
