//! Numbers that are given out and taken back: PASIDs, ASIDs.

use alloc::vec::Vec;

/// A set of numbers, one bit each. Memory grows with the highest number given, up to the bound.
#[derive(Clone, Debug)]
pub struct IdSpace {
    first: u32,
    last: u32,
    /// Bit `n % 64` of word `n / 64`: number `first + n` is in use.
    words: Vec<u64>,
    /// No number before this word is free.
    full_words: usize,
}

impl IdSpace {
    /// The numbers `first..=last`; none where `last` lies before `first`.
    pub const fn new(first: u32, last: u32) -> Self {
        Self { first, last, words: Vec::new(), full_words: 0 }
    }

    /// Takes the lowest free number, at most `last`.
    pub fn take(&mut self, last: u32) -> Option<u32> {
        let (index, bit) = self
            .words
            .iter()
            .enumerate()
            .skip(self.full_words)
            .find(|(_, word)| **word != u64::MAX)
            .map_or((self.words.len(), 0), |(index, word)| (index, word.trailing_ones()));
        let offset = u32::try_from(index).ok()?.checked_mul(64)?.checked_add(bit)?;
        let number = self.first.checked_add(offset).filter(|number| *number <= self.last.min(last))?;
        match self.words.get_mut(index) {
            Some(word) => *word |= 1 << bit,
            None => self.words.push(1),
        }
        self.full_words = index;
        Some(number)
    }

    /// Takes a number of the caller's choice. `false`: it is in use, or none of these.
    pub fn claim(&mut self, number: u32) -> bool {
        let Some((index, mask)) = self.place(number) else {
            return false;
        };
        if index >= self.words.len() {
            self.words.resize(index + 1, 0);
        }
        match self.words.get_mut(index) {
            Some(word) if *word & mask == 0 => {
                *word |= mask;
                true
            }
            _ => false,
        }
    }

    /// Gives a number back. `false`: it was not in use.
    pub fn release(&mut self, number: u32) -> bool {
        let Some((index, mask)) = self.place(number) else {
            return false;
        };
        match self.words.get_mut(index) {
            Some(word) if *word & mask != 0 => {
                *word &= !mask;
                self.full_words = self.full_words.min(index);
                true
            }
            _ => false,
        }
    }

    /// Whether `number` is one of these, in use or not.
    pub const fn contains(&self, number: u32) -> bool {
        self.first <= number && number <= self.last
    }

    /// How many numbers are in use.
    pub fn in_use(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    fn place(&self, number: u32) -> Option<(usize, u64)> {
        if number > self.last {
            return None;
        }
        let offset = number.checked_sub(self.first)?;
        Some((usize::try_from(offset / 64).ok()?, 1 << (offset % 64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_free_number_is_given_and_the_bound_holds() {
        let mut ids = IdSpace::new(1, 130);
        let all: Vec<u32> = core::iter::from_fn(|| ids.take(u32::MAX)).collect();
        assert_eq!(all, (1..=130).collect::<Vec<_>>());
        assert!(ids.release(70) && ids.release(3) && !ids.release(3));
        assert_eq!(ids.take(2), None);
        assert_eq!((ids.take(u32::MAX), ids.take(u32::MAX), ids.take(u32::MAX)), (Some(3), Some(70), None));
        assert_eq!(ids.in_use(), 130);
    }

    #[test]
    fn claimed_numbers_are_not_given() {
        let mut ids = IdSpace::new(0, 1000);
        assert!(ids.claim(0) && ids.claim(200) && !ids.claim(200) && !ids.claim(1001));
        assert_eq!(ids.take(u32::MAX), Some(1));
        assert!(!IdSpace::new(5, 4).claim(5));
        assert_eq!(IdSpace::new(5, 4).take(u32::MAX), None);
    }
}
