//! VMMs: from the plan of a VM to a running process, and what can be asked of it.
//!
//! A [`Driver`] is pure: it turns a [`VmPlan`] into a [`LaunchSpec`] and its verbs into [`Verb`]s. The process is kept by
//! a holder (`bothy-vmm`), which [`holder::Holder`] starts, finds again and talks to; so nothing here is lost with the
//! agent; [`launching`] keeps a launch and its undo apart. [`accel`] finds out how guests can be run on this host, [`clock`] how fast its time-stamp counter runs.

pub mod accel;
pub mod clock;
pub mod holder;
pub mod launching;
pub mod qemu;
pub mod wire;

use bothy_contract::{Error, VmId};
use std::path::PathBuf;

pub use qemu::QemuMicrovm;
pub use wire::LaunchSpec;

/// How guest code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// By the processor.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

impl std::fmt::Display for Accel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        })
    }
}

/// All that a VMM must know to boot one VM. Nothing in it is looked up later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPlan {
    /// The VM.
    pub vm: VmId,
    /// Its name, for the process list.
    pub name: String,
    /// The holder's directory.
    pub dir: PathBuf,
    /// An uncompressed ELF kernel (`vmlinux`).
    pub kernel: PathBuf,
    /// The initramfs with `bothy-guest` as `/init`.
    pub initrd: PathBuf,
    /// The shared rootfs, opened read-only.
    pub rootfs: PathBuf,
    /// The VM's own disk for writes to the rootfs.
    pub system: PathBuf,
    /// The VM's own disk for the guest's home.
    pub work: PathBuf,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The TAP device, made for `uid`.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: String,
    /// The user and group the VMM runs as.
    pub uid: u32,
    /// Further groups: that of `/dev/kvm` where it is used.
    pub groups: Vec<u32>,
    /// How guest code is run.
    pub accel: Accel,
    /// The host's time-stamp counter in kHz, where it is known and constant.
    pub tsc_khz: Option<u32>,
}

/// What a driver can do beside booting and ending a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// A running VM can be saved and resumed.
    pub snapshot: bool,
    /// A disk can grow under a running guest.
    pub resize_disk: bool,
}

/// Something to be done to a VMM, carried out by [`holder::Holder::perform`].
#[derive(Debug, Clone, PartialEq)]
pub enum Verb {
    /// Send this command over QMP.
    Qmp(serde_json::Value),
    /// Send this signal to the process.
    Signal(i32),
}

/// One kind of VMM.
pub trait Driver: Send + Sync + std::fmt::Debug {
    /// `qemu-microvm`.
    fn name(&self) -> &'static str;
    /// The VMM's own version.
    fn version(&self) -> &str;
    /// What it can do.
    fn capabilities(&self) -> Capabilities;
    /// What to hand to the holder. Pure: the same plan gives the same specification.
    ///
    /// # Errors
    /// The plan holds something that this VMM's command line cannot express.
    fn launch_spec(&self, plan: &VmPlan) -> Result<LaunchSpec, Error>;
    /// Ends the VMM at once, its disks flushed; the guest is not asked.
    fn quit(&self) -> Verb;
    /// Presses the guest's power button.
    fn powerdown(&self) -> Verb;
}
