//! What one can say of a machine that nobody uses.

use super::values::age;
use bothy_contract::{
    Error,
    vm::{Idle, IdleAction},
};
use clap::{Args, ValueEnum};
use std::time::Duration;

/// What happens to a machine that nobody uses.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct IdlePolicy {
    /// What to do with it when nobody uses it: no exec, no ssh, no traffic. A paused or suspended one goes on with its next use
    #[arg(long, value_name = "WHAT")]
    idle: Option<Rest>,
    /// After how long: 10m, 2h, 1d
    #[arg(long, value_name = "TIME", value_parser = age, requires = "idle", required_if_eq_any = [
        ("idle", "pause"), ("idle", "suspend"), ("idle", "stop"),
    ])]
    after: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Rest {
    /// Its guest stands still, its memory stays in use
    Pause,
    /// Its memory goes to disk
    Suspend,
    /// It is powered off
    Stop,
    /// Nothing, whatever the host would do
    Never,
}

impl IdlePolicy {
    /// What was said, if anything was.
    ///
    /// # Errors
    /// The time is too short.
    pub(crate) fn policy(self) -> Result<Option<Idle>, Error> {
        let Some(rest) = self.idle else { return Ok(None) };
        let action = match rest {
            Rest::Pause => IdleAction::Pause,
            Rest::Suspend => IdleAction::Suspend,
            Rest::Stop => IdleAction::Stop,
            Rest::Never => IdleAction::Never,
        };
        let idle = Idle { action, after_s: self.after.unwrap_or_default().as_secs() };
        idle.check()?;
        Ok(Some(idle))
    }
}
