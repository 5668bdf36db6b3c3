//! A create that does not boot: it finds the template of its image and shape, resumes that over its own clone of the disk, and
//! makes the guest its own before anybody else can talk to it. Whatever goes wrong, the create goes on by booting.

use super::{Want, files, key, store};
use crate::{
    lifecycle::{
        Agent,
        boot::{self, BootInput, Root, Up, note_steps},
        guest::Identity,
        launch::{Machine, note_launch, vmm_name},
    },
    phase::Vmm,
};
use bothy_contract::{
    Error, VmId,
    guest::BootStep,
    image::{BootSet, WorkDisk},
    methods::WorkspaceIdentityFiles,
    net::Lease,
    workspace::{GuestFile, IdentityFiles},
};
use bothy_ops::StageCx;
use bothy_vm_agent::vmm::{Memory, Origin, Snapshot};
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, sleep, timeout};

/// How long a guest may take from the start of its VMM to its own identity; a loaded host takes many times what a calm one
/// does, and a boot is slower still.
const RESUME: Duration = Duration::from_secs(30);
/// How often the host key is looked for.
const LOOK: Duration = Duration::from_millis(2);

/// The template that a create can be resumed from. To look for one never fails a create.
pub(in crate::lifecycle) async fn find(
    agent: &Agent,
    cx: &StageCx,
    boot: &BootSet,
    input: &BootInput,
) -> Option<VmId> {
    if input.cold {
        cx.note("it is to boot");
        return None;
    }
    if agent.config.template.max == 0 {
        cx.note("templates are turned off");
        return None;
    }
    if !boot.root_disk.can_be_frozen() {
        cx.note(format!("there are none for root disks that are {}", boot.root_disk.word()));
        return None;
    }
    let shape = &input.spec.shape;
    let found = async {
        let key = key(boot, agent.choice(boot).await?, agent.tsc_khz, shape);
        Ok::<_, Error>(agent.db.read(move |c| store::find(c, &key)).await?)
    };
    match found.await {
        Ok(Some(template)) => match template.set_aside {
            Some(why) => {
                cx.note(format!("its template was set aside: {why}"));
                None
            }
            None => Some(template.id),
        },
        Ok(None) => {
            cx.note("no template yet");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "cannot look for a template");
            None
        }
    }
}

/// Resumes the VM from the template that its root came from. `None` where it has to boot, with everything as it must be for
/// that.
pub(in crate::lifecycle) async fn run(
    agent: &Agent,
    cx: &StageCx,
    vm: VmId,
    input: &BootInput,
    (boot, lease, root, work): (&BootSet, &Lease, &Root, &WorkDisk),
) -> Result<Option<Up>, Error> {
    let Some(template) = root.template else { return Ok(None) };
    let why = if agent.vm(vm).await?.phase.live().is_some() || agent.config.holder_dir(vm).exists() {
        // What its guest wrote by now does not fit what it would be resumed from.
        "it was interrupted".to_owned()
    } else {
        let resumed = resume(agent, cx, vm, input, template, (boot, lease, root, work));
        match cx.unless_stopped(resumed).await {
            Ok(up) => return Ok(Some(up)),
            Err(stopped) if cx.stop().is_cancelled() => return Err(stopped),
            Err(error) => {
                tracing::warn!(bothy.vm.id = %vm, %template, %error, "a guest could not be resumed");
                agent.set_aside(template, &error).await;
                error.to_string()
            }
        }
    };
    agent.remove_holder(vm).await?;
    boot::release_disks(agent, vm).await?;
    boot::prepare_rootfs(agent, cx, vm, &input.spec, lease, None).await?;
    boot::prepare_work_disk(agent, vm, &input.spec, lease, false).await?;
    cx.note(format!("it could not be resumed, so it boots: {why}"));
    Ok(None)
}

