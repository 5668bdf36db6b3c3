//! The agent against the real kernel, in private network namespaces.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "the tests' helpers: a failed one is a failed test"
)]

mod agent;
mod dns;
mod dns_hostile;
mod egress;
mod groups;
mod guest;
mod host_names;
mod leases;
mod machine;
mod packets;
mod pool;
mod ports;
mod resolver;
mod world;
