//! virtio-iommu at the command line.
//!
//! Device, guest memory and virtqueues run in one process on the software host; nothing of the machine that runs the
//! program is touched. `demo` tells what it is for, `console` is the device at a prompt, `replay` checks the tables of a
//! captured kernel through it. `host` reports what the machine's own hardware can be handed, and `hil` hands it over and
//! checks what devices then reach: these two are about the real machine. `patterns` draws how devices used their
//! mappings.
#![forbid(unsafe_code)]

mod capture;
mod console;
mod demo;
mod driver;
mod hil;
mod host;
mod machine;
mod notation;
mod patterns;
mod replay;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing::level_filters::LevelFilter;

/// The virtio-iommu device on its software host.
#[derive(Parser)]
#[command(name = "viommu", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What to log to standard error: off, error, warn, info, debug, trace. Default: RUST_LOG, else warn.
    #[arg(long, global = true, value_name = "LEVEL")]
    log: Option<LevelFilter>,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Options),
    Console(console::Options),
    Replay(replay::Options),
    Hil(hil::Options),
    Host(host::Options),
    Patterns(patterns::Options),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr(cli.log);
    let done = match &cli.command {
        Command::Demo(options) => demo::run(options),
        Command::Console(options) => console::run(options),
        Command::Replay(options) => replay::run(options),
        Command::Hil(options) => hil::run(options),
        Command::Host(options) => host::run(options),
        Command::Patterns(options) => patterns::run(options),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Standard output is for answers alone.
fn log_to_stderr(level: Option<LevelFilter>) {
    let level = level.or_else(|| std::env::var("RUST_LOG").ok()?.parse().ok()).unwrap_or(LevelFilter::WARN);
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
}
