//! The orderly end of the machine. With systemd it is systemd's: a signal to PID 1 starts `poweroff.target` or
//! `reboot.target` (systemd(1), SIGNALS), and the agent, which systemd spares, answers until the last moment.

use std::io;
use std::time::Duration;

use nix::libc;

use crate::sys;

/// Asks systemd, which may have become PID 1 a moment ago: the kernel drops a signal to PID 1 that it does not
/// handle yet, so this waits until it does.
///
/// # Errors
/// When PID 1 does not come to listen within 30 s.
pub(crate) async fn ask_systemd(reboot: bool) -> io::Result<()> {
    let signal = libc::SIGRTMIN() + if reboot { 5 } else { 4 };
    for _ in 0..3000 {
        if listens(&fs_err::read_to_string("/proc/1/status")?, signal) {
            return sys::kill(1, signal);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "PID 1 does not listen for the power-off signal"))
}

/// Whether `/proc/<pid>/status` says that the signal is blocked (for a signalfd, as systemd does) or caught.
fn listens(status: &str, signal: i32) -> bool {
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let bit = u32::try_from(signal - 1).ok().and_then(|shift| 1_u64.checked_shl(shift)).unwrap_or(0);
    (mask("SigBlk:").unwrap_or(0) | mask("SigCgt:").unwrap_or(0)) & bit != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_or_caught_signal_is_heard() {
        // SIGRTMIN+4 is 38: bit 37.
        assert!(listens("SigBlk:\t0000002000000000\nSigCgt:\t0000000000000000\n", 38));
        assert!(listens("SigBlk:\t0000000000000000\nSigCgt:\t0000002000000000\n", 38));
        assert!(!listens("SigBlk:\t0000001000000000\nSigCgt:\t0000000000000000\n", 38));
    }
}
