//! The method table: every request of the bus, in one place.
//!
//! From this table come the typed client, the registration of servers, and the bus server's permissions: a service
//! that a method does not name as a caller is refused by the server itself.

use crate::{
    catalogue::{
        ImportKernel, KernelInfo, KernelList, KernelRef, ListKernels, PromoteImage, PruneImages, Pruned,
        RegisterImage, VerifyImages,
    },
    image::{
        BootSet, BuildImage, DiskList, DiskUsageList, ForgetTemplate, FreezeDisks, FrozenDisks, FrozenList,
        GetDiskUsage, GrowDisks, ImageList, ImageManifest, ImageRef, ListDisks, ListFrozen, ListImages,
        PrepareRootfs, PrepareWorkDisk, ReleaseDisks, Rootfs, WorkDisk,
    },
    intake::OpenIntake,
    net::{
        AcquireLease, Done, EgressReport, GetEgress, GetNetHost, Lease, LeaseList, ListLeases, NameVm,
        NetHost, PublishPorts, ReleaseLease, SetEgress, TeardownNet, UnnameVm,
    },
    net_group::SetGroups,
    op::{Begun, OpList, OpRecord, OpRef},
    usage::{GetVmStats, PortList, VmStatsList},
    vm::{
        CreateVm, DeleteVm, GetVmHost, KillVm, ListTemplates, ListVms, MakeTemplate, OpenChannel, OpenLog,
        PauseVm, RestartVm, ResumeVm, SetVm, StartVm, StopVm, SuspendVm, TemplateList, TemplateMade, Ticket,
        VmHost, VmList, VmRecord, VmRef,
    },
    workspace::{
        GetWorkspaceHost, GuestFiles, IdentityFiles, OpenExport, OpenImport, SyncIdentity, WorkspaceHost,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::time::Duration;

/// A host process with an identity on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Service {
    /// The HTTP API; the only caller of most methods.
    Gateway,
    /// VM lifecycle.
    Vm,
    /// Network.
    Net,
    /// Images and disks.
    Image,
    /// Repositories and identity.
    Workspace,
}

impl Service {
    /// All of them.
    pub const ALL: [Service; 5] =
        [Service::Gateway, Service::Vm, Service::Net, Service::Image, Service::Workspace];

    /// Its token in subjects, file names and configuration.
    pub fn token(self) -> &'static str {
        match self {
            Service::Gateway => "gateway",
            Service::Vm => "vm",
            Service::Net => "net",
            Service::Image => "image",
            Service::Workspace => "workspace",
        }
    }

    /// The name of its binary and unit.
    pub fn binary(self) -> &'static str {
        match self {
            Service::Gateway => "bothy-gateway",
            Service::Vm => "bothy-vm-agent",
            Service::Net => "bothy-net-agent",
            Service::Image => "bothy-image-agent",
            Service::Workspace => "bothy-workspace-agent",
        }
    }
}

/// One method of the bus, as a type without values.
pub trait Method: Send + Sync + 'static {
    /// What the caller sends.
    type Request: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// What the service answers.
    type Reply: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// Who serves it.
    const SERVICE: Service;
    /// What it is about.
    const NOUN: &'static str;
    /// What it does.
    const VERB: &'static str;
    /// Who may call it.
    const CALLERS: &'static [Service];
    /// Whether it changes anything: then its reply is remembered by request id, and a repeat gets the same reply.
    const MUTATING: bool;
    /// How long a caller waits unless it says otherwise.
    const TIMEOUT: Duration;

    /// The method as a row of data.
    fn info() -> MethodInfo {
        MethodInfo {
            service: Self::SERVICE,
            noun: Self::NOUN,
            verb: Self::VERB,
            callers: Self::CALLERS,
            mutating: Self::MUTATING,
        }
    }
}

