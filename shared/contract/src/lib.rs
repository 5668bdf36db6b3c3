//! What the processes of bothy say to one another.
//!
//! This crate holds words only: identifiers, records, requests, replies, the error envelope, and the **method
//! table** ([`methods`]) that names every request of the bus with who may send it. It depends on no transport; the
//! `bothy-bus` crate moves these words over NATS, and the gateway shows the same records as JSON over HTTP.
//!
//! # Changing the contract
//! Agents are upgraded one at a time under running VMs, so a field is added with `#[serde(default)]`, never renamed
//! or given another meaning; a method is replaced by one with a new verb, and the old one goes a release later.

pub mod catalogue;
pub mod error;
pub mod guest;
pub mod id;
pub mod image;
pub mod intake;
pub mod methods;
pub mod name;
pub mod net;
pub mod net_group;
pub mod op;
pub mod subject;
pub mod usage;
pub mod vm;
pub mod workspace;

pub use error::{Code, Error};
pub use id::{OpId, RequestId, TicketId, VmId};
pub use methods::{Method, MethodInfo, Service};
pub use name::{GroupName, HostToken, ImageName, KernelName, VmName};
