//! Becomes a service that ends when `host up` does, however that ends: even SIGKILL leaves nothing behind.
//!
//! The death signal (PR_SET_PDEATHSIG, prctl(2)) must be set between fork and exec. This is a process of its own that
//! does so, since only it can without unsafe code.

use crate::Status;
use bothy_contract::{Code, Error};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use std::{ffi::OsString, os::unix::process::CommandExt, process::Command};

/// Becomes `argv`.
pub(crate) fn main(parent: u32, argv: &[OsString]) -> Result<Status, Error> {
    let (program, args) = argv.split_first().ok_or_else(|| Error::invalid("no program is named"))?;
    set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|e| Error::internal("cannot ask for a signal at the parent's death", &e))?;
    // A parent that went before that will send nothing.
    let now = getppid().map(|pid| pid.as_raw_nonzero().get());
    if now != i32::try_from(parent).ok() {
        return Err(Error::new(Code::FailedPrecondition, format!("the parent, process {parent}, has gone")));
    }
    more_descriptors()?;
    let error = Command::new(program).args(args).exec();
    Err(Error::internal(format!("cannot run {}", program.display()), &error))
}

/// Descriptors that a service may have open: a stream takes two, and services allow a thousand streams and more.
const DESCRIPTORS: u64 = 65_536;

/// Raises the soft limit of open files, mostly 1024 for the sake of select(2), as the units of systemd do.
fn more_descriptors() -> Result<(), Error> {
    let failed = |e: nix::Error| Error::internal("cannot raise the limit of open files", &e);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed)?;
    let wanted = DESCRIPTORS.min(hard);
    if soft < wanted { setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).map_err(failed) } else { Ok(()) }
}
