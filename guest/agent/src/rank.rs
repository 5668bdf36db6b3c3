//! Who comes last. A machine that was resumed from a template has news for everybody: the clock has jumped, a disk is mounted,
//! and what was held still goes on. systemd alone has hundreds of milliseconds of an emulated processor to do with that, all of
//! it at the moment of the user's first command. So for a second all processes of the template come after that.
//!
//! The kernel shares the processor out among sessions (autogroup, sched(7)), so it is a session's niceness that counts: that
//! of a process alone would only count against others of its session.

/// The lowest rank.
const LAST: &str = "19";
/// The usual one.
const USUAL: &str = "0";

/// Has all processes come last but this one and its children; which ones. A kernel that does not group by session has nothing
/// to write to, and they stay as they are.
pub(crate) fn lower() -> Vec<i32> {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let Ok(entries) = fs_err::read_dir("/proc") else { return Vec::new() };
    let all = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(|pid| *pid != own && is_ordinary(*pid, own) && set(*pid, LAST)).collect()
}

/// Gives them back their rank. Who is gone meanwhile does not need it.
pub(crate) fn raise(pids: &[i32]) {
    for pid in pids {
        set(*pid, USUAL);
    }
}

/// Whether `pid` is no kernel thread, and in another session than this process: a command of the host's is in its own, and the
/// agent's own session is not to come last.
fn is_ordinary(pid: i32, own: i32) -> bool {
    let has_program = fs_err::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
    has_program && session(pid).is_some_and(|session| Some(session) != self::session(own))
}

fn session(pid: i32) -> Option<i32> {
    session_of(&fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The sixth field of `/proc/<pid>/stat`; the second is a name in parentheses, which may hold anything.
fn session_of(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(3)?.parse().ok()
}

fn set(pid: i32, rank: &str) -> bool {
    fs_err::write(format!("/proc/{pid}/autogroup"), rank).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    #[test]
    fn a_session_is_read_behind_any_name() {
        assert_eq!(session_of("7 (a) b) S) S 1 5 42 0 -1"), Some(42));
        assert_eq!(session_of("7 (a"), None);
    }

    #[test]
    fn our_own_session_is_not_ordinary() {
        let own = i32::try_from(std::process::id()).unwrap();
        let mut command = Command::new("cat");
        // A group of its own, but no session.
        let mut child = command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let ordinary = is_ordinary(pid, own);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!ordinary && !is_ordinary(2, own), "nor is a kernel thread, or nobody");
    }
}
