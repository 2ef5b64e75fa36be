//! `console`: the device at a prompt.

mod command;
mod options;
mod session;

use std::io::{self, BufRead, IsTerminal as _, Read as _, Write};
use std::process::ExitCode;

use session::Session;

pub(crate) use options::Options;

/// Longest line that is taken, in bytes. A longer one is an error, and the console goes on behind it.
const MAX_LINE: u64 = 4 << 20;

/// Answers commands until the input ends.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let (setup, capture) = options.setup()?;
    let mut session = Session::new(setup, capture)?;
    let prompt = io::stdin().is_terminal();
    match serve(&mut session, io::stdin().lock(), io::stdout().lock(), prompt) {
        // Whoever read the answers has gone.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        done => Ok(done.map(|()| ExitCode::SUCCESS)?),
    }
}

fn serve(
    session: &mut Session,
    mut input: impl BufRead,
    mut output: impl Write,
    prompt: bool,
) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        if prompt {
            // Standard output is for answers.
            eprint!("> ");
        }
        line.clear();
        let length = input.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
        if length == 0 {
            return Ok(());
        }
        let answer = if length as u64 == MAX_LINE && line.last() != Some(&b'\n') {
            skip_line(&mut input)?;
            Some(format!("error line of more than {MAX_LINE} bytes"))
        } else {
            match std::str::from_utf8(&line) {
                Ok(line) => session.answer(line),
                Err(_) => Some("error line is not UTF-8".to_owned()),
            }
        };
        if let Some(answer) = answer {
            writeln!(output, "{answer}")?;
            output.flush()?;
        }
    }
}

fn skip_line(input: &mut impl BufRead) -> io::Result<()> {
    loop {
        let buffer = input.fill_buf()?;
        let (length, ended) = match buffer.iter().position(|&byte| byte == b'\n') {
            Some(at) => (at + 1, true),
            None => (buffer.len(), buffer.is_empty()),
        };
        input.consume(length);
        if ended {
            return Ok(());
        }
    }
}
