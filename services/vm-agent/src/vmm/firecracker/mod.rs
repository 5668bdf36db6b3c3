//! Firecracker: a fresh process is told over its API what it is to be, then booted.
//!
//! The driver only makes the list of requests ([`api`]); the holder sends them ([`client`]). Firecracker differs from QEMU in
//! what its guest must know, which is told on the kernel's command line, for `bothy-guest` to read:
//!
//! - `bothy.disks=rootfs,system,work`: its disks have no serial of ours, so they are known by their order.
//! - `bothy.end=reset`: its machine cannot be powered off (a guest that tries halts, and the process stays); it ends when
//!   the guest resets it.

pub mod api;
pub mod client;
mod version;

use super::{
    Accel, Capabilities, Driver, LaunchSpec, Origin, RunState, Verb, VmPlan, host_cpu,
    jail::{self, Jail, JailFile},
    text,
    wire::{self, MemoryFile, Monitor, Restore},
};
use api::{
    Action, BackendType, Balloon, BootSource, CacheType, Drive, DrivePatch, Entropy, Level, Logger,
    MachineConfig, MemoryBackend, Metrics, NetworkInterface, NetworkOverride, Request, SnapshotLoad, VmState,
    Vsock,
};
use bothy_contract::{Code, Error};
use serde_json::Value;
use std::path::{Path, PathBuf};

pub use version::Version;

/// The guest's vsock address. Every guest has the same: each has a socket of its own on the host.
const CID: u32 = 3;
/// The layout of the devices of a guest: another one cannot go on from what was saved of this.
const LAYOUT: u32 = 1;

/// The driver for Firecracker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firecracker {
    program: PathBuf,
    version: Version,
    text: String,
    jailer: Option<Jailer>,
}

/// The program that starts it in a root directory of its own ([`super::jail`]).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Jailer {
    program: PathBuf,
    /// The name of Firecracker's own program, by which the jailer calls a directory.
    starts: String,
}

impl Firecracker {
    /// A driver for a Firecracker whose version is known already.
    pub fn new(program: impl Into<PathBuf>, version: Version) -> Self {
        Self { program: program.into(), text: version.to_string(), version, jailer: None }
    }

    /// Asks `program` for its version.
    ///
    /// # Errors
    /// It is not there (`NotFound`), cannot be run, or is of a version that this driver is not made for.
    pub async fn find(program: &Path) -> Result<Self, Error> {
        let version = version_of(program, "Firecracker").await.map_err(|e| {
            e.hint("install Firecracker, or set `vm.firecracker` in bothy.toml to where it is")
        })?;
        version.check().map_err(|e| e.context(program.display()))?;
        Ok(Self::new(program, version))
    }

    /// The same for a VM that runs in a jail already.
    pub(super) fn of_jailed(self) -> Self {
        let jailer = Jailer { program: "jailer".into(), starts: super::FIRECRACKER.into() };
        Self { text: format!("{} {JAILED}", self.version), jailer: Some(jailer), ..self }
    }

    /// The same, each VM's started by `jailer`, which must be of the same release.
    ///
    /// # Errors
    /// Either cannot be found or run, they do not fit each other, or this process is not root, as the jailer must be.
    pub async fn jailed(self, jailer: &Path) -> Result<Self, Error> {
        const WITHOUT: &str = "or remove `vm.jailer`: each VMM runs as a user of its own all the same";
        let refused = |why: String| Error::new(Code::FailedPrecondition, why);
        if !jailer.is_absolute() {
            return Err(refused(format!("`vm.jailer` is {}, which is no absolute path", jailer.display()))
                .hint(format!("set it to where Firecracker's jailer is, {WITHOUT}")));
        }
        if !nix::unistd::geteuid().is_root() {
            return Err(refused(format!(
                "{} must be started as root, and bothy-vm-agent is not",
                jailer.display()
            ))
            .hint(format!("have the agent run as root, {WITHOUT}")));
        }
        let fits = format!("install the jailer of Firecracker {}, {WITHOUT}", self.version);
        let version = version_of(jailer, "Jailer").await.map_err(|e| e.hint(fits.clone()))?;
        if version != self.version {
            let (jailer, version, own) = (jailer.display(), version, self.version);
            return Err(
                refused(format!("{jailer} is of release {version}, and Firecracker of {own}")).hint(fits)
            );
        }
        // As the jailer does before it names a directory by it.
        let found = on_path(&self.program).and_then(fs_err::canonicalize);
        let program = found.map_err(|e| Error::internal("cannot find Firecracker's program", &e))?;
        let starts = program.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        if !starts.contains("firecracker") {
            return Err(refused(format!(
                "{} is not called firecracker, so its jailer refuses it",
                program.display()
            ))
            .hint(format!("rename it, {WITHOUT}")));
        }
        Ok(Self { program, jailer: Some(Jailer { program: jailer.to_owned(), starts }), ..self.of_jailed() })
    }
}

