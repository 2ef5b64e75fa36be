//! Commands, carried out.

use std::fmt::Write as _;

use anyhow::{Context as _, bail, ensure};
use pgtable_formats::{AccessKind, Iova};
use viommu_device::host::Host as _;
use viommu_device::soft::{AccessError, Answer as TicketAnswer, Ticket};
use viommu_wire::{EndpointId, Features, Request, Tail};

use super::command::{Command, Dma, HELP};
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
    /// Accesses that waited; the number of the first one is 1.
    waits: Vec<Wait>,
}

/// An access that waits, or has.
struct Wait {
    dma: Dma,
    ticket: Ticket,
}

/// Most accesses that are kept.
const MAX_WAITS: usize = 1024;

impl Session {
    /// Makes the machine, loads the capture's memory, and accepts everything that is offered.
    pub(super) fn new(setup: Setup, capture: Option<Capture>) -> anyhow::Result<Self> {
        let mut machine = Machine::new(setup)?;
        if let Some(capture) = &capture {
            capture.fill(&machine)?;
        }
        let accepted = machine.offered_features();
        let driver = RawDriver::start(&mut machine, accepted)?;
        Ok(Self { machine, driver, capture, accepted, waits: Vec::new() })
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
            Command::Dma { dma, wait: false } => self.dma(dma),
            Command::Dma { dma, wait: true } => self.dma_that_waits(dma, None),
            Command::Again(number) => self.again(number),
            Command::Waiting => Ok(self.waiting()),
            Command::Respond(response) => {
                self.request(&[Request::PageResponse(response).encode().to_vec()], &[Tail::LEN])
            }
            Command::Time(now) => {
                self.machine.device_mut().set_time(now);
                let due = self.machine.device().page_requests_due();
                Ok(due.map_or_else(|| "due never".to_owned(), |due| format!("due {due}")))
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

    fn dma(&mut self, Dma { stream, range, access }: Dma) -> anyhow::Result<String> {
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

    /// Access `number`, if it has one already.
    fn dma_that_waits(&mut self, dma: Dma, number: Option<usize>) -> anyhow::Result<String> {
        let Dma { stream, range, access } = dma;
        let host = self.machine.device_mut().host_mut();
        ensure!(host.caps(stream.endpoint).is_some(), "there is no endpoint {}", stream.endpoint);
        let mut at = range.start();
        loop {
            match host.access(stream, at, access, |piece| piece.length) {
                Ok(length) => match at.checked_add(length).filter(|next| *next <= range.last()) {
                    Some(next) => at = next,
                    // Nothing comes in between on this thread.
                    None => return self.dma(dma),
                },
                Err(AccessError::Fault(cause)) => return Ok(format!("fault {cause}")),
                Err(AccessError::Waits(ticket)) => return self.keep(Wait { dma, ticket }, number),
            }
        }
    }

    fn keep(&mut self, wait: Wait, number: Option<usize>) -> anyhow::Result<String> {
        let number = match number {
            Some(number) => number,
            None => {
                ensure!(self.waits.len() < MAX_WAITS, "{MAX_WAITS} accesses have waited; reset forgets them");
                self.waits.len() + 1
            }
        };
        match self.waits.get_mut(number - 1) {
            Some(known) => *known = wait,
            None => self.waits.push(wait),
        }
        Ok(format!("waits {number}"))
    }

    fn again(&mut self, number: usize) -> anyhow::Result<String> {
        let wait = number.checked_sub(1).and_then(|index| self.waits.get(index));
        let Wait { dma, ticket } = wait.with_context(|| format!("no access {number} has waited"))?;
        match self.machine.device().host().answer(*ticket) {
            None => Ok(format!("waits {number}")),
            Some(TicketAnswer::Failed) => Ok("failed".to_owned()),
            Some(TicketAnswer::Retry) => self.dma_that_waits(*dma, Some(number)),
        }
    }

    fn waiting(&self) -> String {
        let host = self.machine.device().host();
        let mut text = String::new();
        for (index, Wait { dma: Dma { stream, range, access }, ticket }) in self.waits.iter().enumerate() {
            if host.answer(*ticket).is_some() {
                continue;
            }
            let pasid = stream.pasid.map_or_else(|| "-".to_owned(), |pasid| pasid.value().to_string());
            let (Iova(start), length) = (range.start(), u128::from(range.length_minus_one()) + 1);
            let direction = if access.kind == AccessKind::Write { "w" } else { "r" };
            let between = if text.is_empty() { "" } else { ", " };
            // Writing to a string does not fail.
            let _ = write!(
                text,
                "{between}{} {} {pasid} {start:#x} {length} {direction} {}",
                index + 1,
                stream.endpoint,
                ticket.group()
            );
        }
        if text.is_empty() { "none".to_owned() } else { text }
    }

    fn accept(&mut self, features: Features) -> anyhow::Result<String> {
        // This driver knows no other kind of device.
        let features = features | Features::VERSION_1;
        let unknown = features.difference(self.machine.offered_features());
        ensure!(unknown.is_empty(), "bits {:#x} were not offered", unknown.bits());
        self.machine.reset();
        self.waits.clear();
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
