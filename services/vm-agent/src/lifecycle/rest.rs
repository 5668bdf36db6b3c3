//! The stages of a pause, of a suspend, and of going on from either.
//!
//! ```text
//!   pause:    pause_vmm                                                 the memory stays in the VMM
//!   suspend:  pause_vmm -> save_memory -> end_vmm                       the memory goes to disk
//!   resume:   resume_vmm -> greet_guest                                 from a pause
//!             resolve_image -> acquire_network -> prepare_rootfs | prepare_work_disk -> launch_vmm ->
//!                     forget_memory -> resume_vmm -> greet_guest -> publish_dns     from a suspend
//! ```
//! Memory on disk is half of one moment, of which the disks are the other: so it is forgotten before its guest goes on, and
//! while it is there, nothing boots from these disks. `greet_guest` tells the guest what it has missed: the time.

use super::{
    Agent,
    ask::{Ask, ResumeInput},
    boot::{Root, Up, launch, unlaunch},
    end::dead,
    files,
    launch::Machine,
    stages::Stages,
};
use crate::{
    phase::Live,
    store::{Asleep, Vm},
};
use bothy_contract::{Code, Error, VmId, vm::VmState};
use bothy_ops::{Graph, Inputs, Output, StageCx};
use bothy_vm_agent::vmm::{Memory, Origin, Save};
use std::time::Duration;
use tokio::time::Instant;

/// How long a guest that goes on may take to take the time.
const GREET: Duration = Duration::from_secs(60);
/// How long a use of a VM waits for it to go on.
const AWAKE: Duration = Duration::from_secs(60);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Adds the stages of a pause to `g`.
pub(crate) fn add_pause(g: &mut Graph, agent: &Agent, vm: VmId) {
    g.not_cancellable();
    add_pause_vmm(g, agent, vm);
}

fn add_pause_vmm(g: &mut Graph, agent: &Agent, vm: VmId) -> Output<()> {
    let (a, undo) = (agent.clone(), agent.clone());
    g.undoable(
        "pause_vmm",
        (),
        move |_, ()| async move {
            let live = a.live(vm).await?;
            live.place.holder(&a.config, vm).perform(&live.driver()?.pause()).await.map(drop)
        },
        move |_| {
            let undo = undo.clone();
            async move {
                match undo.living(vm).await? {
                    Some(live) => go_on(&undo, vm, &live).await,
                    None => Ok(()),
                }
            }
        },
    )
}

async fn go_on(agent: &Agent, vm: VmId, live: &Live) -> Result<(), Error> {
    live.place.holder(&agent.config, vm).perform(&live.driver()?.resume()).await.map(drop)
}

/// Whether the VMM of `vm` can save its guest.
pub(crate) fn check(vm: &Vm) -> Result<(), Error> {
    let Some(live) = vm.phase.live() else { return Ok(()) };
    if live.driver()?.capabilities().snapshot {
        return Ok(());
    }
    let (name, vmm) = (&vm.facts.name, &live.vmm.name);
    Err(Error::new(
        Code::FailedPrecondition,
        format!("{name} cannot be suspended: {vmm} cannot save a guest"),
    )
    .hint(format!("`bothy vm pause {name}` keeps it in memory, `bothy vm stop {name}` keeps its disks")))
}

/// Adds the stages of a suspend to `g`.
pub(crate) fn add_suspend(g: &mut Graph, agent: &Agent, vm: VmId) {
    g.not_cancellable();
    let paused = add_pause_vmm(g, agent, vm);
    let (a, undo) = (agent.clone(), agent.clone());
    let saved = g.undoable(
        "save_memory",
        paused,
        move |cx, ()| async move { save(&a, &cx, vm).await },
        move |_| {
            let undo = undo.clone();
            async move { undo.forget_memory(vm).await }
        },
    );
    let a = agent.clone();
    g.stage("end_vmm", saved, move |_, ()| async move {
        a.kill(vm).await?;
        // Its name still leads to it: the next use brings it back.
        dead(&a, vm).await
    });
}

async fn save(agent: &Agent, cx: &StageCx, vm: VmId) -> Result<(), Error> {
    // Once it is on disk, its VMM may have been ended by an earlier run of this operation.
    if agent.vm(vm).await?.facts.asleep.is_some() {
        return Ok(());
    }
    let live = agent.live(vm).await?;
    let shape = live.vmm.booted.clone();
    let to = files::asleep(&agent.state_dir(), vm);
    let what = Save::Whole { resume: false };
    let saved = live.place.holder(&agent.config, vm).save(&to, what, shape.memory_mib).await?;
    let bytes = saved.state_bytes + saved.memory_bytes.unwrap_or_default();
    cx.note(format!("{} MiB", bytes >> 20));
    let asleep = Asleep { shape, vmm: live.vmm.name.clone(), bytes };
    agent
        .update(vm, move |row| {
            row.facts.asleep = Some(asleep);
            Ok(())
        })
        .await?;
    // Nobody waits for it: what is used before it is written down is not held against it.
    tokio::task::spawn_blocking(move || {
        if let Err(error) = to.count() {
            tracing::warn!(bothy.vm.id = %vm, %error, "whether this memory is whole cannot be told later");
        }
    });
    Ok(())
}

