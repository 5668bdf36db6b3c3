//! Becomes a service that ends when `host up` does, however that ends: even SIGKILL leaves nothing behind.
//!
//! The death signal (PR_SET_PDEATHSIG, prctl(2)) must be set between fork and exec. This is a process of its own that
//! does so, since only it can without unsafe code.

use crate::Status;
use bothy_contract::{Code, Error};
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
    let error = Command::new(program).args(args).exec();
    Err(Error::internal(format!("cannot run {}", program.display()), &error))
}
