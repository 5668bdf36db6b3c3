//! The host that VMs share: whether its memory holds one more ([`memory`]), the bounds of each ([`cgroup`]), and how much
//! each uses ([`usage`]).

pub mod cgroup;
pub mod memory;
pub mod usage;

/// A `MiB` in bytes.
const MIB: u64 = 1 << 20;