/// Asks `program`, which calls itself `name`, for its version.
async fn version_of(program: &Path, name: &str) -> Result<Version, Error> {
    let said = super::version_text(program).await.map_err(|e| {
        let code = match e.kind() {
            std::io::ErrorKind::NotFound => Code::NotFound,
            _ => Code::FailedPrecondition,
        };
        Error::new(code, format!("cannot run {}: {e}", program.display()))
    })?;
    Version::parse(name, &said).ok_or_else(|| {
        let program = program.display();
        Error::new(
            Code::FailedPrecondition,
            format!("`{program} --version` does not name a version of {name}"),
        )
    })
}

/// The file that `program` is, a path or a name on PATH (execvp(3)).
fn on_path(program: &Path) -> std::io::Result<PathBuf> {
    if program.components().count() > 1 {
        return Ok(program.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|place| place.join(program));
    places.find(|place| place.is_file()).ok_or_else(|| std::io::ErrorKind::NotFound.into())
}

/// Where Firecracker finds what it is told of by an absolute path.
struct Paths {
    kernel: PathBuf,
    initrd: PathBuf,
    log: PathBuf,
    metrics: PathBuf,
}

impl Paths {
    fn of(plan: &VmPlan) -> Self {
        Self {
            kernel: plan.kernel.clone(),
            initrd: plan.initrd.clone(),
            log: plan.dir.join(wire::LOG_PIPE),
            metrics: plan.dir.join(wire::METRICS_PIPE),
        }
    }

    fn in_jail() -> Self {
        let at = |name: &str| Path::new("/").join(name);
        Self {
            kernel: at(KERNEL),
            initrd: at(INITRD),
            log: at(wire::LOG_PIPE),
            metrics: at(wire::METRICS_PIPE),
        }
    }
}

/// What is added to the version of a jailed one.
pub(super) const JAILED: &str = "jailed";
/// The names of the boot set's files in a jail.
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";

/// The kernel's command line. The keyboard controller is what a reset goes through (`reboot=k`); there is no PCI to look for.
fn kernel_command_line(plan: &VmPlan) -> String {
    let disks: Vec<_> = plan.disks().map(|(serial, ..)| serial).collect();
    let disks = disks.join(",");
    format!(
        "console=ttyS0 panic=-1 reboot=k quiet cryptomgr.notests pci=off i8042.noaux i8042.nomux i8042.nopnp \
         i8042.dumbkbd bothy.disks={disks} bothy.end=reset"
    )
}

/// Where it logs and counts.
fn outputs(paths: &Paths) -> [Request; 2] {
    [
        Request::logger(&Logger {
            log_path: paths.log.clone(),
            level: Level::Warning,
            show_level: true,
            show_log_origin: false,
        }),
        Request::metrics(&Metrics { metrics_path: paths.metrics.clone() }),
    ]
}

/// All requests that make a fresh Firecracker go on, paused, from where a guest was saved. Its disks and its vsock have the
/// paths that they had for that one: within the working directory, which is the holder's.
fn resumed(plan: &VmPlan) -> Vec<Request> {
    let mut requests = outputs(&Paths::of(plan)).to_vec();
    requests.push(Request::load(&SnapshotLoad {
        snapshot_path: by_descriptor(wire::STATE_FD),
        mem_backend: MemoryBackend {
            backend_type: BackendType::File,
            backend_path: by_descriptor(wire::MEMORY_FD),
        },
        resume_vm: false,
        network_overrides: vec![NetworkOverride {
            iface_id: INTERFACE.into(),
            host_dev_name: plan.tap.clone(),
        }],
        vsock_override: None,
    }));
    requests
}

fn by_descriptor(placeholder: &str) -> PathBuf {
    format!("/proc/self/fd/{placeholder}").into()
}

/// The name of the guest's network interface in the API.
const INTERFACE: &str = "net";

/// All requests that make a fresh Firecracker the VM of `plan` and boot it.
fn requests(plan: &VmPlan, paths: &Paths) -> Vec<Request> {
    let drive = |id: &str, read_only: bool| {
        Request::drive(&Drive {
            drive_id: id.into(),
            path_on_host: wire::disk_link(id).into(),
            // Ours is the initramfs: it finds the root by itself.
            is_root_device: false,
            is_read_only: read_only,
            // What a guest was told is on the disk survives a crash of the host.
            cache_type: if read_only { CacheType::Unsafe } else { CacheType::Writeback },
        })
    };
    let [logger, metrics] = outputs(paths);
    let mut requests = vec![
        logger,
        metrics,
        Request::machine(&MachineConfig {
            vcpu_count: plan.cpus,
            mem_size_mib: plan.memory_mib,
            smt: false,
            track_dirty_pages: false,
        }),
        Request::boot_source(&BootSource {
            kernel_image_path: paths.kernel.clone(),
            initrd_path: Some(paths.initrd.clone()),
            boot_args: Some(kernel_command_line(plan)),
        }),
    ];
    // In the order of the kernel's command line.
    requests.extend(plan.disks().map(|(serial, _, read_only)| drive(serial, read_only)));
    requests.extend([
        Request::network(&NetworkInterface {
            iface_id: INTERFACE.into(),
            host_dev_name: plan.tap.clone(),
            guest_mac: Some(plan.mac.clone()),
        }),
        Request::vsock(&Vsock { guest_cid: CID, uds_path: wire::VSOCK_SOCKET.into() }),
        Request::entropy(&Entropy {}),
        Request::balloon(&Balloon { amount_mib: 0, deflate_on_oom: true, stats_polling_interval_s: 0 }),
        Request::action(Action::InstanceStart),
    ]);
    requests
}

impl Firecracker {
    /// The launch of a jailed one, all of whose paths are within its jail.
    fn jailed_spec(&self, jailer: &Jailer, plan: &VmPlan) -> Result<LaunchSpec, Error> {
        if plan.from != Origin::Boot {
            return Err(Error::new(
                Code::FailedPrecondition,
                "a jailed Firecracker does not go on from a saved guest",
            )
            .hint("remove `vm.jailer` from bothy.toml for templates and suspended VMs"));
        }
        let api = Path::new("/").join(wire::API_SOCKET);
        let mut argv = vec![text(&jailer.program)?];
        let options = [
            ("--id", plan.vm.to_string()),
            ("--exec-file", text(&self.program)?),
            ("--uid", plan.uid.to_string()),
            ("--gid", plan.uid.to_string()),
            ("--chroot-base-dir", text(&plan.dir.join(jail::PLACE))?),
        ];
        argv.extend(options.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
        argv.extend(["--".into(), "--api-sock".into(), text(&api)?]);
        let file =
            |name: &str, path: &Path, read_only| JailFile { name: name.into(), path: path.into(), read_only };
        let mut files = vec![file(KERNEL, &plan.kernel, true), file(INITRD, &plan.initrd, true)];
        files.extend(
            plan.disks().map(|(serial, path, read_only)| file(&wire::disk_link(serial), path, read_only)),
        );
        Ok(LaunchSpec {
            vm: plan.vm,
            vmm: format!("{} {}", self.name(), self.text),
            dir: plan.dir.clone(),
            argv,
            monitor: Monitor::Api { requests: requests(plan, &Paths::in_jail()) },
            tap: None,
            uid: plan.uid,
            gid: plan.uid,
            groups: plan.groups.clone(),
            cgroup: None,
            memory: None,
            restore: None,
            disks: Vec::new(),
            jail: Some(Jail { program: jailer.starts.clone(), files }),
        })
    }
}

impl Driver for Firecracker {
    fn name(&self) -> &'static str {
        super::FIRECRACKER
    }

    fn version(&self) -> &str {
        &self.text
    }

    fn version_key(&self, accel: Accel) -> String {
        let (name, program) = (self.name(), self.program.display());
        format!("{name} {program} {} {accel} {} layout {LAYOUT}", self.text, host_cpu())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            snapshot: self.jailer.is_none() && self.version.snapshots().is_ok(),
            resize_disk: true,
            power_off: false,
            tcg: false,
        }
    }

    fn launch_spec(&self, plan: &VmPlan) -> Result<LaunchSpec, Error> {
        if plan.accel != Accel::Kvm {
            return Err(Error::new(Code::FailedPrecondition, "Firecracker runs guests under KVM only")
                .hint("set `vm.driver` to `auto` or `qemu-microvm` in bothy.toml"));
        }
        if plan.cpus == 0 || plan.cpus > api::MAX_CPUS {
            return Err(Error::invalid(format!(
                "{} cpus are more than Firecracker can give a guest, {}",
                plan.cpus,
                api::MAX_CPUS
            ))
            .hint("ask for fewer, or set `vm.driver` to `qemu-microvm` in bothy.toml"));
        }
        let disks = plan.disks().map(|(_, path, _)| path);
        for path in disks.chain([plan.dir.as_path(), &plan.kernel, &plan.initrd]) {
            text(path)?;
        }
        let bytes = plan.memory_mib << 20;
        let (memory, from) = match &plan.from {
            Origin::Boot => (None, None),
            Origin::Template(from) => {
                (Some(MemoryFile::Map { path: from.memory.clone(), bytes }), Some(from))
            }
            Origin::Saved(from) => (Some(MemoryFile::Own { path: from.memory.clone(), bytes }), Some(from)),
        };
        if from.is_some() {
            self.version.snapshots()?;
        }
        if let Some(jailer) = &self.jailer {
            return self.jailed_spec(jailer, plan);
        }
        let requests = if from.is_some() { resumed(plan) } else { requests(plan, &Paths::of(plan)) };
        let socket = plan.dir.join(wire::API_SOCKET);
        let argv = vec![
            text(&self.program)?,
            "--id".into(),
            plan.vm.to_string(),
            "--api-sock".into(),
            text(&socket)?,
        ];
        Ok(LaunchSpec {
            vm: plan.vm,
            vmm: format!("{} {}", self.name(), self.text),
            dir: plan.dir.clone(),
            argv,
            monitor: Monitor::Api { requests },
            // It opens the TAP by its name.
            tap: None,
            uid: plan.uid,
            gid: plan.uid,
            groups: plan.groups.clone(),
            cgroup: None,
            memory,
            restore: from.map(|from| Restore { state: from.state.clone(), memory_apart: true }),
            disks: plan.disks().map(|(serial, file, _)| (serial.to_owned(), file.to_owned())).collect(),
            jail: None,
        })
    }

    /// Firecracker has no way out of its own. It writes to its disks' files at once, so that nothing is lost with it.
    fn quit(&self) -> Verb {
        Verb::Signal(15)
    }

    fn powerdown(&self) -> Verb {
        Verb::Api(Request::action(Action::SendCtrlAltDel))
    }

    fn pause(&self) -> Verb {
        Verb::Api(Request::vm(VmState::Paused))
    }

    fn resume(&self) -> Verb {
        Verb::Api(Request::vm(VmState::Resumed))
    }

    /// To Firecracker a reset is the machine's end.
    fn reset(&self) -> Vec<Verb> {
        Vec::new()
    }

    /// Firecracker takes the size from the file.
    fn resize_disk(&self, serial: &str, _bytes: u64) -> Verb {
        Verb::Api(Request::redrive(&DrivePatch {
            drive_id: serial.into(),
            path_on_host: api::SAME_PATH.into(),
        }))
    }

    fn run_state(&self) -> Verb {
        Verb::Api(Request::describe())
    }

    fn read_run_state(&self, answer: &Value) -> Option<RunState> {
        match answer.get("state")?.as_str()? {
            "Running" => Some(RunState::Running),
            "Paused" => Some(RunState::Paused),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
