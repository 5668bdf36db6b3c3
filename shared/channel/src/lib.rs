//! Streams to numbered guest ports over one virtio-serial port.
//!
//! A virtio-serial port is a byte pipe without connections: either end can vanish and come back unseen, bytes towards
//! the guest survive that (stale ones arrive in front of the new), bytes towards the host do not. Three layers make
//! streams of it, from the wire upwards:
//!
//! 1. [`frame`](self): magic, session id, sequence number, length and CRC-32, so that a reader finds the next whole
//!    frame behind any garbage.
//! 2. session: the host says HELLO with a fresh random id, the guest ACKs it, and only frames of that session count. A
//!    guest that starts, or that finds a hole in the sequence, says READY and is greeted again with a new id.
//! 3. mux: inside a session, yamux gives flow-controlled streams. Only the host opens them; the first four bytes of
//!    each are the port number, big-endian.
//!
//! ```text
//!   guest                         host
//!     | READY ---------------------> |   the guest has no session (only where it starts after the host, or lost one)
//!     | <--------------- HELLO(s) ---|   new random s; every stream of an older session ends with ConnectionReset
//!     | ACK(s) --------------------> |   session s is up
//!     | <========= DATA(s, n) =====> |   yamux frames; n counts up from 0 in each direction
//! ```
//! READY, HELLO and ACK are followed by one maximal frame of zeros: a reader stuck in a torn frame then has enough bytes
//! to find its CRC wrong and to look again.
//!
//! Neither end trusts the other's sizes: frames are at most [`MAX_FRAME`] bytes, the bytes queued for a session and the
//! number of streams are limited, and whoever goes beyond loses the session, not the host's memory.

mod frame;
pub mod guest;
pub mod host;
mod link;
mod mux;
mod session;
mod stream;

pub use frame::MAX_FRAME;
pub use mux::MAX_STREAMS;
pub use stream::Stream;
