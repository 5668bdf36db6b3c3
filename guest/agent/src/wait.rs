//! Waiting for a service of the image: a TCP port that answers, a systemd unit that is active, or both.
//!
//! A port costs nothing but a connection. A unit is asked for on systemd's private socket, every [`POLL`]; one that has
//! failed, or will never be there, ends the wait at once. Only where a wait was in vain is a process started, to read
//! the unit's journal.

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use crate::ports;
use crate::systemd::{Manager, SOCKET, Unit};

/// Between two questions to systemd: it has one thread, and during a boot that is busy.
const POLL: Duration = Duration::from_millis(100);
/// How long reading the journal may take.
const JOURNAL: Duration = Duration::from_secs(10);
/// How late the journal may be.
const LATE: Duration = Duration::from_secs(3);
/// How many of its last lines, and how many bytes of them, are told.
const LINES: usize = 20;
const BYTES: usize = 4 << 10;
/// The most that is read of what journalctl says: lines may be of any length.
const READ: u64 = 256 << 10;

/// What is waited for.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) port: Option<u16>,
    pub(crate) unit: Option<String>,
    pub(crate) timeout: Duration,
}

/// Why a service is not up, and what it said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NotUp {
    pub(crate) why: String,
    pub(crate) log: String,
}

/// Waits until all of `wanted` is there.
///
/// # Errors
/// It has failed for good, or the time is over.
pub(crate) async fn wait(wanted: &Wanted, nic: Option<Ipv4Addr>) -> Result<(), NotUp> {
    let until = Instant::now() + wanted.timeout;
    let port = async {
        let Some(port) = wanted.port else { return Ok(()) };
        if ports::wait(port, nic, wanted.timeout).await {
            return Ok(());
        }
        // What it waits for may be what its unit does.
        let state = match &wanted.unit {
            Some(unit) => format!("; {}", now(unit).await),
            None => String::new(),
        };
        Err(format!("nothing accepts connections on port {port}{state}"))
    };
    let unit = async {
        match &wanted.unit {
            Some(unit) => active(Path::new(SOCKET), unit, until).await,
            None => Ok(()),
        }
    };
    let Err(why) = tokio::try_join!(unit, port) else { return Ok(()) };
    let log = match &wanted.unit {
        Some(unit) => {
            last_words(unit).await.unwrap_or_else(|error| format!("its journal cannot be read: {error}"))
        }
        None => String::new(),
    };
    Err(NotUp { why, log })
}

/// Waits until `unit` is active.
async fn active(socket: &Path, unit: &str, until: Instant) -> Result<(), String> {
    let mut manager = None;
    loop {
        let told = ask(&mut manager, socket, unit).await;
        if told.is_err() {
            // systemd starts, or starts itself anew: a new conversation.
            manager = None;
        }
        match (&told, told.as_ref().ok().map(verdict)) {
            (_, Some(Verdict::Up)) => return Ok(()),
            (_, Some(Verdict::Never(why))) => return Err(format!("unit {unit} {why}")),
            (Ok(state), _) if Instant::now() >= until => return Err(is(unit, state)),
            (Err(error), _) if Instant::now() >= until => {
                return Err(format!("systemd does not tell of unit {unit}: {error}"));
            }
            _ => sleep(POLL).await,
        }
    }
}

async fn ask(manager: &mut Option<Manager>, socket: &Path, unit: &str) -> io::Result<Unit> {
    match manager {
        Some(manager) => manager.unit(unit).await,
        None => manager.insert(Manager::connect(socket).await?).unit(unit).await,
    }
}

/// How `unit` is at this moment, in words.
async fn now(unit: &str) -> String {
    match ask(&mut None, Path::new(SOCKET), unit).await {
        Ok(state) => is(unit, &state),
        Err(error) => format!("systemd does not tell of unit {unit}: {error}"),
    }
}

fn is(unit: &str, state: &Unit) -> String {
    format!("unit {unit} is {} ({})", state.active, state.sub)
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Up,
    NotYet,
    Never(String),
}

