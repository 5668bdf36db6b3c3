//! VMs: what one asks for, what one gets, and where it stands.

use crate::{
    Error, GroupName, ImageName, TicketId, VmId, VmName,
    net::{Egress, Lease, Publish},
    op::Begun,
    workspace::Identity,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, path::PathBuf};

const MIB: u64 = 1 << 20;

/// The size and shape of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Virtual processors, 1 to 64.
    pub cpus: u32,
    /// Memory in MiB, 128 to 1 TiB.
    pub memory_mib: u64,
    /// The work disk (the guest's home) in MiB.
    pub work_mib: u64,
    /// The system overlay (writes to the rootfs) in MiB.
    pub system_mib: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { cpus: 2, memory_mib: 1024, work_mib: 10 * 1024, system_mib: 10 * 1024 }
    }
}

impl Shape {
    /// Checks every number against what a VM can have.
    pub fn check(&self) -> Result<(), Error> {
        let range = |what: &str, unit: &str, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(Error::invalid(format!("{value}{unit} is not a valid {what}"))
                    .hint(format!("give {min} to {max}{unit}")))
            }
        };
        range("number of cpus", "", self.cpus.into(), 1, 64)?;
        range("memory size", " MiB", self.memory_mib, 128, MIB)?;
        range("work disk size", " MiB", self.work_mib, 64, 4 * MIB)?;
        range("system disk size", " MiB", self.system_mib, 64, 4 * MIB)
    }
}

/// What `vm create` asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// The name; a free one is chosen where none is given.
    #[serde(default)]
    pub name: Option<VmName>,
    /// The image to boot.
    pub image: ImageName,
    /// Size and shape.
    #[serde(default)]
    pub shape: Shape,
    /// Whether the guest may reach the outside through the host: short for [`Egress::Open`], where `egress` says nothing.
    #[serde(default)]
    pub nat: bool,
    /// What the guest may reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    /// Ports of the guest that the host answers for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<Publish>,
    /// The groups whose members it reaches and is reached by.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub groups: BTreeSet<GroupName>,
    /// The user's public identity, put into the guest once its agent answers.
    #[serde(default)]
    pub identity: Identity,
    /// What happens to it when nobody uses it; what the host does otherwise, where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<Idle>,
}

/// What happens to a VM that nobody uses. Used is: an exec, a shell, ssh, an import or export, or traffic on its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Idle {
    /// What is done.
    pub action: IdleAction,
    /// After how many seconds without use.
    pub after_s: u64,
}

/// What is done to a VM that nobody uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdleAction {
    /// Nothing, whatever the host would do.
    Never,
    /// Its guest stands still, until the next use.
    Pause,
    /// Its memory goes to disk, until the next use.
    Suspend,
    /// It is powered off.
    Stop,
}

impl Idle {
    /// The shortest time without use that a policy may name, in seconds.
    pub const LEAST_S: u64 = 10;

    /// Checks the time.
    ///
    /// # Errors
    /// It is too short to be meant.
    pub fn check(&self) -> Result<(), Error> {
        if self.action != IdleAction::Never && self.after_s < Self::LEAST_S {
            return Err(Error::invalid(format!("{} s without use is too short", self.after_s))
                .hint(format!("give at least {}s", Self::LEAST_S)));
        }
        Ok(())
    }
}

impl VmSpec {
    /// What the guest may reach, by the long or the short form.
    pub fn reaches(&self) -> Egress {
        self.egress.clone().unwrap_or(if self.nat { Egress::Open } else { Egress::None })
    }
}

/// Begins a create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateVm {
    /// What is wanted.
    pub spec: VmSpec,
    /// The user it will belong to, as the gateway saw it.
    pub owner: u32,
    /// Create it even if the host's memory does not hold it.
    #[serde(default)]
    pub force: bool,
    /// Boot it, even if there is a template that it could be resumed from.
    #[serde(default)]
    pub cold: bool,
}

/// Begins to make the template of an image and a shape, unless it is there: creates of that image and shape are resumed from
/// it then. The result is the [`TemplateRecord`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MakeTemplate {
    /// The image.
    pub image: ImageName,
    /// Processors and memory; of the disks only the system overlay's size is of importance: VMs get one at least as large.
    #[serde(default)]
    pub shape: Shape,
    /// The user who asks.
    pub owner: u32,
    /// Make it anew, even if one is there or was set aside.
    #[serde(default)]
    pub force: bool,
}

