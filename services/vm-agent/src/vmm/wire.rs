//! What agent and holder exchange, and the names of the files in a holder's directory.
//!
//! The directory `<run>/vm/<id>` belongs to the VM's user and, set-group-id, to the agent's group: so the agent reaches
//! what the holder makes there without the holder being in that group, and no other local user does.

use super::{
    Save,
    firecracker::api::Request,
    jail::{self, Jail},
};
use bothy_contract::{Error, VmId, vm::ExitRecord};
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// Where the holder answers.
pub const HOLDER_SOCKET: &str = "holder.sock";
/// Where the VMM connects its QMP monitor.
pub const QMP_SOCKET: &str = "qmp.sock";
/// Where the VMM connects the port `bothy.control`.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Where the VMM connects the port `bothy.bulk`.
pub const BULK_SOCKET: &str = "bulk.sock";
/// Where Firecracker takes requests.
pub const API_SOCKET: &str = "api.sock";
/// Where Firecracker takes connections to ports of its guest.
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// What Firecracker logs into; the holder keeps it, bounded, in [`VMM_LOG`].
pub const LOG_PIPE: &str = "log.pipe";
/// What Firecracker counts into; the holder keeps it, bounded, in [`METRICS_LOG`].
pub const METRICS_PIPE: &str = "metrics.pipe";
/// Firecracker's counters, one line of JSON for each time; `.1` is the older half.
pub const METRICS_LOG: &str = "metrics.log";
/// What the guest wrote to its serial console; `.1` is the older half.
pub const CONSOLE_LOG: &str = "console.log";
/// What the VMM and the holder wrote; `.1` is the older half.
pub const VMM_LOG: &str = "vmm.log";
/// Where a VMM that writes to paths only saves its guest's state, on the way to where that belongs.
pub const STATE_SPOOL: &str = "saved.state";
/// The same of its memory.
pub const MEMORY_SPOOL: &str = "saved.memory";
/// How the VMM ended.
pub const EXIT_RECORD: &str = "exit.json";

/// Removes the sockets and pipes in a holder's directory, so that nobody takes a dead holder's for a living one's. By the
/// holder as it ends; by the agent where the holder was killed.
pub fn remove_sockets(dir: &Path) {
    let sockets = [HOLDER_SOCKET, QMP_SOCKET, CONTROL_SOCKET, BULK_SOCKET, API_SOCKET, VSOCK_SOCKET];
    for name in sockets.into_iter().chain([LOG_PIPE, METRICS_PIPE]) {
        drop(fs_err::remove_file(dir.join(name)));
    }
}

/// Stands in a command line for the number of the TAP's descriptor, which only the holder knows.
pub const TAP_FD: &str = "@tap-fd@";

/// Stands in a command line, or in a request, for the number of the descriptor of the guest's memory.
pub const MEMORY_FD: &str = "@memory-fd@";

/// Stands in a request for the number of the descriptor of the saved state, where the VMM opens that itself.
pub const STATE_FD: &str = "@state-fd@";

/// The name in the holder's directory of a link to the disk `serial`, for a VMM that writes down by which path it was told
/// of a disk: so that this is the same for every VM.
pub fn disk_link(serial: &str) -> String {
    format!("{serial}{DISK_LINK}")
}

/// How the names of links to disks end.
pub const DISK_LINK: &str = ".disk";

/// Longest line on `holder.sock` in either direction, in bytes.
pub const MAX_LINE: usize = 1 << 20;

/// What `bothy-vmm launch` reads from its standard input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchSpec {
    /// The VM.
    pub vm: VmId,
    /// The VMM and its version: `qemu-microvm 10.0.2`.
    pub vmm: String,
    /// The holder's directory. It is made anew; what an earlier holder left there goes.
    pub dir: PathBuf,
    /// The VMM's program and arguments.
    pub argv: Vec<String>,
    /// Which kind of VMM it is: how the holder talks to it and to its guest.
    #[serde(default)]
    pub monitor: Monitor,
    /// The TAP that the VMM gets as an open descriptor, whose number takes the place of [`TAP_FD`] in `argv`. It must be
    /// owned by `uid`.
    #[serde(default)]
    pub tap: Option<String>,
    /// The user that holder and VMM run as.
    pub uid: u32,
    /// Their group.
    pub gid: u32,
    /// Their further groups.
    pub groups: Vec<u32>,
    /// `cgroup.procs` of the control group that they are started in, where there is one.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// The file that is the guest's memory, where it is one: the VMM gets it as an open descriptor, whose number takes the
    /// place of [`MEMORY_FD`].
    #[serde(default)]
    pub memory: Option<MemoryFile>,
    /// What the guest goes on from, where it is not booted.
    #[serde(default)]
    pub restore: Option<Restore>,
    /// Disks that a link in the holder's directory leads to, which is its VMM's working directory: their serials and files.
    #[serde(default)]
    pub disks: Vec<(String, PathBuf)>,
    /// Where the VMM is to see nothing but its own: then `argv` is Firecracker's jailer, which takes root.
    #[serde(default)]
    pub jail: Option<Jail>,
}

