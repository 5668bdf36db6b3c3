//! The net-agent: a bridge, a pool of warm TAPs, address leases, NAT and names for the VMs of one host.
//!
//! [`network::Network`] is the agent's whole job; [`service`] puts it on the bus, and [`dns`] answers guests. Below it, pure modules say what should
//! be ([`plan`], [`slots`], [`ruleset`]) and small ones make it so in the kernel ([`link`], [`tun`], [`nft`],
//! [`forwarding`]). The agent comes and goes under running VMs: it leaves the kernel's state as it is when it stops, and
//! finds it again when it starts.

pub mod devices;
pub mod dns;
pub mod firewall;
pub mod forwarding;
pub mod forwarding6;
pub mod leases;
pub mod link;
pub mod network;
pub mod nft;
pub mod plan;
pub mod publish;
pub mod resolved;
pub mod ruleset;
pub mod service;
pub mod slots;
pub mod tun;