/// A row of the table as data, for permissions and documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MethodInfo {
    /// Who serves it.
    pub service: Service,
    /// What it is about.
    pub noun: &'static str,
    /// What it does.
    pub verb: &'static str,
    /// Who may call it.
    pub callers: &'static [Service],
    /// Whether it changes anything.
    pub mutating: bool,
}

macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident = $service:ident . $noun:ident . $verb:ident
        ($req:ty) -> $rep:ty, $kind:ident, by [$($caller:ident),*], within $secs:literal s;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy)]
            pub enum $name {}

            impl Method for $name {
                type Request = $req;
                type Reply = $rep;
                const SERVICE: Service = Service::$service;
                const NOUN: &'static str = stringify!($noun);
                const VERB: &'static str = stringify!($verb);
                const CALLERS: &'static [Service] = &[$(Service::$caller),*];
                const MUTATING: bool = methods!(@mutating $kind);
                const TIMEOUT: Duration = Duration::from_secs($secs);
            }
        )*

        /// Every method, in the order of this file.
        pub fn table() -> Vec<MethodInfo> {
            vec![$($name::info()),*]
        }
    };
    (@mutating changes) => { true };
    (@mutating reads) => { false };
}

methods! {
    /// Gives a VM its place on the network.
    NetLeaseAcquire = Net.lease.acquire(AcquireLease) -> Lease, changes, by [Vm], within 10 s;
    /// Takes it back.
    NetLeaseRelease = Net.lease.release(ReleaseLease) -> Done, changes, by [Vm], within 10 s;
    /// Lists all places.
    NetLeaseList = Net.lease.list(ListLeases) -> LeaseList, reads, by [Vm, Gateway], within 5 s;
    /// Changes what a VM may reach.
    NetEgressSet = Net.egress.set(SetEgress) -> Done, changes, by [Vm], within 10 s;
    /// What a VM may reach, has reached and was denied.
    NetEgressShow = Net.egress.show(GetEgress) -> EgressReport, reads, by [Vm, Gateway], within 5 s;
    /// Publishes a VM's ports.
    NetPortsPublish = Net.ports.publish(PublishPorts) -> Done, changes, by [Vm], within 10 s;
    /// Puts a VM into groups.
    NetGroupsSet = Net.groups.set(SetGroups) -> Done, changes, by [Vm], within 10 s;
    /// Makes a VM known by name.
    NetNameSet = Net.name.set(NameVm) -> Done, changes, by [Vm], within 10 s;
    /// Takes its name away.
    NetNameUnset = Net.name.unset(UnnameVm) -> Done, changes, by [Vm], within 10 s;
    /// How the network stands.
    NetHostShow = Net.host.show(GetNetHost) -> NetHost, reads, by [Gateway], within 5 s;
    /// Removes everything from the kernel.
    NetHostTeardown = Net.host.teardown(TeardownNet) -> Done, changes, by [Gateway], within 30 s;

    /// Lists the images.
    ImageListAll = Image.image.list(ListImages) -> ImageList, reads, by [Gateway], within 5 s;
    /// Shows one image.
    ImageShow = Image.image.show(ImageRef) -> ImageManifest, reads, by [Gateway], within 5 s;
    /// What an image boots; makes the initramfs where it is missing.
    ImageResolve = Image.image.resolve(ImageRef) -> BootSet, reads, by [Vm], within 30 s;
    /// Begins a build.
    ImageBuild = Image.image.build(BuildImage) -> Begun, changes, by [Gateway], within 10 s;
    /// Begins to compute the digests of images anew.
    ImageVerify = Image.image.verify(VerifyImages) -> Begun, changes, by [Gateway], within 10 s;
    /// Removes an image that no VM uses.
    ImageRemove = Image.image.remove(ImageRef) -> Pruned, changes, by [Gateway], within 60 s;
    /// Removes what nothing needs.
    ImagePrune = Image.image.prune(PruneImages) -> Pruned, changes, by [Gateway], within 60 s;
    /// Begins to register a root file system of the host as an image.
    ImageRegister = Image.image.register(RegisterImage) -> Begun, changes, by [Gateway], within 10 s;
    /// Begins to make a registered image's files the image-agent's own.
    ImagePromote = Image.image.promote(PromoteImage) -> Begun, changes, by [Gateway], within 10 s;
    /// Lists the kernels.
    KernelListAll = Image.kernel.list(ListKernels) -> KernelList, reads, by [Gateway], within 5 s;
    /// Shows one kernel.
    KernelShow = Image.kernel.show(KernelRef) -> KernelInfo, reads, by [Gateway], within 5 s;
    /// Begins to import a kernel.
    KernelImport = Image.kernel.import(ImportKernel) -> Begun, changes, by [Gateway], within 10 s;
    /// Removes a kernel that no image boots.
    KernelRemove = Image.kernel.remove(KernelRef) -> Pruned, changes, by [Gateway], within 30 s;
    /// Opens a stream for what an image is to be made of.
    ImageIntakeOpen = Image.intake.open(OpenIntake) -> Ticket, reads, by [Gateway], within 10 s;
    /// Makes a VM's rootfs ready.
    ImageRootfsPrepare = Image.rootfs.prepare(PrepareRootfs) -> Rootfs, changes, by [Vm], within 60 s;
    /// Makes a VM's work disk ready.
    ImageWorkDiskPrepare = Image.work_disk.prepare(PrepareWorkDisk) -> WorkDisk, changes, by [Vm], within 60 s;
    /// Removes a VM's disks.
    ImageDisksRelease = Image.disks.release(ReleaseDisks) -> Done, changes, by [Vm], within 60 s;
    /// Lists the VMs that have disks.
    ImageDisksList = Image.disks.list(ListDisks) -> DiskList, reads, by [Vm], within 10 s;
    /// Makes a VM's disks larger.
    ImageDisksGrow = Image.disks.grow(GrowDisks) -> Done, changes, by [Vm], within 10 s;
    /// How large some VMs' disks are.
    ImageDisksUsage = Image.disks.usage(GetDiskUsage) -> DiskUsageList, reads, by [Vm], within 5 s;
    /// Makes a VM's disks those of a template.
    ImageTemplateFreeze = Image.template.freeze(FreezeDisks) -> FrozenDisks, changes, by [Vm], within 60 s;
    /// Removes a template's disks.
    ImageTemplateForget = Image.template.forget(ForgetTemplate) -> Done, changes, by [Vm], within 60 s;
    /// Lists the templates that have disks.
    ImageTemplateList = Image.template.list(ListFrozen) -> FrozenList, reads, by [Vm], within 10 s;
    /// One operation of the image-agent.
    ImageOpShow = Image.op.show(OpRef) -> OpRecord, reads, by [Gateway], within 5 s;
    /// The image-agent's operations, newest first.
    ImageOpList = Image.op.list(OpList) -> Vec<OpRecord>, reads, by [Gateway], within 5 s;
    /// Asks an operation of the image-agent to stop and undo itself.
    ImageOpCancel = Image.op.cancel(OpRef) -> OpRecord, changes, by [Gateway], within 5 s;

    /// Begins a create.
    VmCreate = Vm.vm.create(CreateVm) -> Begun, changes, by [Gateway], within 10 s;
    /// Begins a start.
    VmStart = Vm.vm.start(StartVm) -> Begun, changes, by [Gateway], within 10 s;
    /// Begins a stop.
    VmStop = Vm.vm.stop(StopVm) -> Begun, changes, by [Gateway], within 10 s;
    /// Begins a delete.
    VmDelete = Vm.vm.delete(DeleteVm) -> Begun, changes, by [Gateway], within 10 s;
    /// Begins a restart.
    VmRestart = Vm.vm.restart(RestartVm) -> Begun, changes, by [Gateway], within 10 s;
    /// Begins a kill.
    VmKill = Vm.vm.kill(KillVm) -> Begun, changes, by [Gateway], within 10 s;
    /// Begins a pause.
    VmPause = Vm.vm.pause(PauseVm) -> Begun, changes, by [Gateway], within 10 s;
    /// Begins a suspend.
    VmSuspend = Vm.vm.suspend(SuspendVm) -> Begun, changes, by [Gateway], within 10 s;
    /// Begins to let a paused or suspended VM go on.
    VmResume = Vm.vm.resume(ResumeVm) -> Begun, changes, by [Gateway], within 10 s;
    /// Somebody is about to use a VM: one that is paused or suspended begins to go on.
    VmTouch = Vm.vm.touch(VmRef) -> Done, changes, by [Net], within 10 s;
    /// Begins a change of a VM.
    VmSet = Vm.vm.set(SetVm) -> Begun, changes, by [Gateway], within 10 s;
    /// How much some VMs use.
    VmStatsShow = Vm.vm.stats(GetVmStats) -> VmStatsList, reads, by [Gateway], within 10 s;
    /// The sockets on which a guest listens.
    VmPortsList = Vm.vm.ports(VmRef) -> PortList, reads, by [Gateway], within 10 s;
    /// Lists the VMs.
    VmListAll = Vm.vm.list(ListVms) -> VmList, reads, by [Gateway, Image, Workspace], within 5 s;
    /// Shows one VM.
    VmShow = Vm.vm.show(VmRef) -> VmRecord, reads, by [Gateway, Workspace], within 5 s;
    /// Opens a stream to a port of a guest.
    VmChannelOpen = Vm.channel.open(OpenChannel) -> Ticket, reads, by [Gateway, Workspace], within 75 s;
    /// Opens a VM's log.
    VmLogOpen = Vm.log.open(OpenLog) -> Ticket, reads, by [Gateway], within 5 s;
    /// What the host can do.
    VmHostShow = Vm.host.show(GetVmHost) -> VmHost, reads, by [Gateway], within 5 s;
    /// Begins to make a template.
    VmTemplateMake = Vm.template.make(MakeTemplate) -> TemplateMade, changes, by [Gateway], within 40 s;
    /// Lists the templates.
    VmTemplateList = Vm.template.list(ListTemplates) -> TemplateList, reads, by [Gateway], within 5 s;
    /// One operation of the vm-agent.
    VmOpShow = Vm.op.show(OpRef) -> OpRecord, reads, by [Gateway], within 5 s;
    /// The vm-agent's operations, newest first.
    VmOpList = Vm.op.list(OpList) -> Vec<OpRecord>, reads, by [Gateway], within 5 s;
    /// Asks an operation of the vm-agent to stop and undo itself.
    VmOpCancel = Vm.op.cancel(OpRef) -> OpRecord, changes, by [Gateway], within 5 s;

    /// Puts the user's identity into a guest.
    WorkspaceIdentitySync = Workspace.identity.sync(SyncIdentity) -> Done, changes, by [Vm], within 30 s;
    /// The files that hold an identity in a home that has none yet.
    WorkspaceIdentityFiles = Workspace.identity.files(IdentityFiles) -> GuestFiles, reads, by [Vm], within 5 s;
    /// Opens a stream into a guest for a packed repository.
    WorkspaceImportOpen = Workspace.import.open(OpenImport) -> Ticket, reads, by [Gateway], within 10 s;
    /// Opens a stream of a guest's changes.
    WorkspaceExportOpen = Workspace.export.open(OpenExport) -> Ticket, reads, by [Gateway], within 10 s;
    /// How the workspace-agent stands.
    WorkspaceHostShow = Workspace.host.show(GetWorkspaceHost) -> WorkspaceHost, reads, by [Gateway], within 5 s;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_method_has_a_subject_of_its_own_and_a_caller() {
        let table = table();
        let subjects: BTreeSet<_> = table.iter().map(|m| (m.service, m.noun, m.verb)).collect();
        assert_eq!(subjects.len(), table.len());
        assert!(table.iter().all(|m| !m.callers.is_empty() && !m.callers.contains(&m.service)));
    }
}
