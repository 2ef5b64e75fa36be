//! `edu`, QEMU's device for teaching.
//!
//! PCI 1234:11e8, described in QEMU's `docs/specs/edu.rst`. It has a buffer of 4096 bytes that only its own DMA reaches,
//! so what it writes is what it read before. A DMA runs about 100 ms (of the machine's time) after it was started. It is
//! not told of refused accesses: a refused write is lost, a refused read leaves the buffer in a state that nobody
//! promises.
//!
//! Without `-device edu,dma_mask=0xffffffffffff` it cuts every address to 28 bits, and says so to QEMU's terminal alone.

use std::thread;
use std::time::{Duration, Instant};

use pgtable_formats::Iova;

use super::{Abilities, DmaError, Engine, Registers};

const IDENTIFICATION: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const INTERRUPT_RAISE: u64 = 0x60;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
const DMA_SOURCE: u64 = 0x80;
const DMA_DESTINATION: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;

const COMMAND_RUN: u32 = 1 << 0;
const COMMAND_TO_MEMORY: u32 = 1 << 1;

/// Where the buffer lies in the device's own addresses.
const BUFFER: u64 = 0x40000;
const BUFFER_LENGTH: usize = 4096;

/// Low half of the identification register; the high half is the version.
const IDENTITY: u32 = 0x00ed;

/// Number that this driver raises interrupts with; any bit would do.
const INTERRUPT: u32 = 1;

/// QEMU's device for teaching.
pub struct Edu<R> {
    registers: R,
    limit: Duration,
}

impl<R: Registers> Edu<R> {
    /// Takes the device over; a DMA that is under way is waited for.
    ///
    /// # Errors
    /// [`DmaError::Broken`] where it is another device; [`DmaError::Timeout`].
    pub fn start(registers: R) -> Result<Self, DmaError> {
        let mut edu = Self { registers, limit: Duration::from_secs(10) };
        edu.restart()?;
        Ok(edu)
    }

    /// Waits at most `limit` for a DMA. 10 seconds where this is not called: emulated machines may be slow.
    pub fn with_limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    fn transfer(
        &mut self,
        source: u64,
        destination: u64,
        length: usize,
        command: u32,
    ) -> Result<(), DmaError> {
        DmaError::check_length(length, BUFFER_LENGTH)?;
        // Registers do not take writes while a DMA runs: one that timed out earlier, say.
        self.wait()?;
        self.set_address(DMA_SOURCE, source)?;
        self.set_address(DMA_DESTINATION, destination)?;
        self.registers.write32(DMA_COUNT, u32::try_from(length).unwrap_or(0));
        self.registers.write32(DMA_COMMAND, command | COMMAND_RUN);
        self.wait()
    }

    fn set_address(&mut self, register: u64, address: u64) -> Result<(), DmaError> {
        if let Ok(address) = u32::try_from(address) {
            self.registers.write32(register, address);
            return Ok(());
        }
        self.registers.write64(register, address);
        // An access that was split in two leaves the low half alone.
        if self.registers.read64(register) == address {
            Ok(())
        } else {
            Err(DmaError::Address(Iova(address)))
        }
    }

