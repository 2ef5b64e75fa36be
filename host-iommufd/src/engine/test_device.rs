//! `iommu-testdev`, QEMU's test device for IOMMUs (11.1 and later).
//!
//! PCI 1b36:0005, an ID that it shares with `pci-testdev`, which has a second BAR; described in QEMU's
//! `docs/specs/iommu-testdev.rst`. It writes, within the register access that starts it: the bytes 78 56 34 12, over and
//! over from the first address on, cut to the length asked. It is told of a refused access, and then part of the bytes
//! may have been written.
//!
//! After the write it reads back at a *machine* address that the driver gives, around the IOMMU. A program does not know
//! machine addresses, so this driver gives 0 and takes no heed of what that read finds.

use pgtable_formats::Iova;

use super::{Abilities, DmaError, Engine, Registers};

const TRIGGER: u64 = 0x00;
const ADDRESS_LOW: u64 = 0x04;
const ADDRESS_HIGH: u64 = 0x08;
const LENGTH: u64 = 0x0c;
const RESULT: u64 = 0x10;
const DOORBELL: u64 = 0x14;
const ATTRIBUTES: u64 = 0x18;
const READ_BACK_LOW: u64 = 0x1c;
const READ_BACK_HIGH: u64 = 0x20;

const DOORBELL_ARM: u32 = 1;

/// Non-secure, and that field counts.
const ATTRIBUTES_NON_SECURE: u32 = 1 << 3 | 1 << 1;

const RESULT_DONE: u32 = 0;
const RESULT_IDLE: u32 = 0xffff_ffff;
const RESULT_REFUSED: u32 = 0xdead_0002;
// The write was done, and the read-back failed or found other bytes.
const RESULT_READ_BACK_FAILED: u32 = 0xdead_0003;
const RESULT_READ_BACK_DIFFERS: u32 = 0xdead_0004;

/// The bytes that are written are those of this number, little-endian.
const PATTERN: u32 = 0x1234_5678;

/// The device itself has no bound; the memory for it is QEMU's.
const LIMIT: usize = 1 << 20;

/// QEMU's test device for IOMMUs.
pub struct TestDevice<R> {
    registers: R,
}

impl<R: Registers> TestDevice<R> {
    /// Takes the device over.
    ///
    /// # Errors
    /// [`DmaError::Broken`] where it is another device.
    pub fn start(registers: R) -> Result<Self, DmaError> {
        let mut device = Self { registers };
        if !device.registers.is_only_bar() {
            return Err(DmaError::Broken(0));
        }
        device.restart()?;
        Ok(device)
    }
}

