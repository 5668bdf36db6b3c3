//! VMMs: from the plan of a VM to a running process, and what can be asked of it.
//!
//! A [`Driver`] is pure: it turns a [`VmPlan`] into a [`LaunchSpec`] and its verbs into [`Verb`]s. The process is kept by
//! a holder (`bothy-vmm`), which [`holder::Holder`] starts, finds again and talks to; so nothing here is lost with the
//! agent; [`launching`] keeps a launch and its undo apart, and [`liveness`] says whether a VM's VMM lives. [`choose`] says which driver this host is best served by, [`accel`]
//! finds out how guests can be run on it, [`clock`] how fast its time-stamp counter runs. [`snapshot`] saves a guest and says
//! what a saved one is; [`passing`] hands files over; [`jail`] is how a Firecracker is started by its jailer.

pub mod accel;
pub mod checksum;
mod choice;
pub mod clock;
pub mod firecracker;
pub mod holder;
pub mod jail;
pub mod launching;
pub mod liveness;
pub mod passing;
pub mod qemu;
pub mod snapshot;
pub mod wire;

use bothy_contract::{Error, VmId};
use std::path::{Path, PathBuf};

pub use choice::{Choice, Host, choose, driver_of};
pub use firecracker::Firecracker;
pub use qemu::QemuMicrovm;
pub use snapshot::{Memory, Origin, Save, Saved, SealedMemory, Snapshot};
pub use wire::LaunchSpec;

/// The name of the driver for QEMU.
pub const QEMU_MICROVM: &str = "qemu-microvm";
/// The name of the driver for Firecracker.
pub const FIRECRACKER: &str = "firecracker";

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

/// All that a VMM must know to boot one VM, or to let a saved one go on. Nothing in it is looked up later.
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
    /// The shared rootfs, opened read-only; without a system disk the VM's own, which the guest writes to.
    pub rootfs: PathBuf,
    /// The VM's own disk for writes to the rootfs.
    pub system: Option<PathBuf>,
    /// The VM's own disk for the guest's home.
    pub work: PathBuf,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// What the guest's memory is.
    pub memory: Memory,
    /// Whether the guest boots, or goes on from where another was saved. Then it is paused when the launch is done, and all
    /// else in the plan but the names, paths and addresses must be as it was for that one.
    pub from: Origin,
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

impl VmPlan {
    /// Its disks in the order in which the guest finds them: serial, file, and whether it is only read.
    fn disks(&self) -> impl Iterator<Item = (&'static str, &Path, bool)> {
        let system = self.system.as_deref();
        let rootfs = ("rootfs", self.rootfs.as_path(), system.is_some());
        let system = system.map(|path| ("system", path, false));
        [Some(rootfs), system, Some(("work", self.work.as_path(), false))].into_iter().flatten()
    }
}

/// What a driver can do beside booting and ending a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// A running VM can be saved and resumed.
    pub snapshot: bool,
    /// A disk can grow under a running guest.
    pub resize_disk: bool,
    /// A guest that powers its machine off ends the VMM. Where it does not, the guest resets the machine instead, which ends
    /// every VMM here; `bothy-guest` knows that from the kernel's command line.
    pub power_off: bool,
    /// It can run guests without KVM.
    pub tcg: bool,
}

/// Whether a guest's processors run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// They do.
    Running,
    /// They do not, and go on when they are told to.
    Paused,
}

/// Something to be done to a VMM, carried out by [`holder::Holder::perform`].
#[derive(Debug, Clone, PartialEq)]
pub enum Verb {
    /// Send this command over QMP.
    Qmp(serde_json::Value),
    /// Send this request to Firecracker's API.
    Api(firecracker::api::Request),
    /// Send this signal to the process.
    Signal(i32),
}

/// One kind of VMM.
pub trait Driver: Send + Sync + std::fmt::Debug {
    /// `qemu-microvm`.
    fn name(&self) -> &'static str;
    /// The VMM's own version.
    fn version(&self) -> &str;
    /// All of this VMM that a saved guest depends on: it goes on only under one with the same key. The program, its exact
    /// version, how it runs guests, the processor that they see, and the layout of their devices.
    fn version_key(&self, accel: Accel) -> String;
    /// What it can do.
    fn capabilities(&self) -> Capabilities;
    /// What to hand to the holder. Pure: the same plan gives the same specification.
    ///
    /// # Errors
    /// The plan holds something that this VMM's command line cannot express.
    fn launch_spec(&self, plan: &VmPlan) -> Result<LaunchSpec, Error>;
    /// Ends the VMM at once, its disks flushed; the guest is not asked.
    fn quit(&self) -> Verb;
    /// Presses the guest's power button, or the keys that have the same effect; a guest without a driver for them does
    /// not notice.
    fn powerdown(&self) -> Verb;
    /// Stops the guest's processors. Doing it twice is doing it once.
    fn pause(&self) -> Verb;
    /// Lets them go on. Doing it twice is doing it once. Where the file of a disk has another size than when the guest was
    /// saved, [`Driver::resize_disk`] tells the guest, once this is done.
    fn resume(&self) -> Verb;
    /// Lets the guest boot from its beginning, whatever it is at, paused or not: to be carried out in this order, one after
    /// the other. None where the VMM cannot.
    fn reset(&self) -> Vec<Verb>;
    /// Tells a running guest that the file of its disk `serial` has `bytes` bytes now, which it must have already. Its disk
    /// only grows.
    fn resize_disk(&self, serial: &str, bytes: u64) -> Verb;
    /// Asks whether the guest's processors run; [`Driver::read_run_state`] reads the answer.
    fn run_state(&self) -> Verb;
    /// What the answer to [`Driver::run_state`] says; `None` where the guest neither runs nor waits to.
    fn read_run_state(&self, answer: &serde_json::Value) -> Option<RunState>;
}

/// What `program` prints for `--version`.
async fn version_text(program: &Path) -> std::io::Result<String> {
    let mut command = tokio::process::Command::new(program);
    let command = command.arg("--version").stdin(std::process::Stdio::null()).kill_on_drop(true);
    Ok(String::from_utf8_lossy(&command.output().await?.stdout).into_owned())
}

/// The host's processor, as far as a guest that runs on it unhidden can tell it from another.
fn host_cpu() -> String {
    let known = ["vendor_id", "cpu family", "model\t", "model name", "stepping", "microcode", "flags"];
    let text = fs_err::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let lines = text.lines().take_while(|line| !line.is_empty());
    let told = lines.filter(|line| known.iter().any(|known| line.starts_with(known)));
    told.filter_map(|line| line.split_once(':')).map(|(_, value)| value.trim()).collect::<Vec<_>>().join("/")
}

/// A path as an argument of a VMM.
fn text(path: &Path) -> Result<String, Error> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::invalid(format!("path {} is not UTF-8", path.display())))
}
