//! The words of the HTTP API, version 1: paths, headers, and the bodies that are not already records of the contract.
//!
//! Errors are [`bothy_contract::Error`] as JSON with the status of [`status`]. All bodies are JSON, but for streams:
//! logs are raw bytes, operation events are server-sent events, a workspace goes in as a pack and comes out as a
//! patch, and a channel is an upgraded connection.

use bothy_config::Config;
use bothy_contract::{
    Code, Error, GroupName, KernelName, Service,
    catalogue::KernelSource,
    image::{ImageManifest, InitStyle, WaitService},
    intake::Credentials,
    net::{Egress, NetHost, Publish},
    net_group::check_groups,
    vm::{Idle, Shape, VmHost, VmRecord, VmSpec},
    workspace::Identity,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt::Write as _, path::PathBuf};

/// The version of this API, as `GET /v1/version` gives it.
pub const API_VERSION: u32 = 1;

/// The header that makes a repeated mutating request safe: an id (UUID), the same for each attempt.
pub const REQUEST_ID: &str = "bothy-request-id";

/// The trailer of an export that holds the `ExportReport` as JSON. An export without it was cut short.
pub const REPORT_TRAILER: &str = "bothy-report";

/// The protocol that a channel request upgrades to (RFC 9110 section 7.8): raw bytes to a guest port.
pub const CHANNEL_PROTOCOL: &str = "bothy-channel";

/// `GET /v1/version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The gateway's version.
    pub version: String,
    /// The API's version.
    pub api: u32,
}

/// `GET /v1/host`: how the host's services stand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// The five services, the gateway first.
    pub services: Vec<ServiceReport>,
    /// What the vm-agent says, where it answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmHost>,
    /// What the net-agent says, where it answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<NetHost>,
    /// The images, where the image-agent answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<Vec<ImageManifest>>,
    /// What the host was told to use, so that a user who cannot read its configuration can check it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uses: Option<HostUses>,
}

/// What the host's configuration names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostUses {
    /// The state directory.
    pub state_dir: PathBuf,
    /// The VMM's program: a name on the services' `PATH` or an absolute path.
    pub qemu: PathBuf,
    /// The bus server's program, likewise.
    pub bus_server: PathBuf,
}

impl From<&Config> for HostUses {
    fn from(config: &Config) -> Self {
        Self {
            state_dir: config.state_dir.clone(),
            qemu: config.vm.qemu.clone(),
            bus_server: config.bus.server.clone(),
        }
    }
}

impl HostReport {
    /// Whether every service answered.
    pub fn all_up(&self) -> bool {
        self.services.iter().all(|s| s.up)
    }
}

/// How one service stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceReport {
    /// Which.
    pub service: Service,
    /// Whether it answered on the bus.
    pub up: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
}

/// The body of `POST /v1/vms`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateBody {
    /// What is wanted.
    #[serde(flatten)]
    pub spec: VmSpec,
    /// Create it even if the host's memory does not hold it.
    #[serde(default)]
    pub force: bool,
    /// Boot it, even if there is a template that it could be resumed from.
    #[serde(default)]
    pub cold: bool,
}

/// The body of `POST /v1/images/{image}/warm`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmBody {
    /// Processors, memory, and the least size of the system overlay.
    #[serde(default)]
    pub shape: Shape,
    /// Make it anew, even if one is there.
    #[serde(default)]
    pub force: bool,
}

/// The body of `POST /v1/vms/{ref}/start`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartBody {
    /// The user's public identity.
    #[serde(default)]
    pub identity: Identity,
    /// Start it even if the host's memory does not hold it.
    #[serde(default)]
    pub force: bool,
}

/// The body of `POST /v1/images/{image}/register`. All paths are absolute ones of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterBody {
    /// An ext4 file system.
    pub rootfs: PathBuf,
    /// Its kernel.
    pub kernel: KernelSource,
    /// An archive that is put before the initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// How the guest is brought up; found out where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitStyle>,
    /// What must answer before a VM of it is ready.
    #[serde(default)]
    pub wait: Vec<WaitService>,
    /// Take the place of an image of that name.
    #[serde(default)]
    pub force: bool,
}

