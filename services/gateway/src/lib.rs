//! The gateway: bothy's HTTP API on a unix socket, and what the command line shares with it.
//!
//! Read [`api`] for the paths and bodies, [`refs`] for how a VM is named, and [`server`] for the API itself. The
//! command line is the binary `bothy`, in `bin/bothy`.

pub mod api;
pub mod refs;
pub mod server;
