//! Tests of the workspace-agent: all without a VM, all with the scripts that run in one.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod edges;
mod modes;
mod modules;
mod round_trip;
mod service;
mod support;
mod sync;