/// The body of `POST /v1/images/{image}/pull`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullBody {
    /// The image of a registry: `[registry/]repository[:tag][@digest]`.
    pub reference: String,
    /// The kernel that it boots; the newest one where nothing is said, else the default image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelName>,
    /// Take the place of an image of that name.
    #[serde(default)]
    pub force: bool,
    /// Ask the registry over plain HTTP.
    #[serde(default)]
    pub insecure_http: bool,
    /// Who asks; anybody, where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<Credentials>,
}

/// The body of `POST /v1/kernels`. All paths are absolute ones of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelBody {
    /// What it shall be called; its release where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<KernelName>,
    /// A Debian package, a bzImage or a vmlinux.
    pub file: PathBuf,
    /// Its modules, `.../lib/modules/<release>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<PathBuf>,
}

/// How long a guest may take to power off where nothing else is said, in milliseconds.
pub const DEFAULT_GRACE_MS: u64 = 10_000;

fn default_grace_ms() -> u64 {
    DEFAULT_GRACE_MS
}

/// The body of `POST /v1/vms/{ref}/stop`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopBody {
    /// How long the guest may take to power off before it is killed, in milliseconds.
    #[serde(default = "default_grace_ms")]
    pub grace_ms: u64,
}

impl Default for StopBody {
    fn default() -> Self {
        Self { grace_ms: DEFAULT_GRACE_MS }
    }
}

/// The body of `POST /v1/vms/{ref}/restart`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartBody {
    /// How long the guest may take to power off before it is killed, in milliseconds.
    #[serde(default = "default_grace_ms")]
    pub grace_ms: u64,
    /// The user's public identity.
    #[serde(default)]
    pub identity: Identity,
}

/// SIGKILL, signal(7).
pub const SIGKILL: i32 = 9;

fn sigkill() -> i32 {
    SIGKILL
}

/// The body of `POST /v1/vms/{ref}/kill`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KillBody {
    /// The number of the signal that the VMM gets.
    #[serde(default = "sigkill")]
    pub signal: i32,
}

impl Default for KillBody {
    fn default() -> Self {
        Self { signal: SIGKILL }
    }
}

/// The body of `PATCH /v1/vms/{ref}`. What is not named stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetBody {
    /// Virtual processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Memory in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// The work disk in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work_mib: Option<u64>,
    /// The system overlay in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_mib: Option<u64>,
    /// Whether the guest may reach the outside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nat: Option<bool>,
    /// What the guest may reach, at once; not beside `nat`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    /// All ports of the guest that the host answers for, at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish: Option<Vec<Publish>>,
    /// All groups that it is in, at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<BTreeSet<GroupName>>,
    /// What happens when nobody uses it, at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<Idle>,
}

/// The body of `POST /v1/vms/{ref}/resume`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeBody {
    /// Bring a suspended one back even if the host's memory does not hold it.
    #[serde(default)]
    pub force: bool,
}

impl SetBody {
    /// Checks that this can be made of `vm`: that it changes something, to sizes that a VM can have, and that no disk
    /// gets smaller.
    ///
    /// # Errors
    /// When it cannot.
    pub fn check(&self, vm: &VmRecord) -> Result<(), Error> {
        if *self == Self::default() {
            return Err(Error::invalid("there is nothing to change").hint(
                "name one of cpus, memory, work disk, system disk, nat, egress, publish, groups and idle",
            ));
        }
        if self.nat.is_some() && self.egress.is_some() {
            return Err(Error::invalid("`nat` and `egress` say the same thing").hint("give one of them"));
        }
        self.egress.clone().map(Egress::checked).transpose()?;
        Publish::check(self.publish.as_deref().unwrap_or_default())?;
        self.groups.as_ref().map_or(Ok(()), check_groups)?;
        self.idle.map_or(Ok(()), |idle| idle.check())?;
        let has = &vm.shape;
        let shape = Shape {
            cpus: self.cpus.unwrap_or(has.cpus),
            memory_mib: self.memory_mib.unwrap_or(has.memory_mib),
            work_mib: self.work_mib.unwrap_or(has.work_mib),
            system_mib: self.system_mib.unwrap_or(has.system_mib),
        };
        shape.check()?;
        for (disk, wanted, has) in
            [("work disk", shape.work_mib, has.work_mib), ("system disk", shape.system_mib, has.system_mib)]
        {
            if wanted < has {
                return Err(Error::invalid(format!(
                    "the {disk} of {} has {has} MiB and cannot be made smaller, to {wanted} MiB",
                    vm.name
                ))
                .hint("disks only grow; a new VM can have a smaller one"));
            }
        }
        Ok(())
    }
}

