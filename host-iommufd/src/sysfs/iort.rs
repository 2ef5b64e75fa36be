//! IORT, the ACPI table that describes SMMUs and what is behind them (Arm DEN 0049).

use super::Bdf;

/// What an IORT says of SMMUs and of PCI root complexes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Iort {
    /// Base addresses of the SMMUv3s.
    pub smmuv3: Vec<u64>,
    /// The PCI root complexes.
    pub root_complexes: Vec<RootComplex>,
}

/// A PCI root complex.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootComplex {
    /// Its PCI segment.
    pub segment: u32,
    /// Memory access flags, bit 2, CANWBS: cacheable accesses to memory that a stage 2 makes cacheable are coherent
    /// whatever a guest's stage 1 says. Linux demands it for nesting, or an SMMU that forces write-back (S2FWB).
    pub canwbs: bool,
    /// ATS attribute, bit 0: the root complex supports ATS.
    pub ats: bool,
    /// ATS attribute, bit 1: and page requests.
    pub page_requests: bool,
    /// Requester IDs that are translated, first and last. Empty: all of the segment.
    requesters: Vec<(u32, u32)>,
}

/// Not an IORT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IortError {
    /// The signature is another.
    #[error("the table has another signature")]
    Signature,
    /// It ends before it should.
    #[error("the table is cut off")]
    Short,
    /// A node has a length that cannot be.
    #[error("a node has a bad length")]
    Node,
}

const ROOT_COMPLEX: u8 = 2;
const SMMUV3: u8 = 4;
const NODE_HEADER: usize = 16;
const MAPPING: usize = 20;

impl Iort {
    /// Reads the table.
    ///
    /// # Errors
    /// Bytes that are not an IORT. Nodes of other kinds are passed over.
    pub fn parse(table: &[u8]) -> Result<Self, IortError> {
        if table.get(..4).ok_or(IortError::Short)? != b"IORT" {
            return Err(IortError::Signature);
        }
        let length = usize::try_from(u32_at(table, 4)?).map_err(|_| IortError::Short)?;
        let table = table.get(..length).ok_or(IortError::Short)?;
        let count = u32_at(table, 36)?;
        let mut place = usize::try_from(u32_at(table, 40)?).map_err(|_| IortError::Short)?;
        let mut iort = Self::default();
        for _ in 0..count {
            let node = table.get(place..).ok_or(IortError::Short)?;
            let length = usize::from(u16::from_le_bytes(*chunk(node, 1)?));
            if length < NODE_HEADER {
                return Err(IortError::Node);
            }
            let node = node.get(..length).ok_or(IortError::Short)?;
            match node.first() {
                Some(&ROOT_COMPLEX) => iort.root_complexes.push(RootComplex::parse(node)?),
                Some(&SMMUV3) => iort.smmuv3.push(u64::from_le_bytes(*chunk(node, 16)?)),
                _ => {}
            }
            place = place.checked_add(length).ok_or(IortError::Node)?;
        }
        Ok(iort)
    }

    /// The root complex that a PCI function is behind.
    pub fn root_complex(&self, function: Bdf) -> Option<&RootComplex> {
        let requester = u32::from(function.requester);
        let covers = |complex: &RootComplex| {
            complex.requesters.is_empty()
                || complex.requesters.iter().any(|&(first, last)| (first..=last).contains(&requester))
        };
        self.root_complexes.iter().find(|complex| complex.segment == function.segment && covers(complex))
    }
}

impl RootComplex {
    fn parse(node: &[u8]) -> Result<Self, IortError> {
        let [flags] = *chunk::<1>(node, 23)?;
        let ats = u32_at(node, 24)?;
        let count = u32_at(node, 8)?;
        let first = usize::try_from(u32_at(node, 12)?).map_err(|_| IortError::Node)?;
        let mut requesters = Vec::new();
        let mappings = node.get(first..).ok_or(IortError::Node)?.chunks_exact(MAPPING);
        for mapping in mappings.take(usize::try_from(count).map_err(|_| IortError::Node)?) {
            let base = u32_at(mapping, 0)?;
            // The number of IDs less one.
            requesters.push((base, base.saturating_add(u32_at(mapping, 4)?)));
        }
        Ok(Self {
            segment: u32_at(node, 28)?,
            canwbs: flags & 1 << 2 != 0,
            ats: ats & 1 << 0 != 0,
            page_requests: ats & 1 << 1 != 0,
            requesters,
        })
    }
}

fn u32_at(bytes: &[u8], place: usize) -> Result<u32, IortError> {
    Ok(u32::from_le_bytes(*chunk(bytes, place)?))
}

fn chunk<const N: usize>(bytes: &[u8], place: usize) -> Result<&[u8; N], IortError> {
    bytes.get(place..).and_then(|rest| rest.first_chunk()).ok_or(IortError::Short)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ITS group, an SMMUv3, and a root complex for requesters 0x100 to 0x1ff of segment 1.
    pub(crate) fn table(flags: u8) -> Vec<u8> {
        let node = |kind: u8, length: u16| {
            let mut node = vec![0; usize::from(length)];
            node[0] = kind;
            node[1..3].copy_from_slice(&length.to_le_bytes());
            node
        };
        let mut smmu = node(SMMUV3, 88);
        smmu[16..24].copy_from_slice(&0x905_0000u64.to_le_bytes());
        let mut complex = node(ROOT_COMPLEX, 60);
        complex[8..12].copy_from_slice(&1u32.to_le_bytes());
        complex[12..16].copy_from_slice(&40u32.to_le_bytes());
        complex[23] = flags;
        complex[24] = 1;
        complex[28] = 1;
        complex[40..44].copy_from_slice(&0x100u32.to_le_bytes());
        complex[44..48].copy_from_slice(&0xffu32.to_le_bytes());
        let mut bytes = vec![0; 48];
        bytes[..4].copy_from_slice(b"IORT");
        bytes[36] = 3;
        bytes[40] = 48;
        bytes.extend([node(0, 24), smmu, complex].concat());
        let length = u32::try_from(bytes.len()).unwrap();
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        bytes
    }

    #[test]
    fn root_complexes_say_whether_they_are_coherent() {
        for (flags, canwbs) in [(0x03, false), (0x07, true)] {
            let iort = Iort::parse(&table(flags)).unwrap();
            assert_eq!(iort.smmuv3, [0x905_0000]);
            let complex = iort.root_complex(Bdf { segment: 1, requester: 0x1ff }).unwrap();
            assert_eq!((complex.canwbs, complex.ats, complex.page_requests), (canwbs, true, false));
            for (segment, requester) in [(0, 0x100), (1, 0xff), (1, 0x200)] {
                assert_eq!(iort.root_complex(Bdf { segment, requester }), None);
            }
        }
    }

    #[test]
    fn tables_that_are_cut_or_bent_are_refused() {
        let whole = table(7);
        for length in 0..whole.len() {
            assert_eq!(Iort::parse(&whole[..length]), Err(IortError::Short), "{length}");
        }
        let mut other = whole.clone();
        other[0] = b'X';
        assert_eq!(Iort::parse(&other), Err(IortError::Signature));
        let mut bent = whole.clone();
        bent[49..51].copy_from_slice(&8u16.to_le_bytes());
        assert_eq!(Iort::parse(&bent), Err(IortError::Node));
        let mut bent = whole;
        let complex = 48 + 24 + 88;
        bent[complex + 12..complex + 16].copy_from_slice(&0xffff_u32.to_le_bytes());
        assert_eq!(Iort::parse(&bent), Err(IortError::Node));
    }
}