    fn wait(&self) -> Result<(), DmaError> {
        let start = Instant::now();
        loop {
            let command = self.registers.read32(DMA_COMMAND);
            if command == u32::MAX {
                return Err(DmaError::Broken(command.into()));
            }
            if command & COMMAND_RUN == 0 {
                return Ok(());
            }
            if start.elapsed() >= self.limit {
                return Err(DmaError::Timeout(self.limit));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl<R: Registers> Engine for Edu<R> {
    fn name(&self) -> &'static str {
        "QEMU edu"
    }

    fn abilities(&self) -> Abilities {
        Abilities::READ | Abilities::WRITE | Abilities::INTERRUPT
    }

    fn limit(&self) -> usize {
        BUFFER_LENGTH
    }

    fn write(&mut self, to: Iova, length: usize) -> Result<(), DmaError> {
        self.transfer(BUFFER, to.0, length, COMMAND_TO_MEMORY)
    }

    fn read(&mut self, from: Iova, length: usize) -> Result<(), DmaError> {
        self.transfer(from.0, BUFFER, length, 0)
    }

    fn raise_interrupt(&mut self) -> Result<(), DmaError> {
        self.registers.write32(INTERRUPT_RAISE, INTERRUPT);
        Ok(())
    }

    fn acknowledge_interrupt(&mut self) -> Result<(), DmaError> {
        self.registers.write32(INTERRUPT_ACKNOWLEDGE, u32::MAX);
        Ok(())
    }

    fn restart(&mut self) -> Result<(), DmaError> {
        self.registers.enable();
        let identity = self.registers.read32(IDENTIFICATION);
        if identity & 0xffff != IDENTITY {
            return Err(DmaError::Broken(identity.into()));
        }
        // It answers the complement of what is written.
        let question = 0x5a5a_1234;
        self.registers.write32(LIVENESS, question);
        let answer = self.registers.read32(LIVENESS);
        if answer != !question {
            return Err(DmaError::Broken(answer.into()));
        }
        self.wait()?;
        self.acknowledge_interrupt()
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use std::cell::Cell;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// The device's registers as its documentation has them, and memory from address 0 on.
    struct Model {
        memory: Arc<Mutex<Vec<u8>>>,
        buffer: [u8; BUFFER_LENGTH],
        dma: [u64; 4],
        liveness: u32,
        // Reads of the command register until the DMA is done.
        latency: Cell<u32>,
        split_writes: bool,
        interrupts: u32,
        enabled: bool,
    }

    impl Model {
        fn new(memory: &Arc<Mutex<Vec<u8>>>) -> Self {
            Self {
                memory: memory.clone(),
                buffer: [0; BUFFER_LENGTH],
                dma: [0; 4],
                liveness: 0,
                latency: Cell::new(0),
                split_writes: false,
                interrupts: 0,
                enabled: false,
            }
        }

        fn run(&mut self) {
            let [source, destination, count, command] = self.dma.map(|value| value as usize);
            let memory = &mut *self.memory.lock().unwrap();
            let buffer = BUFFER as usize;
            if command & 2 != 0 {
                let from = source - buffer;
                memory[destination..destination + count].copy_from_slice(&self.buffer[from..from + count]);
            } else {
                let to = destination - buffer;
                self.buffer[to..to + count].copy_from_slice(&memory[source..source + count]);
            }
            self.latency.set(3);
        }
    }

    impl Registers for Model {
        fn read32(&self, offset: u64) -> u32 {
            match offset {
                _ if !self.enabled => u32::MAX,
                0x00 => 0x0100_00ed,
                0x04 => self.liveness,
                0x98 => {
                    let left = self.latency.get();
                    self.latency.set(left.saturating_sub(1));
                    u32::from(left > 0)
                }
                _ => panic!("read of {offset:#x}"),
            }
        }
        fn read64(&self, offset: u64) -> u64 {
            self.dma[((offset - 0x80) / 8) as usize]
        }
        fn write32(&mut self, offset: u64, value: u32) {
            match offset {
                0x04 => self.liveness = !value,
                0x60 => self.interrupts |= value,
                0x64 => self.interrupts &= !value,
                0x80..=0x98 => {
                    assert_eq!(self.latency.get(), 0, "written while it runs");
                    self.dma[((offset - 0x80) / 8) as usize] = value.into();
                    if offset == 0x98 {
                        assert_eq!(value & 1, 1);
                        self.run();
                    }
                }
                _ => panic!("write of {offset:#x}"),
            }
        }
        fn write64(&mut self, offset: u64, value: u64) {
            if self.split_writes {
                self.write32(offset, value as u32);
            } else {
                self.dma[((offset - 0x80) / 8) as usize] = value;
            }
        }
        fn enable(&mut self) {
            self.enabled = true;
        }
        fn is_only_bar(&self) -> bool {
            true
        }
    }

    fn memory() -> Arc<Mutex<Vec<u8>>> {
        Arc::new(Mutex::new((0..0x4000u32).map(|index| (index >> 4) as u8).collect()))
    }

    #[test]
    fn copies_through_its_buffer() {
        let memory = memory();
        let mut edu = Edu::start(Model::new(&memory)).unwrap();
        edu.copy(Iova(0x1230), Iova(0x3000), 0x40).unwrap();
        let memory = memory.lock().unwrap();
        assert_eq!(memory[0x3000..0x3040], memory[0x1230..0x1270]);
        assert_ne!(memory[0x3040..0x3050], memory[0x1270..0x1280]);
    }

    #[test]
    fn lengths_beyond_the_buffer_are_refused() {
        let mut edu = Edu::start(Model::new(&memory())).unwrap();
        for length in [0, 4097, usize::MAX] {
            assert_eq!(edu.read(Iova(0), length), Err(DmaError::Length { length, limit: 4096 }));
            assert_eq!(edu.write(Iova(0), length), Err(DmaError::Length { length, limit: 4096 }));
        }
        edu.read(Iova(0), 4096).unwrap();
    }

    #[test]
    fn waiting_ends() {
        let mut edu = Edu::start(Model::new(&memory())).unwrap().with_limit(Duration::from_millis(5));
        edu.registers.latency.set(u32::MAX - 1);
        assert_eq!(edu.read(Iova(0), 4), Err(DmaError::Timeout(Duration::from_millis(5))));
    }

    #[test]
    fn high_addresses_need_an_undivided_write() {
        let mut edu = Edu::start(Model::new(&memory())).unwrap();
        edu.set_address(DMA_SOURCE, 0x12_3456_7000).unwrap();
        assert_eq!(edu.registers.dma[0], 0x12_3456_7000);
        edu.registers.split_writes = true;
        let high = Iova(0x12_3456_8000);
        assert_eq!(edu.read(high, 4), Err(DmaError::Address(high)));
    }

    #[test]
    fn interrupts() {
        let mut edu = Edu::start(Model::new(&memory())).unwrap();
        edu.raise_interrupt().unwrap();
        assert_ne!(edu.registers.interrupts, 0);
        edu.acknowledge_interrupt().unwrap();
        assert_eq!(edu.registers.interrupts, 0);
    }

    #[test]
    fn a_device_that_is_gone_is_told() {
        let mut edu = Edu::start(Model::new(&memory())).unwrap();
        edu.registers.enabled = false;
        assert_eq!(edu.read(Iova(0), 4), Err(DmaError::Broken(0xffff_ffff)));
    }
}