/// What became of a wish for a template: the one that is there, or the operation that makes it, be it an earlier one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TemplateMade {
    /// It is there.
    There(TemplateRecord),
    /// It is being made.
    Begun(Begun),
}

/// Asks for the templates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListTemplates {}

/// The templates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateList {
    /// Those that are there or were set aside, the last used first.
    pub templates: Vec<TemplateRecord>,
}

/// A booted guest whose memory is kept, from which VMs are resumed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateRecord {
    /// Its id: that of the VM it was made of.
    pub id: VmId,
    /// The image it was booted from.
    pub image: ImageName,
    /// Its processors and memory; VMs of it have the same, and disks at least as large.
    pub shape: Shape,
    /// The VMM that it was made with: `qemu-microvm 10.0.2 (tcg)`.
    pub vmm: String,
    /// When it was made.
    pub created: Timestamp,
    /// When a VM was last resumed from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<Timestamp>,
    /// How often one was.
    pub uses: u64,
    /// What it takes on disk, in bytes.
    pub bytes: u64,
    /// Why it is not used any more, where that is so: a restore from it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_aside: Option<String>,
}

/// Where a VM stands. The vm-agent's `lifecycle` module has the diagram of who moves what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Its create is running.
    Creating,
    /// Its start is running.
    Starting,
    /// Its guest was ready and its VMM lives.
    Running,
    /// Its guest stands still, its memory is kept; the next use lets it go on.
    Paused,
    /// Its guest's memory is on disk and no VMM lives; the next use brings it back.
    Suspended,
    /// Its stop is running.
    Stopping,
    /// No VMM; disks and lease are kept.
    Stopped,
    /// Its delete is running.
    Deleting,
    /// Its VMM died unasked, or an undo failed; `reason` says which.
    Error,
}

/// A VM as `vm show` gives it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: VmName,
    /// The user it belongs to.
    pub owner: u32,
    /// Where it stands.
    pub state: VmState,
    /// Why it is in that state, where that is not plain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The image it boots.
    pub image: ImageName,
    /// Size and shape, as of its next boot.
    pub shape: Shape,
    /// The shape that its VMM was started with, while one lives: where it differs from `shape`, the rest of a change
    /// takes effect at the next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub booted: Option<Shape>,
    /// Whether the guest may reach the whole outside.
    pub nat: bool,
    /// What it may reach.
    #[serde(default)]
    pub egress: Egress,
    /// Ports of the guest that the host answers for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<Publish>,
    /// The groups whose members it reaches and is reached by.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub groups: BTreeSet<GroupName>,
    /// What happens when nobody uses it, where that was said for this VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<Idle>,
    /// Its place on the network, once it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
    /// `qemu-microvm`, and how it runs guests: `tcg` or `kvm`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<String>,
    /// The process id of the VMM while it lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
    /// The kernel's boot id in the guest, new at every boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// How the last VMM ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<ExitRecord>,
    /// When it was created.
    pub created: Timestamp,
    /// When it last became ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Timestamp>,
}

impl VmRecord {
    /// The record of a VM that nothing has been made of yet.
    pub fn new(id: VmId, name: VmName, owner: u32, image: ImageName, shape: Shape) -> Self {
        Self {
            id,
            name,
            owner,
            state: VmState::Creating,
            reason: None,
            image,
            shape,
            booted: None,
            nat: false,
            egress: Egress::None,
            publish: Vec::new(),
            groups: BTreeSet::new(),
            idle: None,
            lease: None,
            vmm: None,
            vmm_pid: None,
            boot_id: None,
            last_exit: None,
            created: Timestamp::now(),
            started: None,
        }
    }
}

/// How a VMM process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// When.
    pub at: Timestamp,
    /// Its exit status, where it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<i32>,
    /// The signal, where one ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
}

/// Names one VM by id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRef {
    /// The VM.
    pub vm: VmId,
}

/// Begins a stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopVm {
    /// The VM.
    pub vm: VmId,
    /// How long the guest may take to power off before it is killed, in milliseconds.
    pub grace_ms: u64,
}

