//! The stages of bringing a VM up, as methods that add one each: what a create, a start and the making of a template are put
//! together from. What a stage does is in [`super::boot`].

use super::{
    Agent,
    boot::{
        BootInput, PERSONALISE, Root, Up, acquire_network, guest, identity, launch, prepare_rootfs,
        prepare_work_disk, release_disks, release_network, sync_identity, unlaunch, wait_guest,
        wait_services,
    },
    files,
    launch::Machine,
    template::resume,
};
use bothy_contract::{
    Error, VmId,
    guest::BootStep,
    image::{BootSet, ImageRef, WorkDisk},
    methods::{ImageResolve, NetNameSet},
    net::{Lease, NameVm},
};
use bothy_ops::{Graph, Inputs, Output};
use bothy_vm_agent::vmm::{Memory, Origin};
use futures::future::BoxFuture;

/// Adds stages to a graph, in the order of their needs. Each method is one stage.
pub(super) struct Stages<'a> {
    pub(super) g: &'a mut Graph,
    pub(super) agent: Agent,
    pub(super) vm: VmId,
    pub(super) input: BootInput,
    /// Whether what they make goes where they are undone.
    pub(super) making: bool,
}

impl Stages<'_> {
    pub(super) fn resolve(&mut self, after: impl Inputs) -> Output<BootSet> {
        let (a, image) = (self.agent.clone(), self.input.spec.image.clone());
        self.g.stage("resolve_image", after, move |cx, _| async move {
            cx.unless_stopped(a.bus.call::<ImageResolve>(&ImageRef { image })).await
        })
    }

    pub(super) fn network(&mut self, boot: Output<BootSet>) -> Output<Lease> {
        let (a, undo, spec) = (self.agent.clone(), self.agent.clone(), self.input.spec.clone());
        let (vm, making) = (self.vm, self.making);
        self.g.undoable(
            "acquire_network",
            boot,
            move |cx, _| acquire_network(a, cx, vm, spec),
            move |_| {
                let undo = undo.clone();
                async move { if making { release_network(&undo, vm).await } else { Ok(()) } }
            },
        )
    }

    pub(super) fn host_key(&mut self, boot: Output<BootSet>) -> Output<()> {
        let (a, undo, vm, making) = (self.agent.clone(), self.agent.clone(), self.vm, self.making);
        self.g.undoable(
            "host_key",
            boot,
            move |_, _| async move { files::make_host_key(&a.state_dir(), vm).await },
            move |_| {
                let undo = undo.clone();
                async move { if making { files::remove_vm(&undo.state_dir(), vm) } else { Ok(()) } }
            },
        )
    }

    pub(super) fn find_template(&mut self, boot: Output<BootSet>) -> Output<Option<VmId>> {
        let (a, input) = (self.agent.clone(), self.input.clone());
        self.g.stage("find_template", boot, move |cx, boot| async move {
            Ok(resume::find(&a, &cx, &boot, &input).await)
        })
    }

    /// The root's disks, with the overlay of a template where the second input names one.
    pub(super) fn rootfs<T: Into<MaybeTemplate> + Send + 'static>(
        &mut self,
        after: impl Inputs<Values = (Lease, T)>,
    ) -> Output<Root> {
        let (a, spec, vm) = (self.agent.clone(), self.input.spec.clone(), self.vm);
        let undo = self.unmake_disks();
        self.g.undoable(
            "prepare_rootfs",
            after,
            move |cx, (lease, template)| async move {
                prepare_rootfs(&a, &cx, vm, &spec, &lease, template.into().0).await
            },
            move |_| undo(),
        )
    }

    /// The work disk; for a template a placeholder, that no guest looks at.
    pub(super) fn work_disk(&mut self, lease: Output<Lease>, placeholder: bool) -> Output<WorkDisk> {
        let (a, spec, vm) = (self.agent.clone(), self.input.spec.clone(), self.vm);
        let undo = self.unmake_disks();
        self.g.undoable(
            "prepare_work_disk",
            lease,
            move |cx, lease| async move {
                let disk = prepare_work_disk(&a, vm, &spec, &lease, placeholder).await?;
                cx.note(match disk.how.as_str() {
                    "kept" => "the disk that was there".to_owned(),
                    "placeholder" => disk.how.clone(),
                    how @ ("reflink" | "copy") => format!("work-seed cloned by {how}"),
                    how => how.to_owned(),
                });
                Ok(disk)
            },
            move |_| undo(),
        )
    }

    pub(super) fn resume(
        &mut self,
        after: impl Inputs<Values = (BootSet, Lease, Root, WorkDisk)>,
    ) -> Output<Option<Up>> {
        let (a, undo, vm, input) = (self.agent.clone(), self.agent.clone(), self.vm, self.input.clone());
        self.g.undoable(
            "resume",
            after,
            move |cx, (boot, lease, root, work)| async move {
                resume::run(&a, &cx, vm, &input, (&boot, &lease, &root, &work)).await
            },
            move |_| unlaunch(undo.clone(), vm),
        )
    }

    /// A VMM whose guest boots, unless the last input is one that was resumed.
    pub(super) fn launch<T: Into<MaybeUp> + Send + 'static>(
        &mut self,
        after: impl Inputs<Values = (BootSet, Lease, Root, WorkDisk, T)>,
        memory: Memory,
    ) -> Output<Up> {
        let (a, undo, vm, input) = (self.agent.clone(), self.agent.clone(), self.vm, self.input.clone());
        self.g.undoable(
            "launch_vmm",
            after,
            move |cx, (boot, lease, root, work, up)| async move {
                if let Some(up) = up.into().0 {
                    cx.note("its guest was resumed");
                    return Ok(up);
                }
                let (name, shape, rootfs) = (&input.name, &input.spec.shape, &root.disks);
                let (boot, lease, work, from) = (&boot, &lease, &work, Origin::Boot);
                launch(&a, &cx, Machine { vm, name, shape, boot, lease, rootfs, work, memory, from }).await
            },
            move |_| unlaunch(undo.clone(), vm),
        )
    }

    pub(super) fn wait_guest(&mut self, lease: Output<Lease>, up: Output<Up>) -> Output<()> {
        let (a, vm) = (self.agent.clone(), self.vm);
        self.g.stage("wait_guest", (lease, up), move |cx, (lease, up)| async move {
            if up.resumed.is_some() { Ok(()) } else { wait_guest(a, cx, vm, lease, up.handle).await }
        })
    }

    pub(super) fn personalise(
        &mut self,
        after: impl Inputs<Values = (BootSet, Lease, Up, (), ())>,
    ) -> Output<()> {
        let (a, vm, input) = (self.agent.clone(), self.vm, self.input.clone());
        self.g.stage("personalise", after, move |cx, (boot, lease, up, (), ())| async move {
            if up.resumed.is_some() {
                return Ok(());
            }
            let guest = guest(&a, vm, &lease, up.handle);
            let identity = identity(&a, vm, &input)?;
            let work = guest.personalise(&identity, &lease, &boot);
            cx.unless_stopped(guest.alive_within("giving the guest its identity", PERSONALISE, work))
                .await
                .map(drop)
        })
    }

    pub(super) fn publish_dns(&mut self, personal: Output<()>) {
        let (a, undo, vm) = (self.agent.clone(), self.agent.clone(), self.vm);
        let name = self.input.name.clone();
        self.g.undoable(
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
    }

    pub(super) fn sync_identity(&mut self, boot: Output<BootSet>, up: Output<Up>, personal: Output<()>) {
        let (a, vm, identity) = (self.agent.clone(), self.vm, self.input.spec.identity.clone());
        self.g.stage("sync_identity", (boot, up, personal), move |cx, (boot, up, ())| {
            sync_identity(a, cx, vm, boot, identity, up)
        });
    }

    pub(super) fn wait_services(
        &mut self,
        boot: Output<BootSet>,
        lease: Output<Lease>,
        up: Output<Up>,
        personal: Output<()>,
    ) -> Output<Vec<BootStep>> {
        let (a, vm) = (self.agent.clone(), self.vm);
        self.g.stage("wait_services", (boot, lease, up, personal), move |cx, (boot, lease, up, ())| {
            wait_services(a, cx, vm, boot, lease, up)
        })
    }

    fn unmake_disks(
        &self,
    ) -> impl Fn() -> BoxFuture<'static, Result<(), Error>> + Send + Sync + 'static + use<> {
        let (agent, vm, making) = (self.agent.clone(), self.vm, self.making);
        move || {
            let agent = agent.clone();
            Box::pin(async move { if making { release_disks(&agent, vm).await } else { Ok(()) } })
        }
    }
}

/// A template, where the inputs of a stage know of such.
#[derive(Debug)]
pub(super) struct MaybeTemplate(Option<VmId>);

impl From<Option<VmId>> for MaybeTemplate {
    fn from(template: Option<VmId>) -> Self {
        Self(template)
    }
}

impl From<()> for MaybeTemplate {
    fn from((): ()) -> Self {
        Self(None)
    }
}

/// A resumed guest, where the inputs of a stage know of such.
#[derive(Debug)]
pub(super) struct MaybeUp(Option<Up>);

impl From<Option<Up>> for MaybeUp {
    fn from(up: Option<Up>) -> Self {
        Self(up)
    }
}

impl From<()> for MaybeUp {
    fn from((): ()) -> Self {
        Self(None)
    }
}
