//! How much VMs use, and what their guests serve.

use crate::{VmId, image::DiskUsage};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Asks how much some VMs use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetVmStats {
    /// Which: at most 200. One that is gone is left out of the answer.
    pub vms: Vec<VmId>,
}

/// How much some VMs use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmStatsList {
    /// In the order of the question.
    pub stats: Vec<VmStats>,
}

/// How much a VM uses. What is not known (of a stopped VM, or from a guest that does not answer in time) is absent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmStats {
    /// The VM.
    pub vm: VmId,
    /// When this was read.
    pub at: Timestamp,
    /// Seconds since its VMM was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime_s: Option<u64>,
    /// Processor time that its VMM has used, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_us: Option<u64>,
    /// Processor time per wall time since the reading before, in percent of one processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<f64>,
    /// Memory of the host that its VMM holds, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Its disks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<DiskUsage>,
    /// Bytes that the guest has received since its TAP was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_bytes: Option<u64>,
    /// Bytes that the guest has sent since its TAP was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    /// What the guest says of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestStats>,
}

/// What a guest says of itself. It is the guest's word.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestStats {
    /// Seconds since its kernel started.
    pub uptime_s: u64,
    /// Its memory in bytes.
    pub memory_total: u64,
    /// How much of it a new process could have, in bytes (MemAvailable, proc_meminfo(5)).
    pub memory_available: u64,
    /// The load average of the last minute.
    pub load_1m: f64,
    /// The size of the file system of its home, in bytes.
    pub home_size: u64,
    /// How much of that is used, in bytes.
    pub home_used: u64,
    /// The size of its root's file system, in bytes.
    pub root_size: u64,
    /// How much of that is used, in bytes.
    pub root_used: u64,
}

/// The sockets on which a guest listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortList {
    /// By protocol and number.
    pub ports: Vec<GuestPort>,
}

/// A socket on which a guest listens. It is the guest's word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestPort {
    /// `tcp`, `tcp6`, `udp` or `udp6`.
    pub protocol: String,
    /// The address it listens on.
    pub address: String,
    /// The port.
    pub port: u16,
    /// The process that has it, where the guest knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
}
