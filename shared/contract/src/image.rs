//! Images and the disks of VMs.

use crate::{ImageName, KernelName, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// How an image's guest is brought up once `bothy-guest` has made its root ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitStyle {
    /// PID 1 is handed to the image's own `/sbin/init`.
    Systemd,
    /// `bothy-guest` stays PID 1.
    Agent,
}

/// Something that must answer before a VM of the image is `ready`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitService {
    /// Its name, for people: `ssh`.
    pub name: String,
    /// The TCP port in the guest that must accept a connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The systemd unit that must be active; with a port too, both. Its journal is what an error shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// How long it may take, in seconds from launch.
    pub timeout_s: u32,
}

impl WaitService {
    /// What is waited for, for people: `port 22`, `unit ssh.service`, or both.
    pub fn what(&self) -> String {
        let port = self.port.map(|port| format!("port {port}"));
        let unit = self.unit.as_ref().map(|unit| format!("unit {unit}"));
        port.into_iter().chain(unit).collect::<Vec<_>>().join(", ")
    }
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// Its file name in the image's directory.
    pub file: String,
    /// Its SHA-256, in lower-case hex.
    pub sha256: String,
    /// Its size in bytes.
    pub size: u64,
    /// Where it is, for a file of the host that the image-agent does not own: an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The file as it was when its digest was last computed: while this holds, it is not computed again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<Stamp>,
}

/// What changes when a file is replaced or written to. A hard link has the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// Its inode.
    pub inode: u64,
    /// When its content last changed, in seconds since the epoch.
    pub mtime: i64,
    /// And the nanoseconds of that.
    pub mtime_nsec: i64,
}

/// What a process in the guest gets where nothing else is said. From an OCI image's configuration, for instance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// The user, by name or number: `root` where none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Its environment, each `NAME=value`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// Its directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// What the image would run. bothy starts no such thing by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// The arguments that go with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
}

impl Defaults {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The manifest of an image: `manifest.json` in its directory is the truth, and no table repeats it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageManifest {
    /// The format of this file.
    pub version: u32,
    /// The image's name.
    pub name: ImageName,
    /// `x86_64`.
    pub architecture: String,
    /// When it was built.
    pub created: Timestamp,
    /// The SHA-256 of the recipe that it was built from.
    pub recipe_sha256: String,
    /// How its guest is brought up.
    pub init: InitStyle,
    /// The home that the work disk is mounted on: `/root`.
    pub home: String,
    /// What must answer before a VM of it is ready.
    pub wait: Vec<WaitService>,
    /// The release of its kernel: `6.1.0-56-cloud-amd64`.
    pub kernel_release: String,
    /// By role: `rootfs`, `kernel`, `modules`, `system-seed`, `work-seed`, and for some images `initrd`.
    pub artifacts: BTreeMap<String, Artifact>,
    /// What it was made from, for people: `recipe debian`, `registered`, `docker.io/library/busybox@sha256:...`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub origin: String,
    /// The kernel of the catalogue that it boots, where it has not one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelName>,
    /// Directories of a new home that nobody else may enter, relative to it: a work-seed is made with them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub private: Vec<String>,
    /// What went into the work-seed. Another one than a seed made now would have: the seed is stale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed_fingerprint: Option<String>,
    /// What a process in the guest gets where nothing else is said.
    #[serde(default, skip_serializing_if = "Defaults::is_empty")]
    pub defaults: Defaults,
}

impl ImageManifest {
    /// The format that this build writes and reads.
    pub const VERSION: u32 = 1;

    /// The manifest of an image made now, on this machine's architecture, of root's home and without files so far.
    pub fn new(name: ImageName, init: InitStyle) -> Self {
        Self {
            version: Self::VERSION,
            name,
            architecture: std::env::consts::ARCH.to_owned(),
            created: Timestamp::now(),
            recipe_sha256: String::new(),
            init,
            home: "/root".to_owned(),
            wait: Vec::new(),
            kernel_release: String::new(),
            artifacts: BTreeMap::new(),
            origin: String::new(),
            kernel: None,
            private: Vec::new(),
            seed_fingerprint: None,
            defaults: Defaults::default(),
        }
    }

    /// Whether all its files are the image-agent's own. Else it boots files of the host that somebody else may change.
    pub fn is_managed(&self) -> bool {
        self.artifacts.values().all(|a| a.path.is_none())
    }
}

/// Asks for one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// Its name.
    pub image: ImageName,
}

/// Asks for all images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListImages {}

/// All images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageList {
    /// By name.
    pub images: Vec<ImageManifest>,
}

/// Begins a build from a recipe that came with bothy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildImage {
    /// The recipe, and the name of the image it makes.
    pub recipe: ImageName,
    /// Build even if an image of the same recipe is there.
    pub force: bool,
    /// The user who asks.
    pub owner: u32,
}

