//! What one can type about what a machine reaches and who reaches it.

use bothy_contract::{
    Error, GroupName,
    net::{Egress, Publish, checked_name},
};
use clap::{Args, Subcommand, ValueEnum};

/// The network of a machine that is to be created.
#[derive(Debug, Args)]
pub(crate) struct Network {
    /// Let the machine reach the outside through the host: short for `--egress open`
    #[arg(long, conflicts_with_all = ["egress", "allow"])]
    pub(crate) nat: bool,
    /// What the machine may reach outside [default: none]
    #[arg(long, value_enum, value_name = "POLICY", conflicts_with = "allow")]
    egress: Option<Reach>,
    /// Let the machine reach these names and nothing else: crates.io, or *.crates.io for all below it
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = checked_name)]
    allow: Vec<String>,
    /// Answer on a TCP port of this host for one of the machine; on the loopback unless said
    #[arg(long, value_name = "[ADDR:]HOSTPORT:GUESTPORT")]
    pub(crate) publish: Vec<Publish>,
    /// Join a group: your machines that share one reach each other
    #[arg(long = "group", value_name = "NAME")]
    pub(crate) groups: Vec<GroupName>,
}

impl Network {
    /// The policy, where one was given in words other than `--nat`.
    ///
    /// # Errors
    /// When there are too many names.
    pub(crate) fn egress(&self) -> Result<Option<Egress>, Error> {
        if self.allow.is_empty() {
            return Ok(self.egress.map(Egress::from));
        }
        Egress::Allow { names: self.allow.clone() }.checked().map(Some)
    }
}

/// A policy without names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Reach {
    /// Nothing
    None,
    /// Everything that the host reaches, but for link-local and metadata addresses
    Open,
}

impl From<Reach> for Egress {
    fn from(reach: Reach) -> Self {
        match reach {
            Reach::None => Self::None,
            Reach::Open => Self::Open,
        }
    }
}

/// What `bothy vm egress` makes of a machine's policy.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Policy {
    /// Let it reach nothing
    None,
    /// Let it reach everything that the host reaches, but for link-local and metadata addresses
    Open,
    /// Let it reach these names too
    Allow {
        /// crates.io, or *.crates.io for all below it
        #[arg(required = true, value_name = "NAME", value_delimiter = ',', value_parser = checked_name)]
        names: Vec<String>,
        /// Only these: names that were allowed before are not any more
        #[arg(long)]
        only: bool,
    },
}

impl Policy {
    /// What it makes of `now`.
    ///
    /// # Errors
    /// When there are too many names.
    pub(crate) fn of(&self, now: &Egress) -> Result<Egress, Error> {
        match self {
            Self::None => Ok(Egress::None),
            Self::Open => Ok(Egress::Open),
            Self::Allow { names, only } => {
                let mut names = names.clone();
                match now {
                    Egress::Allow { names: before } if !only => names.extend_from_slice(before),
                    _ => {}
                }
                Egress::Allow { names }.checked()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_added_or_take_the_place_of_others() {
        let allow = |names: &[&str]| Egress::Allow { names: names.iter().map(|&n| n.to_owned()).collect() };
        let policy = |only| Policy::Allow { names: vec!["b.c".to_owned()], only };
        assert_eq!(policy(false).of(&allow(&["z.z", "b.c"])).unwrap(), allow(&["b.c", "z.z"]));
        assert_eq!(policy(true).of(&allow(&["z.z"])).unwrap(), allow(&["b.c"]));
        for before in [Egress::None, Egress::Open] {
            assert_eq!(policy(false).of(&before).unwrap(), allow(&["b.c"]));
        }
    }
}
