//! Layers into file systems, looked at with e2fsprogs and, where this may be done, through the kernel's own eyes.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "the tests' helpers: a failed one is a failed test"
)]

mod hostile;
mod model;
mod semantics;
mod support;
