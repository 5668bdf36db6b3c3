//! Which `host up` a state directory belongs to: a lock that the kernel drops with its holder, and a record of who that is.

use bothy_contract::{Code, Error};
use fs_err::{self as fs, os::unix::fs::OpenOptionsExt};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::OwnedFd,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};
use std::{
    io::{Read, Seek, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};

const FILE: &str = "host.lock";

/// The process that has the directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    /// Its id.
    pub(super) pid: u32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22): a reused id has another.
    pub(super) start: u64,
}

/// The lock, held until this is dropped.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "holding it is its use")] fs::File);

fn open(state: &Path) -> Result<fs::File, Error> {
    let failed = |e: std::io::Error| Error::internal("cannot open the lock of the state directory", &e);
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(state.join(FILE))
        .map_err(failed)?;
    // Whoever may read a file may lock it (flock(2)), and so keep everybody else from it.
    file.set_permissions(std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(file)
}

/// Takes the directory for this process.
///
/// # Errors
/// Says who has it.
pub(super) fn take(state: &Path) -> Result<Lock, Error> {
    let mut file = open(state)?;
    if file.file().try_lock().is_err() {
        let who =
            read(&mut file).map_or_else(|_| "another process".to_owned(), |o| format!("process {}", o.pid));
        return Err(Error::new(
            Code::FailedPrecondition,
            format!("{} belongs to a running `bothy host up` ({who})", state.display()),
        )
        .hint(format!(
            "stop it with `bothy host down --state {0}`, or give another `--state`",
            state.display()
        )));
    }
    let pid = std::process::id();
    let owner = Owner { pid, start: start_of(pid)? };
    let text = serde_json::to_vec(&owner).map_err(|e| Error::internal("cannot write the lock", &e))?;
    let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&text));
    written.map_err(|e| Error::internal("cannot write the lock", &e))?;
    Ok(Lock(file))
}

/// Who has the directory, if anybody has.
pub(super) fn find(state: &Path) -> Result<Option<Owner>, Error> {
    if !state.join(FILE).exists() {
        return Ok(None);
    }
    let mut file = fs::File::open(state.join(FILE)).map_err(|e| match e.kind() {
        std::io::ErrorKind::PermissionDenied => {
            Error::new(Code::PermissionDenied, format!("cannot tell whose {} is: {e}", state.display()))
                .hint("do it as root")
        }
        _ => Error::internal("cannot open the lock of the state directory", &e),
    })?;
    // A shared lock is refused exactly while a `host up` lives. It is dropped at once.
    if file.file().try_lock_shared().is_ok() {
        return Ok(None);
    }
    read(&mut file).map(Some)
}

fn read(file: &mut fs::File) -> Result<Owner, Error> {
    let mut text = String::new();
    file.rewind()
        .and_then(|()| file.take(4096).read_to_string(&mut text))
        .map_err(|e| Error::internal("cannot read the lock of the state directory", &e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::internal("the lock of the state directory makes no sense", &e))
}

/// When process `pid` started.
fn start_of(pid: u32) -> Result<u64, Error> {
    let gone = |why: String| Error::not_found(format!("there is no process {pid}: {why}"));
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|e| gone(e.to_string()))?;
    // The name, field 2, may hold blanks and brackets: fields are counted from behind its end.
    let (_, rest) = stat.rsplit_once(')').ok_or_else(|| gone("its stat has no name".to_owned()))?;
    rest.split_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| gone("its stat has no start time".to_owned()))
}

impl Owner {
    /// A handle of this very process, not of one that came after it.
    pub(super) fn handle(&self) -> Result<OwnedFd, Error> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| Error::not_found(format!("there is no process {}", self.pid)))?;
        let handle = pidfd_open(pid, PidfdFlags::empty())
            .map_err(|e| Error::not_found(format!("cannot get hold of process {}: {e}", self.pid)))?;
        // Checked after the handle is there: from now on the id cannot come to mean somebody else.
        if start_of(self.pid)? == self.start {
            return Ok(handle);
        }
        Err(Error::not_found(format!(
            "process {} is not the `bothy host up` that took the directory",
            self.pid
        )))
    }
}

/// Asks the process to stop, and waits until it has.
pub(super) fn stop(handle: &OwnedFd, patience: Duration) -> Result<(), Error> {
    pidfd_send_signal(handle, Signal::TERM).map_err(|e| {
        Error::new(Code::PermissionDenied, format!("cannot stop `bothy host up`: {e}")).hint("do it as root")
    })?;
    let timeout = Timespec::try_from(patience).map_err(|e| Error::internal("cannot wait so long", &e))?;
    let mut fds = [PollFd::new(handle, PollFlags::IN)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(0) => Err(Error::new(
            Code::DeadlineExceeded,
            format!(
                "`bothy host up` has been asked to stop and is still there after {} s",
                patience.as_secs()
            ),
        )
        .hint("its own output says what it waits for")),
        Ok(_) => Ok(()),
        Err(e) => Err(Error::internal("cannot wait for `bothy host up` to end", &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_owner_at_a_time_and_says_who() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find(dir.path()).unwrap(), None);
        fs::write(dir.path().join(FILE), "").unwrap();
        fs::set_permissions(dir.path().join(FILE), std::fs::Permissions::from_mode(0o644)).unwrap();
        let lock = take(dir.path()).unwrap();
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "only its owner may lock it");
        let owner = find(dir.path()).unwrap().unwrap();
        assert_eq!(owner.pid, std::process::id());
        assert!(owner.handle().is_ok());
        let refused = take(dir.path()).unwrap_err();
        assert!(refused.message.contains(&format!("process {}", owner.pid)), "{refused}");
        drop(lock);
        // A program that another test is just starting has a duplicate of it until it is that program.
        let free = (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            find(dir.path()).unwrap().is_none()
        });
        assert!(free, "the lock goes with its file");
        drop(take(dir.path()).unwrap());
        let other = Owner { start: owner.start + 1, ..owner };
        assert!(other.handle().is_err(), "another process of the same id");
    }
}
