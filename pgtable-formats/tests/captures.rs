//! The tables that a real kernel built (`tests/captures/README.md`): every mapping comes out right, through the
//! context tables and the walk, and whatever is not mapped faults.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::{cell::RefCell, collections::BTreeMap, fs, path::PathBuf};

use pgtable_formats::{
    Access, AccessKind, Fault, FaultClass, Gpa, Iova, NotMemory, Pasid, Perms, TableMem,
    context::{Canonical, Context, Stage1, smmuv3, vtd},
};
use serde_json::Value;

const SMMUV3: &str = "smmuv3-linux-7.3-4k";
const VTD: &str = "vtd-linux-7.3-4level";

#[test]
fn smmuv3_mappings_come_out_right() {
    let capture = Capture::read(SMMUV3);
    let mut mappings = 0;
    for endpoint in capture.endpoints() {
        let [ste0, ste1] = words(&endpoint["ste"]);
        let table = smmuv3::CdTable::from_ste(ste0, ste1, &capture.smmuv3_caps()).unwrap();
        assert_eq!(table.words(), [ste0, ste1], "the driver's entry is canonical");
        assert_eq!(table.pasid_bits(), 0);
        // With one descriptor untagged DMA uses it and PASIDs are not allowed.
        let canonical = Canonical::Smmuv3(table);
        assert_eq!(canonical.effective_pasid(None), Some(Pasid::ZERO));
        let refused = Err(Fault::Smmuv3(smmuv3::Event::CBadSubstreamid));
        assert_eq!(canonical.lookup(&capture.memory, Pasid::new(0)), refused);
        mappings += check(&capture, &canonical, &endpoint);
    }
    assert_eq!(mappings, 545);
}

#[test]
fn vtd_mappings_come_out_right() {
    let capture = Capture::read(VTD);
    let caps = capture.vtd_caps();
    let mut mappings = 0;
    for endpoint in capture.endpoints() {
        let context: [u64; 4] = words(&endpoint["context"]);
        let table = vtd::PasidTable::from_context_entry(context, &caps).unwrap();
        assert_eq!(table.words(), context, "the driver's entry is canonical");
        assert_eq!(u64::from(table.untagged().value()), endpoint["pasid"].as_u64().unwrap());
        let (directory, bytes) = table.extents();
        assert_eq!((directory.0, bytes), (context[0] & !0xfff, 4096));
        let canonical = Canonical::VtdPasidTable(table);
        mappings += check(&capture, &canonical, &endpoint);

        // The same table bound directly.
        let Ok(Context::Stage1(Stage1::Vtd(first_stage))) = canonical.lookup(&capture.memory, None) else {
            panic!("the entry of untagged DMA is a first-stage one")
        };
        let root = first_stage.root();
        let direct = vtd::FirstStage::new(root, vtd::FirstStageFlags::empty(), 48, &caps).unwrap();
        assert_eq!(direct, first_stage);
        check(&capture, &Canonical::VtdFirstStage(direct), &endpoint);
    }
    assert_eq!(mappings, 541);
}

