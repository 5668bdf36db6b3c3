//! What can be asked of Firecracker: each request a plain struct, and where it is sent.
//!
//! Names and shapes are those of the API's published schema (`firecracker.yaml`), against which a test checks every request
//! that can be made here. A field that newer versions have added is left out unless it is set, so that older ones, which
//! refuse what they do not know, take the request.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{path::PathBuf, time::Duration};

/// Stands for the path of the disk that a `PATCH` of a drive names, as the VM was launched with it.
pub const SAME_PATH: &str = "@same-path@";

/// How a request is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Method {
    /// Asks and changes nothing.
    Get,
    /// Makes, or does.
    Put,
    /// Changes what is there.
    Patch,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// How.
    pub method: Method,
    /// Where.
    pub path: String,
    /// What, where there is something to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<Value>,
}

impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let method = match self.method {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
        };
        write!(f, "{method} {}", self.path)
    }
}

impl Request {
    fn get(path: &str) -> Self {
        Self { method: Method::Get, path: path.into(), body: None }
    }

    fn send(method: Method, path: impl Into<String>, body: &impl Serialize) -> Self {
        // Structs with string keys and numbers: they always have a value.
        let body = serde_json::to_value(body).unwrap_or(Value::Null);
        Self { method, path: path.into(), body: Some(body) }
    }

    /// `GET /`: name, state and version of the instance.
    pub fn describe() -> Self {
        Self::get("/")
    }

    /// `GET /version`.
    pub fn version() -> Self {
        Self::get("/version")
    }

    /// Processors and memory.
    pub fn machine(config: &MachineConfig) -> Self {
        Self::send(Method::Put, "/machine-config", config)
    }

    /// Kernel and initramfs.
    pub fn boot_source(source: &BootSource) -> Self {
        Self::send(Method::Put, "/boot-source", source)
    }

    /// A disk.
    pub fn drive(drive: &Drive) -> Self {
        Self::send(Method::Put, format!("/drives/{}", drive.drive_id), drive)
    }

    /// Looks at a disk's file again: the guest is told of its new size.
    pub fn redrive(drive: &DrivePatch) -> Self {
        Self::send(Method::Patch, format!("/drives/{}", drive.drive_id), drive)
    }

    /// A network interface.
    pub fn network(interface: &NetworkInterface) -> Self {
        Self::send(Method::Put, format!("/network-interfaces/{}", interface.iface_id), interface)
    }

    /// The way to the guest.
    pub fn vsock(vsock: &Vsock) -> Self {
        Self::send(Method::Put, "/vsock", vsock)
    }

    /// A source of random numbers.
    pub fn entropy(entropy: &Entropy) -> Self {
        Self::send(Method::Put, "/entropy", entropy)
    }

    /// A way to take memory back.
    pub fn balloon(balloon: &Balloon) -> Self {
        Self::send(Method::Put, "/balloon", balloon)
    }

    /// How much memory to take back from a running guest.
    pub fn inflate(balloon: &BalloonPatch) -> Self {
        Self::send(Method::Patch, "/balloon", balloon)
    }

    /// Where Firecracker counts.
    pub fn metrics(metrics: &Metrics) -> Self {
        Self::send(Method::Put, "/metrics", metrics)
    }

    /// Where Firecracker logs.
    pub fn logger(logger: &Logger) -> Self {
        Self::send(Method::Put, "/logger", logger)
    }

    /// Something to be done now.
    pub fn action(action_type: Action) -> Self {
        Self::send(Method::Put, "/actions", &ActionInfo { action_type })
    }

    /// Pauses or resumes the guest.
    pub fn vm(state: VmState) -> Self {
        Self::send(Method::Patch, "/vm", &Vm { state })
    }

    /// Saves a paused guest.
    pub fn save(snapshot: &SnapshotCreate) -> Self {
        Self::send(Method::Put, "/snapshot/create", snapshot)
    }

    /// Becomes a saved guest: only where nothing but logger and metrics was configured before.
    pub fn load(snapshot: &SnapshotLoad) -> Self {
        Self::send(Method::Put, "/snapshot/load", snapshot)
    }

    /// How long the answer may take.
    pub fn patience(&self) -> Duration {
        // Memory goes to disk and back.
        Duration::from_secs(if self.path.starts_with("/snapshot/") { 300 } else { 10 })
    }
}

