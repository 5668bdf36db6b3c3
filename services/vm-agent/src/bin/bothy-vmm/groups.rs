//! `bothy-vmm groups`: the one process of `bothy-vms.service`, in whose control group VMs' groups are made. systemd removes the
//! group of a unit without processes, and a group that passes controllers on may have no processes of its own (cgroups(7)); so
//! this sits in a group below, and does nothing until it is ended.

use bothy_vm_agent::host::cgroup;
use nix::unistd::pause;
use std::{convert::Infallible, process::ExitCode};

/// The group of this process.
const OWN: &str = "keeper";

/// Moves into its own group, says so to systemd, and stays until a signal ends it.
pub(crate) fn run() -> ExitCode {
    match stay() {
        Ok(never) => match never {},
        Err(why) => {
            // systemd's journal takes what it is told here.
            drop(std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("bothy-vmm groups: {why}\n").as_bytes(),
            ));
            ExitCode::FAILURE
        }
    }
}

fn stay() -> Result<Infallible, String> {
    let (mount, unit) = cgroup::own()?;
    if unit == mount {
        return Err(
            "it is for the unit bothy-vms.service, and this is not in one: `systemctl start bothy-vms`"
                .to_owned(),
        );
    }
    cgroup::enter(&unit.join(OWN)).map_err(|e| format!("its group is not delegated to it: {e}"))?;
    sd_notify::notify(&[sd_notify::NotifyState::Ready]).map_err(|e| format!("cannot tell systemd: {e}"))?;
    loop {
        pause();
    }
}
