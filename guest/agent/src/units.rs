//! What systemd is asked for when a machine becomes another one: services restarted that must know who they are now,
//! timers held back while nobody knows what time it is, and the journal kept under the machine's id.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::systemd::{Act, Manager, SOCKET};

/// Services known to keep the host's name, keys, addresses or resolver in memory.
const KNOW_IDENTITY: [&str; 8] = [
    "ssh.service",
    "sshd.service",
    "rsyslog.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "systemd-hostnamed.service",
    "avahi-daemon.service",
    "postfix.service",
];
const SSHD: [&str; 2] = ["ssh.service", "sshd.service"];
/// Where distributions have the program that sshd of 9.8 and later starts for each connection.
const SSHD_SESSION: [&str; 4] = [
    "usr/lib/openssh/sshd-session",
    "usr/libexec/openssh/sshd-session",
    "usr/lib/ssh/sshd-session",
    "usr/libexec/sshd-session",
];
const JOURNAL: &str = "systemd-journald.service";
/// Where journals are, each below its machine's id.
const JOURNALS: [&str; 2] = ["run/log/journal", "var/log/journal"];
/// When persistent timers last ran (systemd.timer(5), `Persistent=`).
const STAMPS: &str = "var/lib/systemd/timers";
/// How long a unit may take to be restarted.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which of `wanted`, or of the known ones where there are none, are active and must be restarted to know who they are.
///
/// # Errors
/// When systemd does not answer.
pub(crate) async fn to_restart(wanted: &[String]) -> io::Result<Vec<String>> {
    let known = wanted.is_empty();
    let names: Vec<&str> =
        if known { KNOW_IDENTITY.to_vec() } else { wanted.iter().map(String::as_str).collect() };
    let mut active: Vec<String> = Vec::new();
    for unit in Manager::connect(Path::new(SOCKET)).await?.units(&names).await? {
        // An alias is the same unit a second time.
        let again = active.contains(&unit.name);
        let knows_by_itself = known && SSHD.contains(&unit.name.as_str()) && sshd_reads_keys(Path::new("/"));
        if matches!(unit.active.as_str(), "active" | "reloading") && !again && !knows_by_itself {
            active.push(unit.name);
        }
    }
    Ok(active)
}

/// Whether sshd reads its host keys anew for each connection, in the process that it starts for it. From 9.8 on it starts a
/// program of its own, and that one is given the keys that sshd read when it was started itself.
fn sshd_reads_keys(root: &Path) -> bool {
    !SSHD_SESSION.iter().any(|path| root.join(path).exists())
}

/// Restarts `units`.
///
/// # Errors
/// Says which is not active any more, or that systemd does not answer.
pub(crate) async fn restart(units: &[String]) -> io::Result<()> {
    if units.is_empty() {
        return Ok(());
    }
    let mut manager = Manager::connect(Path::new(SOCKET)).await?;
    for unit in units {
        manager.act(Act::TryRestart, unit).await?;
    }
    let names: Vec<&str> = units.iter().map(String::as_str).collect();
    let now = manager.settled(&names, PATIENCE).await?.into_iter();
    let bad: Vec<String> = now
        .filter(|unit| unit.active != "active")
        .map(|unit| format!("{} is {}", unit.name, unit.active))
        .collect();
    if bad.is_empty() {
        return Ok(());
    }
    Err(io::Error::other(format!("restarted for the new identity, but: {}", bad.join(", "))))
}

/// Keeps the journal under the id `new` instead of `old`, so that what was logged before is found with what comes.
///
/// # Errors
/// When a directory cannot be renamed, or the service not be restarted.
pub(crate) async fn move_journal(root: &Path, old: &str, new: &str) -> io::Result<()> {
    for journals in JOURNALS {
        let (from, to) = (root.join(journals).join(old), root.join(journals).join(new));
        if old != new && from.is_dir() && !to.exists() {
            fs_err::rename(from, to)?;
        }
    }
    restart(&to_restart(&[JOURNAL.to_owned()]).await?).await
}

/// Stops the timers that go by the calendar; which ones.
///
/// # Errors
/// When systemd does not answer, or refuses.
pub(crate) async fn stop_timers() -> io::Result<Vec<String>> {
    let mut manager = Manager::connect(Path::new(SOCKET)).await?;
    let timers = manager.calendar_timers().await?;
    for timer in &timers {
        manager.act(Act::Stop, timer).await?;
    }
    let names: Vec<&str> = timers.iter().map(String::as_str).collect();
    if !names.is_empty() {
        manager.settled(&names, PATIENCE).await?;
    }
    Ok(timers)
}

/// Starts them again, as if they had just run: what they would have done in the time that passed is not made up for.
///
/// # Errors
/// When systemd does not answer, or refuses.
pub(crate) async fn start_timers(root: &Path, timers: &[String]) -> io::Result<()> {
    let mut manager = Manager::connect(Path::new(SOCKET)).await?;
    for timer in timers {
        let stamp = root.join(STAMPS).join(format!("stamp-{timer}"));
        if stamp.is_file() {
            fs_err::OpenOptions::new().write(true).open(&stamp)?.set_modified(SystemTime::now())?;
        }
        manager.act(Act::Start, timer).await?;
    }
    Ok(())
}
