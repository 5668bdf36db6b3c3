//! `bothy-vmm`: keeps one VM's VMM, as the VM's own user, for exactly as long as the VM lives.
//!
//! ```text
//! vm-agent -- bothy-vmm launch        takes the launch's lock, makes the directory, becomes the VM's user, waits for the first word, exits
//!                  '-- bothy-vmm hold         a session of its own; answers on holder.sock; soon a child of init
//!                           '-- bothy-vmm exec     asks the kernel to kill it with its parent, then becomes the VMM
//! ```
//! `bothy-vmm groups` is none of these: it is the process of `bothy-vms.service`.
//!
//! It does as little as it can, so that it need not be replaced under a running VM: no bus, no database, no guest protocol.

mod exec;
mod files;
mod firecracker;
mod gate;
mod groups;
mod hold;
mod jail;
mod launch;
mod link;
mod lock;
mod log;
mod memory;
mod migrate;
mod qmp;
mod serve;
mod socket;
mod tap;
mod user;

use bothy_contract::Error;
use bothy_vm_agent::vmm::wire::Launched;
use clap::{Parser, Subcommand};
use std::{io::Write, process::ExitCode};

#[derive(Debug, Parser)]
#[command(name = "bothy-vmm", version, about = "Keeps the VMM of one VM; started by bothy-vm-agent")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Starts a holder from the launch specification on standard input, and prints one line of JSON
    Launch {
        /// Who runs this: without it as its parent, nothing is launched
        #[arg(long)]
        parent: i32,
    },
    /// The holder itself
    Hold {
        /// The number of an inherited descriptor, the launch's lock
        #[arg(long)]
        lock: i32,
        /// The number of another, what a saved guest goes on from
        #[arg(long)]
        state: Option<i32>,
    },
    /// Becomes the VMM
    Exec {
        /// The holder's process id
        #[arg(long)]
        parent: i32,
        /// Not before a byte has come on standard input
        #[arg(long)]
        wait: bool,
        /// The VMM's program and arguments
        #[arg(last = true, required = true)]
        argv: Vec<String>,
    },
    /// Keeps the control group of its systemd unit for VMs' groups to be made in
    Groups,
}

fn main() -> ExitCode {
    match Args::parse().command {
        Command::Launch { parent } => {
            let launched = launch::run(parent);
            say(&launched)
        }
        Command::Hold { lock, state } => hold::run(lock, state),
        Command::Exec { parent, wait, argv } => exec::run(parent, wait, &argv),
        Command::Groups => groups::run(),
    }
}

/// Prints the outcome of a launch for whoever asked for it.
fn say(launched: &Launched) -> ExitCode {
    let line = serde_json::to_vec(launched).unwrap_or_default();
    let mut out = std::io::stdout().lock();
    let said = out.write_all(&line).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
    match (launched, said) {
        (Launched::Running(_), Ok(())) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// An error of the operating system, with what was being done.
fn os_error(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Error {
    move |err| Error::internal(what, &err)
}
