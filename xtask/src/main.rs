//! `cargo xtask`: what a developer of bothy runs. Each subcommand is a module.

mod dist;
mod fuzz;
mod guest;
mod run;
mod say;
mod setup;
mod test;

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
    /// Runs every check and test, the ones that boot VMs too.
    Test {
        /// Only tests whose name contains this.
        filter: Option<String>,
    },
    /// Does the main job on this repository, from nothing to nothing, and shows where the time went.
    Demo,
    /// Measures what bothy costs: `create [pairs]`, `crowd [vms]`, `many [vms]`, `end [pairs]`, `images [creates]`, `idle` and more.
    Bench {
        /// What to measure, and how often.
        #[arg(required = true)]
        what: Vec<String>,
    },
    /// Tries inputs that are led by the code they reach: `tar` (archives and layers) or `oci` (layouts and their documents).
    Fuzz {
        /// What is tried.
        #[arg(value_enum)]
        target: fuzz::Target,
        /// For how long, in seconds.
        #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
        seconds: u32,
        /// Only this input, of an earlier run for instance.
        #[arg(long, value_name = "FILE")]
        input: Option<std::path::PathBuf>,
    },
    /// Puts release binaries, the guest's and the recipes into `target/dist`.
    Dist,
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Setup => setup::run(),
        Command::Guest => guest::run().map(|_| ()),
        Command::Test { filter } => test::run(filter.as_deref()),
        Command::Demo => run::released("demo", &[]),
        Command::Bench { what } => run::released("bench", &what),
        Command::Fuzz { target, seconds, input } => fuzz::run(target, seconds, input.as_deref()),
        Command::Dist => dist::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say::error(&e);
            ExitCode::FAILURE
        }
    }
}