/// Adds the stages of going on to `g`.
pub(crate) fn add_resume(g: &mut Graph, agent: &Agent, vm: VmId, input: ResumeInput) {
    match input {
        ResumeInput::Paused => {
            g.not_cancellable();
            add_go_on(g, agent, vm, ());
        }
        ResumeInput::Suspended(boot) => {
            let mut add = Stages { g, agent: agent.clone(), vm, input: *boot, making: false };
            let boot = add.resolve(());
            let lease = add.network(boot);
            let root = add.rootfs((lease, ()));
            let work = add.work_disk(lease, false);
            let (a, undo, input) = (agent.clone(), agent.clone(), add.input.clone());
            let up = add.g.undoable(
                "launch_vmm",
                (boot, lease, root, work),
                move |cx, (boot, lease, Root { disks, .. }, work)| async move {
                    let from = Origin::Saved(files::asleep(&a.state_dir(), vm));
                    let (name, shape) = (&input.name, &input.spec.shape);
                    let (boot, lease, rootfs, work) = (&boot, &lease, &disks, &work);
                    let memory = Memory::Own;
                    let machine = Machine { vm, name, shape, boot, lease, rootfs, work, memory, from };
                    // Side by side: both read the same file, and the guest does not go on before the next stage.
                    let (up, whole) = tokio::join!(launch(&a, &cx, machine), is_whole(&a, vm));
                    whole?;
                    up
                },
                move |_| unlaunch(undo.clone(), vm),
            );
            let a = agent.clone();
            let forgotten =
                add.g.stage("forget_memory", up, move |_, _: Up| async move { a.forget_memory(vm).await });
            let awake = add_go_on(add.g, agent, vm, forgotten);
            add.publish_dns(awake);
        }
    }
}

/// Whether what `vm` had in memory is still what was saved.
async fn is_whole(agent: &Agent, vm: VmId) -> Result<(), Error> {
    let saved = files::asleep(&agent.state_dir(), vm);
    let checked = tokio::task::spawn_blocking(move || saved.check()).await;
    checked.map_err(|e| Error::internal("cannot look at a saved guest", &e))?
}

fn add_go_on(g: &mut Graph, agent: &Agent, vm: VmId, after: impl Inputs) -> Output<()> {
    let a = agent.clone();
    let running = g.stage("resume_vmm", after, move |_, _| async move {
        let live = a.live(vm).await?;
        go_on(&a, vm, &live).await
    });
    let a = agent.clone();
    g.stage("greet_guest", running, move |cx, ()| async move {
        let live = a.live(vm).await?;
        let guest = live.guest(&a.config, vm);
        let greeted = guest.alive_within("telling the guest the time", GREET, guest.greet()).await;
        match greeted {
            Ok((boot_id, behind)) => {
                cx.note(format!("its clock was {} s behind", behind.as_secs()));
                a.note_boot_id(vm, boot_id).await
            }
            Err(error) if live.vmm.handle.vmm.is_alive() => {
                cx.note(format!("its clock may be wrong: {error}"));
                Ok(())
            }
            Err(error) => Err(error),
        }
    })
}

impl Agent {
    /// What `vm` had in memory is gone.
    pub(super) async fn forget_memory(&self, vm: VmId) -> Result<(), Error> {
        self.update(vm, |row| {
            row.facts.asleep = None;
            Ok(())
        })
        .await?;
        let files = files::forget_asleep(&self.state_dir(), vm)?;
        // Nobody waits until their room is free.
        tokio::task::spawn_blocking(move || drop(files));
        Ok(())
    }

    /// Has `vm` go on, if it is paused or suspended, and waits until it does.
    ///
    /// # Errors
    /// It does not, and why.
    pub(crate) async fn wake(&self, vm: VmId) -> Result<(), Error> {
        let deadline = Instant::now() + AWAKE;
        let mut begun = false;
        loop {
            let row = self.vm(vm).await?;
            match (row.facts.state, row.facts.busy) {
                (VmState::Paused | VmState::Suspended, None) if begun => {
                    let why = row.facts.reason.unwrap_or_default();
                    let name = row.facts.name;
                    let hint = format!(
                        "`bothy vm kill {name}` gives up what it had in memory; its disks stay, and it can be started"
                    );
                    return Err(
                        Error::new(Code::Unavailable, format!("VM {name} does not go on: {why}")).hint(hint)
                    );
                }
                (VmState::Paused | VmState::Suspended, None) => {
                    begun = true;
                    if let Err(error) = self.machines.begin(vm, Ask::Resume { force: false }, None).await
                        && self.vm(vm).await?.facts.busy.is_none()
                    {
                        return Err(error);
                    }
                }
                // It is about to be at rest, or to leave it.
                (_, Some(_)) if row.facts.resting && Instant::now() < deadline => {}
                _ => return Ok(()),
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
