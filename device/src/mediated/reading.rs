//! A guest's PASID table, compared with what is bound.

use alloc::vec::Vec;

use pgtable_formats::Pasid;
use pgtable_formats::TableMem;
use pgtable_formats::context::vtd::{Caps, FirstStage, PasidEntry, PasidTable};
use pgtable_formats::context::{Context, Stage1};

/// What a legal entry says, and in which words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Said {
    /// The first three; the others of a legal entry are 0.
    words: [u64; 3],
    pub(super) target: Target,
}

/// What a legal entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    PageTable(FirstStage),
    Bypass,
}

impl Said {
    /// `None` of an entry that is not present, or not legal.
    pub(super) fn of(entry: &PasidEntry, caps: &Caps) -> Option<Self> {
        let target = match entry.judge(caps).ok()? {
            Context::Bypass => Target::Bypass,
            Context::Stage1(Stage1::Vtd(table)) => Target::PageTable(table),
            Context::Stage1(Stage1::Smmuv3(_)) => return None,
        };
        let [word0, word1, word2, ..] = entry.words();
        Some(Self { words: [word0, word1, word2], target })
    }

    /// Whether `entry` has the same words: then it says the same, and need not be judged.
    // Word by word: the entry was written so just now, and a wider load of it would wait for these writes.
    #[inline]
    fn is(&self, entry: &PasidEntry) -> bool {
        let [word0, word1, word2] = self.words;
        word0 == entry.word0.into_bits()
            && word1 == entry.word1.into_bits()
            && word2 == entry.word2.into_bits()
            && !entry.reserved.iter().any(|word| *word != 0)
    }
}

/// What in a live table is not as it is bound.
#[derive(Debug)]
pub(super) struct Reading {
    /// By ascending PASID. `None`: not present, or not legal.
    pub(super) changes: Vec<(Pasid, Option<Said>)>,
    /// How many of these were not bound before.
    pub(super) added: usize,
    /// How many are not any more.
    pub(super) gone: usize,
    /// Nothing was left out: no more entries were new than there may be in all, and no more tables there than are read.
    pub(super) is_whole: bool,
}

impl Reading {
    /// Reads `table` once, and walks along `bound`, which ascends, once: what an entry said, `None` where it is to be
    /// bound anew whatever it says. Of new entries it keeps the first `limit`.
    pub(super) fn of<'a, M: TableMem>(
        table: &PasidTable,
        memory: &M,
        bound: impl Iterator<Item = (Pasid, Option<&'a Said>)>,
        limit: usize,
        max_tables: usize,
    ) -> Self {
        let mut reading = Self { changes: Vec::new(), added: 0, gone: 0, is_whole: true };
        let mut bound = bound.peekable();
        let cut = table.scan_entries(memory, max_tables, |pasid, entry| {
            while let Some((gone, _)) = bound.next_if(|(other, _)| *other < pasid) {
                reading.remove(gone);
            }
            let old = bound.next_if(|(other, _)| *other == pasid).map(|(_, old)| old);
            let entry = entry.as_ref().ok();
            if !old.flatten().zip(entry).is_some_and(|(old, entry)| old.is(entry)) {
                let new = entry.and_then(|entry| Said::of(entry, table.caps()));
                reading.change(pasid, old, new, limit);
            }
        });
        // What was not reached stays as it is.
        while let Some((gone, _)) = bound.next_if(|(other, _)| cut.is_none_or(|cut| *other < cut)) {
            reading.remove(gone);
        }
        reading.is_whole &= cut.is_none();
        reading
    }

    fn change(&mut self, pasid: Pasid, old: Option<Option<&Said>>, new: Option<Said>, limit: usize) {
        match (old, new) {
            (Some(Some(old)), Some(new)) if old.target == new.target => {}
            (Some(_), Some(_)) => self.changes.push((pasid, new)),
            (Some(_), None) => self.remove(pasid),
            (None, Some(_)) if self.added >= limit => self.is_whole = false,
            (None, Some(_)) => {
                self.added += 1;
                self.changes.push((pasid, new));
            }
            (None, None) => {}
        }
    }

    fn remove(&mut self, pasid: Pasid) {
        self.gone += 1;
        self.changes.push((pasid, None));
    }
}
