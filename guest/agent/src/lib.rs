//! `bothy-guest`: one static binary that is `/init` of the initramfs and then the agent of the guest.
//!
//! ```text
//! kernel -> PID 1 (boot): modules, mounts --spawns--> agent: channel, Health, Personalise, Exec, ...
//!                |  waits on the link (boot::link)  <--- "systemd" | "stay" | "poweroff"
//!                '-> switches root; becomes /sbin/init, or stays PID 1 (boot::reaper)
//! ```
//!
//! The agent lives in the new root from its first line on (`chroot` before PID 1 moves that mount to `/`), so that
//! everything it does looks the same before and after the switch. Nothing here listens on a network: all requests
//! come through the channel, from the host.

pub mod agent;
pub mod boot;
pub mod kmsg;
pub mod sys;
pub mod timeline;

mod exec;
mod files;
mod forward;
mod freezer;
mod identity;
mod machine;
mod metrics;
mod neighbours;
mod nic;
mod personalise;
mod port;
mod ports;
mod pty;
mod rank;
mod service;
mod shutdown;
mod systemd;
mod tarball;
mod units;
mod users;
mod vsock;
mod wait;
mod workdisk;

pub use service::{Guest, Init};
