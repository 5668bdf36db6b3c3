//! Keeping images and kernels: what is checked, removed, registered and promoted.

use crate::{
    ImageName, KernelName,
    image::{Artifact, InitStyle, WaitService},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Begins to compute all digests of images anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyImages {
    /// The image; all of them where none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageName>,
    /// The user who asks.
    pub owner: u32,
}

/// How the files of an image are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// The image.
    pub image: ImageName,
    /// Its files, by role.
    pub files: Vec<Checked>,
}

impl Verified {
    /// Whether every file is what the manifest says.
    pub fn is_whole(&self) -> bool {
        self.files.iter().all(|f| f.state == FileState::Whole)
    }
}

/// How one file of an image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// What it is in the image: `rootfs`.
    pub role: String,
    /// Where it is.
    pub path: PathBuf,
    /// The SHA-256 that the manifest says.
    pub expected: String,
    /// The SHA-256 that it has, where it could be computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// What that comes to.
    pub state: FileState,
}

/// How a file stands against the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileState {
    /// As it should be.
    Whole,
    /// Of another size.
    Torn,
    /// Of the right size and another content.
    Altered,
    /// Not there.
    Missing,
}

/// Removes what nothing needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneImages {
    /// Only say what would go.
    pub dry_run: bool,
    /// Images that no VM uses, too, but for the default one.
    #[serde(default)]
    pub all: bool,
}

/// What was removed, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    /// Images.
    pub images: Vec<ImageName>,
    /// Other files: blobs that no image has, initramfs files of other agents.
    pub files: Vec<PathBuf>,
    /// What that frees on disk, in bytes.
    pub freed: u64,
}

/// A kernel of the catalogue: `manifest.json` in its directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelManifest {
    /// The format of this file.
    pub version: u32,
    /// Its name.
    pub name: KernelName,
    /// Its release, as it says of itself: `6.1.0-56-cloud-amd64`.
    pub release: String,
    /// `x86_64`.
    pub architecture: String,
    /// When it was imported.
    pub created: Timestamp,
    /// What it was imported from, for people.
    pub origin: String,
    /// The uncompressed kernel.
    pub kernel: Artifact,
    /// The modules that a guest needs before it has a root.
    pub modules: Artifact,
    /// Their names in the order in which they are loaded; none where all is built in.
    pub module_names: Vec<String>,
}

/// Begins to import a kernel from files of the host that only root may name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportKernel {
    /// What it shall be called; its release where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<KernelName>,
    /// A Debian package, a bzImage or a vmlinux: an absolute path.
    pub file: PathBuf,
    /// Its modules, `.../lib/modules/<release>`: an absolute path. Not beside a package, which brings them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<PathBuf>,
    /// The user who asks.
    pub owner: u32,
}

/// Asks for one kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelRef {
    /// Its name.
    pub kernel: KernelName,
}

/// Asks for all kernels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListKernels {}

/// All kernels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelList {
    /// By name, each with who uses it.
    pub kernels: Vec<KernelInfo>,
}

/// A kernel and who uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelInfo {
    /// What it is.
    #[serde(flatten)]
    pub manifest: KernelManifest,
    /// The images that boot it.
    pub used_by: Vec<ImageName>,
}

/// Where a registered image's kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelSource {
    /// A file of the host, an absolute path, and its modules.
    File {
        /// A bzImage or a vmlinux.
        kernel: PathBuf,
        /// Its modules, `.../lib/modules/<release>`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        modules: Option<PathBuf>,
    },
    /// One of the catalogue.
    Catalogue(KernelName),
    /// What the root file system has in `/boot` and `/lib/modules`.
    Rootfs,
}

/// Begins to register files of the host as an image. They stay where they are: whoever owns them may change them, and then
/// the image is refused until it is registered again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterImage {
    /// The image's name.
    pub image: ImageName,
    /// An ext4 file system: an absolute path.
    pub rootfs: PathBuf,
    /// Its kernel.
    pub kernel: KernelSource,
    /// An archive that is put before the initramfs: an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// How the guest is brought up; found out from the root file system where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitStyle>,
    /// What must answer before a VM of it is ready.
    #[serde(default)]
    pub wait: Vec<WaitService>,
    /// Take the place of an image of that name.
    #[serde(default)]
    pub force: bool,
    /// The user who asks.
    pub owner: u32,
}

/// Begins to make the files of a registered image the image-agent's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromoteImage {
    /// The image.
    pub image: ImageName,
    /// The user who asks.
    pub owner: u32,
}
