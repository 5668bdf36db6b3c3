//! The stages of a create, and of a start, which is the same from the network on but keeps what it finds: then disks and
//! lease are there, asking for them again gives the same ones, and failing takes none of them away.
//!
//! ```text
//!  resolve_image -> acquire_network -> prepare_rootfs | prepare_work_disk -> launch_vmm -> wait_guest -> personalise
//!                   host_key ------------------------------------------------------------------------------^  |
//!                                                         publish_dns | sync_identity | wait_services  <-------'
//! ```

use super::{Agent, files, guest::Guest};
use crate::phase::{Placed, Vmm};
use bothy_contract::{
    Code, Error, VmId, VmName,
    guest::BootStep,
    image::{BootSet, ImageRef, PrepareRootfs, PrepareWorkDisk, ReleaseDisks, Rootfs, WorkDisk},
    methods::{
        ImageDisksRelease, ImageResolve, ImageRootfsPrepare, ImageWorkDiskPrepare, NetLeaseAcquire,
        NetLeaseRelease, NetNameSet, WorkspaceIdentitySync,
    },
    net::{AcquireLease, Egress, Lease, NameVm, ReleaseLease},
    vm::{Shape, VmSpec},
    workspace::{Identity, SyncIdentity},
};
use bothy_guest_proto::v1::HealthReply;
use bothy_ops::{Graph, Output, StageCx, UndoCx};
use bothy_vm_agent::host::cgroup::Bounds;
use bothy_vm_agent::vmm::{
    Accel, LaunchSpec, Memory, Origin, VmPlan,
    holder::Holder,
    liveness::{self, Liveness},
    wire::{self, HolderHandle},
};
use serde::{Deserialize, Serialize};
use std::{os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

/// How long the guest may take to become what it is told to be.
const PERSONALISE: Duration = Duration::from_secs(120);
/// What waiting for services may take beyond their own times.
const SLACK: Duration = Duration::from_secs(30);

/// All that a create's stages are made from; a start's too.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct BootInput {
    /// The VM's name.
    pub(crate) name: VmName,
    /// What was asked for.
    pub(crate) spec: VmSpec,
    /// The guest's machine-id.
    pub(crate) machine_id: String,
}

/// Whether the VM is made by this operation, and so unmade when it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Create,
    Start,
}

/// Adds the stages of a create or start to `g`; those of a restart begin once `stopped`.
pub(crate) fn add(
    g: &mut Graph,
    agent: &Agent,
    vm: VmId,
    input: BootInput,
    mode: Mode,
    stopped: Option<Output<()>>,
) {
    let BootInput { name, spec, machine_id } = input;
    let making = mode == Mode::Create;

    let a = agent.clone();
    let image = spec.image.clone();
    let resolve = move |cx: StageCx, ()| async move {
        cx.unless_stopped(a.bus.call::<ImageResolve>(&ImageRef { image })).await
    };
    let boot = match stopped {
        None => g.stage("resolve_image", (), resolve),
        Some(stopped) => g.stage("resolve_image", stopped, resolve),
    };

    let (a, undo, s) = (agent.clone(), agent.clone(), spec.clone());
    let lease = g.undoable(
        "acquire_network",
        boot,
        move |cx, _| acquire_network(a, cx, vm, s),
        move |_| unmake_network(undo.clone(), vm, making),
    );
    let (a, undo) = (agent.clone(), agent.clone());
    let key = g.undoable(
        "host_key",
        boot,
        move |_, _| async move { files::make_host_key(&a.state_dir(), vm).await },
        move |_| {
            let undo = undo.clone();
            async move { if making { files::remove_vm(&undo.state_dir(), vm) } else { Ok(()) } }
        },
    );
    let (a, undo, s) = (agent.clone(), agent.clone(), spec.clone());
    let rootfs = g.undoable(
        "prepare_rootfs",
        lease,
        move |_, lease| async move {
            let system_mib = s.shape.system_mib;
            a.bus
                .call::<ImageRootfsPrepare>(&PrepareRootfs { vm, image: s.image, uid: lease.uid, system_mib, template: None })
                .await
        },
        move |_| unmake_disks(undo.clone(), vm, making),
    );
    let (a, undo, s) = (agent.clone(), agent.clone(), spec.clone());
    let work = g.undoable(
        "prepare_work_disk",
        lease,
        move |cx, lease| async move {
            let work_mib = s.shape.work_mib;
            let disk = a
                .bus
                .call::<ImageWorkDiskPrepare>(&PrepareWorkDisk {
                    vm,
                    image: s.image,
                    uid: lease.uid,
                    work_mib,
                })
                .await?;
            cx.note(match disk.how.as_str() {
                "kept" => "the disk that was there".to_owned(),
                how => format!("work-seed cloned by {how}"),
            });
            Ok(disk)
        },
        move |_| unmake_disks(undo.clone(), vm, making),
    );
    let (a, undo, n, s) = (agent.clone(), agent.clone(), name.clone(), spec.clone());
    let handle = g.undoable(
        "launch_vmm",
        (boot, lease, (rootfs, work)),
        move |cx, (boot, lease, disks)| launch(a, cx, vm, n, s, boot, lease, disks),
        move |cx| unlaunch(undo.clone(), cx, vm),
    );
    let a = agent.clone();
    let answered = g.stage("wait_guest", (lease, handle), move |cx, (lease, handle)| {
        wait_guest(a, cx, vm, lease, handle)
    });

    let (a, n) = (agent.clone(), name.clone());
    let personal = g.stage(
        "personalise",
        (boot, lease, handle, answered, key),
        move |cx, (boot, lease, handle, (), ())| async move {
            let guest = guest(&a, vm, &lease, handle);
            let key = files::host_key(&a.state_dir(), vm)?;
            let work = guest.personalise(n.as_str(), &machine_id, &lease, &boot, key);
            cx.unless_stopped(guest.alive_within("giving the guest its identity", PERSONALISE, work)).await
        },
    );
    let (a, undo) = (agent.clone(), agent.clone());
    g.undoable(
        "publish_dns",
        personal,
        move |_, ()| async move {
            a.bus.call::<NetNameSet>(&NameVm { vm, name }).await?;
            Ok(())
        },
        move |_| {
            let undo = undo.clone();
            async move { undo.unpublish_dns(vm).await }
        },
    );
    let (a, identity) = (agent.clone(), spec.identity);
    g.stage("sync_identity", (boot, personal), move |cx, (boot, ())| {
        sync_identity(a, cx, vm, boot, identity)
    });

    let a = agent.clone();
    let steps =
        g.stage("wait_services", (boot, lease, handle, personal), move |cx, (boot, lease, handle, ())| {
            wait_services(a, cx, vm, boot, lease, handle)
        });
    g.result(steps);
}

