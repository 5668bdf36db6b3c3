//! The words of the HTTP API, version 1: paths, headers, and the bodies that are not already records of the contract.
//!
//! Errors are [`bothy_contract::Error`] as JSON with the status of [`status`]. All bodies are JSON, but for streams:
//! logs are raw bytes, operation events are server-sent events, a workspace goes in as a pack and comes out as a
//! patch, and a channel is an upgraded connection.

use bothy_config::Config;
use bothy_contract::{
    Code, Error, Service, image::ImageManifest, net::NetHost, vm::VmHost, workspace::Identity,
};
use serde::{Deserialize, Serialize};
use std::{fmt::Write as _, path::PathBuf};

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

/// The body of `POST /v1/vms/{ref}/start`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartBody {
    /// The user's public identity.
    #[serde(default)]
    pub identity: Identity,
}

/// The body of `POST /v1/vms/{ref}/stop`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopBody {
    /// How long the guest may take to power off before it is killed, in milliseconds.
    #[serde(default = "default_grace_ms")]
    pub grace_ms: u64,
}

fn default_grace_ms() -> u64 {
    20_000
}

impl Default for StopBody {
    fn default() -> Self {
        Self { grace_ms: default_grace_ms() }
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
    fn segments_never_leave_their_place_in_a_path() {
        assert_eq!(segment("web-1"), "web-1");
        assert_eq!(segment("../x?a=b&c#d /é"), "..%2Fx%3Fa%3Db%26c%23d%20%2F%C3%A9");
    }
}
