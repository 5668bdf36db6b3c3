//! The agent against the real kernel, in private network namespaces.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "the tests' helpers: a failed one is a failed test"
)]

mod agent;
mod guest;
mod leases;
mod packets;
mod pool;
mod world;
