//! One launch at a time, and none behind an undo's back.
//!
//! A launch outlives an agent that dies: `bothy-vmm launch` and `hold` go on. The restarted agent may undo that launch
//! while the holder does not listen yet; it would find nobody to end, remove the directory, and a moment later a VM runs
//! that no record names. So beside the holder's directory there is a lock file `<dir>.lock`, the agent's own, mode 0600:
//!
//! - The agent makes it ([`prepare`]) before it runs `launch`, which opens it but never makes it ([`take`]).
//! - `launch` locks it (flock(2)) before all else, then refuses unless the file still has its name and its parent is still
//!   the agent that ran it. `hold` inherits the lock and keeps it until it listens and its VMM answers, or nothing runs.
//! - Whoever wants to know whether a holder is there, or to remove its directory, has the lock while it looks and until the
//!   directory is gone ([`wait`]); the lock file goes last, under the lock.
//!
//! Why no holder is missed: the lock orders each launch either before an undo or after it.
//!
//! - Before it: the undo waits for the launch's first word. Then the holder listens, and is found, or nothing runs.
//! - After it: `launch` gets the lock of a file that has lost its name, or finds no file, and refuses. Where a *later* launch
//!   has made the file again, the undo's agent is either another than the one that ran this `launch`: that one was dead
//!   before its successor began, the kernel had given `launch` another parent by then (before a dead process can be waited
//!   for), and it refuses. Or it is the same agent, which gave up on a slow launch: then both launches are of the same VM
//!   and one finds the other's holder there, and fails without touching it; its undo ends the holder by its socket.
//!
//! The lock is one open file's, not a process's: it ends when `launch` *and* `hold` have let go of it or died, and never
//! because one of them did. The VMM does not inherit it. A VM's user who breaks out of the VMM while it starts may get hold
//! of it and keep an undo waiting; that ends with an error after [`PATIENCE`], and with the VMM's end for good.

use bothy_contract::{Code, Error};
use fs_err::{File, os::unix::fs::OpenOptionsExt};
use rustix::fs::{FlockOperation, flock};
use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long a launch may keep others waiting: longer than its VMM may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How often the lock is tried. A blocking flock(2) cannot be given up, and a thread that hangs in it keeps the agent from
/// ending.
const STEP: Duration = Duration::from_millis(20);

/// The lock file of the holder in `dir`.
pub fn lock_path(dir: &Path) -> PathBuf {
    let mut path = dir.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

fn open(path: &Path, create: bool) -> io::Result<File> {
    fs_err::OpenOptions::new()
        .read(true)
        .write(create)
        .create(create)
        .mode(0o600)
        .custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits())
        .open(path)
}

/// Makes the lock file, so that a launch in `dir` can be.
///
/// # Errors
/// The directory above `dir` is not writable.
pub fn prepare(dir: &Path) -> Result<(), Error> {
    open(&lock_path(dir), true).map(drop).map_err(|e| Error::internal("cannot make a launch's lock file", &e))
}

/// For `bothy-vmm launch`: takes the lock for the process that runs as `parent`'s child. It is let go of when the file and
/// all its duplicates are closed.
///
/// # Errors
/// The launch was undone, or its agent is gone: `FailedPrecondition`.
pub fn take(dir: &Path, parent: i32) -> Result<File, Error> {
    let path = lock_path(dir);
    let failed = |e: io::Error| Error::internal("cannot take a launch's lock", &e);
    let refused = |why: &str| {
        Error::new(Code::FailedPrecondition, format!("the launch in {} is void: {why}", dir.display()))
    };
    let file = match open(&path, false) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(refused(&format!("there is no {}, so it was undone", path.display())));
        }
        Err(e) => return Err(failed(e)),
    };
    while let Err(errno) = flock(&file, FlockOperation::LockExclusive) {
        if errno != rustix::io::Errno::INTR {
            return Err(failed(errno.into()));
        }
    }
    if file.metadata().map_err(failed)?.nlink() == 0 {
        return Err(refused("it was undone"));
    }
    // After the lock, not before: from here on an undo waits.
    let now = nix::unistd::getppid().as_raw();
    if now != parent {
        return Err(refused(&format!("process {parent}, which asked for it, is gone")));
    }
    Ok(file)
}

/// No launch is under way as long as this lives.
#[derive(Debug)]
pub struct Quiet {
    file: File,
    path: PathBuf,
}

impl Quiet {
    /// Removes the lock file: launches that wait for it, or come later, are void.
    ///
    /// # Errors
    /// The directory above is not writable.
    pub fn remove(self) -> Result<(), Error> {
        match fs_err::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Error::internal("cannot remove a launch's lock file", &e))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // By word and not by closing: a program that the agent is just starting may still have a duplicate. Unlocking an
        // open file cannot fail.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// Waits until no launch in `dir` is under way, at most for [`PATIENCE`], and keeps others from beginning. `None` where
/// there is no lock file: then no launch can begin until somebody makes one. Blocks.
///
/// # Errors
/// A launch is still under way after that time (`DeadlineExceeded`).
pub fn wait(dir: &Path) -> Result<Option<Quiet>, Error> {
    let path = lock_path(dir);
    let failed = |e: io::Error| Error::internal("cannot wait for a launch", &e);
    let begun = Instant::now();
    loop {
        let file = match open(&path, false) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
            if begun.elapsed() > PATIENCE {
                return Err(Error::new(
                    Code::DeadlineExceeded,
                    format!(
                        "a launch in {} is still under way after {} s",
                        dir.display(),
                        PATIENCE.as_secs()
                    ),
                )
                .hint(format!(
                    "`fuser -v {}` shows the process that hangs; then try again",
                    path.display()
                )));
            }
            std::thread::sleep(STEP);
        }
        let quiet = Quiet { file, path: path.clone() };
        // A lock on a file that has lost its name excludes nobody.
        if quiet.file.metadata().map_err(failed)?.nlink() > 0 {
            return Ok(Some(quiet));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_is_void_without_its_file_or_its_parent() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("vm");
        let parent = nix::unistd::getppid().as_raw();
        let undone = take(&dir, parent).unwrap_err();
        assert!(undone.code == Code::FailedPrecondition && undone.message.contains("undone"), "{undone}");
        assert!(wait(&dir).unwrap().is_none() && !lock_path(&dir).exists());

        prepare(&dir).unwrap();
        assert_eq!(fs_err::metadata(lock_path(&dir)).unwrap().mode() & 0o777, 0o600);
        let orphan = take(&dir, parent + 1).unwrap_err();
        assert!(orphan.message.contains("is gone"), "{orphan}");
        // What refused let go of the lock, and one that has it keeps it through a duplicate's end.
        let lock = take(&dir, parent).unwrap();
        drop(nix::unistd::dup(&lock).unwrap());
        let busy = open(&lock_path(&dir), false).unwrap();
        assert!(flock(&busy, FlockOperation::NonBlockingLockExclusive).is_err());
        drop(lock);
        wait(&dir).unwrap().unwrap().remove().unwrap();
        assert!(!lock_path(&dir).exists());
    }

    #[test]
    fn a_launch_that_waited_while_it_was_undone_is_void() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("vm");
        let parent = nix::unistd::getppid().as_raw();
        prepare(&dir).unwrap();
        let quiet = wait(&dir).unwrap().unwrap();
        let late = std::thread::spawn({
            let dir = dir.clone();
            move || take(&dir, parent)
        });
        // Whether it has opened the file by then or not, the answer is the same.
        std::thread::sleep(Duration::from_millis(50));
        quiet.remove().unwrap();
        assert!(late.join().unwrap().unwrap_err().message.contains("undone"));
    }
}
