//! The stages of a create, and of a start, which is the same from the network on but keeps what it finds: then disks and
//! lease are there, asking for them again gives the same ones, and failing takes none of them away. A create resumes its guest
//! from a template where there is one ([`super::template`]), and boots it otherwise; a start boots.
//!
//! ```text
//!  resolve_image -> acquire_network -> prepare_rootfs | prepare_work_disk -> resume -> launch_vmm -> wait_guest -> personalise
//!          | '----> find_template -------^                               (in a create)                             ^  |
//!          '------> host_key ----------------------------------------------------------------------------------------'  |
//!                                                         publish_dns | sync_identity | wait_services  <----------------'
//! ```

use super::{
    Agent, files,
    guest::{Guest, Identity as GuestIdentity, Resumed, plain_id},
    launch::{Machine, note_launch, vmm_name},
    stages::Stages,
};
use crate::phase::{Placed, Vmm};
use bothy_contract::{
    Code, Error, VmId, VmName,
    guest::BootStep,
    image::{BootSet, PrepareRootfs, PrepareWorkDisk, ReleaseDisks, Rootfs, WorkDisk},
    methods::{
        ImageDisksRelease, ImageRootfsPrepare, ImageWorkDiskPrepare, NetLeaseAcquire, NetLeaseRelease,
        WorkspaceIdentitySync,
    },
    net::{AcquireLease, Egress, Lease, ReleaseLease},
    net_group::Membership,
    vm::VmSpec,
    workspace::{Identity, SyncIdentity},
};
use bothy_ops::{Graph, Output, StageCx};
use bothy_vm_agent::vmm::{
    Memory,
    liveness::{self, Liveness},
    wire::{self, HolderHandle},
};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime};
use tokio::time::timeout;

/// How long the guest may take to become what it is told to be.
pub(super) const PERSONALISE: Duration = Duration::from_secs(120);
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
    /// Whether a create is to boot even if there is a template.
    #[serde(default)]
    pub(crate) cold: bool,
}

/// Whether the VM is made by this operation, and so unmade when it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Create,
    Start,
}

/// What a VM's root lies on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Root {
    pub(super) disks: Rootfs,
    /// The template whose overlay it began with.
    pub(super) template: Option<VmId>,
}

/// A VMM that a stage has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Up {
    pub(super) handle: HolderHandle,
    /// What its guest told where it was resumed, and has its identity: else it boots.
    pub(super) resumed: Option<Resumed>,
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
    let mut add = Stages { g, agent: agent.clone(), vm, input, making: mode == Mode::Create };
    let boot = match stopped {
        None => add.resolve(()),
        Some(stopped) => add.resolve(stopped),
    };
    let lease = add.network(boot);
    let key = add.host_key(boot);
    let up = match mode {
        Mode::Create => {
            let template = add.find_template(boot);
            let root = add.rootfs((lease, template));
            let work = add.work_disk(lease, false);
            let up = add.resume((boot, lease, root, work));
            add.launch((boot, lease, root, work, up), Memory::Own)
        }
        Mode::Start => {
            let root = add.rootfs((lease, ()));
            let work = add.work_disk(lease, false);
            add.launch((boot, lease, root, work, ()), Memory::Own)
        }
    };
    let answered = add.wait_guest(lease, up);
    let personal = add.personalise((boot, lease, up, answered, key));
    add.publish_dns(personal);
    add.sync_identity(boot, up, personal);
    let steps = add.wait_services(boot, lease, up, personal);
    g.result(steps);
}

/// Who the guest of a VM is.
pub(super) fn identity(agent: &Agent, vm: VmId, input: &BootInput) -> Result<GuestIdentity, Error> {
    Ok(GuestIdentity {
        hostname: input.name.to_string(),
        machine_id: input.machine_id.clone(),
        key: files::host_key(&agent.state_dir(), vm)?,
        files: Vec::new(),
        work_mib: input.spec.shape.work_mib,
        template: false,
    })
}

/// The way to the guest of a VM that this operation has booted.
pub(super) fn guest(agent: &Agent, vm: VmId, lease: &Lease, handle: HolderHandle) -> Guest {
    Guest::new(Placed { lease: lease.clone() }.holder(&agent.config, vm), handle)
}

