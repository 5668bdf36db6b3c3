//! The network as other processes see it: leases, NAT, and how the pool stands.

use crate::VmId;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// A VM's place on the network. It is the VM's from create to delete, stopped or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The pool slot; TAP, address, MAC and the VMM's user all follow from it.
    pub slot: u32,
    /// The TAP device, made for user `uid` and attached to the bridge.
    pub tap: String,
    /// The user (and group) id that the VMM of this slot runs as.
    pub uid: u32,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The prefix length of the subnet.
    pub prefix: u8,
    /// The bridge's address: the guest's default route.
    pub gateway: Ipv4Addr,
    /// The guest's MAC address, `52:54:00:xx:xx:xx`.
    pub mac: String,
    /// Name servers for the guest.
    pub dns: Vec<Ipv4Addr>,
}

/// Takes a slot for a VM. A VM that has one gets the same one again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcquireLease {
    /// The VM.
    pub vm: VmId,
    /// Whether its traffic may leave through the host.
    pub nat: bool,
}

/// Gives a VM's slot back. A VM that has none is not an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseLease {
    /// The VM.
    pub vm: VmId,
}

/// Turns NAT for a VM on or off, at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetNat {
    /// The VM.
    pub vm: VmId,
    /// On or off.
    pub enabled: bool,
}

/// Asks for all leases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListLeases {}

/// One row of the lease table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRow {
    /// The VM.
    pub vm: VmId,
    /// Its place.
    pub lease: Lease,
    /// Whether NAT is on.
    pub nat: bool,
}

/// All leases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseList {
    /// In the order of their slots.
    pub leases: Vec<LeaseRow>,
}

/// Asks how the network stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetNetHost {}

/// How the network stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetHost {
    /// The bridge device.
    pub bridge: String,
    /// The subnet, `10.77.0.0/24`.
    pub subnet: String,
    /// Slots made and free.
    pub warm: u32,
    /// Slots that VMs hold.
    pub leased: u32,
    /// Slots that the subnet has room for.
    pub capacity: u32,
}

/// Removes the bridge, the TAPs and the rules from the kernel, for `host down`. Leases are kept; the next start makes
/// their devices again. Refused while the device of a lease is in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TeardownNet {}

/// The empty reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}
