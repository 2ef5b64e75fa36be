//! One line at the console, parsed.

use pgtable_formats::{Access, Gpa, Iova, IovaRange, Pasid};
use viommu_device::host::Stream;
use viommu_wire::{EndpointId, PageResponse, PageResponseCode};

use crate::driver::{MAX_PART_BYTES, MAX_PARTS};
use crate::notation::{self, NotationError, abbreviated};

/// Most bytes of an event buffer.
const MAX_EVENT: u64 = 4096;
/// Most bytes that `peek` shows.
const MAX_PEEK: u64 = 64 << 10;
/// Most bytes that one `dma` covers.
const MAX_DMA: u64 = 16 << 20;
/// Most bytes that `config` shows.
const MAX_CONFIG: u64 = 4096;

/// The answer to `help`: every command.
pub(crate) const HELP: &str = "req HEX[,HEX...]|- W[,W...]|-; event N; mem GPA HEX; peek GPA N; \
    dma ENDPOINT PASID|- IOVA N r|w [wait]; again K; waiting; \
    respond ENDPOINT PASID|- GROUP success|invalid|failure; time NS; features; accept HEX; config OFFSET N; config-write OFFSET HEX; reset; \
    bind ENDPOINT; help";

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Send a request whose parts are these.
    Request { readable: Vec<Vec<u8>>, writable: Vec<usize> },
    /// Offer an event buffer of so many bytes.
    Event(usize),
    /// Write guest memory.
    Write { at: Gpa, bytes: Vec<u8> },
    /// Read guest memory.
    Peek { at: Gpa, length: usize },
    /// Translate an access of an endpoint, of a device that waits for pages or of one that does not.
    Dma { dma: Dma, wait: bool },
    /// Translate an access that waited once more.
    Again(usize),
    /// Say which accesses wait.
    Waiting,
    /// Answer a group of page requests.
    Respond(PageResponse),
    /// Say what time it is.
    Time(u64),
    /// Say which features are offered.
    Features,
    /// Reset, and accept these features.
    Accept(u64),
    /// Read the configuration space.
    Config { offset: usize, length: usize },
    /// Write the configuration space.
    WriteConfig { offset: usize, bytes: Vec<u8> },
    /// Reset the device.
    Reset,
    /// Bind the captured table of an endpoint.
    Bind(EndpointId),
    /// Say what there is to say.
    Help,
}

/// An access of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dma {
    pub(crate) stream: Stream,
    pub(crate) range: IovaRange,
    pub(crate) access: Access,
}