async fn resume(
    agent: &Agent,
    cx: &StageCx,
    vm: VmId,
    input: &BootInput,
    template: VmId,
    (boot, lease, root, work): (&BootSet, &Lease, &Root, &WorkDisk),
) -> Result<Up, Error> {
    let begun = Instant::now();
    let limited = async {
        let sealed = agent.templates.memory(&agent.state_dir(), template).await?;
        let state = files::snapshot(&agent.state_dir(), template).state;
        let from = Origin::Template(Snapshot { state, memory: sealed.path() });
        let (name, shape, rootfs) = (&input.name, &input.spec.shape, &root.disks);
        let machine = Machine { vm, name, shape, boot, lease, rootfs, work, memory: Memory::Own, from };
        let (running, files) = tokio::join!(machine.start(agent), users_files(agent, input, boot));
        let handle = running?.handle;
        let loaded = begun.elapsed();
        let vmm = vmm_name(agent, boot).await?;
        note_launch(agent, vm, Vmm { handle, name: vmm, booted: shape.clone(), boot_id: None }).await?;

        let live = agent.running(vm).await?;
        let (holder, driver) = (live.place.holder(&agent.config, vm), live.driver()?);
        holder.perform(&driver.resume()).await?;
        // The template had a placeholder in its place.
        holder.perform(&driver.resize_disk("work", shape.work_mib << 20)).await?;
        let guest = live.guest(&agent.config, vm);
        let identity = Identity { files, ..identity(agent, vm, input).await };
        let told = guest.personalise_resumed(&identity, lease, boot);
        let (boot_id, resumed) = guest.alive_within("giving the guest its identity", RESUME, told).await?;
        note_steps(vm, began(&resumed.steps), &resumed.steps);
        agent.note_boot_id(vm, boot_id).await?;
        agent.db.write(move |tx| store::used(tx, template)).await?;
        // Since the stage began.
        let (loaded, itself) = (loaded.as_millis(), begun.elapsed().as_millis());
        cx.note(format!("loaded after {loaded} ms, itself after {itself} ms"));
        Ok(Up { handle, resumed: Some(resumed) })
    };
    match timeout(RESUME, limited).await {
        Ok(done) => done,
        Err(_) => Err(Error::new(
            bothy_contract::Code::DeadlineExceeded,
            format!("the guest did not answer within {} s", RESUME.as_secs()),
        )),
    }
}

/// The files of the user's identity. Where they are not to be had, `sync_identity` says why.
async fn users_files(agent: &Agent, input: &BootInput, boot: &BootSet) -> Vec<GuestFile> {
    let (home, identity) = (boot.home.clone(), input.spec.identity.clone());
    if identity == Default::default() {
        return Vec::new();
    }
    match agent.bus.call::<WorkspaceIdentityFiles>(&IdentityFiles { home, identity }).await {
        Ok(told) => told.files,
        Err(error) => {
            tracing::warn!(%error, "a guest gets its user's identity later");
            Vec::new()
        }
    }
}

/// When the clock began that counts these steps, the last of which ends now.
fn began(steps: &[BootStep]) -> SystemTime {
    let now = SystemTime::now();
    let ends = steps.iter().map(|step| step.started_us.saturating_add(step.took_us));
    now.checked_sub(Duration::from_micros(ends.max().unwrap_or_default())).unwrap_or(now)
}

/// Who the guest is to be. Its host key is made beside this stage, by one that takes about as long as the VMM; if that fails,
/// so does the create, and nothing waits here any more.
async fn identity(agent: &Agent, vm: VmId, input: &BootInput) -> Identity {
    loop {
        if let Ok(identity) = boot::identity(agent, vm, input) {
            return identity;
        }
        sleep(LOOK).await;
    }
}

/// What a create that has booted would have liked.
pub(in crate::lifecycle) fn wanted(input: &BootInput) -> Option<Want> {
    (!input.cold).then(|| Want { image: input.spec.image.clone(), shape: input.spec.shape.clone() })
}
