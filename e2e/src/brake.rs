//! What holds a host still at a place of the test's choosing, without any hook in the product: stopped processes, and
//! programs that wait at a gate before they become the real ones. Each goes on when its guard is dropped, so that a failed
//! test leaves nothing stopped.

use bothy_testkit::{TempDir, temp_dir};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    ffi::OsString,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// State and start time of a process (proc_pid_stat(5)): the second tells it from a later one of the same number.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// A process stopped with SIGSTOP.
#[derive(Debug)]
pub struct Stopped {
    pid: i32,
    start_time: u64,
}

impl Stopped {
    /// Stops process `pid` and waits until it stands.
    ///
    /// # Errors
    /// It is gone, or does not stop.
    pub fn new(pid: i32) -> Result<Self, String> {
        let gone = || format!("process {pid} is not there to be stopped");
        let (_, start_time) = stat(pid).ok_or_else(gone)?;
        let stopped = Self { pid, start_time };
        kill(Pid::from_raw(pid), Signal::SIGSTOP).map_err(|e| format!("{}: {e}", gone()))?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while stat(pid).ok_or_else(gone)?.0 != 'T' {
            if Instant::now() > deadline {
                return Err(format!("process {pid} does not stop"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(stopped)
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // One that was killed meanwhile may have a successor of its number.
        if stat(self.pid).is_some_and(|(_, start_time)| start_time == self.start_time) {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGCONT);
        }
    }
}

/// Programs that a host runs by way of a gate.
#[derive(Debug)]
pub struct Gates {
    dir: TempDir,
}

/// A program behind a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The VMM.
    Qemu,
    /// What makes guests' host keys.
    SshKeygen,
}

impl Program {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Program::Qemu => "qemu-system-x86_64",
            Program::SshKeygen => "ssh-keygen",
        }
    }
}

/// A file that says something to a gate's script for as long as this lives.
#[derive(Debug)]
pub struct Sign(PathBuf);

impl Sign {
    fn new(path: PathBuf) -> Self {
        fs_err::write(&path, "").expect("a sign for a gate");
        Self(path)
    }
}

impl Drop for Sign {
    fn drop(&mut self) {
        let _ = fs_err::remove_file(&self.0);
    }
}

impl Gates {
    /// A directory with a script for each program; open.
    #[expect(clippy::new_without_default, reason = "makes files")]
    pub fn new() -> Self {
        let gates = Self { dir: temp_dir() };
        let dir = gates.dir.path();
        // VMMs' users pass through it.
        fs_err::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).expect("the gates' mode");
        for program in [Program::Qemu, Program::SshKeygen] {
            let name = program.name();
            let real = which(name);
            let text = format!(
                "#!/bin/sh\n\
                 [ \"$1\" = --version ] && exec {real} \"$@\"\n\
                 while [ -e {dir}/{name}.hold ]; do sleep 0.02; done\n\
                 [ -e {dir}/{name}.fail ] && {{ echo 'this test lets it fail' >&2; exit 1; }}\n\
                 exec {real} \"$@\"\n",
                real = real.display(),
                dir = dir.display(),
            );
            let path = gates.path(program);
            fs_err::write(&path, text).expect("a gate");
            fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("a gate's mode");
        }
        gates
    }

    /// The script.
    pub fn path(&self, program: Program) -> PathBuf {
        self.dir.path().join(program.name())
    }

    /// `PATH` with the gates in front of `rest`.
    pub fn search_path(&self, rest: OsString) -> OsString {
        let mut path = OsString::from(self.dir.path());
        path.push(":");
        path.push(rest);
        path
    }

    /// Closes the gate: `program` waits at it while the result lives.
    pub fn hold(&self, program: Program) -> Sign {
        Sign::new(self.dir.path().join(format!("{}.hold", program.name())))
    }

    /// Lets `program` fail while the result lives.
    pub fn fail(&self, program: Program) -> Sign {
        Sign::new(self.dir.path().join(format!("{}.fail", program.name())))
    }
}

/// Where `name` is.
fn which(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("{name} is not on PATH: run `cargo xtask setup`"))
}

/// A file that is not where it belongs while this lives; what was put in its place goes.
#[derive(Debug)]
pub struct Hidden {
    place: PathBuf,
    aside: PathBuf,
}

impl Hidden {
    /// Moves the file at `place` aside. Never changes the file itself: it may be linked from elsewhere.
    ///
    /// # Errors
    /// It is not there.
    pub fn new(place: &Path) -> Result<Self, String> {
        let mut aside = place.as_os_str().to_owned();
        aside.push(".aside");
        let aside = PathBuf::from(aside);
        fs_err::rename(place, &aside).map_err(|e| e.to_string())?;
        Ok(Self { place: place.to_owned(), aside })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = fs_err::rename(&self.aside, &self.place);
    }
}
