//! The stages of making a template: a VM is booted until it is ready, as nobody's, and taken apart into what is kept of it.
//!
//! ```text
//!  resolve_image -> acquire_network -> prepare_rootfs | prepare_work_disk -> launch_vmm -> wait_guest -> personalise
//!                   host_key ------------------------------------------------------------------------------^  |
//!                                         release <- freeze_disks <- save <- wait_services <------------------'
//! ```
//! Its VM has a row like any other, that no list shows, and its lease, holder and disks go the way of any other's. One that
//! was cut off is undone: half a template is worth nothing.

use super::files;
use crate::lifecycle::{
    Agent,
    boot::{self, BootInput, Up},
    files as vm_files,
    guest::Identity,
    launch,
    stages::Stages,
};
use bothy_contract::{
    Error, VmId,
    image::{BootSet, ForgetTemplate, FreezeDisks, FrozenDisks},
    methods::{ImageTemplateForget, ImageTemplateFreeze},
    net::Lease,
    vm::TemplateRecord,
};
use bothy_ops::{Graph, Output, StageCx};
use bothy_vm_agent::vmm::{Memory, Save};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long a guest may take to become quiet.
const QUIESCE: Duration = Duration::from_secs(60);

/// What a template is made from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MakeInput {
    /// How its VM is booted.
    pub(crate) boot: BootInput,
    /// What it will be found by.
    pub(crate) key: String,
}

/// Adds the stages of making a template of `vm` to `g`.
pub(crate) fn add(g: &mut Graph, agent: &Agent, vm: VmId, input: MakeInput) {
    let input = input.boot;
    let mut add = Stages { g, agent: agent.clone(), vm, input: input.clone(), making: true };
    let boot = add.resolve(());
    let lease = add.network(boot);
    let key = add.host_key(boot);
    let root = add.rootfs((lease, ()));
    let work = add.work_disk(lease, true);
    let memory = make_files(&mut add, lease);
    let place = files::snapshot(&agent.state_dir(), vm).memory;
    let up = add.launch((boot, lease, root, work, memory), Memory::Shared(place));
    let answered = add.wait_guest(lease, up);

    let (a, i) = (agent.clone(), input.clone());
    let personal = add.g.stage(
        "personalise",
        (boot, lease, up, answered, key),
        move |cx, (boot, lease, up, (), ())| async move {
            let guest = boot::guest(&a, vm, &lease, up.handle);
            let identity = Identity { template: true, ..boot::identity(&a, vm, &i)? };
            let work = guest.personalise(&identity, &lease, &boot);
            let what = "giving the guest a template's identity";
            cx.unless_stopped(guest.alive_within(what, boot::PERSONALISE, work)).await.map(drop)
        },
    );
    let waited = add.wait_services(boot, lease, up, personal);

    let (a, m) = (agent.clone(), input.spec.shape.memory_mib);
    let saved = g.stage("save", (lease, up, waited), move |cx, (lease, up, _)| async move {
        save(&a, &cx, vm, &lease, up, m).await
    });
    let (a, undo) = (agent.clone(), agent.clone());
    let frozen = g.undoable(
        "freeze_disks",
        saved,
        move |_, ()| async move {
            // Nobody writes to them any more.
            a.kill(vm).await?;
            a.bus.call::<ImageTemplateFreeze>(&FreezeDisks { vm }).await
        },
        move |_| {
            let undo = undo.clone();
            async move { forget_disks(&undo, vm).await }
        },
    );
    let a = agent.clone();
    let record = g.stage("release", (boot, frozen), move |_, (boot, frozen)| async move {
        release(&a, vm, input, boot, frozen).await
    });
    g.result(record);
}

/// Where its memory will be.
fn make_files(add: &mut Stages<'_>, lease: Output<Lease>) -> Output<()> {
    let (a, undo, vm) = (add.agent.clone(), add.agent.clone(), add.vm);
    add.g.undoable(
        "make_files",
        lease,
        move |_, _| async move { files::make(&a.state_dir(), vm) },
        move |_| {
            let undo = undo.clone();
            async move { files::remove(&undo.state_dir(), vm) }
        },
    )
}

/// Has the guest stand still, and saves the state of its devices; its memory is in its file already.
async fn save(
    agent: &Agent,
    cx: &StageCx,
    vm: VmId,
    lease: &Lease,
    up: Up,
    memory_mib: u64,
) -> Result<(), Error> {
    let guest = boot::guest(agent, vm, lease, up.handle);
    let quiet = guest.alive_within("making the guest quiet", QUIESCE, guest.quiesce());
    for left in cx.unless_stopped(quiet).await? {
        cx.note(left);
    }
    let live = agent.running(vm).await?;
    let holder = live.place.holder(&agent.config, vm);
    holder.perform(&live.driver()?.pause()).await?;
    let saved = holder.save(&files::snapshot(&agent.state_dir(), vm), Save::Devices, memory_mib).await?;
    let memory = saved.memory_bytes.unwrap_or_default();
    cx.note(format!("{} MiB of memory, {} KiB of devices", memory >> 20, saved.state_bytes >> 10));
    Ok(())
}

/// Gives back all that is not kept.
async fn release(
    agent: &Agent,
    vm: VmId,
    input: BootInput,
    boot: BootSet,
    frozen: FrozenDisks,
) -> Result<TemplateRecord, Error> {
    agent.remove_holder(vm).await?;
    boot::release_network(agent, vm).await?;
    vm_files::remove_vm(&agent.state_dir(), vm)?;
    let bytes = files::allocated(&agent.state_dir(), vm)? + frozen.allocated;
    Ok(TemplateRecord {
        id: vm,
        image: input.spec.image,
        shape: input.spec.shape,
        vmm: launch::vmm_name(agent, &boot).await?,
        created: Timestamp::now(),
        used: None,
        uses: 0,
        bytes,
        set_aside: None,
    })
}

/// Removes the frozen disks of a template.
pub(super) async fn forget_disks(agent: &Agent, template: VmId) -> Result<(), Error> {
    agent.bus.call::<ImageTemplateForget>(&ForgetTemplate { template }).await.map(drop)
}