impl<R: Registers> Engine for TestDevice<R> {
    fn name(&self) -> &'static str {
        "QEMU iommu-testdev"
    }

    fn abilities(&self) -> Abilities {
        Abilities::WRITE | Abilities::TELLS_FAULTS
    }

    fn limit(&self) -> usize {
        LIMIT
    }

    fn pattern(&self, length: usize) -> Option<Vec<u8>> {
        Some(PATTERN.to_le_bytes().into_iter().cycle().take(length).collect())
    }

    fn write(&mut self, to: Iova, length: usize) -> Result<(), DmaError> {
        DmaError::check_length(length, LIMIT)?;
        let low = |value: u64| u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0);
        let registers = &mut self.registers;
        registers.write32(ADDRESS_LOW, low(to.0));
        registers.write32(ADDRESS_HIGH, low(to.0 >> 32));
        registers.write32(LENGTH, u32::try_from(length).unwrap_or(0));
        registers.write32(ATTRIBUTES, ATTRIBUTES_NON_SECURE);
        registers.write32(DOORBELL, DOORBELL_ARM);
        registers.read32(TRIGGER);
        match registers.read32(RESULT) {
            RESULT_DONE | RESULT_READ_BACK_FAILED | RESULT_READ_BACK_DIFFERS => Ok(()),
            RESULT_REFUSED => Err(DmaError::Faulted),
            other => Err(DmaError::Broken(other.into())),
        }
    }

    fn restart(&mut self) -> Result<(), DmaError> {
        let registers = &mut self.registers;
        registers.enable();
        // Disarmed, its result is "idle"; with lengths of two kinds read back it is this device and no other.
        registers.write32(DOORBELL, 0);
        registers.write32(READ_BACK_LOW, 0);
        registers.write32(READ_BACK_HIGH, 0);
        for length in [0x5a5a_1234, 4] {
            registers.write32(LENGTH, length);
            let read = registers.read32(LENGTH);
            if read != length {
                return Err(DmaError::Broken(read.into()));
            }
        }
        match registers.read32(RESULT) {
            RESULT_IDLE => Ok(()),
            other => Err(DmaError::Broken(other.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;

    use super::*;

    #[derive(Default)]
    struct Model {
        registers: RefCell<HashMap<u64, u32>>,
        result: u32,
        other_bar: bool,
        read_only: bool,
        writes: RefCell<Vec<(u64, u32)>>,
    }

    impl Registers for Model {
        fn read32(&self, offset: u64) -> u32 {
            let mut registers = self.registers.borrow_mut();
            let get = |registers: &HashMap<u64, u32>, offset| registers.get(&offset).copied().unwrap_or(0);
            if offset == 0 {
                assert_eq!(get(&registers, 0x10), 0xffff_fffe, "not armed");
                let address = u64::from(get(&registers, 8)) << 32 | u64::from(get(&registers, 4));
                assert_eq!(get(&registers, 0x18), 0xa);
                self.writes.borrow_mut().push((address, get(&registers, 0xc)));
                registers.insert(0x10, self.result);
            }
            get(&registers, offset)
        }
        fn read64(&self, _: u64) -> u64 {
            panic!("the device takes 32 bits at a time");
        }
        fn write32(&mut self, offset: u64, value: u32) {
            if self.read_only {
                return;
            }
            let mut registers = self.registers.borrow_mut();
            if offset == 0x14 {
                registers.insert(0x10, if value == 1 { 0xffff_fffe } else { 0xffff_ffff });
            }
            registers.insert(offset, value);
        }
        fn write64(&mut self, _: u64, _: u64) {
            panic!("the device takes 32 bits at a time");
        }
        fn enable(&mut self) {}
        fn is_only_bar(&self) -> bool {
            !self.other_bar
        }
    }

    #[test]
    fn writes_and_tells() {
        let mut device = TestDevice::start(Model::default()).unwrap();
        device.write(Iova(0x1_2345_6000), 64).unwrap();
        assert_eq!(device.registers.writes.take(), [(0x1_2345_6000, 64)]);
        // What the read-back finds is nothing of ours.
        for (result, outcome) in [
            (0, Ok(())),
            (0xdead_0003, Ok(())),
            (0xdead_0004, Ok(())),
            (0xdead_0002, Err(DmaError::Faulted)),
            (0xdead_0001, Err(DmaError::Broken(0xdead_0001))),
            (0xdead_0005, Err(DmaError::Broken(0xdead_0005))),
        ] {
            device.registers.result = result;
            assert_eq!(device.write(Iova(0), 4), outcome, "{result:#x}");
        }
    }

    #[test]
    fn the_pattern_is_cut() {
        let device = TestDevice::start(Model::default()).unwrap();
        assert_eq!(device.pattern(6).unwrap(), [0x78, 0x56, 0x34, 0x12, 0x78, 0x56]);
    }

    #[test]
    fn other_devices_of_this_id_are_left_alone() {
        assert!(TestDevice::start(Model { other_bar: true, ..Model::default() }).is_err());
        assert!(TestDevice::start(Model { read_only: true, ..Model::default() }).is_err());
    }

    #[test]
    fn what_it_cannot() {
        let mut device = TestDevice::start(Model::default()).unwrap();
        assert_eq!(device.read(Iova(0), 4), Err(DmaError::Unsupported));
        assert_eq!(device.write(Iova(0), 0), Err(DmaError::Length { length: 0, limit: 1 << 20 }));
    }
}