/// The way to the guest of a VM that this operation has booted.
fn guest(agent: &Agent, vm: VmId, lease: &Lease, handle: HolderHandle) -> Guest {
    Guest::new(Placed { lease: lease.clone() }.holder(&agent.config, vm), handle)
}

async fn acquire_network(agent: Agent, cx: StageCx, vm: VmId, spec: VmSpec) -> Result<Lease, Error> {
    let egress = spec.reaches();
    let nat = egress == Egress::Open;
    let ask = AcquireLease { vm, nat, egress: Some(egress), publish: Some(spec.publish) };
    let lease = agent.bus.call::<NetLeaseAcquire>(&ask).await?;
    cx.note(format!("{} on {}", lease.address, lease.tap));
    let kept = lease.clone();
    agent
        .update(vm, move |row| {
            row.phase.place(kept);
            Ok(())
        })
        .await?;
    Ok(lease)
}

async fn unmake_network(agent: Agent, vm: VmId, making: bool) -> Result<(), Error> {
    if making {
        agent.bus.call::<NetLeaseRelease>(&ReleaseLease { vm }).await?;
    }
    Ok(())
}

async fn unmake_disks(agent: Agent, vm: VmId, making: bool) -> Result<(), Error> {
    if making {
        agent.bus.call::<ImageDisksRelease>(&ReleaseDisks { vm }).await?;
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "the outputs of all earlier stages")]
async fn launch(
    agent: Agent,
    cx: StageCx,
    vm: VmId,
    name: VmName,
    spec: VmSpec,
    boot: BootSet,
    lease: Lease,
    (rootfs, work): (Rootfs, WorkDisk),
) -> Result<HolderHandle, Error> {
    let begun = wire::monotonic_now()?;
    let choice = agent.choice(&boot).await?;
    let (driver, accel) = (&choice.driver, choice.finding.as_ref().map_or(Accel::Tcg, |f| f.accel));
    let vmm = format!("{} {} ({accel})", driver.name(), driver.version());
    // A crash may have come after the launch, or while it was under way: then the holder says so itself, once it is done.
    let holder = Placed { lease: lease.clone() }.holder(&agent.config, vm);
    let quiet = holder.quiet().await?;
    let there = match liveness::look(&holder, None).await {
        Liveness::Alive(status) => Some(status.handle),
        _ => None,
    };
    drop(quiet);
    let (handle, started) = match there {
        Some(handle) => (handle, None),
        None => {
            let groups = match accel {
                Accel::Kvm => kvm_group()?.into_iter().collect(),
                Accel::Tcg => Vec::new(),
            };
            let plan = VmPlan {
                vm,
                name: name.to_string(),
                dir: agent.config.holder_dir(vm),
                kernel: boot.kernel,
                initrd: boot.initrd,
                rootfs: rootfs.base,
                system: rootfs.system,
                work: work.path,
                cpus: spec.shape.cpus,
                memory_mib: spec.shape.memory_mib,
                memory: Memory::Own,
                from: Origin::Boot,
                tap: lease.tap,
                mac: lease.mac,
                uid: lease.uid,
                groups,
                accel,
                tsc_khz: agent.tsc_khz,
            };
            let launch =
                LaunchSpec { cgroup: cgroup(&agent, vm, &spec.shape, accel)?, ..driver.launch_spec(&plan)? };
            let (_, running) = Holder::launch(&agent.program, &launch).await?;
            (running.handle, Some(running.vmm_started))
        }
    };
    let kept = Vmm { handle, name: vmm.clone(), booted: spec.shape, boot_id: None };
    agent.update(vm, move |row| row.phase.launch(kept)).await?;
    agent.machines.look(vm);
    let process = format!("{vmm}, process {}", handle.vmm.pid);
    cx.note(match started {
        // Since the stage began. The benchmark reads this number.
        Some(started) => {
            format!("{process}, started after {} ms", started.saturating_sub(begun).as_millis())
        }
        // By an earlier run of this stage, which the agent did not survive.
        None => process,
    });
    Ok(handle)
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

async fn unlaunch(agent: Agent, _: UndoCx, vm: VmId) -> Result<(), Error> {
    agent.remove_holder(vm).await
}

async fn wait_guest(
    agent: Agent,
    cx: StageCx,
    vm: VmId,
    lease: Lease,
    handle: HolderHandle,
) -> Result<(), Error> {
    let guest = guest(&agent, vm, &lease, handle);
    let limit = Duration::from_secs(agent.config.vm.boot_timeout_s.into());
    let answer = async { Ok(guest.first_answer().await) };
    let health = cx.unless_stopped(guest.alive_within("the guest's boot", limit, answer)).await?;
    cx.note(format!(
        "agent {} answers",
        health.version.chars().filter(|c| !c.is_control()).take(40).collect::<String>()
    ));
    let boot_id = boot_id(&health);
    agent.note_boot_id(vm, boot_id).await
}

/// The boot id that a guest tells: whatever it is, it is short and plain.
pub(super) fn boot_id(health: &HealthReply) -> String {
    health.boot_id.chars().filter(char::is_ascii_graphic).take(64).collect()
}

async fn sync_identity(
    agent: Agent,
    cx: StageCx,
    vm: VmId,
    boot: BootSet,
    identity: Identity,
) -> Result<(), Error> {
    if identity == Identity::default() {
        cx.note("no identity to sync");
        return Ok(());
    }
    cx.unless_stopped(agent.bus.call::<WorkspaceIdentitySync>(&SyncIdentity {
        vm,
        home: boot.home,
        identity,
    }))
    .await?;
    Ok(())
}

async fn wait_services(
    agent: Agent,
    cx: StageCx,
    vm: VmId,
    boot: BootSet,
    lease: Lease,
    handle: HolderHandle,
) -> Result<Vec<BootStep>, Error> {
    let guest = guest(&agent, vm, &lease, handle);
    if !boot.wait.is_empty() {
        let longest = boot.wait.iter().map(|w| w.timeout_s).max().unwrap_or(0);
        let limit = Duration::from_secs(longest.into()) + SLACK;
        let wait = guest.wait_services(&boot.wait);
        cx.note(
            cx.unless_stopped(guest.alive_within("waiting for the guest's services", limit, wait)).await?,
        );
    }
    match guest.timeline().await {
        Ok((kernel, steps)) => {
            let span = tracing::Span::current();
            for step in &steps {
                let start = kernel + Duration::from_micros(step.started_us);
                let end = start + Duration::from_micros(step.took_us);
                bothy_telemetry::past_span(
                    &span,
                    span_name(&step.name),
                    start,
                    end,
                    [("bothy.vm.id", vm.to_string())],
                );
            }
            Ok(steps)
        }
        // A guest that is ready is ready, whether it tells its times or not; one whose VMM is gone is not.
        Err(e) if handle.vmm.is_alive() => {
            tracing::warn!(bothy.vm.id = %vm, error = %e, "the guest does not tell its boot's times");
            Ok(Vec::new())
        }
        Err(e) => Err(Error { code: Code::StageFailed, ..e }),
    }
}

/// Span names are fixed words, whatever a guest calls its steps.
fn span_name(step: &str) -> &'static str {
    match step {
        "kernel" => "guest.kernel",
        "modules" => "guest.modules",
        "mounts" => "guest.mounts",
        "channel" => "guest.channel",
        "personalise" => "guest.personalise",
        "init" => "guest.init",
        _ => "guest.step",
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
