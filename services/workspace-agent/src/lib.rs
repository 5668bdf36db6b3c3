//! The workspace-agent: repositories into guests, changes out of them, identity.
//!
//! It keeps nothing: a pack flows from the CLI's stream through this process into the guest, a patch flows back, and
//! neither is ever held here or on the host's disk. All work on a repository is done **in the guest**, by a few fixed
//! shell scripts (`src/scripts`) that run `git` there, so that no host process ever reads what a guest wrote.
//!
//! - [`service`]: the methods on the bus and the streams behind their tickets
//! - [`guest`]: what is asked of a guest, and the real one over its channel
//! - [`import`], [`export`], [`identity`]: the three jobs, over any [`guest::Guest`]
//! - [`queue`]: one job per VM at a time

pub mod export;
pub mod guest;
pub mod identity;
pub mod import;
pub mod path;
pub mod queue;
pub mod script;
pub mod service;