/// Why a line is no command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CommandError {
    #[error("unknown command `{0}`; help names them all")]
    Unknown(String),
    #[error("usage: {0}")]
    Usage(&'static str),
    #[error("{what}: {error}")]
    Notation { what: &'static str, error: NotationError },
    #[error("{what}: 1 to {limit} bytes, not 0")]
    Zero { what: &'static str, limit: u64 },
    #[error("a request has at most {MAX_PARTS} parts, and {MAX_PART_BYTES} bytes either way")]
    RequestTooLarge,
    #[error("a request has at least one part")]
    NoParts,
    #[error("PASID {0} has more than 20 bits")]
    WidePasid(u32),
    #[error("the access wraps at 2^64")]
    Wraps,
    #[error("`{0}` is neither r nor w")]
    Direction(String),
    #[error("`{0}` is none of success, invalid, failure")]
    Code(String),
}

impl Command {
    /// Parses a line; `None` for one without a command, empty or a comment.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub(crate) fn parse(line: &str) -> Result<Option<Self>, CommandError> {
        let mut words = line.split_whitespace();
        let name = match words.next() {
            Some(name) if !name.starts_with('#') => name,
            _ => return Ok(None),
        };
        let words: Vec<&str> = words.collect();
        let command = match (name, words.as_slice()) {
            ("req", &[readable, writable]) => request(readable, writable)?,
            ("req", _) => return Err(CommandError::Usage("req HEX[,HEX...]|- W[,W...]|-")),
            ("event", &[length]) => Self::Event(index("N", length, MAX_EVENT)?),
            ("event", _) => return Err(CommandError::Usage("event N")),
            ("mem", &[at, bytes]) => Self::Write { at: Gpa(number("GPA", at)?), bytes: byte_string(bytes)? },
            ("mem", _) => return Err(CommandError::Usage("mem GPA HEX")),
            ("peek", &[at, length]) => {
                Self::Peek { at: Gpa(number("GPA", at)?), length: length_of(length, MAX_PEEK)? }
            }
            ("peek", _) => return Err(CommandError::Usage("peek GPA N")),
            ("dma", &[endpoint, pasid, iova, length, direction]) => {
                Self::Dma { dma: dma(endpoint, pasid, iova, length, direction)?, wait: false }
            }
            ("dma", &[endpoint, pasid, iova, length, direction, "wait"]) => {
                Self::Dma { dma: dma(endpoint, pasid, iova, length, direction)?, wait: true }
            }
            ("dma", _) => return Err(CommandError::Usage("dma ENDPOINT PASID|- IOVA N r|w [wait]")),
            ("again", &[number]) => Self::Again(index("K", number, u32::MAX.into())?),
            ("again", _) => return Err(CommandError::Usage("again K")),
            ("waiting", &[]) => Self::Waiting,
            ("waiting", _) => return Err(CommandError::Usage("waiting")),
            ("respond", &[endpoint, pasid, group, code]) => respond(endpoint, pasid, group, code)?,
            ("respond", _) => {
                return Err(CommandError::Usage("respond ENDPOINT PASID|- GROUP success|invalid|failure"));
            }
            ("time", &[now]) => Self::Time(number("NS", now)?),
            ("time", _) => return Err(CommandError::Usage("time NS")),
            ("features", &[]) => Self::Features,
            ("features", _) => return Err(CommandError::Usage("features")),
            ("accept", &[bits]) => Self::Accept(named("HEX", notation::hex_number(bits))?),
            ("accept", _) => return Err(CommandError::Usage("accept HEX")),
            ("config", &[offset, length]) => {
                let offset = index("OFFSET", offset, u32::MAX.into())?;
                Self::Config { offset, length: length_of(length, MAX_CONFIG)? }
            }
            ("config", _) => return Err(CommandError::Usage("config OFFSET N")),
            ("config-write", &[offset, bytes]) => {
                let offset = index("OFFSET", offset, u32::MAX.into())?;
                Self::WriteConfig { offset, bytes: byte_string(bytes)? }
            }
            ("config-write", _) => return Err(CommandError::Usage("config-write OFFSET HEX")),
            ("reset", &[]) => Self::Reset,
            ("reset", _) => return Err(CommandError::Usage("reset")),
            ("bind", &[endpoint]) => Self::Bind(endpoint_id(endpoint)?),
            ("bind", _) => return Err(CommandError::Usage("bind ENDPOINT")),
            ("help", _) => Self::Help,
            _ => return Err(CommandError::Unknown(abbreviated(name))),
        };
        Ok(Some(command))
    }
}

/// A side that is `-` has no descriptor, nor has a writable side that is 0; among several parts, an empty one, `-` or
/// 0 is a descriptor of length 0.
fn request(readable: &str, writable: &str) -> Result<Command, CommandError> {
    let readable = parts(readable, |part| named("HEX", notation::bytes(part)))?;
    let writable = parts(writable, |part| match part {
        "" => Ok(0),
        part => index("W", part, MAX_PART_BYTES as u64),
    })?;
    let writable = if writable == [0] { Vec::new() } else { writable };
    if readable.is_empty() && writable.is_empty() {
        return Err(CommandError::NoParts);
    }
    if readable.len() + writable.len() > MAX_PARTS
        || readable.iter().map(Vec::len).sum::<usize>() > MAX_PART_BYTES
        || writable.iter().sum::<usize>() > MAX_PART_BYTES
    {
        return Err(CommandError::RequestTooLarge);
    }
    Ok(Command::Request { readable, writable })
}

fn parts<T>(text: &str, parse: impl Fn(&str) -> Result<T, CommandError>) -> Result<Vec<T>, CommandError> {
    if text == "-" {
        return Ok(Vec::new());
    }
    text.split(',').map(|part| parse(if part == "-" { "" } else { part })).collect()
}

fn dma(endpoint: &str, pasid: &str, iova: &str, length: &str, direction: &str) -> Result<Dma, CommandError> {
    let stream = Stream { endpoint: endpoint_id(endpoint)?, pasid: pasid_or_none(pasid)? };
    let start = Iova(number("IOVA", iova)?);
    let length = length_of(length, MAX_DMA)?;
    let range = IovaRange::from_length(start, length as u64).ok_or(CommandError::Wraps)?;
    let access = match direction {
        "r" => Access::READ,
        "w" => Access::WRITE,
        text => return Err(CommandError::Direction(abbreviated(text))),
    };
    Ok(Dma { stream, range, access })
}

fn respond(endpoint: &str, pasid: &str, group: &str, code: &str) -> Result<Command, CommandError> {
    let endpoint = endpoint_id(endpoint)?;
    let pasid = pasid_or_none(pasid)?;
    let group_id = named("GROUP", notation::number_up_to(group, u16::MAX.into()))?;
    let group_id = u16::try_from(group_id).map_err(|_| too_large("GROUP", group, u16::MAX.into()))?;
    let code = match code {
        "success" => PageResponseCode::Success,
        "invalid" => PageResponseCode::Invalid,
        "failure" => PageResponseCode::Failure,
        text => return Err(CommandError::Code(abbreviated(text))),
    };
    Ok(Command::Respond(PageResponse { endpoint, pasid, group_id, code }))
}

fn pasid_or_none(text: &str) -> Result<Option<Pasid>, CommandError> {
    if text == "-" {
        return Ok(None);
    }
    let value = named("PASID", notation::number32(text))?;
    Pasid::new(value).map(Some).ok_or(CommandError::WidePasid(value))
}

fn named<T>(what: &'static str, parsed: Result<T, NotationError>) -> Result<T, CommandError> {
    parsed.map_err(|error| CommandError::Notation { what, error })
}

fn number(what: &'static str, text: &str) -> Result<u64, CommandError> {
    named(what, notation::number(text))
}

fn index(what: &'static str, text: &str, limit: u64) -> Result<usize, CommandError> {
    let value = named(what, notation::number_up_to(text, limit))?;
    usize::try_from(value).map_err(|_| too_large(what, text, limit))
}

fn length_of(text: &str, limit: u64) -> Result<usize, CommandError> {
    match index("N", text, limit)? {
        0 => Err(CommandError::Zero { what: "N", limit }),
        length => Ok(length),
    }
}

fn endpoint_id(text: &str) -> Result<EndpointId, CommandError> {
    named("ENDPOINT", notation::number32(text)).map(EndpointId)
}

fn byte_string(text: &str) -> Result<Vec<u8>, CommandError> {
    named("HEX", notation::bytes(text))
}

fn too_large(what: &'static str, text: &str, limit: u64) -> CommandError {
    CommandError::Notation { what, error: NotationError::Large { text: abbreviated(text), limit } }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(line: &str) -> Command {
        Command::parse(line).unwrap().unwrap()
    }

    #[test]
    fn lines_without_a_command_are_nothing() {
        for line in ["", "   ", "\t", "# req 00 4", "#", "  #x"] {
            assert_eq!(Command::parse(line), Ok(None), "{line:?}");
        }
    }

    #[test]
    fn parts_become_descriptors() {
        let parts = |line| match command(line) {
            Command::Request { readable, writable } => (readable, writable),
            other => panic!("{other:?}"),
        };
        assert_eq!(parts("req 0102 4"), (vec![vec![1, 2]], vec![4]));
        assert_eq!(parts("req 01,02,0304 2,0x2"), (vec![vec![1], vec![2], vec![3, 4]], vec![2, 2]));
        assert_eq!(parts("req - 4"), (vec![], vec![4]));
        assert_eq!(parts("req 01 0"), (vec![vec![1]], vec![]));
        assert_eq!(parts("req 01 -"), (vec![vec![1]], vec![]));
        assert_eq!(parts("req 01,,-,02 4,0,-"), (vec![vec![1], vec![], vec![], vec![2]], vec![4, 0, 0]));
    }

    #[test]
    fn what_is_no_command_is_named() {
        use CommandError::*;
        let many = "00,".repeat(1024);
        let long = "00".repeat(MAX_PART_BYTES + 1);
        assert_eq!(Command::parse("req - -"), Err(NoParts));
        assert_eq!(Command::parse("req - 0"), Err(NoParts));
        assert_eq!(Command::parse(&format!("req {many}00 4")), Err(RequestTooLarge));
        assert_eq!(Command::parse(&format!("req {long} 4")), Err(RequestTooLarge));
        assert_eq!(Command::parse("req 00 1048576,1"), Err(RequestTooLarge));
        assert!(Command::parse("req 00 0,0,1048576").is_ok());
        assert!(matches!(Command::parse("req 00 1048577"), Err(Notation { what: "W", .. })));
        assert!(matches!(Command::parse("req 00 -1"), Err(Notation { .. })));
        assert!(matches!(Command::parse("req 0 4"), Err(Notation { error: NotationError::Odd, .. })));
        assert!(matches!(Command::parse("req zz 4"), Err(Notation { error: NotationError::Digit('z'), .. })));
        assert!(matches!(Command::parse("req 00"), Err(Usage(_))));
        assert!(matches!(Command::parse("req 00 4 4"), Err(Usage(_))));
        assert!(matches!(Command::parse("event 4097"), Err(Notation { .. })));
        assert_eq!(command("event 0"), Command::Event(0));
        assert!(matches!(Command::parse("peek 0 0"), Err(Zero { .. })));
        assert!(matches!(Command::parse("peek 0 65537"), Err(Notation { .. })));
        assert!(matches!(Command::parse("config 0 0"), Err(Zero { .. })));
        assert!(matches!(Command::parse("dma 8 - 0 0 r"), Err(Zero { .. })));
        assert_eq!(Command::parse("dma 8 - 0xffffffffffffffff 2 r"), Err(Wraps));
        assert!(Command::parse("dma 8 - 0xffffffffffffffff 1 r").is_ok());
        assert_eq!(Command::parse("dma 8 0x100000 0 1 r"), Err(WidePasid(0x10_0000)));
        assert!(Command::parse("dma 8 0xfffff 0 1 r").is_ok());
        assert_eq!(Command::parse("dma 8 - 0 1 x"), Err(Direction("x".into())));
        assert!(matches!(Command::parse("dma 0x100000000 - 0 1 r"), Err(Notation { what: "ENDPOINT", .. })));
        assert!(matches!(Command::parse("dma 8 - 0 0x1000001 r"), Err(Notation { .. })));
        assert!(matches!(command("dma 8 - 0 1 r wait"), Command::Dma { wait: true, .. }));
        assert!(matches!(Command::parse("dma 8 - 0 1 r waits"), Err(Usage(_))));
        assert!(matches!(Command::parse("again"), Err(Usage(_))));
        assert!(matches!(Command::parse("again -"), Err(Notation { what: "K", .. })));
        assert!(matches!(Command::parse("waiting 1"), Err(Usage(_))));
        assert!(matches!(command("respond 8 - 0xffff failure"), Command::Respond(_)));
        assert!(matches!(Command::parse("respond 8 - 65536 success"), Err(Notation { what: "GROUP", .. })));
        assert_eq!(Command::parse("respond 8 0x100000 0 success"), Err(WidePasid(0x10_0000)));
        assert_eq!(Command::parse("respond 8 5 0 SUCCESS"), Err(Code("SUCCESS".into())));
        assert!(matches!(Command::parse("respond 8 5 0"), Err(Usage(_))));
        assert_eq!(command("time 0xffffffffffffffff"), Command::Time(u64::MAX));
        assert!(matches!(Command::parse("time"), Err(Usage(_))));
        assert!(matches!(Command::parse("features x"), Err(Usage(_))));
        assert!(matches!(Command::parse("accept"), Err(Usage(_))));
        assert!(matches!(Command::parse("accept g"), Err(Notation { .. })));
        assert_eq!(command("accept 0x100000000"), command("accept 100000000"));
        assert!(matches!(Command::parse("frobnicate 1"), Err(Unknown(_))));
        assert!(matches!(Command::parse("REQ 00 4"), Err(Unknown(_))));
    }
}
