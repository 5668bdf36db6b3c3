//! The bus: the words of `bothy-contract` over NATS.
//!
//! - [`Client`] calls methods and publishes and watches the events of operations. A call knows only the method's type;
//!   subject, deadline, retries, trace context and the error envelope are in here.
//! - [`Server`] answers a service's methods: concurrently up to a limit, each request in a span of the caller's trace,
//!   a repeated mutating request with the first one's reply, a panic with an error.
//! - [`permissions`] writes the configuration of nats-server from the same method table: who is not named there as a
//!   caller is refused by the server itself. [`setup`] puts it and the services' identities on disk.
//!
//! # What a request carries
//! JSON as payload, and headers: W3C `traceparent` and `tracestate`, `bothy-deadline` (absolute, Unix milliseconds; an
//! expired request is dropped, not executed) and `bothy-request-id`. A reply that is an error has the service-error
//! headers of NATS (ADR-32) and the whole [`bothy_contract::Error`] as JSON in `bothy-error`.

mod call;
mod client;
mod dedupe;
mod events;
mod link;
pub mod permissions;
mod server;
mod setup;
#[cfg(feature = "testing")]
pub mod testing;
mod wire;

pub use call::CallOptions;
pub use client::Client;
pub use dedupe::{MemoryReplies, ReplyStore, StoredReply};
pub use server::{Context, Server};
pub use setup::setup;

/// The longest time that a call may be given; the right to answer a request lasts as long on the bus.
pub const MAX_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(300);
