//! Private hosts of bothy for tests, demos and benches: real binaries, a real bus, real guests, in a network namespace
//! and directories of their own.
//!
//! - [`host`]: one such host, from `bothy host up` to its end, and commands run on it.
//! - [`images`]: the default image, built once by bothy itself and shared by all hosts of a checkout.
//! - [`leak`]: what a host left behind.
//! - [`matrix`]: faults in every stage of every operation; [`brake`] holds a host still for them, [`journal`] and
//!   [`gateway`] show and begin operations while parts of it stand.
//! - [`otlp`]: a receiver of spans.
//! - [`repo`]: git repositories to run on.
//! - [`by_hand`]: the same VM without bothy, to measure against.
#![expect(clippy::expect_used, clippy::panic, reason = "test support: a failed set-up is a failed test")]
#![expect(clippy::indexing_slicing, reason = "test support: a record without its field is a failed test")]

pub mod brake;
pub mod by_hand;
pub mod gateway;
pub mod host;
pub mod images;
pub mod journal;
pub mod leak;
pub mod matrix;
pub mod oci;
pub mod otlp;
pub mod ran;
pub mod repo;
pub mod resumed;