/// Checks every mapping at its first and last byte and the bytes just outside; answers how many pages there were.
fn check(capture: &Capture, canonical: &Canonical, endpoint: &Value) -> usize {
    let Ok(Context::Stage1(stage1)) = canonical.lookup(&capture.memory, None) else {
        panic!("untagged DMA of {} has a table", endpoint["id"])
    };
    let mappings: BTreeMap<u64, (u64, u64, bool)> = endpoint["mappings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mapping| {
            let [iova, last, output] = ["iova", "last", "output"].map(|key| number(&mapping[key]));
            (iova, (last, output, mapping["write"].as_bool().unwrap()))
        })
        .collect();
    let expected = |iova: u64| {
        let (first, &(last, output, write)) = mappings.range(..=iova).next_back()?;
        (iova <= last).then(|| (output + (iova - first), write))
    };
    let mut pages = 0;
    for (&first, &(last, ..)) in &mappings {
        pages += usize::try_from((last - first + 1) / 4096).unwrap();
        let inside = (first..=last).step_by(4096);
        let around =
            [first, last, last & !7].into_iter().chain(first.checked_sub(1)).chain(last.checked_add(1));
        for iova in inside.chain(around) {
            for kind in [AccessKind::Read, AccessKind::Write] {
                let access = Access { kind, privileged: false };
                let answer = stage1.walk(&capture.memory, Iova(iova), access);
                let context = format!("endpoint {} {iova:#x} {kind:?}", endpoint["id"]);
                match (expected(iova), kind) {
                    (None, _) => {
                        assert_eq!(answer.unwrap_err().class(), FaultClass::NotMapped, "{context}");
                    }
                    (Some((_, false)), AccessKind::Write) => {
                        assert_eq!(answer.unwrap_err().class(), FaultClass::Permission, "{context}");
                    }
                    (Some((output, _)), _) => {
                        let translation = answer.expect(&context);
                        assert!(translation.contains(Iova(iova)), "{context}");
                        assert_eq!(translation.apply(Iova(iova)), Gpa(output), "{context}");
                        assert!(translation.perms.contains(Perms::USER_READ), "{context}");
                    }
                }
            }
        }
    }
    for iova in [0, 0x1000, 0x7fff_ffff_f000, 1 << 47, 1 << 55, u64::MAX] {
        if expected(iova).is_none() {
            let fault = stage1.walk(&capture.memory, Iova(iova), Access::READ).unwrap_err();
            assert_eq!(fault.class(), FaultClass::NotMapped, "{iova:#x}");
        }
    }
    pages
}

struct Capture {
    json: Value,
    memory: Pages,
}

impl Capture {
    fn read(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/captures").join(name);
        let json = serde_json::from_slice(&fs::read(folder.join("capture.json")).unwrap()).unwrap();
        let bytes = fs::read(folder.join("memory.bin")).unwrap();
        let (records, rest) = bytes.as_chunks::<{ 8 + 4096 }>();
        assert!(rest.is_empty());
        let mut words = BTreeMap::new();
        for record in records {
            let (chunks, _) = record.as_chunks::<8>();
            let (page, content) = chunks.split_first().unwrap();
            for (at, word) in (u64::from_le_bytes(*page)..).step_by(8).zip(content) {
                words.insert(at, u64::from_le_bytes(*word));
            }
        }
        Self { json, memory: Pages(RefCell::new(words)) }
    }

    fn endpoints(&self) -> Vec<Value> {
        self.json["endpoints"].as_array().unwrap().clone()
    }

    fn register(&self, name: &str) -> u64 {
        number(&self.json["registers"][name])
    }

    fn smmuv3_caps(&self) -> smmuv3::Caps {
        let [idr0, idr1, idr3, idr5] =
            ["idr0", "idr1", "idr3", "idr5"].map(|name| u32::try_from(self.register(name)).unwrap());
        smmuv3::Caps::from_registers(smmuv3::IdRegisters { idr0, idr1, idr3, idr5 })
    }

    fn vtd_caps(&self) -> vtd::Caps {
        let registers = vtd::CapRegisters { cap: self.register("cap"), ecap: self.register("ecap") };
        vtd::Caps::from_registers(registers)
    }
}

/// Pages of a capture; everything else is not memory.
struct Pages(RefCell<BTreeMap<u64, u64>>);

impl TableMem for Pages {
    fn load(&self, at: Gpa) -> Result<u64, NotMemory> {
        self.0.borrow().get(&at.0).copied().ok_or(NotMemory)
    }

    fn compare_exchange(&self, at: Gpa, current: u64, new: u64) -> Result<Result<u64, u64>, NotMemory> {
        let mut words = self.0.borrow_mut();
        let word = words.get_mut(&at.0).ok_or(NotMemory)?;
        if *word != current {
            return Ok(Err(*word));
        }
        *word = new;
        Ok(Ok(current))
    }
}

fn number(value: &Value) -> u64 {
    let text = value.as_str().unwrap();
    u64::from_str_radix(text.strip_prefix("0x").unwrap(), 16).unwrap()
}

fn words<const N: usize>(value: &Value) -> [u64; N] {
    let words: Vec<u64> = value.as_array().unwrap().iter().map(number).collect();
    words.try_into().unwrap()
}
