//! PID 1 for images without an init: reaps every orphan, and ends the machine when the agent or a command such as
//! busybox `poweroff` asks for it.

use std::convert::Infallible;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::reboot::RebootMode;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::link::{Order, STAYED, wait};
use super::{BootError, Tried, mounts, power_down};
use crate::{kmsg, sys};

/// How long commands may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// Stays PID 1 until the machine goes down.
pub(super) fn stay(mut link: UnixStream, agent: Child) -> Result<Infallible, BootError> {
    mounts::for_stay()?;
    let mut mask = SigSet::empty();
    for signal in
        [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGPWR]
    {
        mask.add(signal);
    }
    mask.thread_block().tried(|| "block signals".into())?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .tried(|| "listen for signals".into())?;
    link.write_all(STAYED).tried(|| "tell the agent that the root is switched".into())?;
    let order = watch(&mut link, &signals, &agent).tried(|| "wait as PID 1".into())?;
    end_processes();
    unmount();
    power_down(if order == Order::Reboot { RebootMode::RB_AUTOBOOT } else { RebootMode::RB_POWER_OFF })
}

fn watch(link: &mut UnixStream, signals: &SignalFd, agent: &Child) -> io::Result<Order> {
    let mut linked = true;
    loop {
        reap(agent.id());
        let mut sources = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if linked {
            sources.push(PollFd::new(link.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut sources, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let spoke = sources.get(1).and_then(PollFd::any).unwrap_or(false);
        while let Some(info) = signals.read_signal()? {
            match Signal::try_from(info.ssi_signo.cast_signed()) {
                // What busybox' halt, poweroff and reboot send to PID 1, and the kernel on ctrl-alt-del.
                Ok(Signal::SIGUSR1 | Signal::SIGUSR2 | Signal::SIGPWR) => return Ok(Order::PowerOff),
                Ok(Signal::SIGTERM | Signal::SIGINT) => return Ok(Order::Reboot),
                _ => {}
            }
        }
        if spoke {
            match wait(link) {
                Ok(order @ (Order::PowerOff | Order::Reboot)) => return Ok(order),
                Ok(_) => {}
                // The commands go on; the host sees that nobody answers, and decides.
                Err(error) => {
                    kmsg::error(&format!("the agent is gone: {error}"));
                    linked = false;
                }
            }
        }
    }
}

/// Collects whoever has ended.
fn reap(agent: u32) {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        match status {
            WaitStatus::StillAlive => return,
            status if status.pid().is_some_and(|pid| pid.as_raw().cast_unsigned() == agent) => {
                kmsg::error(&format!("the agent ended: {status:?}"));
            }
            _ => {}
        }
    }
}

/// SIGTERM to everybody but the agent, SIGKILL to who is still there after [`GRACE`].
fn end_processes() {
    let until = Instant::now() + GRACE;
    signal_all(Signal::SIGTERM);
    while Instant::now() < until {
        reap(0);
        if others().is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    signal_all(Signal::SIGKILL);
    let until = Instant::now() + Duration::from_secs(1);
    while !others().is_empty() && Instant::now() < until {
        reap(0);
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal_all(signal: Signal) {
    for pid in others() {
        // Gone in between is what was wanted.
        let _ = sys::kill(pid, signal as i32);
        let _ = sys::kill(pid, Signal::SIGCONT as i32);
    }
}

/// All user processes but PID 1 and those whose argv[0] begins with `@`.
fn others() -> Vec<i32> {
    let Ok(entries) = fs_err::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != 1)
        .filter(|pid| fs_err::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| is_ordinary(&line)))
        .collect()
}

/// Kernel threads and zombies have no command line.
fn is_ordinary(command_line: &[u8]) -> bool {
    command_line.first().is_some_and(|first| *first != b'@')
}

/// Unmounts what can be, innermost first, and makes the rest read-only: nothing is left for a journal to replay.
fn unmount() {
    nix::unistd::sync();
    let mounts = fs_err::read_to_string("/proc/self/mounts").unwrap_or_default();
    for target in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)) {
        if target != "/" && umount2(target, MntFlags::empty()).is_err() {
            let _ = mount(
                None::<&str>,
                target,
                None::<&str>,
                MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
                None::<&str>,
            );
        }
    }
    if let Err(errno) =
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None::<&str>)
    {
        kmsg::error(&format!("make / read-only: {errno}; everything was written by sync"));
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_agent_and_kernel_threads_are_spared() {
        assert!(super::is_ordinary(b"sleep\x00100\x00"));
        assert!(!super::is_ordinary(b"@bothy-guest\x00agent\x00"));
        assert!(!super::is_ordinary(b""));
    }
}
