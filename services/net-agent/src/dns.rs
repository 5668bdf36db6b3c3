//! What the DNS server for guests is made of: the names of VMs, and which addresses an answer may hold.
//!
//! Nothing here opens a socket yet.

pub mod filter;
pub mod zone;
