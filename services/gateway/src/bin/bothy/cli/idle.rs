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
    #[arg(long, value_name = "TIME", value_parser = age, requires = "idle")]
    after: Option<Duration>,
}

/// What is done with such a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rest {
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
    /// As for [`Rest::policy`].
    pub(crate) fn policy(self) -> Result<Option<Idle>, Error> {
        Rest::policy(self.idle, self.after)
    }
}

impl Rest {
    /// The policy that both options say together.
    ///
    /// # Errors
    /// The time is absent where one is needed, or too short.
    pub(super) fn policy(rest: Option<Self>, after: Option<Duration>) -> Result<Option<Idle>, Error> {
        let Some(rest) = rest else { return Ok(None) };
        let action = match rest {
            Rest::Pause => IdleAction::Pause,
            Rest::Suspend => IdleAction::Suspend,
            Rest::Stop => IdleAction::Stop,
            Rest::Never => IdleAction::Never,
        };
        if action != IdleAction::Never && after.is_none() {
            return Err(Error::invalid("`--idle` does not say after how long")
                .hint("give `--after` too: `--idle suspend --after 30m`"));
        }
        let idle = Idle { action, after_s: after.unwrap_or_default().as_secs() };
        idle.check()?;
        Ok(Some(idle))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_has_a_time_that_can_be_meant() {
        let minutes = |n| Some(Duration::from_mins(n));
        let policy = |rest, after| Rest::policy(rest, after);
        assert_eq!(policy(None, None).unwrap(), None);
        let never = policy(Some(Rest::Never), None).unwrap().unwrap();
        assert_eq!(never.action, IdleAction::Never);
        let idle = policy(Some(Rest::Suspend), minutes(30)).unwrap().unwrap();
        assert_eq!((idle.action, idle.after_s), (IdleAction::Suspend, 1800));
        assert!(policy(Some(Rest::Pause), None).unwrap_err().hint.unwrap().contains("--after"));
        assert!(policy(Some(Rest::Stop), Some(Duration::from_secs(1))).is_err());
    }
}