fn verdict(unit: &Unit) -> Verdict {
    match (unit.load.as_str(), unit.active.as_str()) {
        (_, "active" | "reloading") => Verdict::Up,
        (_, "failed") => Verdict::Never("has failed".to_owned()),
        ("loaded" | "stub" | "merged", _) => Verdict::NotYet,
        (load, _) => Verdict::Never(format!("cannot be started: systemd says `{load}`")),
    }
}

/// The last lines of a unit that may have ended a moment ago: systemd knows of the end before journald has read the last words. One that never
/// ran has none, and is not waited for.
async fn last_words(unit: &str) -> io::Result<String> {
    let until = Instant::now() + LATE;
    loop {
        let text = journal(unit).await?;
        if !text.is_empty() || Instant::now() >= until {
            return Ok(text);
        }
        if ask(&mut None, Path::new(SOCKET), unit).await?.active == "inactive" {
            return Ok(text);
        }
        sleep(LATE / 10).await;
    }
}

/// The last lines of `unit`'s journal.
async fn journal(unit: &str) -> io::Result<String> {
    let mut child = Command::new("journalctl")
        .args([
            "--no-pager",
            "--quiet",
            "--output=cat",
            &format!("--lines={LINES}"),
            &format!("--unit={unit}"),
        ])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let mut text = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        timeout(JOURNAL, stdout.take(READ).read_to_end(&mut text))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "journalctl takes too long"))??;
    }
    // What is over the limit is not waited for.
    let _ = child.start_kill();
    let _ = timeout(JOURNAL, child.wait()).await;
    Ok(tail(&text))
}

/// The last [`LINES`] lines, of those the last [`BYTES`] bytes.
fn tail(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().collect();
    let last = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n");
    let mut from = last.len().saturating_sub(BYTES);
    while !last.is_char_boundary(from) {
        from += 1;
    }
    last.get(from..).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(load: &str, active: &str) -> Unit {
        Unit { load: load.into(), active: active.into(), sub: "x".into(), ..Unit::default() }
    }

    #[test]
    fn what_will_never_be_up_is_known_at_once() {
        assert_eq!(verdict(&unit("loaded", "active")), Verdict::Up);
        for waits in ["inactive", "activating", "deactivating"] {
            assert_eq!(verdict(&unit("loaded", waits)), Verdict::NotYet);
        }
        for (load, active) in [("loaded", "failed"), ("not-found", "inactive"), ("masked", "inactive")] {
            assert!(matches!(verdict(&unit(load, active)), Verdict::Never(_)), "{load} {active}");
        }
    }

    #[test]
    fn the_log_is_short_whatever_the_service_said() {
        let many: String = (0..100).map(|n| format!("line {n}\n")).collect();
        let told = tail(many.as_bytes());
        assert_eq!((told.lines().count(), told.lines().next()), (LINES, Some("line 80")));
        let long = "é".repeat(100_000);
        assert!((BYTES - 1..=BYTES).contains(&tail(long.as_bytes()).len()));
        assert_eq!(tail(b"\xff\n"), "\u{fffd}");
    }

    #[tokio::test]
    async fn a_systemd_that_is_not_there_is_waited_for_and_then_named() {
        let dir = tempfile::tempdir().unwrap();
        let why = active(&dir.path().join("none"), "a.service", Instant::now()).await.unwrap_err();
        assert!(why.contains("a.service") && why.contains("No such file"), "{why}");
    }

    #[tokio::test]
    async fn a_port_is_waited_for_without_systemd() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let wanted = |timeout| Wanted { port: Some(port), unit: None, timeout };
        assert_eq!(wait(&wanted(Duration::from_secs(30)), None).await, Ok(()));
        drop(listener);
        let not_up = wait(&wanted(Duration::ZERO), None).await.unwrap_err();
        assert!(not_up.why.contains(&port.to_string()) && not_up.log.is_empty(), "{not_up:?}");
    }
}
