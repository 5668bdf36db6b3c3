//! Whether a VM's VMM lives: the one place that decides it, and how a holder is found again from the operating system alone.
//!
//! A handle in a record is a cache: it may be lost, stale or damaged. Nothing is believed of it unless three things agree:
//! a pidfd on each process, taken first, so that no id can change its owner while this looks; their start times, for ids
//! come back; and the holder's own word on its socket. What no record knows is found by its socket, and where that does not
//! answer, by the VM's user and the command lines in `/proc`.

use super::{
    holder::Holder,
    wire::{HolderHandle, Process, State, Status},
};
use bothy_contract::{Code, Error};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use std::{
    collections::BTreeMap,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
};

/// How a VM's VMM stands.
#[derive(Debug)]
pub enum Liveness {
    /// It runs, and its holder says so.
    Alive(Status),
    /// Another one runs than the one that was asked for.
    Other(Status),
    /// Its process runs, and nobody answers for it. It ends with its holder.
    Mute {
        /// Why nobody does.
        why: Error,
    },
    /// Nothing runs.
    Dead {
        /// How that was seen, for people.
        why: String,
    },
}

/// How the VMM behind `holder` stands: the one of `known`, or whichever answers.
pub async fn look(holder: &Holder, known: Option<&HolderHandle>) -> Liveness {
    let watched = known.map(Watched::open);
    let answer = match holder.status().await {
        // What it says of itself is checked like a record.
        Ok(status) => Watched::open(&status.handle).and_then(|watched| match status.state {
            State::Running => watched.still().map(|()| status),
            State::Exited => Err("its holder says that it has ended".into()),
        }),
        Err(e) => Err(e.message.clone()),
    };
    match (known, watched, answer) {
        (Some(known), Some(Ok(_)), Ok(status)) if status.handle == *known => Liveness::Alive(status),
        (Some(_), _, Ok(status)) => Liveness::Other(status),
        (None, _, Ok(status)) => Liveness::Alive(status),
        (Some(_), Some(Ok(watched)), Err(why)) => match watched.still() {
            Ok(()) => Liveness::Mute { why: Error::new(Code::Unavailable, why) },
            Err(why) => Liveness::Dead { why },
        },
        // A VMM lives at most a moment longer than its holder.
        (Some(_), Some(Err(why)), Err(_)) => Liveness::Dead { why },
        (_, _, Err(why)) => Liveness::Dead { why },
    }
}

/// Both processes of a handle, held on to.
struct Watched {
    holder: OwnedFd,
    vmm: OwnedFd,
    handle: HolderHandle,
}

impl Watched {
    /// Takes hold of both, or says which is not there.
    fn open(handle: &HolderHandle) -> Result<Self, String> {
        let hold = |what: &str, process: Process| {
            let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or_else(|| format!("{} is no process id", process.pid))?;
            let fd = pidfd_open(pid, PidfdFlags::NONBLOCK)
                .map_err(|e| format!("its {what}, process {}, is not there: {e}", process.pid))?;
            // The pidfd is there, so from here on the id is this process' or nobody's.
            if process.is_alive() {
                Ok(fd)
            } else {
                Err(format!("its {what}, process {}, has ended, or the id is another's by now", process.pid))
            }
        };
        Ok(Self { holder: hold("holder", handle.holder)?, vmm: hold("VMM", handle.vmm)?, handle: *handle })
    }

    /// Whether neither has ended since.
    fn still(&self) -> Result<(), String> {
        for (what, fd, process) in
            [("holder", &self.holder, self.handle.holder), ("VMM", &self.vmm, self.handle.vmm)]
        {
            let mut fds = [PollFd::new(fd, PollFlags::IN)];
            let none = Timespec { tv_sec: 0, tv_nsec: 0 };
            match poll(&mut fds, Some(&none)) {
                Ok(0) => {}
                Ok(_) => return Err(format!("its {what}, process {}, has ended just now", process.pid)),
                Err(e) => return Err(format!("its {what}, process {}, cannot be watched: {e}", process.pid)),
            }
        }
        Ok(())
    }
}

/// A holder that was found without any record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// It and its VMM.
    pub handle: HolderHandle,
    /// What it says, where it answers.
    pub status: Option<Status>,
}

/// Finds the holder in that directory, run by that user, from the operating system alone: by its socket, or by the
/// processes that there are.
///
/// # Errors
/// `/proc` cannot be read.
pub async fn rediscover(holder: &Holder) -> Result<Option<Found>, Error> {
    if let Liveness::Alive(status) = look(holder, None).await {
        return Ok(Some(Found { handle: status.handle, status: Some(status) }));
    }
    let (dir, uid) = (holder.dir().to_owned(), holder.uid());
    let handle = tokio::task::spawn_blocking(move || in_proc(&dir, uid))
        .await
        .map_err(|e| Error::internal("cannot look for a holder", &e))?
        .map_err(|e| Error::internal("cannot read which processes there are", &e))?;
    let Some(handle) = handle else { return Ok(None) };
    // Its socket may have been made again in the meantime.
    let status = holder.status().await.ok().filter(|status| status.handle == handle);
    Ok(Some(Found { handle, status }))
}

/// One process of the VM's user.
struct Seen {
    parent: u32,
    argv: Vec<String>,
}

/// The holder is the user's process that is called `bothy-vmm hold`; its VMM is its child and names the directory, or the VM
/// that it is called by, on its command line.
fn in_proc(dir: &Path, uid: u32) -> std::io::Result<Option<HolderHandle>> {
    let mut seen = BTreeMap::new();
    for entry in fs_err::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A process may end while it is looked at.
        if entry.metadata().is_ok_and(|meta| meta.uid() == uid)
            && let Some(process) = see(pid)
        {
            seen.insert(pid, process);
        }
    }
    // A jailed one names no path of the host's; its jailer tells it whose it is.
    let id = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let dir = format!("{}/", dir.display());
    // QEMU takes a doubled comma for a comma.
    let doubled = dir.replace(',', ",,");
    for (pid, vmm) in &seen {
        let names_dir = vmm.argv.iter().any(|arg| arg.contains(&dir) || arg.contains(&doubled))
            || vmm.argv.array_windows().any(|[option, value]| option == "--id" && *value == id);
        if names_dir
            && seen.get(&vmm.parent).is_some_and(is_holder)
            && let (Some(holder), Some(vmm)) = (Process::find(vmm.parent), Process::find(*pid))
        {
            return Ok(Some(HolderHandle { holder, vmm }));
        }
    }
    Ok(None)
}

fn is_holder(process: &Seen) -> bool {
    let program = process.argv.first().map(Path::new).and_then(Path::file_name);
    program.is_some_and(|name| name == "bothy-vmm") && process.argv.get(1).is_some_and(|verb| verb == "hold")
}

fn see(pid: u32) -> Option<Seen> {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let parent = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let argv = fs_err::read(format!("/proc/{pid}/cmdline")).ok()?;
    let argv = argv.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect();
    Some(Seen { parent, argv })
}