/// What an image boots: paths that the VMM's user can read and nobody of lesser rights than the image-agent can write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSet {
    /// The image.
    pub image: ImageName,
    /// The uncompressed kernel.
    pub kernel: PathBuf,
    /// The initramfs with this host's `bothy-guest`.
    pub initrd: PathBuf,
    /// How the guest is brought up.
    pub init: InitStyle,
    /// The home that the work disk is mounted on.
    pub home: String,
    /// What must answer before the VM is ready.
    pub wait: Vec<WaitService>,
    /// The digest of all the image's files: another one is another image, whatever its name.
    #[serde(default)]
    pub digest: String,
    /// What commands get in its VMs where nothing else is said.
    #[serde(default, skip_serializing_if = "Defaults::is_empty")]
    pub defaults: Defaults,
    /// What the roots of new VMs are kept on.
    #[serde(default, skip_serializing_if = "RootDisk::is_overlay")]
    pub root_disk: RootDisk,
}

/// What a VM's root is kept on, and what the guest writes to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RootDisk {
    /// The image's rootfs, shared and read-only, and a disk of the VM's own that the guest lays over it.
    #[default]
    Overlay,
    /// A clone of the image's rootfs that shares its extents until either is written to.
    Reflink,
    /// A snapshot by the device mapper: blocks that the guest writes go to a file of the VM's own.
    DmSnapshot,
    /// A copy of the image's rootfs, holes left out.
    Copy,
}

impl RootDisk {
    /// Its name in the configuration and in messages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Overlay => "overlay",
            Self::Reflink => "reflink",
            Self::DmSnapshot => "dm-snapshot",
            Self::Copy => "copy",
        }
    }

    /// Whether a template can be made of a VM with such a root.
    pub fn can_be_frozen(self) -> bool {
        self != Self::DmSnapshot
    }

    fn is_overlay(&self) -> bool {
        *self == Self::Overlay
    }
}

/// Makes the rootfs of a VM ready: the shared read-only base and the VM's own system overlay. Idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareRootfs {
    /// The VM.
    pub vm: VmId,
    /// The image.
    pub image: ImageName,
    /// The user that gets the overlay: the VMM's.
    pub uid: u32,
    /// The overlay's size in MiB.
    pub system_mib: u64,
    /// The template whose frozen overlay it is to begin with, over the template's own base; else the image's empty one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<VmId>,
}

/// Makes the disks of a VM whose VMM has ended those of a template, which has its id: base and system overlay are kept and
/// never change again, all else of its disks goes. Idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeDisks {
    /// The VM.
    pub vm: VmId,
}

/// Removes the disks of a template. One that has none is not an error; VMs that began with it are not touched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetTemplate {
    /// The template.
    pub template: VmId,
}

/// Asks for the templates that have disks, whole or half frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListFrozen {}

/// The templates that have disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenList {
    /// Their ids.
    pub templates: Vec<VmId>,
}

/// How much a template's disks take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenDisks {
    /// What the host has given the frozen overlay, in bytes.
    pub allocated: u64,
}

/// The disks of a VM's root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rootfs {
    /// The image's rootfs, shared and read-only. Where there is no overlay, the VM's own root, a file or a block device, which
    /// the guest writes to.
    pub base: PathBuf,
    /// The VM's own overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<PathBuf>,
}

/// Makes a VM's work disk: a clone of the image's work-seed. Idempotent: a work disk that is there is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareWorkDisk {
    /// The VM.
    pub vm: VmId,
    /// The image.
    pub image: ImageName,
    /// The user that gets it: the VMM's.
    pub uid: u32,
    /// Its size in MiB; the guest grows the file system to it.
    pub work_mib: u64,
    /// Make an empty file that is smaller than any disk instead, for the guest of a template, which does not look at it.
    #[serde(default)]
    pub placeholder: bool,
}

/// A VM's work disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkDisk {
    /// The disk.
    pub path: PathBuf,
    /// How it was made: `reflink` or `copy`; `kept` where it was there already; `placeholder`.
    pub how: String,
}

/// Removes all disks of a VM. A VM that has none is not an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseDisks {
    /// The VM.
    pub vm: VmId,
}

/// Asks for the VMs that have disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListDisks {}

/// The VMs that have disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskList {
    /// Their ids.
    pub vms: Vec<VmId>,
}

/// Makes a stopped or running VM's disks larger. Never smaller; asking for the size they have changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowDisks {
    /// The VM.
    pub vm: VmId,
    /// The work disk's new size in MiB.
    pub work_mib: u64,
    /// The system overlay's new size in MiB.
    pub system_mib: u64,
}

/// Asks how large some VMs' disks are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetDiskUsage {
    /// Which VMs: at most 200.
    pub vms: Vec<VmId>,
}

/// How large some VMs' disks are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUsageList {
    /// Those of the VMs that have disks.
    pub disks: BTreeMap<VmId, DiskUsage>,
}

/// How large a VM's disks are, in bytes: as the guest sees them, and what the host has given them so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUsage {
    /// The work disk's size.
    pub work_size: u64,
    /// What of the work disk is allocated.
    pub work_allocated: u64,
    /// The system overlay's size.
    pub system_size: u64,
    /// What of the system overlay is allocated.
    pub system_allocated: u64,
    /// The VM has a root of its own and no overlay: the last two are of that.
    #[serde(default)]
    pub own_root: bool,
}
