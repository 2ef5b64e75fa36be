//! A map for few entries.

use alloc::collections::VecDeque;
use core::cmp::Ordering;

/// A map in a sorted ring. Where there are seldom more than a few entries it is faster than a tree, and one that is emptied
/// and filled again and again does not allocate. An insertion or a removal moves the entries before or behind, whichever are
/// fewer: at the ends, where numbers that are given in turn come and go, nearly none; anywhere else, at most half of them.
/// Whoever uses it has a bound on their number.
#[derive(Clone, Debug)]
pub(crate) struct SortedMap<K, V> {
    entries: VecDeque<(K, V)>,
}

impl<K: Ord, V> SortedMap<K, V> {
    pub(crate) const fn new() -> Self {
        Self { entries: VecDeque::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    #[inline]
    pub(crate) fn contains_key(&self, key: &K) -> bool {
        self.find(key).is_ok()
    }

    #[inline]
    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        let at = self.find(key).ok()?;
        self.entries.get(at).map(|(_, value)| value)
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        let at = self.find(key).ok()?;
        self.entries.get_mut(at).map(|(_, value)| value)
    }

    /// Puts `value` in the place of what is there under `key`.
    pub(crate) fn insert(&mut self, key: K, value: V) {
        match self.find(&key) {
            Ok(at) => {
                if let Some(entry) = self.entries.get_mut(at) {
                    entry.1 = value;
                }
            }
            Err(at) => self.entries.insert(at, (key, value)),
        }
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let at = self.find(key).ok()?;
        self.entries.remove(at).map(|(_, value)| value)
    }

    /// Keeps what `keeps` says.
    pub(crate) fn retain(&mut self, mut keeps: impl FnMut(&K, &mut V) -> bool) {
        self.entries.retain_mut(|(key, value)| keeps(key, value));
    }

    /// In ascending order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &K> {
        self.entries.iter().map(|(key, _)| key)
    }

    /// In ascending order.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        self.entries.iter_mut().map(|(key, value)| (&*key, value))
    }

    /// Where `key` is, or would be.
    #[inline]
    fn find(&self, key: &K) -> Result<usize, usize> {
        let Some((last, _)) = self.entries.back() else { return Err(0) };
        match last.cmp(key) {
            Ordering::Less => Err(self.entries.len()),
            Ordering::Equal => Ok(self.entries.len() - 1),
            Ordering::Greater => self.entries.binary_search_by(|(known, _)| known.cmp(key)),
        }
    }
}

impl<K: Ord, V> Default for SortedMap<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeMap;
    use alloc::vec::Vec;

    use super::SortedMap;

    /// Against a tree: keys in turn, as numbers of groups are given, and all over.
    #[test]
    fn does_what_a_tree_does() {
        let (mut map, mut tree) = (SortedMap::new(), BTreeMap::new());
        let mut random = 1_u32;
        for step in 0_u32..20_000 {
            random = random.wrapping_mul(0x9e37_79b1).rotate_left(7) ^ step;
            let key = if step % 4_000 < 2_000 { step % 97 } else { random % 97 };
            match random >> 29 {
                0..=3 => {
                    map.insert(key, step);
                    tree.insert(key, step);
                }
                4..=5 => assert_eq!(map.remove(&key), tree.remove(&key)),
                6 => assert_eq!(map.get_mut(&key), tree.get_mut(&key)),
                _ if random & 0xff_0000 == 0 => {
                    map.retain(|key, value| (*key ^ *value) & 1 == 0);
                    tree.retain(|key, value| (*key ^ *value) & 1 == 0);
                }
                _ => assert_eq!(map.contains_key(&key), tree.contains_key(&key)),
            }
            assert_eq!(
                (map.len(), map.is_empty(), map.get(&key)),
                (tree.len(), tree.is_empty(), tree.get(&key))
            );
        }
        assert!(!map.is_empty());
        assert_eq!(map.keys().collect::<Vec<_>>(), tree.keys().collect::<Vec<_>>());
        assert_eq!(map.iter_mut().collect::<Vec<_>>(), tree.iter_mut().collect::<Vec<_>>());
    }
}
