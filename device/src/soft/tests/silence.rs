//! Faults that the guest's table says are not to be recorded: they fail, and nobody is told.

use super::*;

const IOVA: u64 = 0x12_3000;
const OUTPUT: u64 = 0x4010_0000;

/// Reads with PASID 1, in the host with caches and in the one without: the same fault, and whether it is told.
#[track_caller]
fn fails(world: &mut World, access: Access) -> bool {
    let [cached, strict] = [&mut world.host, &mut world.strict].map(|host| {
        let cause = host.translate(tagged(1), Iova(IOVA), access, |_| ()).unwrap_err();
        let told = host.next_fault();
        assert!(told.is_none_or(|told| told.cause == cause));
        assert_eq!(host.next_fault(), None);
        (cause, told.is_some())
    });
    assert_eq!(cached, strict);
    cached.1
}

/// PASID 1 with a descriptor that `change` changed.
fn arm(change: impl Fn(&mut smmuv3::Cd)) -> (World, PageTable) {
    let mut world = World::new(Arch::Arm);
    let page_table = world.page_table();
    world.set_context(1, 1, page_table);
    change_cd(&mut world, page_table, change);
    (world, page_table)
}

fn change_cd(world: &mut World, page_table: PageTable, change: impl Fn(&mut smmuv3::Cd)) {
    let Canonical::Smmuv3(table) = &world.table else { panic!() };
    let mut cd = page_table.cd(1).encode(&arm_caps()).unwrap();
    change(&mut cd);
    table.clear(&world.memory, Pasid::new(1).unwrap()).unwrap();
    table.write(&mut world.memory, Pasid::new(1).unwrap(), &cd).unwrap();
}

fn no_record(cd: &mut smmuv3::Cd) {
    cd.word0.set_record(false);
}

#[test]
fn arm_r_silences_the_faults_of_stage_1() {
    let (mut world, page_table) = arm(no_record);
    assert!(!fails(&mut world, Access::READ), "F_TRANSLATION");
    world.map(page_table, IOVA, 0x1000, OUTPUT, Attrs::READ);
    assert!(!fails(&mut world, Access::WRITE), "F_PERMISSION");
    assert_eq!(world.read(1, IOVA), Ok(OUTPUT));
    let (mut world, _) = arm(|_| ());
    assert!(fails(&mut world, Access::READ), "R = 1");
}

#[test]
fn arm_r_silences_nothing_else() {
    // C_BAD_CD.
    let (mut world, _) = arm(|cd| {
        no_record(cd);
        cd.word0.set_aa64(false);
    });
    assert!(fails(&mut world, Access::READ));
    // F_WALK_EABT.
    let (mut world, _) = arm(|cd| {
        no_record(cd);
        cd.word1.set_ttb0(0x9000_0000 >> 4);
    });
    assert!(fails(&mut world, Access::READ));
    // Another PASID, for which there is nothing.
    let (mut world, _) = arm(no_record);
    assert!(world.read(2, IOVA).is_err());
    assert!(world.host.next_fault().is_some());
}

#[test]
fn arm_r_is_that_of_the_context_in_use() {
    let (mut world, page_table) = arm(|_| ());
    assert!(fails(&mut world, Access::READ));
    // Cleared and not invalidated: neither the one nor the other descriptor is without a record.
    change_cd(&mut world, page_table, |cd| *cd = smmuv3::Cd::default());
    assert!(world.read(1, IOVA).is_err());
    assert!(world.host.next_fault().is_some());
    change_cd(&mut world, page_table, no_record);
    let all = Caches::all();
    world.invalidate(Invalidation { caches: all, ..tlb(Scope::Pasid(Pasid::new(1))) });
    assert!(!fails(&mut world, Access::READ));
}

#[test]
fn a_silenced_fault_can_still_wait_for_its_page() {
    let (mut world, _) = arm(no_record);
    world.host.ports.get_mut(&ENDPOINT).unwrap().caps.page_requests = true;
    assert!(world.host.access(tagged(1), Iova(IOVA), Access::READ, |_| ()).is_err());
    let request = world.host.next_page_request().unwrap();
    assert_eq!(request.fault, None, "nor is it told where it is no page request");
    assert_eq!(world.host.next_fault(), None);
}

/// Sets FPD in the directory entry and in the entry of PASID 1.
fn set_fpd(world: &World, in_directory: bool, in_entry: bool) {
    let Canonical::VtdPasidTable(table) = &world.table else { panic!() };
    let flip = |at: Gpa, set: bool| {
        let before = world.memory.load(at).unwrap();
        let after = before & !2 | u64::from(set) << 1;
        assert_eq!(world.memory.compare_exchange(at, before, after).unwrap(), Ok(before));
    };
    let directory = table.extents().0;
    flip(directory, in_directory);
    let entries = world.memory.load(directory).unwrap() & !0xfff;
    if entries != 0 {
        flip(Gpa(entries + 64), in_entry);
    }
}

#[test]
fn vtd_fpd_of_either_entry_silences() {
    for (in_directory, in_entry) in [(false, true), (true, false), (true, true)] {
        let mut world = World::new(Arch::Vtd);
        let page_table = world.page_table();
        world.set_context(1, 1, page_table);
        assert!(fails(&mut world, Access::READ), "both clear");
        set_fpd(&world, in_directory, in_entry);
        assert!(!fails(&mut world, Access::READ), "not present");
        assert!(!fails(&mut world, Access { privileged: true, ..Access::READ }), "0x5d, by the entry itself");
        world.map(page_table, IOVA, 0x1000, OUTPUT, Attrs::READ);
        assert!(!fails(&mut world, Access::WRITE));
        set_fpd(&world, false, false);
        assert!(fails(&mut world, Access::WRITE));
    }
}

#[test]
fn vtd_fpd_counts_where_the_entry_is_not_present() {
    let mut world = World::new(Arch::Vtd);
    let page_table = world.page_table();
    // No table of entries yet.
    set_fpd(&world, true, false);
    assert!(!fails(&mut world, Access::READ));
    set_fpd(&world, false, false);
    assert!(fails(&mut world, Access::READ));
    // As drivers leave an entry that they take away.
    world.set_context(1, 1, page_table);
    let Canonical::VtdPasidTable(table) = world.table.clone() else { panic!() };
    table.clear(&world.memory, Pasid::new(1).unwrap()).unwrap();
    set_fpd(&world, false, true);
    assert!(!fails(&mut world, Access::READ));
    // Beyond the directory nobody has said anything.
    assert!(world.read(1 << 19, IOVA).is_err());
    assert!(world.host.next_fault().is_some());
}

#[test]
fn vtd_fpd_of_the_directory_does_not_silence_a_table_that_is_nowhere() {
    let mut world = World::new(Arch::Vtd);
    let Canonical::VtdPasidTable(table) = &world.table else { panic!() };
    let directory = table.extents().0;
    let entry = vtd::DirectoryEntry::new().with_present(true).with_fault_disable(true).with_table(0x9_0000);
    assert_eq!(world.memory.compare_exchange(directory, 0, entry.into_bits()).unwrap(), Ok(0));
    let cause = world.read(1, IOVA);
    assert_eq!(cause, Err(FaultCause::Table(pgtable_formats::Fault::Vtd(vtd::FaultReason::ENTRY_ACCESS))));
    assert!(world.host.next_fault().is_some());
}