/// A file that is a guest's memory. It is opened with the agent's rights: the VM's user reaches it by the descriptor alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum MemoryFile {
    /// Made anew, of holes alone, and the VM's user's, who writes into it.
    Make {
        /// Where.
        path: PathBuf,
        /// How long.
        bytes: u64,
    },
    /// There already, of another guest, and only read.
    Map {
        /// Where.
        path: PathBuf,
        /// How long it must be.
        bytes: u64,
    },
    /// There already, and the VM's own: its user's from now on.
    Own {
        /// Where.
        path: PathBuf,
        /// How long it must be.
        bytes: u64,
    },
}

/// What a guest goes on from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// The saved state. It is opened with the agent's rights.
    pub state: PathBuf,
    /// Whether that leaves memory out, which is in [`LaunchSpec::memory`] then.
    pub memory_apart: bool,
}

/// What follows `SAVE`. Two descriptors come with the line: where the state goes, and where memory goes if that is apart and
/// not in a file already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveRequest {
    /// How much.
    pub what: Save,
    /// How long that may take.
    pub limit: Duration,
}

/// What `SAVE` returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveReply {
    /// Whether the second descriptor was written to.
    pub memory_written: bool,
    /// Whether the guest ran before.
    pub ran: bool,
}

/// How long a saved guest of that many bytes may take to load: far longer than any disk that is not broken needs.
pub fn load_limit(bytes: u64) -> Duration {
    Duration::from_secs(20 + bytes / (50 << 20))
}

/// How the holder talks to a VMM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Monitor {
    /// QEMU: it connects its monitor and the guest's two virtio-serial ports to sockets in the holder's directory, on which
    /// the holder listens.
    #[default]
    Qmp,
    /// Firecracker: it listens on [`API_SOCKET`] and, for the guest's vsock, on [`VSOCK_SOCKET`].
    Api {
        /// What it is told, in this order, once it listens; the last one boots the guest.
        requests: Vec<Request>,
    },
}

impl LaunchSpec {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check(&self) -> Result<(), Error> {
        let longest = self.vmm_dir().join(CONTROL_SOCKET);
        if !self.dir.is_absolute() || self.dir.components().any(|c| c == std::path::Component::ParentDir) {
            return Err(Error::invalid(format!(
                "holder directory {} is not a plain absolute path",
                self.dir.display()
            )));
        }
        // sun_path, with its closing zero (unix(7)).
        if longest.as_os_str().len() > 107 {
            return Err(Error::invalid(format!(
                "socket path {} is longer than 107 bytes",
                longest.display()
            )));
        }
        if self.argv.first().is_none_or(String::is_empty) || self.argv.iter().any(|arg| arg.contains('\0')) {
            return Err(Error::invalid("the VMM's command line is empty or has a zero byte"));
        }
        // Without its API a VMM could not be asked anything any more.
        if self.argv.iter().any(|arg| arg == "--no-api") {
            return Err(Error::invalid("a VMM without its API cannot be held"));
        }
        let plain = |serial: &str| !serial.is_empty() && serial.bytes().all(|b| b.is_ascii_alphanumeric());
        if let Some((serial, _)) = self.disks.iter().find(|(serial, _)| !plain(serial)) {
            return Err(Error::invalid(format!("`{serial}` is no disk's name")));
        }
        if self.uid == 0 || self.gid == 0 || self.groups.contains(&0) {
            return Err(Error::invalid("a VMM does not run as root"));
        }
        self.jail.as_ref().map_or(Ok(()), |jail| jail.check(self))
    }

    /// Where the VMM has its sockets and pipes, as its holder sees it.
    pub fn vmm_dir(&self) -> PathBuf {
        match &self.jail {
            None => self.dir.clone(),
            Some(_) => self.dir.join(jail::PLACE).join(jail::ROOT),
        }
    }
}

/// A process that cannot be taken for another: process ids come back, start times with them do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its process id.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

impl Process {
    /// The process that has `pid` now, if there is one.
    pub fn find(pid: u32) -> Option<Self> {
        start_time(pid).map(|start_time| Self { pid, start_time })
    }

    /// Whether it still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Sends it `signal`, and never another process that has its id by now (pidfd_send_signal(2)). It takes the right to: a
    /// VM's processes are another user's. One that has ended is not signalled, which is no error.
    ///
    /// # Errors
    /// There is no such signal, or this process may not.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
        let failed = |err: rustix::io::Errno| {
            let err = std::io::Error::from(err);
            Error::internal(format!("cannot send signal {signal} to process {}", self.pid), &err)
        };
        let signal = Signal::from_named_raw(signal)
            .ok_or_else(|| Error::invalid(format!("{signal} is not a signal")))?;
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
        let sent = pidfd_open(pid, PidfdFlags::empty()).and_then(|fd| {
            // With the pidfd held the id cannot change its owner any more.
            if self.is_alive() { pidfd_send_signal(fd, signal) } else { Ok(()) }
        });
        match sent {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(err) => Err(failed(err)),
        }
    }
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; what follows its last closing one is fields 3 and on.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// What `bothy-vmm launch` prints, as one line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Launched {
    /// The holder listens and the VMM answers.
    Running(Running),
    /// Nothing runs.
    Failed(Error),
}