/// The HTTP status (RFC 9110) that goes with an error of `code`.
pub fn status(code: Code) -> u16 {
    match code {
        Code::InvalidArgument => 400,
        Code::PermissionDenied => 403,
        Code::NotFound => 404,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Cancelled => 409,
        Code::ResourceExhausted => 429,
        Code::Unavailable => 503,
        Code::DeadlineExceeded => 504,
        Code::StageFailed | Code::Internal | Code::Unknown => 500,
    }
}

/// `text` as one segment of a path or one value of a query: everything but the unreserved characters of RFC 3986
/// section 2.3 is percent-encoded.
pub fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_only_grow() {
        let id = "019a0000-0000-7000-8000-00000000000a".parse().unwrap();
        let image = bothy_contract::ImageName::default_image();
        let vm = VmRecord::new(id, "web".parse().unwrap(), 0, image, Shape::default());
        let set =
            |json: &str| serde_json::from_str::<SetBody>(json).unwrap().check(&vm).map_err(|e| e.message);
        assert!(set(r#"{"work_mib":20480,"cpus":1,"memory_mib":128}"#).is_ok());
        assert!(set(r#"{"work_mib":10240,"nat":true}"#).is_ok(), "the same size is no smaller one");
        assert!(set(r#"{"system_mib":10239}"#).unwrap_err().contains("system disk of web has 10240 MiB"));
        assert!(set(r#"{"work_mib":64}"#).unwrap_err().contains("work disk"));
        assert!(set(r#"{"egress":{"policy":"allow","names":["*.crates.io"]}}"#).is_ok());
        assert!(set(r#"{"egress":{"policy":"allow","names":["*"]}}"#).is_err());
        assert!(set(r#"{"egress":{"policy":"open"},"nat":true}"#).is_err());
        let port = r#"{"listen":"127.0.0.1:8080","guest_port":80}"#;
        assert!(set(&format!(r#"{{"publish":[{port}]}}"#)).is_ok());
        assert!(set(&format!(r#"{{"publish":[{port},{port}]}}"#)).unwrap_err().contains("twice"));
        assert!(set(r#"{"publish":[]}"#).is_ok(), "nothing is published any more");
        assert!(set(r#"{"cpus":65}"#).is_err() && set("{}").is_err());
        assert!(
            serde_json::from_str::<SetBody>(r#"{"memory":1}"#).is_err(),
            "a mistyped field is no success"
        );
    }

    #[test]
    fn a_create_may_say_force_or_not() {
        let plain = r#"{"image":"debian","nat":true}"#;
        let body: CreateBody = serde_json::from_str(plain).unwrap();
        assert!(body.spec.nat && !body.force);
        let body: CreateBody = serde_json::from_str(r#"{"image":"debian","force":true}"#).unwrap();
        assert!(body.force);
        let back = serde_json::to_value(&body).unwrap();
        assert!(back["image"] == "debian" && back["force"] == true);
    }

    #[test]
    fn segments_never_leave_their_place_in_a_path() {
        assert_eq!(segment("web-1"), "web-1");
        assert_eq!(segment("../x?a=b&c#d /é"), "..%2Fx%3Fa%3Db%26c%23d%20%2F%C3%A9");
    }
}
