//! PCI configuration space: the capabilities that decide what an IOMMU can do for a device.

/// A function's configuration space, as far as it was readable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
}

/// Layout of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderType {
    /// Type 0: a function that does something.
    Endpoint,
    /// Type 1 or 2: a bridge.
    Bridge,
}

/// Address Translation Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ats {
    /// Whether the device has them switched on now.
    pub enabled: bool,
}

/// Process Address Space ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PasidCapability {
    /// Bits of a PASID that the device can send, 0 to 20.
    pub bits: u8,
    /// Accesses may say that they execute.
    pub execute: bool,
    /// Accesses may say that they are privileged.
    pub privileged: bool,
    /// Whether the device has them switched on now.
    pub enabled: bool,
}

/// Single-root I/O virtualization, of a physical function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sriov {
    /// Virtual functions that there are now.
    pub enabled: u16,
    /// The most that there can be.
    pub total: u16,
}

const ATS: u16 = 0x000f;
const SRIOV: u16 = 0x0010;
const PRI: u16 = 0x0013;
const PASID: u16 = 0x001b;

/// The conventional space; PCI Express has its extended capabilities above it.
const CONVENTIONAL: usize = 256;
const EXTENDED: usize = 4096;
/// Capability ID of PCI Express.
const PCI_EXPRESS: u8 = 0x10;

impl ConfigSpace {
    /// Takes what was read from the beginning of the space.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    /// Whether extended capabilities are seen: all of them, or surely none. Without privilege only 64 bytes can be read.
    pub fn is_whole(&self) -> bool {
        match self.bytes.len() {
            EXTENDED.. => true,
            // A conventional device has no more; an Express device behind a host that does not reach further neither.
            CONVENTIONAL.. => true,
            _ => false,
        }
    }

    /// Layout of the header; `None` where it was not read.
    pub fn header(&self) -> Option<HeaderType> {
        Some(if self.bytes.get(0x0e)? & 0x7f == 0 { HeaderType::Endpoint } else { HeaderType::Bridge })
    }

    /// Whether it is a PCI Express function; `None` where that was not seen.
    pub fn is_express(&self) -> Option<bool> {
        if self.u16(0x06)? & 1 << 4 == 0 {
            return Some(false); // Status bit 4: no list of capabilities
        }
        let mut place = usize::from(*self.bytes.get(0x34)? & !3);
        for _ in 0..CONVENTIONAL / 4 {
            if place < 0x40 {
                return Some(false);
            }
            let [id, next] = [*self.bytes.get(place)?, *self.bytes.get(place + 1)?];
            if id == PCI_EXPRESS {
                return Some(true);
            }
            place = usize::from(next & !3);
        }
        Some(false)
    }

    /// Address Translation Services; `None` where the device has none, or its capabilities were not seen.
    pub fn ats(&self) -> Option<Ats> {
        let control = self.u16(self.extended(ATS)? + 6)?;
        Some(Ats { enabled: control & 1 << 15 != 0 })
    }

    /// Whether the device can send page requests.
    pub fn page_requests(&self) -> bool {
        self.extended(PRI).is_some()
    }

    /// PASIDs; `None` where the device has none, or its capabilities were not seen.
    pub fn pasid(&self) -> Option<PasidCapability> {
        let place = self.extended(PASID)?;
        let (capability, control) = (self.u16(place + 4)?, self.u16(place + 6)?);
        Some(PasidCapability {
            bits: u8::try_from(capability >> 8 & 0x1f).ok()?.min(20),
            execute: capability & 1 << 1 != 0,
            privileged: capability & 1 << 2 != 0,
            enabled: control & 1 != 0,
        })
    }

    /// SR-IOV, of a physical function.
    pub fn sriov(&self) -> Option<Sriov> {
        let place = self.extended(SRIOV)?;
        Some(Sriov { total: self.u16(place + 0x0e)?, enabled: self.u16(place + 0x10)? })
    }

    /// Where an extended capability begins.
    fn extended(&self, wanted: u16) -> Option<usize> {
        let mut place = CONVENTIONAL;
        // The list is the device's word: it may run in circles.
        for _ in 0..(EXTENDED - CONVENTIONAL) / 4 {
            let header = self.u32(place)?;
            if header == 0 || header == u32::MAX {
                return None;
            }
            if header & 0xffff == u32::from(wanted) {
                return Some(place);
            }
            place = usize::try_from(header >> 20 & !3).ok()?;
            if place < CONVENTIONAL {
                return None;
            }
        }
        None
    }

    fn u16(&self, place: usize) -> Option<u16> {
        let bytes = self.bytes.get(place..)?.first_chunk()?;
        Some(u16::from_le_bytes(*bytes))
    }

    fn u32(&self, place: usize) -> Option<u32> {
        let bytes = self.bytes.get(place..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(capabilities: &[(u16, &[u8])]) -> ConfigSpace {
        let mut bytes = vec![0; EXTENDED];
        let mut place = CONVENTIONAL;
        for (index, (id, body)) in capabilities.iter().enumerate() {
            let next = if index + 1 == capabilities.len() { 0 } else { place + 0x40 };
            let header = u32::from(*id) | 1 << 16 | u32::try_from(next).unwrap() << 20;
            bytes[place..place + 4].copy_from_slice(&header.to_le_bytes());
            bytes[place + 4..place + 4 + body.len()].copy_from_slice(body);
            place = next;
        }
        ConfigSpace::new(bytes)
    }

    #[test]
    fn extended_capabilities_are_found_in_any_order() {
        let config = space(&[
            (0x0001, &[]),
            (PASID, &[0x06, 0x14, 0x01, 0x00]),
            (PRI, &[0; 12]),
            (SRIOV, &[0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 8, 0, 4, 0]),
            (ATS, &[0x20, 0x00, 0x00, 0x80]),
        ]);
        assert_eq!(config.ats(), Some(Ats { enabled: true }));
        assert!(config.page_requests());
        let pasid = PasidCapability { bits: 20, execute: true, privileged: true, enabled: true };
        assert_eq!(config.pasid(), Some(pasid));
        assert_eq!(config.sriov(), Some(Sriov { enabled: 4, total: 8 }));
    }

    #[test]
    fn what_is_cut_off_is_not_seen() {
        let mut config = space(&[(ATS, &[0; 4])]);
        assert!(config.is_whole());
        config.bytes.truncate(64);
        assert!(!config.is_whole());
        assert_eq!(config.ats(), None);
        assert_eq!(ConfigSpace::new(Vec::new()).header(), None);
    }

    #[test]
    fn lists_that_run_in_circles_end() {
        let mut config = space(&[(1, &[])]);
        config.bytes[CONVENTIONAL..CONVENTIONAL + 4].copy_from_slice(&(1u32 | 0x100 << 20).to_le_bytes());
        assert_eq!(config.ats(), None);
        config.bytes[6] = 0x10;
        config.bytes[0x34] = 0x40;
        config.bytes[0x41] = 0x40;
        assert_eq!(config.is_express(), Some(false));
    }
}
