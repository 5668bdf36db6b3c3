//! Becoming the VMM.

use crate::{jail, memory};
use nix::sys::{prctl, signal::Signal};
use std::{
    io::Write,
    os::unix::process::CommandExt,
    process::{Command, ExitCode, Stdio},
};

/// Tied to `parent`'s life, becomes `argv`. Returns only where that fails; the reason is on standard error.
pub(crate) fn run(parent: i32, wait: bool, argv: &[String]) -> ExitCode {
    let why = become_vmm(parent, wait, argv);
    // The holder reads this into vmm.log, and reports it.
    drop(writeln!(std::io::stderr(), "bothy-vmm: {why}"));
    ExitCode::from(127)
}

fn become_vmm(parent: i32, wait: bool, argv: &[String]) -> String {
    if let Err(err) = prctl::set_pdeathsig(Signal::SIGKILL) {
        return format!("cannot tie the VMM to its holder: {err}");
    }
    // The parent may have died before that call; then the signal never comes (prctl(2)).
    if nix::unistd::getppid().as_raw() != parent {
        return "the holder is gone".into();
    }
    if let Err(err) = memory::unbound() {
        return format!("cannot lift the holder's limit of memory: {err}");
    }
    let Some((program, args)) = argv.split_first() else { return "no program is given".into() };
    let mut vmm = Command::new(program);
    vmm.args(args);
    if wait {
        if let Err(err) = jail::wait() {
            return format!("the holder gave it up: {err}");
        }
        vmm.stdin(Stdio::null());
    }
    let err = vmm.exec();
    format!("cannot run {program}: {err}")
}
