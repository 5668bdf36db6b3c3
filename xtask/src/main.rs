//! `cargo xtask`: what a developer of bothy runs. Each subcommand is a module.

mod guest;
mod say;
mod setup;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Set-up, demo, test and bench of the project.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Installs what is missing on a Debian-like machine; quick when nothing is.
    Setup,
    /// Builds the static `bothy-guest` that goes into every initramfs.
    Guest,
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Setup => setup::run(),
        Command::Guest => guest::run().map(|_| ()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say::error(&e);
            ExitCode::FAILURE
        }
    }
}
