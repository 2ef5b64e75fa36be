//! Page requests: taken in, handed to the process's handler, answered.

use viommu_wire::{Event, PageRequest, PageResponse, PageResponseCode, Request, Status};

use super::endpoint::Sva;
use super::groups::{Ready, Token};
use super::process::{FaultHandler, PageGroup, Processes};
use super::{ProcessId, SvaError};
use crate::hal::{Platform, Transport};
use crate::{Driver, RequestError};

/// What became of answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServeCounters {
    /// Groups that a handler has seen.
    pub handled: u64,
    /// Groups for a PASID that no process has, or not any more: answered INVALID.
    pub strays: u64,
    /// Responses that the device took.
    pub answered: u64,
    /// Responses to groups that the device had answered itself (NOENT): harmless.
    pub gone: u64,
    /// Responses that failed otherwise. Each was sent once: whether the device acted on it is unknown, or it refused.
    pub failed: u64,
}

impl Sva {
    /// Takes an event that [`Driver::handle_events`] delivers. `false`: it is no page request of this endpoint, and
    /// somebody else's.
    pub fn receive(&mut self, event: &Event) -> bool {
        match event {
            Event::PageRequest(request) if request.endpoint == self.endpoint() => {
                self.take_in(*request);
                true
            }
            Event::PageRequest(_) | Event::Fault(_) => false,
        }
    }

    pub(super) fn take_in(&mut self, request: PageRequest) {
        if !self.answers.is_empty() {
            // Another group has the name by now.
            let is_other =
                |answer: &PageResponse| (answer.pasid, answer.group_id) != (request.pasid, request.group_id);
            self.answers.retain(is_other);
        }
        self.groups.add(request);
    }

    /// Whether [`serve`](Self::serve) has something to do.
    pub fn has_work(&self) -> bool {
        self.groups.ready() != 0
    }

    /// Shows every group that is whole to the handler of its process, and sends the answers, all with one notification.
    /// Groups of PASIDs that nobody has are answered INVALID. Gives the number of groups.
    ///
    /// # Errors
    /// [`SvaError::Request`], the first: the other answers were sent all the same, and none is sent again.
    pub fn serve<P: Platform, T: Transport, H: FaultHandler<P, T>>(
        &mut self,
        driver: &mut Driver<P, T>,
        processes: &mut Processes<H>,
    ) -> Result<usize, SvaError> {
        let mut served = 0;
        // No more than there are now: a handler that takes new events in does not keep this here.
        for _ in 0..self.groups.ready() {
            let Some(Ready { token, requests }) = self.groups.next_ready() else { break };
            served += 1;
            let endpoint = self.endpoint();
            let process = self.serves(token.pasid()).and_then(|(pasid, process)| {
                let process = processes.get_mut(process).filter(|process| !process.has_ended())?;
                Some((pasid, process))
            });
            let code = match process {
                Some((pasid, process)) => {
                    self.counters.handled += 1;
                    let (space, handler) = process.parts();
                    let group = PageGroup { endpoint, pasid, requests: &requests, token };
                    handler.handle(driver, space, &group).code()
                }
                None => {
                    self.counters.strays += 1;
                    Some(PageResponseCode::Invalid)
                }
            };
            if let Some(code) = code
                && self.groups.close(token)
            {
                self.answers.push(token.response(code));
            }
        }
        self.groups.take_refused(&mut self.answers);
        self.send_answers(driver)?;
        Ok(served)
    }

    /// Answers a group that its handler left for later. For a process that has ended the answer is INVALID, whatever
    /// `code` says.
    ///
    /// # Errors
    /// [`SvaError::Answered`] where the group is gone, and no harm done; [`SvaError::Request`].
    pub fn answer<P: Platform, T: Transport, H>(
        &mut self,
        driver: &mut Driver<P, T>,
        processes: &Processes<H>,
        token: Token,
        code: PageResponseCode,
    ) -> Result<(), SvaError> {
        if !self.groups.close(token) {
            return Err(SvaError::Answered);
        }
        let lives = |process: ProcessId| processes.get(process).is_some_and(|process| !process.has_ended());
        let code = match self.serves(token.pasid()) {
            Some((_, process)) if lives(process) => code,
            _ => PageResponseCode::Invalid,
        };
        self.answers.push(token.response(code));
        self.send_answers(driver)
    }

    /// Sends what is to be answered. Nothing is sent twice: a group that the device has answered may be another one by
    /// then.
    pub(super) fn send_answers<P: Platform, T: Transport>(
        &mut self,
        driver: &mut Driver<P, T>,
    ) -> Result<(), SvaError> {
        let mut outcome = Ok(());
        let counters = &mut self.counters;
        driver.send_all(self.answers.drain(..).map(Request::PageResponse), |_, answer| match answer {
            Ok(()) => counters.answered += 1,
            Err(RequestError::Status(Status::NoEnt)) => counters.gone += 1,
            Err(error) => {
                counters.failed += 1;
                if outcome.is_ok() {
                    outcome = Err(error.into());
                }
            }
        });
        outcome
    }
}
