//! The real binary on a real bus.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a failed test is meant to stop, with the line"
)]

mod bus;
mod host;
mod keeping;
mod pruning;
mod pulling;
mod registry;
