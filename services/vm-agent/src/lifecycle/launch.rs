//! Starting a VMM: the plan of a machine from what the stages before have made, and its control group.

use super::Agent;
use crate::phase::Vmm;
use bothy_contract::{
    Code, Error, VmId, VmName,
    image::{BootSet, Rootfs, WorkDisk},
    net::Lease,
    vm::Shape,
};
use bothy_vm_agent::host::cgroup::Bounds;
use bothy_vm_agent::vmm::{Accel, LaunchSpec, Memory, Origin, VmPlan, holder::Holder, wire::Running};
use std::{os::unix::fs::MetadataExt, path::PathBuf};

/// All that a VMM is started from.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) vm: VmId,
    pub(super) name: &'a VmName,
    pub(super) shape: &'a Shape,
    pub(super) boot: &'a BootSet,
    pub(super) lease: &'a Lease,
    pub(super) rootfs: &'a Rootfs,
    pub(super) work: &'a WorkDisk,
    pub(super) memory: Memory,
    pub(super) from: Origin,
}

impl Machine<'_> {
    /// Starts its VMM, which answers when this returns.
    pub(super) async fn start(self, agent: &Agent) -> Result<Running, Error> {
        let choice = agent.choice(self.boot).await?;
        let accel = choice.finding.as_ref().map_or(Accel::Tcg, |f| f.accel);
        let groups = match accel {
            Accel::Kvm => kvm_group()?.into_iter().collect(),
            Accel::Tcg => Vec::new(),
        };
        let plan = VmPlan {
            vm: self.vm,
            name: self.name.to_string(),
            dir: agent.config.holder_dir(self.vm),
            kernel: self.boot.kernel.clone(),
            initrd: self.boot.initrd.clone(),
            rootfs: self.rootfs.base.clone(),
            system: self.rootfs.system.clone(),
            work: self.work.path.clone(),
            cpus: self.shape.cpus,
            memory_mib: self.shape.memory_mib,
            memory: self.memory,
            from: self.from,
            tap: self.lease.tap.clone(),
            mac: self.lease.mac.clone(),
            uid: self.lease.uid,
            groups,
            accel,
            tsc_khz: agent.tsc_khz,
        };
        let cgroup = cgroup(agent, self.vm, self.shape, accel)?;
        let launch = LaunchSpec { cgroup, ..choice.driver.launch_spec(&plan)? };
        let (_, running) = Holder::launch(&agent.program, &launch).await?;
        Ok(running)
    }
}

/// Puts a VMM that runs into the row of `vm`, and has its machine wait for its end.
pub(super) async fn note_launch(agent: &Agent, vm: VmId, vmm: Vmm) -> Result<(), Error> {
    agent.update(vm, move |row| row.phase.launch(vmm)).await?;
    agent.machines.look(vm);
    Ok(())
}

/// The VMM of new VMs, its version and how it runs guests.
pub(super) async fn vmm_name(agent: &Agent, boot: &BootSet) -> Result<String, Error> {
    let choice = agent.choice(boot).await?;
    let (driver, accel) = (&choice.driver, choice.finding.as_ref().map_or(Accel::Tcg, |f| f.accel));
    Ok(format!("{} {} ({accel})", driver.name(), driver.version()))
}

/// The control group of `vm`, made, where this host has such.
fn cgroup(agent: &Agent, vm: VmId, shape: &Shape, accel: Accel) -> Result<Option<PathBuf>, Error> {
    let groups = agent.cgroups.as_ref().ok();
    groups.map(|groups| groups.create(vm, &Bounds::of(shape, accel))).transpose()
}

/// The group that the VM's user must be in to open `/dev/kvm`.
fn kvm_group() -> Result<Option<u32>, Error> {
    let meta = fs_err::metadata("/dev/kvm").map_err(|e| Error::internal("cannot look at /dev/kvm", &e))?;
    group_for(meta.gid(), meta.mode())
}

/// The group that opens a device of that group and mode; `None` where everybody may. Never root's, to which much more than
/// a device is open.
fn group_for(gid: u32, mode: u32) -> Result<Option<u32>, Error> {
    match (mode & 0o006 == 0o006, gid != 0 && mode & 0o060 == 0o060) {
        (true, _) => Ok(None),
        (false, true) => Ok(Some(gid)),
        (false, false) => Err(Error::new(
            Code::FailedPrecondition,
            format!("no VM's user can open /dev/kvm: its group is {gid}, its mode {:o}", mode & 0o777),
        )
        .hint("give it to a group of its own: `chgrp kvm /dev/kvm; chmod 660 /dev/kvm`, or set `vm.accelerator = \"tcg\"`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vms_user_never_gets_roots_group() {
        assert_eq!(group_for(106, 0o20660).unwrap(), Some(106));
        assert_eq!(group_for(0, 0o20666).unwrap(), None);
        assert_eq!(group_for(106, 0o20666).unwrap(), None);
        for (gid, mode) in [(0, 0o20660), (0, 0o20600), (106, 0o20600), (106, 0o20640)] {
            assert_eq!(group_for(gid, mode).unwrap_err().code, Code::FailedPrecondition, "{gid} {mode:o}");
        }
    }
}