/// A launch that came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Holder and VMM.
    #[serde(flatten)]
    pub handle: HolderHandle,
    /// When the VMM's process was there, as [`monotonic_now`] tells time: before it is ready, and before the launch is done.
    pub vmm_started: Duration,
}

/// The time since a moment that all processes of this boot of the host have in common, not counting suspension: what one
/// process has read another may compare (CLOCK_MONOTONIC, clock_gettime(2)).
///
/// # Errors
/// The kernel has no such clock.
pub fn monotonic_now() -> Result<Duration, Error> {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .map_err(|e| Error::internal("cannot read the clock", &e))
}

/// A holder and its VMM. Keep it: it is how a restarted agent knows them again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HolderHandle {
    /// The holder.
    pub holder: Process,
    /// The VMM.
    pub vmm: Process,
}

/// The answer to `STATUS`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The VM.
    pub vm: VmId,
    /// The VMM and its version.
    pub vmm_version: String,
    /// Holder and VMM.
    pub handle: HolderHandle,
    /// Whether the VMM runs.
    pub state: State,
    /// How it ended, where it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<ExitRecord>,
    /// Whether the guest's agent has a session on its control port.
    pub control_up: bool,
    /// Whether it has one on its bulk port.
    pub bulk_up: bool,
}

/// Whether a VMM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It does.
    Running,
    /// It has ended; the holder is about to.
    Exited,
}

/// Reads at most `limit` bytes of a file that a VM's user may have put there: no symbolic link, nothing but a regular file.
///
/// # Errors
/// `NotFound` where there is none; otherwise why it could not be read.
pub fn read_untrusted(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    use fs_err::os::unix::fs::OpenOptionsExt;
    use std::io::{Error, ErrorKind, Read};
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_CLOEXEC;
    let file = fs_err::OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(Error::new(ErrorKind::InvalidData, format!("{} is not a regular file", path.display())));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(Error::new(
            ErrorKind::InvalidData,
            format!("{} is longer than {limit} bytes", path.display()),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> LaunchSpec {
        LaunchSpec {
            vm: VmId::new(),
            vmm: "x 1".into(),
            dir: "/run/bothy/vm/a".into(),
            argv: vec!["x".into()],
            monitor: Monitor::Qmp,
            tap: None,
            uid: 780_000,
            gid: 780_000,
            groups: vec![],
            cgroup: None,
            memory: None,
            restore: None,
            disks: vec![],
            jail: None,
        }
    }

    #[test]
    fn a_wrong_specification_is_refused() {
        spec().check().unwrap();
        assert!(LaunchSpec { dir: "run".into(), ..spec() }.check().is_err());
        assert!(LaunchSpec { dir: "/run/../etc".into(), ..spec() }.check().is_err());
        assert!(LaunchSpec { dir: format!("/{}", "x".repeat(100)).into(), ..spec() }.check().is_err());
        assert!(LaunchSpec { argv: vec![], ..spec() }.check().is_err());
        assert!(LaunchSpec { argv: vec!["x".into(), "--no-api".into()], ..spec() }.check().is_err());
        assert!(LaunchSpec { disks: vec![("../x".into(), "/d".into())], ..spec() }.check().is_err());
        assert!(LaunchSpec { uid: 0, ..spec() }.check().is_err());
        assert!(LaunchSpec { groups: vec![0], ..spec() }.check().is_err());
    }

    #[test]
    fn a_process_is_known_by_pid_and_start_time() {
        let me = Process::find(std::process::id()).unwrap();
        assert!(me.is_alive());
        assert!(!Process { start_time: me.start_time + 1, ..me }.is_alive());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        assert_eq!(Process::find(pid), None);
    }

    #[test]
    fn a_signal_reaches_that_process_or_none() {
        use std::os::unix::process::ExitStatusExt;
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::find(child.id()).unwrap();
        // The id is somebody else's by now, as far as the start time tells.
        Process { start_time: process.start_time + 1, ..process }.signal(9).unwrap();
        assert!(process.is_alive());
        assert!(process.signal(0x7fff).is_err());
        process.signal(15).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(15));
        process.signal(9).unwrap();
        Process { pid: 0, start_time: 0 }.signal(9).unwrap();
    }

    #[test]
    fn files_of_a_vms_user_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs_err::write(at("file"), b"12345").unwrap();
        assert_eq!(read_untrusted(&at("file"), 5).unwrap(), b"12345");
        assert!(read_untrusted(&at("file"), 4).is_err());
        fs_err::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        assert!(read_untrusted(&at("link"), 5).is_err());
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read_untrusted(&at("fifo"), 5).is_err());
        assert_eq!(read_untrusted(&at("none"), 5).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    }
}