/// Begins a delete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeleteVm {
    /// The VM.
    pub vm: VmId,
    /// Delete it even while it runs (it is killed, not shut down).
    pub force: bool,
}

/// Begins a start. The identity is synced again, since it may have changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartVm {
    /// The VM.
    pub vm: VmId,
    /// The user's public identity.
    #[serde(default)]
    pub identity: Identity,
    /// Start it even if the host's memory does not hold it.
    #[serde(default)]
    pub force: bool,
}

/// Begins a restart: a stop and a start on the same disks, as one operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartVm {
    /// The VM.
    pub vm: VmId,
    /// How long the guest may take to power off before it is killed, in milliseconds.
    pub grace_ms: u64,
    /// The user's public identity.
    #[serde(default)]
    pub identity: Identity,
}

/// Begins a pause: the guest stands still, its memory stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseVm {
    /// The VM.
    pub vm: VmId,
}

/// Begins a suspend: the guest's memory goes to disk, the host's is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SuspendVm {
    /// The VM.
    pub vm: VmId,
}

/// Begins to let a paused or suspended VM go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeVm {
    /// The VM.
    pub vm: VmId,
    /// Bring a suspended one back even if the host's memory does not hold it.
    #[serde(default)]
    pub force: bool,
}

/// Begins a kill: the VMM gets a signal that ends it, and the guest is not asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KillVm {
    /// The VM.
    pub vm: VmId,
    /// The signal's number: one of those that end a process by default (signal(7)).
    pub signal: i32,
}

/// Begins a change of a VM. What is not named stays. Disks only grow. What a running guest cannot be given at once (its
/// processors and its memory) takes effect at the next start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetVm {
    /// The VM.
    pub vm: VmId,
    /// Virtual processors.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// Memory in MiB.
    #[serde(default)]
    pub memory_mib: Option<u64>,
    /// The work disk in MiB.
    #[serde(default)]
    pub work_mib: Option<u64>,
    /// The system overlay in MiB.
    #[serde(default)]
    pub system_mib: Option<u64>,
    /// Whether the guest may reach the outside, at once: short for [`Egress::Open`] and [`Egress::None`], where `egress`
    /// says nothing.
    #[serde(default)]
    pub nat: Option<bool>,
    /// What the guest may reach; at once.
    #[serde(default)]
    pub egress: Option<Egress>,
    /// All ports of the guest that the host answers for; at once.
    #[serde(default)]
    pub publish: Option<Vec<Publish>>,
    /// All groups that it is in; at once.
    #[serde(default)]
    pub groups: Option<BTreeSet<GroupName>>,
    /// What happens when nobody uses it; at once.
    #[serde(default)]
    pub idle: Option<Idle>,
}

/// Asks for all VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListVms {}

/// The VMs, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmList {
    /// All of them.
    pub vms: Vec<VmRecord>,
}

/// Asks for a raw stream to a numbered port of a guest (see the `bothy-guest-proto` crate for the ports).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenChannel {
    /// The VM.
    pub vm: VmId,
    /// The port.
    pub port: u32,
}

/// Which log of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogSource {
    /// What the guest wrote to its serial console.
    Console,
    /// What the VMM and its holder wrote.
    Vmm,
}

/// Asks for a log of a VM as a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenLog {
    /// The VM.
    pub vm: VmId,
    /// Which log.
    pub source: LogSource,
    /// Go on as the log grows, until the VM ends or the reader goes.
    #[serde(default)]
    pub follow: bool,
}

/// A ticket: connect to `socket`, present `ticket`, and the stream is open. It is good once, and for 30 seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The issuing service's stream socket.
    pub socket: PathBuf,
    /// The secret.
    pub ticket: TicketId,
}

/// Asks what the host can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetVmHost {}

/// What the vm-agent found out about this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmHost {
    /// `qemu-microvm`.
    pub driver: String,
    /// The VMM's version.
    pub vmm_version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why that accelerator: what was tried and how it went.
    pub accelerator_reason: String,
    /// Why that driver.
    #[serde(default)]
    pub driver_reason: String,
    /// How the resources of VMs are bounded: `cgroup v2 at ...`, or why not.
    #[serde(default)]
    pub limits: String,
    /// VMs whose VMM lives.
    pub running: u32,
    /// All VMs.
    pub total: u32,
}
