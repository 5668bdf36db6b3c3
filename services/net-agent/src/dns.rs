//! The name server for guests, on the bridge: names of VMs from the zone, all others from the host's own resolvers, as far
//! as the asking guest's policy says.
//!
//! ```text
//!   server (sockets, who asks) -> bounds -> answer -> zone
//!                                             |  '--> network: policy, addresses into the guest's set, denials
//!                                             '-----> upstream (cache, resolv) -> filter
//! ```
//! A guest is known by its source address: the bridge lets no other one of it pass. An answer under `allow` goes out only
//! once the kernel lets the guest reach the addresses in it.

pub mod answer;
pub mod bounds;
pub mod cache;
pub mod filter;
pub mod resolv;
pub mod server;
pub mod upstream;
pub mod zone;