pub(super) async fn acquire_network(
    agent: Agent,
    cx: StageCx,
    vm: VmId,
    spec: VmSpec,
) -> Result<Lease, Error> {
    let egress = spec.reaches();
    let nat = egress == Egress::Open;
    // Groups are their owner's, whoever asked.
    let groups = Membership { owner: agent.vm(vm).await?.facts.owner, names: spec.groups };
    let ask =
        AcquireLease { vm, nat, egress: Some(egress), publish: Some(spec.publish), groups: Some(groups) };
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

pub(super) async fn release_network(agent: &Agent, vm: VmId) -> Result<(), Error> {
    agent.bus.call::<NetLeaseRelease>(&ReleaseLease { vm }).await.map(drop)
}

pub(super) async fn release_disks(agent: &Agent, vm: VmId) -> Result<(), Error> {
    agent.bus.call::<ImageDisksRelease>(&ReleaseDisks { vm }).await.map(drop)
}

/// The root's disks. Where those of the template cannot be had, the image's: then the guest boots.
pub(super) async fn prepare_rootfs(
    agent: &Agent,
    cx: &StageCx,
    vm: VmId,
    spec: &VmSpec,
    lease: &Lease,
    template: Option<VmId>,
) -> Result<Root, Error> {
    let ask = PrepareRootfs {
        vm,
        image: spec.image.clone(),
        uid: lease.uid,
        system_mib: spec.shape.system_mib,
        template,
    };
    if template.is_some() {
        match agent.bus.call::<ImageRootfsPrepare>(&ask).await {
            Ok(disks) => return Ok(Root { disks, template }),
            Err(error) => cx.note(format!("the template's disk cannot be had, so it boots: {error}")),
        }
    }
    let disks = agent.bus.call::<ImageRootfsPrepare>(&PrepareRootfs { template: None, ..ask }).await?;
    Ok(Root { disks, template: None })
}

pub(super) async fn prepare_work_disk(
    agent: &Agent,
    vm: VmId,
    spec: &VmSpec,
    lease: &Lease,
    placeholder: bool,
) -> Result<WorkDisk, Error> {
    let (image, uid, work_mib) = (spec.image.clone(), lease.uid, spec.shape.work_mib);
    agent.bus.call::<ImageWorkDiskPrepare>(&PrepareWorkDisk { vm, image, uid, work_mib, placeholder }).await
}

pub(super) async fn launch(agent: &Agent, cx: &StageCx, machine: Machine<'_>) -> Result<Up, Error> {
    let begun = wire::monotonic_now()?;
    let vm = machine.vm;
    // A crash may have come after the launch, or while it was under way: then the holder says so itself, once it is done.
    let holder = Placed { lease: machine.lease.clone() }.holder(&agent.config, vm);
    let quiet = holder.quiet().await?;
    let there = match liveness::look(&holder, None).await {
        Liveness::Alive(status) => Some(status.handle),
        _ => None,
    };
    drop(quiet);
    let (vmm, shape) = (vmm_name(agent, machine.boot).await?, machine.shape.clone());
    let (handle, started) = match there {
        Some(handle) => (handle, None),
        None => {
            let running = machine.start(agent).await?;
            (running.handle, Some(running.vmm_started))
        }
    };
    let process = format!("{vmm}, process {}", handle.vmm.pid);
    note_launch(agent, vm, Vmm { handle, name: vmm, booted: shape, boot_id: None }).await?;
    cx.note(match started {
        // Since the stage began. The benchmark reads this number.
        Some(started) => {
            format!("{process}, started after {} ms", started.saturating_sub(begun).as_millis())
        }
        // By an earlier run of this stage, which the agent did not survive.
        None => process,
    });
    Ok(Up { handle, resumed: None })
}

pub(super) async fn unlaunch(agent: Agent, vm: VmId) -> Result<(), Error> {
    agent.remove_holder(vm).await
}

pub(super) async fn wait_guest(
    agent: Agent,
    cx: StageCx,
    vm: VmId,
    lease: Lease,
    handle: HolderHandle,
) -> Result<(), Error> {
    let guest = guest(&agent, vm, &lease, handle);
    let limit = Duration::from_secs(agent.config.vm.boot_timeout_s.into());
    let answer = async {
        if let Ok(health) = timeout(limit / 2, guest.first_answer()).await {
            return Ok((health, String::new()));
        }
        let reset = boot_anew(&agent, vm, &guest).await;
        Ok((guest.first_answer().await, reset))
    };
    let (health, reset) = cx.unless_stopped(guest.alive_within("the guest's boot", limit, answer)).await?;
    cx.note(format!(
        "agent {} answers{reset}",
        health.version.chars().filter(|c| !c.is_control()).take(40).collect::<String>()
    ));
    let boot_id = plain_id(&health.boot_id);
    agent.note_boot_id(vm, boot_id).await
}

/// Lets a guest that does not come up boot once more. An emulated kernel hangs now and then on its way up, one boot of some
/// hundreds, and then never goes on. What is to be said of it in the stage's note.
async fn boot_anew(agent: &Agent, vm: VmId, guest: &Guest) -> String {
    // Before it: this is of the boot that hangs.
    let busy = guest.busy();
    let reset = async {
        let Some(live) = agent.living(vm).await? else { return Ok(false) };
        let verbs = live.driver()?.reset();
        for verb in &verbs {
            live.place.holder(&agent.config, vm).perform(verb).await?;
        }
        Ok::<_, Error>(!verbs.is_empty())
    };
    match reset.await {
        Ok(true) => {
            tracing::warn!(bothy.vm.id = %vm, "the guest did not come up and was reset{busy}");
            format!("; it had not come up and was reset{busy}")
        }
        Ok(false) => String::new(),
        Err(error) => {
            tracing::warn!(bothy.vm.id = %vm, %error, "the guest did not come up and could not be reset");
            String::new()
        }
    }
}

pub(super) async fn sync_identity(
    agent: Agent,
    cx: StageCx,
    vm: VmId,
    boot: BootSet,
    identity: Identity,
    up: Up,
) -> Result<(), Error> {
    if up.resumed.is_some_and(|resumed| resumed.identity) {
        cx.note("told with its own");
        return Ok(());
    }
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

pub(super) async fn wait_services(
    agent: Agent,
    cx: StageCx,
    vm: VmId,
    boot: BootSet,
    lease: Lease,
    Up { handle, resumed }: Up,
) -> Result<Vec<BootStep>, Error> {
    let guest = guest(&agent, vm, &lease, handle);
    let left = resumed.as_ref().map(|resumed| resumed.left);
    if left.is_some_and(|left| left.grow) {
        // By itself it would do so a moment later; whoever uses it may need the room at once.
        let shape = agent.vm(vm).await?.facts.shape;
        guest.grow_disks(shape.work_mib, shape.system_mib).await?;
    }
    // What was up when its template was saved is up.
    if left.is_some_and(|left| !left.services) {
        cx.note("up since its template was saved");
    } else if !boot.wait.is_empty() {
        let longest = boot.wait.iter().map(|w| w.timeout_s).max().unwrap_or(0);
        let limit = Duration::from_secs(longest.into()) + SLACK;
        let wait = guest.wait_services(&boot.wait);
        cx.note(
            cx.unless_stopped(guest.alive_within("waiting for the guest's services", limit, wait)).await?,
        );
    }
    if let Some(resumed) = resumed {
        return Ok(resumed.steps);
    }
    // It was told the time with its identity, which may have taken long to be heard.
    if let Err(error) = guest.set_clock().await {
        tracing::warn!(bothy.vm.id = %vm, %error, "the guest's clock may be wrong");
    }
    match guest.timeline().await {
        Ok((kernel, steps)) => {
            note_steps(vm, kernel, &steps);
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

/// Puts what a guest did since `start` into the trace.
pub(super) fn note_steps(vm: VmId, start: SystemTime, steps: &[BootStep]) {
    let span = tracing::Span::current();
    for step in steps {
        let start = start + Duration::from_micros(step.started_us);
        let end = start + Duration::from_micros(step.took_us);
        let of = [("bothy.vm.id", vm.to_string())];
        bothy_telemetry::past_span(&span, span_name(&step.name), start, end, of);
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
        "entropy" => "guest.entropy",
        "clock" => "guest.clock",
        "network" => "guest.network",
        "name" => "guest.name",
        "home" => "guest.home",
        _ => "guest.step",
    }
}
