//! Block devices that the kernel makes of files: loop devices ([`loopdev`]) and the device mapper's ([`dm`]), by their ioctls; no
//! tool is run, and none's output is parsed. All that is `unsafe` in this service is here.
//!
//! Every call into the kernel goes through [`call`], where a test has any one of them fail.

pub(crate) mod dm;
pub(crate) mod loopdev;

use std::{io, path::Path};

/// A block device's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Number {
    pub(crate) major: u64,
    pub(crate) minor: u64,
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl Number {
    fn of(device: u64) -> Self {
        Self { major: nix::sys::stat::major(device), minor: nix::sys::stat::minor(device) }
    }

    /// Makes the special file `path` of this device, for `uid` alone, in the place of what is there.
    pub(crate) fn make_node(self, path: &Path, uid: u32) -> io::Result<()> {
        use nix::sys::stat::{Mode, SFlag, makedev, mknod};
        remove(path)?;
        let half = path.with_extension("half");
        remove(&half)?;
        call("mknod", || {
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            Ok(mknod(&half, SFlag::S_IFBLK, mode, makedev(self.major, self.minor))?)
        })?;
        let given = call("chown", || std::os::unix::fs::lchown(&half, Some(uid), None))
            .and_then(|()| call("rename", || fs_err::rename(&half, path)));
        if given.is_err() {
            remove(&half)?;
        }
        given
    }
}

/// Removes a file that may not be there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs_err::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Makes one call into the kernel.
fn call<T>(what: &'static str, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(test)]
    faults::point(what)?;
    work().map_err(|e| io::Error::new(e.kind(), Failed { what, source: e }))
}

/// A call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
struct Failed {
    what: &'static str,
    source: io::Error,
}

/// The error number of a failed call.
fn errno(err: &io::Error) -> Option<i32> {
    let inner = err.get_ref().and_then(|e| e.downcast_ref::<Failed>());
    inner.map_or_else(|| err.raw_os_error(), |failed| failed.source.raw_os_error())
}

/// Calls that fail since a test wants them to.
#[cfg(test)]
pub(crate) mod faults {
    use std::{cell::Cell, io};

    thread_local! {
        static MADE: Cell<u32> = const { Cell::new(0) };
        static FAIL: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// Runs `work`, whose call number `fail` fails; gives how many calls it made.
    pub(crate) fn with<T>(fail: Option<u32>, work: impl FnOnce() -> T) -> (T, u32) {
        MADE.set(0);
        FAIL.set(fail);
        let done = work();
        FAIL.set(None);
        (done, MADE.get())
    }

    pub(super) fn point(what: &str) -> io::Result<()> {
        let made = MADE.get();
        MADE.set(made + 1);
        if FAIL.get() == Some(made) {
            return Err(io::Error::other(format!("{what}: failed on request")));
        }
        Ok(())
    }
}
