//! What the vm-agent and the holder of a VM (`bothy-vmm`) have in common, and what tests drive directly.
//!
//! [`vmm`] hides how a VM is run: the driver that turns a plan into a command line, the holder that keeps the process,
//! and whether this host's KVM is of use. [`host`] is what all VMs share. The agent itself (records, operations, the methods on the bus) is in the binary.

pub mod host;
pub mod vmm;
