//! Commands, carried out.

use std::fmt::Write as _;

use anyhow::{Context as _, bail, ensure};
use pgtable_formats::{Access, IovaRange};
use viommu_device::host::{Host as _, Stream};
use viommu_wire::{EndpointId, Features, Tail};

use super::command::{Command, HELP};
use crate::capture::Capture;
use crate::driver::{Answer, RawDriver};
use crate::machine::{Machine, Setup};
use crate::notation::hex;

/// A machine, and a driver that does what it is told.
pub(super) struct Session {
    machine: Machine,
    driver: RawDriver,
    capture: Option<Capture>,
    /// What the driver accepts after a reset.
    accepted: Features,
}

impl Session {
    /// Makes the machine, loads the capture's memory, and accepts everything that is offered.
    pub(super) fn new(setup: Setup, capture: Option<Capture>) -> anyhow::Result<Self> {
        let mut machine = Machine::new(setup)?;
        if let Some(capture) = &capture {
            capture.fill(&machine)?;
        }
        let accepted = machine.offered_features();
        let driver = RawDriver::start(&mut machine, accepted)?;
        Ok(Self { machine, driver, capture, accepted })
    }

    /// The answer to one line; `None` for one without a command. Always a single line.
    pub(super) fn answer(&mut self, line: &str) -> Option<String> {
        let answer = match Command::parse(line) {
            Ok(None) => return None,
            Ok(Some(command)) => self.execute(command),
            Err(error) => Err(error.into()),
        };
        Some(
            answer
                .unwrap_or_else(|error| format!("error {}", format!("{error:#}").replace(['\n', '\r'], " "))),
        )
    }

    fn execute(&mut self, command: Command) -> anyhow::Result<String> {
        match command {
            Command::Request { readable, writable } => self.request(&readable, &writable),
            Command::Event(length) => self.event(length),
            Command::Write { at, bytes } => self.machine.write(at, &bytes).map(|()| ok()),
            Command::Peek { at, length } => Ok(hex(&self.machine.read(at, length)?)),
            Command::Dma { endpoint, pasid, range, access } => {
                self.dma(Stream { endpoint, pasid }, range, access)
            }
            Command::Features => Ok(format!("features {:#x}", self.machine.offered_features().bits())),
            Command::Accept(bits) => self.accept(Features::from_bits_retain(bits)),
            Command::Config { offset, length } => {
                let mut bytes = vec![0; length];
                self.machine.device().read_config(offset, &mut bytes);
                Ok(format!("config {}", hex(&bytes)))
            }
            Command::WriteConfig { offset, bytes } => {
                self.machine.device_mut().write_config(offset, &bytes)?;
                Ok(ok())
            }
            Command::Reset => self.accept(self.accepted),
            Command::Bind(endpoint) => self.bind(endpoint),
            Command::Help => Ok(HELP.to_owned()),
        }
    }

    fn request(&mut self, readable: &[Vec<u8>], writable: &[usize]) -> anyhow::Result<String> {
        self.driver.request(&mut self.machine, readable, writable).map(|answer| used(&answer))
    }

    fn event(&mut self, length: usize) -> anyhow::Result<String> {
        let answer = self.driver.event(&mut self.machine, length)?;
        Ok(answer.map_or_else(|| "none".to_owned(), |answer| used(&answer)))
    }

    fn dma(&mut self, stream: Stream, range: IovaRange, access: Access) -> anyhow::Result<String> {
        let host = self.machine.device_mut().host_mut();
        ensure!(host.caps(stream.endpoint).is_some(), "there is no endpoint {}", stream.endpoint);
        let mut answer = ok();
        let done = host.translate_range(stream, range, access, |_, output, _| {
            // Writing to a string does not fail.
            let _ = write!(answer, " {output}");
        });
        Ok(match done {
            Ok(()) => answer,
            Err(cause) => format!("fault {cause}"),
        })
    }

    fn accept(&mut self, features: Features) -> anyhow::Result<String> {
        // This driver knows no other kind of device.
        let features = features | Features::VERSION_1;
        let unknown = features.difference(self.machine.offered_features());
        ensure!(unknown.is_empty(), "bits {:#x} were not offered", unknown.bits());
        self.machine.reset();
        self.driver = RawDriver::start(&mut self.machine, features)?;
        self.accepted = features;
        Ok(ok())
    }

    fn bind(&mut self, endpoint: EndpointId) -> anyhow::Result<String> {
        let Some(capture) = &self.capture else { bail!("bind needs --capture") };
        let request =
            capture.attach_table(endpoint).with_context(|| format!("there is no endpoint {endpoint}"))?;
        self.request(&[request.encode().to_vec()], &[Tail::LEN])
    }
}

fn used(answer: &Answer) -> String {
    if answer.writable.is_empty() {
        return format!("used {}", answer.used);
    }
    format!("used {} {}", answer.used, hex(&answer.writable))
}

fn ok() -> String {
    "ok".to_owned()
}