/// Processors and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// 1 to [`MAX_CPUS`].
    pub vcpu_count: u32,
    /// Memory.
    pub mem_size_mib: u64,
    /// Whether the guest sees threads instead of cores.
    pub smt: bool,
    /// Whether a snapshot may hold only what changed since the last one.
    pub track_dirty_pages: bool,
}

/// The most processors that a guest can have.
pub const MAX_CPUS: u32 = 32;

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSource {
    /// An uncompressed ELF kernel.
    pub kernel_image_path: PathBuf,
    /// The initramfs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

/// What becomes of a guest's wish that its writes be on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// It is ignored.
    Unsafe,
    /// It is carried out.
    Writeback,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// Its name in the API; the guest does not see it.
    pub drive_id: String,
    /// The file.
    pub path_on_host: PathBuf,
    /// Whether Firecracker names it as root on the kernel's command line.
    pub is_root_device: bool,
    /// Whether the guest may only read it.
    pub is_read_only: bool,
    /// What a flush does.
    pub cache_type: CacheType,
}

/// A disk whose file is to be looked at again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrivePatch {
    /// Which.
    pub drive_id: String,
    /// The file, or [`SAME_PATH`].
    pub path_on_host: PathBuf,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInterface {
    /// Its name in the API.
    pub iface_id: String,
    /// The TAP.
    pub host_dev_name: String,
    /// The guest's MAC address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
}

/// The way to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The guest's address, 3 or more.
    pub guest_cid: u32,
    /// The socket on which Firecracker listens for whoever wants a port of the guest.
    pub uds_path: PathBuf,
}

/// A source of random numbers, without limits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entropy {}

/// A balloon in the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// How large it is to be.
    pub amount_mib: u64,
    /// Whether the guest may take memory back when it has no other.
    pub deflate_on_oom: bool,
    /// How often the guest counts its memory; 0 for never.
    pub stats_polling_interval_s: u32,
}

/// Another size for the balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonPatch {
    /// How large it is to be.
    pub amount_mib: u64,
}

/// Where Firecracker counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// A file or named pipe.
    pub metrics_path: PathBuf,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Level {
    /// What failed.
    Error,
    /// What is odd too.
    Warning,
    /// What happens too.
    Info,
    /// All that helps to find a mistake.
    Debug,
}

/// Where Firecracker logs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logger {
    /// A file or named pipe.
    pub log_path: PathBuf,
    /// How much.
    pub level: Level,
    /// Whether lines begin with their level.
    pub show_level: bool,
    /// Whether they tell where in the program they come from.
    pub show_log_origin: bool,
}

/// Something to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Boots the guest; once.
    InstanceStart,
    /// Presses those keys in the guest, which most take for a wish to end.
    SendCtrlAltDel,
    /// Writes the metrics out.
    FlushMetrics,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct ActionInfo {
    action_type: Action,
}

/// Whether a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// It does not.
    Paused,
    /// It does again.
    Resumed,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Vm {
    state: VmState,
}

/// What a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All memory.
    Full,
    /// What has changed since the last one.
    Diff,
}

/// Where a guest is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotCreate {
    /// The state of its machine.
    pub snapshot_path: PathBuf,
    /// Its memory.
    pub mem_file_path: PathBuf,
    /// How much of it.
    pub snapshot_type: SnapshotType,
}

/// What memory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendType {
    /// A file, mapped privately.
    File,
    /// A process that answers page faults.
    Uffd,
}

/// Where a saved guest's memory is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBackend {
    /// What kind of thing it is in.
    pub backend_type: BackendType,
    /// Where that is.
    pub backend_path: PathBuf,
}

/// Another TAP for an interface of a saved guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkOverride {
    /// The interface's name in the API.
    pub iface_id: String,
    /// The TAP.
    pub host_dev_name: String,
}

/// Another socket for a saved guest's vsock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockOverride {
    /// The socket.
    pub uds_path: PathBuf,
}

/// A saved guest to become.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotLoad {
    /// The state of its machine.
    pub snapshot_path: PathBuf,
    /// Its memory.
    pub mem_backend: MemoryBackend,
    /// Whether it runs at once.
    pub resume_vm: bool,
    /// Other TAPs.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another vsock socket.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vsock_override: Option<VsockOverride>,
}

/// The answer to [`Request::describe`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// The program's name.
    pub app_name: String,
    /// The instance's.
    pub id: String,
    /// `Not started`, `Running` or `Paused`.
    pub state: String,
    /// The program's version.
    pub vmm_version: String,
}

/// The answer to [`Request::version`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirecrackerVersion {
    /// The program's version.
    pub firecracker_version: String,
}
