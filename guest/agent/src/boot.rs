//! PID 1 of the initramfs, from its first line to the image's own init. Single-threaded, and quick: every
//! instruction before the channel answers is emulated where the host has no KVM.
//!
//! A step that fails says `bothy-guest: ...` on the console and powers the machine off: a guest that is stuck is
//! worse than one that is gone, and a panic of PID 1 says nothing.

mod disk;
mod link;
mod modules;
mod mounts;
mod reaper;
mod switch;

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use nix::sys::reboot::{RebootMode, reboot};

pub(crate) use disk::{by_serial, sectors};
pub(crate) use link::{Order, receive_steps};
pub(crate) use mounts::SYSTEM;
pub(crate) use switch::NEW_ROOT;

use crate::timeline::{Step, now_us};
use crate::{kmsg, machine};

/// Why the boot stopped.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct BootError {
    what: String,
    source: io::Error,
}

/// Says what was tried when it fails.
pub(crate) trait Tried<T> {
    /// Wraps the error with what was tried.
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Tried<T> for Result<T, E> {
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, BootError> {
        self.map_err(|source| BootError { what: what(), source: source.into() })
    }
}

/// Boots the guest. Returns only when even power-off failed.
#[must_use]
pub fn run() -> ExitCode {
    let Err(error) = boot();
    kmsg::error(&format!("boot failed, powering off: {error}"));
    power_off(RebootMode::RB_POWER_OFF)
}

fn boot() -> Result<Infallible, BootError> {
    let entered = now_us();
    let mut steps = vec![Step { name: "kernel".into(), started_us: 0, took_us: entered }];
    mounts::kernel_file_systems()?;
    modules::load()?;
    steps.push(Step::ends_now("modules", entered));

    let began = now_us();
    mounts::new_root()?;
    steps.push(Step::ends_now("mounts", began));

    let (mut link, theirs) = UnixStream::pair().tried(|| "make the link to the agent".into())?;
    link::send_steps(&mut link, &steps).tried(|| "hand the boot steps to the agent".into())?;
    let agent = switch::spawn_agent(theirs).tried(|| "start the agent".into())?;
    match link::wait(&mut link).tried(|| "wait for the agent's word".into())? {
        Order::Systemd => switch::into_init(),
        Order::Stay => {
            switch::into_new_root()?;
            reaper::stay(link, agent)
        }
        Order::PowerOff => power_down(RebootMode::RB_POWER_OFF),
        Order::Reboot => power_down(RebootMode::RB_AUTOBOOT),
    }
}

/// Ends the machine after writing everything to disk.
fn power_down(how: RebootMode) -> ! {
    power_off(how);
    // Only where the kernel refused to: PID 1 must not end.
    loop {
        nix::unistd::pause();
    }
}

fn power_off(how: RebootMode) -> ExitCode {
    let how = if machine::ends_by_reset() { RebootMode::RB_AUTOBOOT } else { how };
    nix::unistd::sync();
    let Err(errno) = reboot(how);
    kmsg::error(&format!("power off: {errno}"));
    ExitCode::FAILURE
}
